"""Recall of decontamination by embedding and by n-grams on planted paraphrases of examples.

    python benchmarks/debian_corpus.py --cache CACHE
    python benchmarks/bench_decontaminate_meaning.py --cache CACHE --model MODEL_FOLDER

The model is a sentence-transformers folder (see `bench_semantic.py`). Examples are paragraphs of
the corpus; their paraphrases by rule (`paraphrases.py`: light, medium, heavy) are each planted
between two sentences of a document that gave no example. `verbatim` plants the
example itself, `independent` another author's text on the same thing.

Clean documents are those that hold no paragraph of the pairs and no 13-gram of any example, so the
13-grams have no false positive by construction; real copies do not count against the embeddings. A
half of them sets the thresholds at 1 % false positives, the other half tells what share is really
hit. A planted paraphrase is found when its document is hit by its own example. The encoder sees
the first `--encoder-docs` of each kind only, and as many clean documents, for time. Rates are per
second of CPU time.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
from bench_semantic import fitting_texts
from paraphrases import Pairs, make_pairs, unpack_wordnet
from rich.console import Console
from rich.table import Table

from puna.data.decontaminate.examples import Example
from puna.data.decontaminate.grouping import group_hits
from puna.data.decontaminate.index import NgramRule, build_index, hash_index, load_index
from puna.data.decontaminate.kernels import find_examples as find_ngrams
from puna.data.decontaminate.targets import (
    CUT,
    Found,
    Targets,
    best_cosines,
    build_targets,
    calibrate,
    find_examples,
    hash_targets,
    load_targets,
    save_thresholds,
)
from puna.data.decontaminate.windows import sentences
from puna.data.kernels.buffers import texts_from
from puna.data.semantic.distil import DistilConfig, distil
from puna.data.semantic.embedder import Embedder, load_embedder

FALSE_POSITIVES = 0.01
MIN_CHARS, MAX_CHARS = 1500, 8000
"""Of the documents in which paraphrases are planted."""


def carriers(corpus: Path, pairs: Pairs, seed: int) -> list[str]:
    """Shuffle the documents that gave no text to the pairs, in English by their source's name."""
    foreign = ("-de", "-fr", "-ja", "-it", "-ru", "man_", "_ja", "-zh")
    found = []
    columns = ["path", "text", "source"]
    for batch in pads.dataset(corpus / "documents").to_batches(columns=columns):
        for row in batch.to_pylist():
            inside = {row["path"], row["path"].rpartition("#")[0]} & pairs.documents
            inside |= {mark for mark in foreign if mark in row["source"]}
            if not inside and MIN_CHARS <= len(row["text"]) <= MAX_CHARS:
                found.append(row["text"])
    return random.Random(seed).sample(found, len(found))


def planted(carrier: str, text: str, rng: random.Random) -> str:
    """Put a text between two sentences of a document."""
    at = int(rng.choice(sentences(carrier)[1:, 0].tolist() or [0]))
    return f"{carrier[:at]}{text} {carrier[at:]}"


def ngram_hits(
    texts: list[str], examples: list[Example], ngram: int, folder: Path
) -> list[set[int]]:
    """Return the examples that n-grams find in each text."""
    folder.mkdir()
    build_index(examples, NgramRule(ngram, min(ngram, 8), 10, 4), folder)
    index = load_index(folder, hash_index(folder)).index
    found: list[set[int]] = [set() for _ in texts]
    rows = find_ngrams(texts_from(texts), index)
    pairs = group_hits(rows, index)
    for document, example in zip(pairs.document.tolist(), pairs.example.tolist(), strict=True):
        found[document].add(example)
    return found


def own_found(embedder: Embedder, targets: Targets, texts: list[str], own: np.ndarray) -> float:
    """Return the share of texts that are hit by their own example."""
    found = find_examples(embedder, targets, texts)
    right = found.document[found.example == own[found.document]]
    return len(np.unique(right)) / len(texts)


def one_cosine(embedder: Embedder, targets: Targets, texts: list[str]) -> np.ndarray:
    """Return one threshold for all targets, at the wanted share of false positives."""
    best = np.concatenate([part.max(1) for part in best_cosines(embedder, targets, texts)])
    limit = np.quantile(best, 1 - FALSE_POSITIVES, method="higher") + 1e-6
    return np.full(len(targets.vectors), float(limit))


def timed(work: Callable[[], Found]) -> tuple[Found, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--wordnet", type=Path, help="Folder for WordNet; by default the cache.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--static", type=Path, help="A static embedder; by default a new one.")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--clean", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--encoder-docs", type=int, default=0, help="0: no encoder.")
    args = parser.parse_args()
    console, corpus = Console(width=120), args.cache / "corpus"
    pairs = make_pairs(corpus, unpack_wordnet(args.wordnet or args.cache))
    rng = random.Random(args.seed)
    kinds = {kind: rng.sample(rows.tolist(), min(args.examples, len(rows)))
             for kind, rows in pairs.positive.items()}  # fmt: skip
    originals = sorted({row[0] for rows in kinds.values() for row in rows})
    number = {text: k for k, text in enumerate(originals)}
    examples = [Example("planted", k, "", (pairs.texts[text],)) for text, k in number.items()]
    texts = {kind: [pairs.texts[b] for _, b in rows] for kind, rows in kinds.items()}
    own = {kind: np.array([number[a] for a, _ in rows]) for kind, rows in kinds.items()}
    first = next(kind for kind in kinds if kind != "independent")
    texts["verbatim"] = [pairs.texts[a] for a, _ in kinds[first]]
    own["verbatim"] = own[first]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        static = args.static or work / "static"
        if not static.is_dir():
            distil(args.model, static, DistilConfig(), fitting_texts(corpus, pairs.documents))
        pool = carriers(corpus, pairs, args.seed)
        hits = ngram_hits(pool, examples, 13, work / "leaks")
        pool = [text for text, found in zip(pool, hits, strict=True) if not found]
        rest, clean = pool[: args.examples], pool[args.examples :][: args.clean]
        documents = {
            kind: [planted(*both, rng) for both in zip(rest, found, strict=False)]
            for kind, found in texts.items()
        }
        console.print(f"{len(examples):,} examples, {len(clean):,} clean documents, planted: "
                      f"{ {kind: len(found) for kind, found in documents.items()} }")  # fmt: skip
        table = Table(title="Planted examples found", title_justify="left")
        for column in ("method", "threshold", "clean hit", *documents, "MB/s"):
            table.add_column(column, justify="right")
        for ngram in (13, 8):
            found = {kind: ngram_hits(some, examples, ngram, work / f"{ngram}{kind}")
                     for kind, some in {**documents, "clean": clean}.items()}  # fmt: skip
            shares = [np.mean([int(own[kind][k]) in one for k, one in enumerate(found[kind])])
                      for kind in documents]  # fmt: skip
            clean_hit = np.mean([bool(one) for one in found["clean"]])
            table.add_row(f"{ngram}-grams", "-", f"{clean_hit:.1%}",
                          *(f"{share:.1%}" for share in shares), "-")  # fmt: skip
        methods = {"static": (static, len(clean))}
        if args.encoder_docs:
            methods["static, as many as the encoder"] = (static, args.encoder_docs)
            methods["encoder"] = (args.model, args.encoder_docs)
        for method, (folder, n) in methods.items():
            embedder = load_embedder(folder, CUT, "cpu", n_threads=1)
            target = work / method
            target.mkdir()
            build_targets(embedder, examples, 8, target)
            targets = load_targets(target, hash_targets(target))
            given, late = clean[:n][::2], clean[:n][1::2]
            find_examples(embedder, targets, late[:2])
            for kind_of_threshold, thresholds in (
                ("one cosine", one_cosine(embedder, targets, given)),
                ("per example", calibrate(embedder, targets, given, FALSE_POSITIVES).thresholds()),
            ):
                save_thresholds(target, thresholds)
                targets = load_targets(target, hash_targets(target))
                found, seconds = timed(lambda e=embedder, t=targets, x=late: find_examples(e, t, x))
                shares = [own_found(embedder, targets, some[:n], own[kind])
                          for kind, some in documents.items()]  # fmt: skip
                n_bytes = sum(len(text.encode()) for text in late)
                table.add_row(f"{method}, {kind_of_threshold}", f"{np.median(thresholds):.3f}",
                              f"{len(np.unique(found.document)) / len(late):.1%}",
                              *(f"{share:.1%}" for share in shares),
                              f"{n_bytes / 1e6 / seconds:.2f}")  # fmt: skip
            console.print(f"{method}: done")
        console.print(table)


if __name__ == "__main__":
    main()

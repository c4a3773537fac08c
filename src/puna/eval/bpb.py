"""Stage ``eval.bpb``: bits per byte of held-out text, before and after training.

Bits per byte = negative log2-likelihood of all tokens of a document after the first (its text and
the end-of-text token) / UTF-8 bytes of its text. It is comparable between tokenizers. Documents
longer than ``seq_len`` are cut to windows by the rule of :mod:`puna.tokens.windows`. For answers of
conversations: the assistants' tokens with their ``<|eot_id|>`` / UTF-8 bytes of their texts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from puna.core.artifact import Artifact
from puna.core.config import Config, Execution, Seed
from puna.core.errors import PunaError
from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.core.progress import progress
from puna.core.stage import Artifacts, Metrics, stage
from puna.lm.load import MODEL_DIR, load
from puna.model.device import Device, pick_device
from puna.model.formats.hf_config import read_hf_config
from puna.post.batches import encode_pairs
from puna.post.pairs import PAIRS_FILE, read_pairs
from puna.tokens.heldout import TextSet, document_sets
from puna.tokens.shards import TokenShards
from puna.tokens.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from puna.eval.likelihood import Likelihood
    from puna.model.llama import Llama

RESULT_FILE = "bpb.json"
ANSWERS = "answers"
TOTAL = "all documents"


class BpbConfig(Config):
    """Bits per byte of held-out documents and answers."""

    max_tokens_per_source: int = Field(default=100_000, ge=2)
    """Documents of a source are taken in an order given by a hash, whole, as long as they fit into
    this many tokens; the same limit holds for the answers."""
    seq_len: int | None = Field(default=None, ge=2)
    """Context in tokens; that of the training when absent."""
    overlap: float = Field(default=0.25, ge=0, lt=1)
    """Long documents: share of a window that repeats earlier tokens as context, unscored."""
    rows_per_batch: int = Field(default=8, ge=1)
    """Rows of a forward pass."""
    untrained: bool = True
    """Also measure the model as it was before its first step."""
    device: Execution[Device] = "auto"
    """Where to run."""
    seed: Seed = 0
    """Chooses the documents."""


@stage(
    "eval.bpb",
    needs={
        "tokens": "tokens.encode|tokens.import",
        "tokenizer": "tokens.train|tokens.use|tokens.import",
        "model": "train.pretrain",
        "tuned?": "post.sft",
        "pairs?": "post.annotated|post.pairs",
    },
)
def bits_per_byte(cfg: BpbConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Measure bits per byte on held-out documents, before and after training and tuning.

    Writes ``bpb.json``: one row per source, one over all documents, one of the held-out answers.

    Raises:
        PunaError: There is no held-out document, or ``seq_len`` is beyond the model's context.
    """
    start_s = time.monotonic()
    tokenizer = load_tokenizer(inputs["tokenizer"].path)
    seq_len = _seq_len(cfg, inputs["model"])
    shards = TokenShards(inputs["tokens"].path)
    limits = (cfg.overlap, cfg.max_tokens_per_source, cfg.seed)
    sets = list(document_sets(shards, seq_len, *limits))
    if not sets:
        raise PunaError(
            f"{inputs['tokens'].path} holds no held-out document that can be measured",
            "raise the held-out share of [data.split], or max_tokens_per_source of [eval.bpb]",
        )
    if "pairs" in inputs:
        sets += _answer_set(cfg, inputs["pairs"], tokenizer, seq_len)
    found: dict[str, dict[str, Likelihood]] = {}
    n_models = 1 + cfg.untrained + ("tuned" in inputs)
    n_tokens = sum(one.n_tokens for one in sets)
    with progress("eval.bpb", total=n_models * n_tokens, unit="tokens") as bar:
        from puna.eval.likelihood import measure

        for name, model in _models(cfg, inputs):
            found[name] = {}
            for one in sets:
                pad_id, on_batch = tokenizer.pad_id, bar.advance
                found[name][one.name] = measure(
                    model, one.pieces, seq_len, cfg.rows_per_batch, pad_id, on_batch
                )
    rows = _rows(sets, found)
    total = next(row for row in rows if row["is_total"])
    result = {
        "models": list(found), "rows": rows, "total": total, "seq_len": seq_len,
        "overlap": cfg.overlap,
    }  # fmt: skip
    write_json(out / RESULT_FILE, result)
    seconds = time.monotonic() - start_s
    per_byte = " -> ".join(f"{total['bits_per_byte'][name]:.3f} {name}" for name in found)
    return {
        "seconds": seconds,
        "tokens_per_s": n_models * n_tokens / max(seconds, 1e-9),
        **result,
        "headline": f"bits per byte {per_byte}",
    }


def _seq_len(cfg: BpbConfig, model: Artifact) -> int:
    limit = read_hf_config(model.file(MODEL_DIR)).max_seq_len
    if cfg.seq_len is None:
        return min(int(model.config.get("seq_len", limit)), limit)
    if cfg.seq_len > limit:
        raise PunaError(
            f"seq_len = {cfg.seq_len} of [eval.bpb] is beyond the model's context of {limit}",
            f"set it to at most {limit}, or leave it out",
        )
    return cfg.seq_len


def _answer_set(
    cfg: BpbConfig, pairs: Artifact, tokenizer: Tokenizer, seq_len: int
) -> Iterator[TextSet]:
    heldout = read_pairs(pairs.file(PAIRS_FILE), "heldout")
    conversations, _ = encode_pairs(heldout, tokenizer, seq_len)
    said = {pair["id"]: _said_bytes(pair["messages"]) for pair in heldout}
    pieces, n_tokens, n_bytes, left = [], 0, 0, cfg.max_tokens_per_source
    for index in range(len(conversations)):
        piece = conversations.piece(index)
        if len(piece.inputs) > left:
            break
        left -= len(piece.inputs)
        pieces.append(piece)
        n_bytes += said[str(conversations.pair_ids[index])]
        n_tokens += int((piece.labels >= 0).sum())
    if n_bytes:
        left_out = len(heldout) - len(pieces)
        yield TextSet(ANSWERS, pieces, len(pieces), n_tokens, n_bytes, left_out)


def _said_bytes(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(
        len(turn["content"].strip().encode()) for turn in messages if turn["role"] == "assistant"
    )


def _models(cfg: BpbConfig, inputs: Artifacts) -> Iterator[tuple[str, Llama]]:
    """Yield the models one after the other; only one is in memory at a time."""
    pretrained = inputs["model"]
    folder = pretrained.file(MODEL_DIR)
    if cfg.untrained:
        from puna.eval.likelihood import untrained

        seed = int(pretrained.config.get("seed", 0))
        yield "untrained", untrained(read_hf_config(folder), seed, pick_device(cfg.device))
    yield "pretrained", load(folder, device=cfg.device).model
    if "tuned" in inputs:
        yield "fine-tuned", load(inputs["tuned"].file(MODEL_DIR), device=cfg.device).model


def _rows(
    sets: Sequence[TextSet], found: Mapping[str, Mapping[str, Likelihood]]
) -> list[dict[str, Any]]:
    documents = [one for one in sets if one.name != ANSWERS]
    rows = [_row(one.name, [one], found) for one in documents]
    rows.append({**_row(TOTAL, documents, found), "is_total": True})
    rows += [_row(one.name, [one], found) for one in sets if one.name == ANSWERS]
    return rows


def _row(
    name: str, sets: Sequence[TextSet], found: Mapping[str, Mapping[str, Likelihood]]
) -> dict[str, Any]:
    n_bytes = sum(one.n_bytes for one in sets)
    n_tokens = sum(one.n_tokens for one in sets)
    bits = {model: sum(by[one.name].bits for one in sets) for model, by in found.items()}
    return {
        "source": name,
        "is_total": False,
        "n_docs": sum(one.n_docs for one in sets),
        "n_left_out": sum(one.n_left_out for one in sets),
        "n_tokens": n_tokens,
        "n_bytes": n_bytes,
        "bits_per_byte": {model: value / n_bytes for model, value in bits.items()},
        "nats_per_token": {model: value * math.log(2) / n_tokens for model, value in bits.items()},
    }

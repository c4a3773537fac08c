"""Fabricates the folder of a finished run: real artifacts, real token shards, a made-up ledger."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from puna.core.artifact import Artifact, write_record
from puna.core.fsio import hash_json
from puna.model.accounting import account
from puna.model.config import ModelConfig
from puna.train.config import PretrainConfig

SOURCES = ("code", "docs", "reference")
EVIL = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>"
TEMPLATE = {
    "code": {"in": 4200, "bytes": 52_000_000, "drop": (0.02, 0.31, 0.22, 0.3)},
    "docs": {"in": 1900, "bytes": 21_000_000, "drop": (0.05, 0.42, 0.35, 0.0)},
    "reference": {"in": 900, "bytes": 4_000_000, "drop": (0.0, 0.08, 0.02, 0.0)},
}
REASONS = (
    {"quarantine.encoding": 3, "quarantine.gzip": 1},
    {"too_short": 8, "language.not_english": 5, "repetition.lines": 4, "code.generated": 3,
     "licence.only": 2, "symbols.share": 1, "lines.too_long": 1, "numbers.share": 1,
     "bullet.share": 0.5, "stop_words.few": 0.4},
    {"duplicate.exact": 2, "duplicate.near": 3},
    {"budget": 1},
)  # fmt: skip
DATA_STAGES = ("data.ingest", "data.filter", "data.dedup", "data.split")


class FakeRun:
    """Writes stages one after the other, with a clock of its own."""

    def __init__(self, folder: Path, now_s: float = 1_780_000_000.0) -> None:
        self.folder, self.now_s = folder, now_s
        self.artifacts: dict[str, Artifact] = {}
        folder.mkdir(parents=True)
        self.ledger = folder / "events.jsonl"

    def emit(self, kind: str, after_s: float = 0.0, **fields: Any) -> None:
        self.now_s += after_s
        event = {"kind": kind, "t_wall_s": self.now_s, "t_mono_s": self.now_s - 1e9, "pid": 1}
        with self.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**event, **fields}) + "\n")

    def begin(self, stage: str, resumed: bool = False) -> Path:
        self.emit("stage.start", 0.4, stage=stage, resumed=resumed)
        self._started_s = self.now_s
        out = self.folder / stage
        out.mkdir(exist_ok=True)
        return out

    def end(
        self, key: str, stage: str, config: dict[str, Any], metrics: dict[str, Any],
        inputs: tuple[str, ...] = (), after_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.now_s += after_s
        upstream = {
            name: {
                "stage": self.artifacts[name].stage,
                "fingerprint": self.artifacts[name].fingerprint,
                "content_hash": self.artifacts[name].content_hash,
            }
            for name in inputs
        }
        write_record(
            self.folder / stage,
            {
                "stage": stage, "schema_version": 1, "config": config, "identity": config,
                "inputs": upstream, "fingerprint": hash_json([stage, config, upstream]),
                "seed": config.get("seed"), "started_at": self._started_s, "ended_at": self.now_s,
                "seconds": self.now_s - self._started_s, "resumed": False, "status": "done",
                "metrics": metrics,
            },
        )  # fmt: skip
        self.emit("stage.done", stage=stage, seconds=self.now_s - self._started_s)
        self.artifacts[key] = Artifact(self.folder / stage)


def data_stages(run: FakeRun) -> None:
    """Ingest, filter, dedup and split with made-up but consistent counts."""
    state = {source: (row["in"], row["bytes"]) for source, row in TEMPLATE.items()}
    before: tuple[str, ...] = ()
    for index, stage in enumerate(DATA_STAGES):
        flow = {}
        for source, (docs, n_bytes) in state.items():
            n_dropped = round(docs * TEMPLATE[source]["drop"][index])
            weights = REASONS[index]
            total = sum(weights.values())
            rejected, left = {}, n_dropped
            for position, (reason, weight) in enumerate(weights.items()):
                last = position == len(weights) - 1
                n = left if last else min(left, round(n_dropped * weight / total))
                left -= n
                if n:
                    rejected[reason] = {"docs": n, "bytes": round(n_bytes * n / docs * 0.8)}
            lost = sum(one["bytes"] for one in rejected.values())
            kept_bytes = n_bytes - lost - (n_bytes // 9 if index == 0 else 0)
            flow[source] = {
                "in_docs": docs, "in_bytes": n_bytes, "kept_docs": docs - n_dropped,
                "kept_bytes": kept_bytes, "rejected": rejected,
            }  # fmt: skip
            state[source] = (docs - n_dropped, kept_bytes)
        seconds = (21.0, 14.5, 9.0, 2.1)[index]
        in_docs = sum(row["in_docs"] for row in flow.values())
        in_bytes = sum(row["in_bytes"] for row in flow.values())
        run.begin(stage)
        metrics = {
            "flow": flow, "seconds": seconds, "docs_per_s": in_docs / seconds,
            "mb_per_s": in_bytes / 1e6 / seconds,
        }  # fmt: skip
        key = stage.rpartition(".")[2]
        run.end(key, stage, {"workers": 0, "strict": False, "label": EVIL}, metrics, before,
                after_s=seconds)  # fmt: skip
        before = (key,)


def token_stages(run: FakeRun, n_tokens: dict[str, int]) -> None:
    """A tokenizer and real token shards."""
    upstream = ("split",) if "split" in run.artifacts else ()
    out = run.begin("tokens.train")
    (out / "tokenizer.json").write_text("{}")
    metrics = {"vocab_size": 4096, "headline": "4,096 tokens, 3.9 bytes each"}
    run.end("tokenizer", "tokens.train", {"vocab_size": 4096}, metrics, upstream, after_s=6.5)
    out = run.begin("tokens.encode")
    rng = np.random.default_rng(0)
    splits: dict[str, Any] = {"train": {}, "heldout": {}}
    for split, share in (("train", 0.95), ("heldout", 0.05)):
        for source, total in n_tokens.items():
            n = int(total * share)
            n_docs = max(n // 900, 1)
            folder = out / split / source
            folder.mkdir(parents=True)
            cuts = np.linspace(0, n, n_docs + 1).astype(np.int64)
            rng.integers(256, 4096, n).astype(np.uint16).tofile(folder / "tokens.bin")
            np.save(folder / "offsets.npy", cuts)
            ids = [f"{hash_json([source, split, i])}".encode() for i in range(n_docs)]
            np.save(folder / "ids.npy", np.array(sorted(ids), "S32"))
            np.save(folder / "n_bytes.npy", np.diff(cuts) * 4)
            splits[split][source] = {"n_docs": n_docs, "n_tokens": n, "n_bytes": n * 4}
    index = {"dtype": "uint16", "vocab_size": 4096, "splits": splits}
    (out / "index.json").write_text(json.dumps(index))
    total = sum(n_tokens.values())
    metrics = {"seconds": 3.2, "tokens_per_s": total / 3.2, "mb_per_s": total * 4e-6 / 3.2,
               "vocab_size": 4096, "headline": f"{total:,} tokens"}  # fmt: skip
    run.end("tokens", "tokens.encode", {"workers": 0}, metrics, (*upstream, "tokenizer"),
            after_s=3.2)  # fmt: skip


def train_stage(
    run: FakeRun, key: str, stage: str, *, steps: int, fault_step: int | None,
    inputs: tuple[str, ...], extra: dict[str, Any], low: float = 3.1, high: float = 8.35,
) -> None:  # fmt: skip
    """A training job whose rank 1 is killed once and that goes on from its checkpoint."""
    config = PretrainConfig(
        steps=steps, seq_len=256, global_batch=16, nproc=2, seed=7,
        model=ModelConfig(preset="demo"), weights={"code": 0.5, "docs": 0.2, "reference": 0.3},
    )  # fmt: skip
    rng = random.Random(stage)
    own = {"stage": stage, "job": f"job-{key}"}
    shape = account(config.model.resolve(4096))
    noise = [rng.gauss(0, 1) for _ in range(steps)]
    run.begin(stage)
    run.emit("job.start", 0.2, resumed=False, **own)

    def step_events(first: int, last: int, attempt: int) -> None:
        for step in range(first, last):
            decay = math.exp(-step / (steps * 0.14))
            loss = low + (high - low) * decay + 0.06 * noise[step]
            warm = min(1.0, (step + 1) / max(steps * 0.05, 1))
            lr = 2e-3 * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            step_s = 0.36 + 0.02 * noise[step]
            run.emit(
                "train.step", step_s, attempt=attempt, n_steps=1, step=step, loss=loss, lr=lr,
                grad_norm=0.5 + 3 * decay + 0.08 * abs(noise[step]), tokens=4096, step_s=step_s,
                tokens_per_s=4096 / step_s, mfu=0.55 * 0.36 / step_s, **own,
            )  # fmt: skip
            if (step + 1) % 40 == 0 or step + 1 == steps:
                run.emit("train.checkpoint", 0.3, step=step + 1, seconds=0.28, n_bytes=48_000_000,
                         **own)  # fmt: skip

    def start(attempt: int, step: int) -> None:
        run.emit("attempt.start", 0.01, attempt=attempt, **own)
        run.emit("train.start", 4.2, attempt=attempt, n_params=shape.n_params, world=2,
                 dtype="fp32", steps=steps, tokens_per_step=4096, flops_per_token=24_000_000,
                 peak_flops_measured=1.68e11, **own)  # fmt: skip
        if attempt:
            run.emit("train.restore", 0.2, attempt=attempt, step=step, whole=True, **own)

    start(0, 0)
    if fault_step is None:
        step_events(0, steps, 0)
    else:
        step_events(0, fault_step, 0)
        back = fault_step // 40 * 40
        run.emit("fault.injected", 0.1, step=fault_step, rank=1, what="kill", **own)
        message = f"rank 1 was killed at step {fault_step}"
        run.emit("fault.detected", 0.07, attempt=0, what="killed", rank=1, step=fault_step,
                 detect_s=0.07, message=message, **own)  # fmt: skip
        run.emit("recovery.start", 0.05, attempt=1, **own)
        start(1, back)
        run.emit("recovery.done", 0.05, attempt=1, step=back, seconds=4.6,
                 steps_lost=fault_step - back, **own)  # fmt: skip
        step_events(back, steps, 1)
    run.emit("job.done", 0.9, **own)
    metrics = {"seconds": 100.0, "steps": steps, "tokens": steps * 4096, "tokens_per_s": 11_000.0,
               "n_params": shape.n_params, **extra}  # fmt: skip
    run.end(key, stage, config.model_dump(mode="json"), metrics, inputs, after_s=0.1)


def full_run(folder: Path, steps: int = 240, fault_step: int | None = 133) -> FakeRun:
    """All stages of the demo."""
    run = FakeRun(folder)
    data_stages(run)
    token_stages(run, {"code": 900_000, "docs": 310_000, "reference": 240_000})
    train_stage(run, "pretrain", "train.pretrain", steps=steps, fault_step=fault_step,
                inputs=("tokens", "tokenizer"),
                extra={"headline": "4.00 M parameters, loss 8.33 -> 3.12"})  # fmt: skip
    run.begin("post.pairs")
    run.end(
        "pairs", "post.pairs", {"seed": 7, "pairs_per_entry": 2},
        {
            "entries": {"in": 9120, "kept": 3380, "rejected": {
                "summary.missing": 3100, "summary.too_short": 1540, "split.leak": 1100}},
            "pairs": {"in": 6500, "kept": 6210, "rejected": {"question.duplicate": 290}},
            "by_split": {"train": 5900, "heldout": 310}, "by_kind": {"call": 2000, "purpose": 4210},
            "pairs_per_s": 3000.0, "seconds": 2.0, "example": {},
        },
        ("split",), after_s=2.0,
    )  # fmt: skip
    train_stage(
        run, "sft", "post.sft", steps=max(steps // 3, 2), fault_step=None, low=1.4, high=3.3,
        inputs=("pairs", "pretrain", "tokenizer"),
        extra={
            "conversations": {"in": 5900, "kept": 5870, "rejected": {"too_long": 30}},
            "epochs": 2.0, "n_tokens": 320_000, "n_label_tokens": 120_000, "fill": 0.98,
            "label_check": {"n_conversations": 40, "n_labels": 812, "example": {}},
            "headline": "5870 conversations, 80 steps, loss 3.300 -> 1.402",
        },
    )  # fmt: skip
    eval_stages(run)
    return run


BITS = {
    "code": (7.91, 2.22, 2.31), "docs": (8.03, 2.61, 2.64), "reference": (7.98, 2.04, 1.97),
    "all documents": (7.95, 2.29, 2.33), "answers": (8.11, 3.02, 1.38),
}  # fmt: skip
MODELS = ("untrained", "pretrained", "fine-tuned")
SAMPLES = (
    ("completion", "pretrained", "def read_lines(path", '):\n    """Read a file."""\n' + EVIL),
    ("completion", "pretrained", "Return a list of", " the names of the files & folders."),
    ("chat", "fine-tuned", "What does `os.path.join` do?", "Join two or more path components."),
)


def eval_stages(run: FakeRun) -> None:
    """Bits per byte and samples."""
    rows = [
        {"source": source, "is_total": source == "all documents", "n_docs": 100 + 7 * index,
         "n_left_out": 0, "n_tokens": 90_000, "n_bytes": 360_000,
         "bits_per_byte": dict(zip(MODELS, bits, strict=True)), "nats_per_token": {}}
        for index, (source, bits) in enumerate(BITS.items())
    ]  # fmt: skip
    result = {"models": list(MODELS), "rows": rows, "total": rows[3], "seq_len": 256,
              "overlap": 0.25}  # fmt: skip
    run.begin("eval.bpb")
    run.end("bpb", "eval.bpb", {"seed": 7}, {**result, "seconds": 9.0, "tokens_per_s": 30_000.0},
            ("tokens", "tokenizer", "pretrain", "sft", "pairs"), after_s=9.0)  # fmt: skip
    out = run.begin("eval.samples")
    samples = [
        {"kind": kind, "model": model, "prompt": prompt, "completion": completion,
         "messages": [{"role": "user", "content": prompt},
                      {"role": "assistant", "content": completion}] if kind == "chat" else None,
         "reference": "Join paths <b>intelligently</b>." if kind == "chat" else None,
         "n_prompt_tokens": 5, "n_tokens": 12, "stop_reason": "length",
         "details": "12 tokens, cut at the limit"}
        for kind, model, prompt, completion in SAMPLES
    ]  # fmt: skip
    (out / "samples.json").write_text(json.dumps(samples))
    run.end("samples", "eval.samples", {"seed": 7}, {"tokens_per_s": 150.0, "n_samples": 3},
            ("pretrain", "sft", "pairs"), after_s=4.0)  # fmt: skip

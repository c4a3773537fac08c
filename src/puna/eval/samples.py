"""Stage ``eval.samples``: what the models write, for people to read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import xxhash
from pydantic import Field

from puna.core.config import Config, Execution, Seed
from puna.core.fsio import write_json
from puna.core.ledger import Ledger
from puna.core.progress import progress
from puna.core.stage import Artifacts, Metrics, stage
from puna.lm.load import MODEL_DIR, load
from puna.lm.text import Completion
from puna.model.device import Device
from puna.model.sampling import Sampling
from puna.post.pairs import PAIRS_FILE, read_pairs

SAMPLES_FILE = "samples.json"


class SamplesConfig(Config):
    """Completions by the pretrained model, answers by the fine-tuned one."""

    prompts: tuple[str, ...] = (
        "def read_lines(path",
        "Return a list of",
        "This module provides",
    )
    """Texts that the pretrained model continues."""
    questions: tuple[str, ...] = ()
    """Questions to the fine-tuned model; when empty, `n_questions` of the held-out pairs."""
    n_questions: int = Field(default=3, ge=0)
    """Held-out questions to take when none are given."""
    sampling: Sampling = Field(default_factory=lambda: Sampling(max_new_tokens=64))
    """How completions are sampled; each text draws with a seed of its own, counted from this."""
    chat_sampling: Sampling = Field(
        default_factory=lambda: Sampling(temperature=0.0, max_new_tokens=64)
    )
    """How answers are sampled."""
    device: Execution[Device] = "auto"
    """Where to run."""
    seed: Seed = 0
    """Chooses the held-out questions."""


@stage(
    "eval.samples",
    needs={"model": "train.pretrain", "tuned?": "post.sft", "pairs?": "post.annotated|post.pairs"},
)
def write_samples(cfg: SamplesConfig, inputs: Artifacts, out: Path, events: Ledger) -> Metrics:
    """Let the pretrained model continue prompts and the fine-tuned model answer questions.

    Writes ``samples.json``: a list of ``{kind, model, prompt, completion, messages, reference,
    n_prompt_tokens, n_tokens, stop_reason, details}``. Times stand in the metrics only, so that
    equal runs leave equal files.

    Raises:
        PunaError: A prompt is longer than the model's context.
    """
    start_s = time.monotonic()
    questions = _questions(cfg, inputs)
    done: list[Completion] = []
    samples: list[dict[str, Any]] = []
    generating_s = 0.0
    with progress("eval.samples", total=len(cfg.prompts) + len(questions), unit="texts") as bar:
        if cfg.prompts:
            language_model = load(inputs["model"].file(MODEL_DIR), device=cfg.device)
            before_s = time.monotonic()
            done += language_model.complete(cfg.prompts, **_settings(cfg.sampling, 0))
            generating_s += time.monotonic() - before_s
            for prompt, completion in zip(cfg.prompts, done, strict=True):
                samples.append(_sample("completion", "pretrained", prompt, completion))
            bar.advance(len(cfg.prompts))
        if questions:
            language_model = load(inputs["tuned"].file(MODEL_DIR), device=cfg.device)
            asked = [[{"role": "user", "content": question}] for question, _ in questions]
            before_s = time.monotonic()
            answers = language_model.complete(asked, **_settings(cfg.chat_sampling, len(samples)))
            generating_s += time.monotonic() - before_s
            done += answers
            for (question, reference), turns, answer in zip(questions, asked, answers, strict=True):
                sample = _sample("chat", "fine-tuned", question, answer)
                said = [*turns, {"role": "assistant", "content": answer.text}]
                samples.append({**sample, "messages": said, "reference": reference})
            bar.advance(len(questions))
    write_json(out / SAMPLES_FILE, samples)
    n_tokens = sum(one.n_tokens for one in done)
    rate = n_tokens / max(generating_s, 1e-9)
    return {
        "seconds": time.monotonic() - start_s,
        "n_samples": len(samples),
        "n_tokens": n_tokens,
        "tokens_per_s": rate,
        "samples": [
            {"n_tokens": one.n_tokens, "seconds": one.seconds, "tokens_per_s": one.tokens_per_s}
            for one in done
        ],
        "headline": f"{len(samples)} texts at {rate:.0f} tokens/s",
    }


def _questions(cfg: SamplesConfig, inputs: Artifacts) -> list[tuple[str, str | None]]:
    """Questions with the answers of the held-out pairs, where they are known."""
    if "tuned" not in inputs:
        return []
    if cfg.questions:
        return [(question, None) for question in cfg.questions]
    if "pairs" not in inputs:
        return []
    pairs = read_pairs(inputs["pairs"].file(PAIRS_FILE), "heldout")
    pairs.sort(key=lambda pair: xxhash.xxh3_64_intdigest(f"{cfg.seed}\0{pair['id']}".encode()))
    asked: dict[str, str] = {}
    for pair in pairs:
        question, answer = pair["messages"][0]["content"], pair["messages"][1]["content"]
        if len(asked) < cfg.n_questions:
            asked.setdefault(question, answer)
    return list(asked.items())


def _settings(sampling: Sampling, n_before: int) -> dict[str, Any]:
    """Equal draws for every text would make the texts of a weak model alike: the seeds count on."""
    return {**dict(sampling), "seed": (sampling.seed + n_before) % 2**63}


def _sample(kind: str, model: str, prompt: str, done: Completion) -> dict[str, Any]:
    ended = {"stop_token": "ended by itself", "stop_text": "ended by a stop text",
             "length": "cut at the limit", "context": "cut at the context"}  # fmt: skip
    return {
        "kind": kind,
        "model": model,
        "prompt": prompt,
        "completion": done.text,
        "messages": None,
        "reference": None,
        "n_prompt_tokens": done.n_prompt_tokens,
        "n_tokens": done.n_tokens,
        "stop_reason": done.stop_reason,
        "details": f"{done.n_tokens} tokens, {ended[done.stop_reason]}",
    }

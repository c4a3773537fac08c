"""What the run made: the model and its accounting, fine-tuning, bits per byte, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.core.artifact import Artifact
from puna.eval.samples import SAMPLES_FILE
from puna.ui.report.collect.training import training_section


def model_section(inputs: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """Account for the model that was pretrained; None when none was."""
    artifact = inputs.get("pretrain")
    if artifact is None:
        return None
    from puna.model.accounting import account
    from puna.train.config import PretrainConfig

    config = PretrainConfig.model_validate(artifact.config)
    tokens = inputs.get("tokens")
    vocab_size = tokens.metrics.get("vocab_size") if tokens is not None else None
    shape = config.model.resolve(vocab_size)
    return {"preset": config.model.preset, **account(shape).to_json("float32", config.seq_len)}


def tuning_section(
    inputs: Mapping[str, Artifact], events: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, Any] | None:
    """Describe the fine-tuning: its pairs and its loss; None when there is none."""
    pairs, sft = inputs.get("pairs"), inputs.get("sft")
    if pairs is None and sft is None:
        return None
    facts: list[dict[str, str]] = []
    rejected: list[dict[str, Any]] = []
    if pairs is not None:
        made = pairs.metrics
        entries = made["entries"]
        facts += [
            _fact("people who wrote them", f"{made['authors']:,}")
            if "authors" in made  # of an annotation desk
            else _fact("documented names used", f"{entries['kept']:,} of {entries['in']:,}"),
            _fact("conversations", f"{made['pairs']['kept']:,}"),
            *(_fact(f"for {split}", f"{n:,}") for split, n in made["by_split"].items()),
        ]
        rejected += _left_out(entries["rejected"], "documented names")
        rejected += _left_out(made["pairs"]["rejected"], "conversations")
    training = training_section(sft, events)
    if sft is not None:
        tuned = sft.metrics
        rejected += _left_out(tuned["conversations"]["rejected"], "conversations to train on")
        facts += [
            _fact("conversations trained on", f"{tuned['conversations']['kept']:,}"),
            _fact("epochs", f"{tuned['epochs']:.2f}"),
            _fact("tokens with loss", f"{tuned['n_label_tokens'] / tuned['n_tokens']:.1%}"),
            _fact("rows filled", f"{tuned['fill']:.1%}"),
            _fact("labels checked by decoding", f"{tuned['label_check']['n_labels']:,}"),
        ]
    if training is not None and training["final_loss"] is not None:
        first = training["first_loss"]
        facts.append(_fact("loss", f"{first:.3f} → {training['final_loss']['mean']:.3f}"))
    return {
        "facts": facts,
        "rejected": sorted(rejected, key=lambda row: -row["number"]),
        "training": training,
    }


def _fact(label: str, value: str) -> dict[str, str]:
    return {"label": label, "value": value}


def _left_out(reasons: Mapping[str, int], of: str) -> list[dict[str, Any]]:
    return [{"reason": reason, "number": n, "of": of} for reason, n in reasons.items()]


def evaluation_section(inputs: Mapping[str, Artifact]) -> dict[str, Any] | None:
    """Compare the models by bits per byte of held-out documents; None when not measured."""
    artifact = inputs.get("bpb")
    if artifact is None:
        return None
    return {key: artifact.metrics[key] for key in ("models", "rows", "total", "seq_len", "overlap")}


def samples_section(inputs: Mapping[str, Artifact]) -> list[dict[str, Any]] | None:
    """Return the texts that the models wrote; None when there are none."""
    artifact = inputs.get("samples")
    if artifact is None:
        return None
    return artifact.read_json(SAMPLES_FILE)

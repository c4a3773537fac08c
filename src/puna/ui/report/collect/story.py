"""The run in a few numbers and in a few sentences."""

from __future__ import annotations

from typing import Any

from puna.core.units import format_bytes, format_count, format_duration


def headline(value: dict[str, Any]) -> list[dict[str, str]]:
    """Choose the numbers at the top of the report.

    Args:
        value: The other sections of the report.

    Returns:
        ``{"key", "label", "before", "value", "unit", "detail"}`` each, texts; ``before`` is shown
        as ``before -> value``. What the run does not have is left out.
    """
    tiles: list[dict[str, str]] = []

    def tile(key: str, label: str, text: str, detail: str = "", before: str = "") -> None:
        number, _, unit = text.partition(" ") if text.count(" ") == 1 else (text, "", "")
        tiles.append({"key": key, "label": label, "before": before, "value": number, "unit": unit,
                      "detail": detail})  # fmt: skip

    data, tokens, model = value["data"], value["tokens"], value["model"]
    if data is not None:
        first, last = data["steps"][0], data["steps"][-1]
        share = last["kept_docs"] / first["in_docs"] if first["in_docs"] else 0.0
        tile("documents", "documents kept", f"{last['kept_docs']:,}",
             f"{share:.0%} of the input, {format_bytes(last['kept_bytes'])}",
             f"{first['in_docs']:,}")  # fmt: skip
    if tokens is not None:
        per = tokens["bytes_per_token"]
        tile("tokens", "tokens", format_count(tokens["n_tokens"]),
             f"{per:.2f} bytes per token" if per else "")  # fmt: skip
    if model is not None:
        tile("parameters", "parameters", format_count(model["n_params"]),
             f"{model['config']['n_layers']} layers, width {model['config']['dim']}")  # fmt: skip
    _training_tiles(value["training"], tile)
    _evaluation_tile(value["evaluation"], tile)
    run = value["run"]
    n = run["n_stages"]
    tile("wall_time", "time at work", format_duration(run["busy_s"]),
         f"{n} stage{'' if n == 1 else 's'}")  # fmt: skip
    return tiles


def _training_tiles(training: dict[str, Any] | None, tile: Any) -> None:
    if training is None:
        return
    if training["final_loss"] is not None:
        first = training["first_loss"]
        tile("loss", "loss", f"{training['final_loss']['mean']:.3f}",
             f"after {training['n_steps']:,} steps", f"{first:.2f}" if first else "")  # fmt: skip
    goodput = training["goodput"]
    n = sum(incident["is_fault"] for incident in training["incidents"])
    faults = "no fault" if n == 0 else f"{n} fault{'' if n == 1 else 's'} survived"
    tile("goodput", "goodput", f"{goodput['goodput']:.1%}", faults)
    mfu = training["median_mfu"]
    if training["median_tokens_per_s"]:
        tile("rate", "training rate", f"{format_count(training['median_tokens_per_s'])} tokens/s",
             f"{mfu:.0%} MFU" if mfu else "")  # fmt: skip


def _evaluation_tile(evaluation: dict[str, Any] | None, tile: Any) -> None:
    if evaluation is None:
        return
    total = evaluation["total"]["bits_per_byte"]
    models = [model for model in evaluation["models"] if model in total]
    if models:
        before = f"{total[models[0]]:.2f}" if len(models) > 1 else ""
        best = min(total[model] for model in models[1:]) if len(models) > 1 else total[models[0]]
        tile("bits_per_byte", "bits per byte", f"{best:.3f}", "held-out documents", before)


def story(value: dict[str, Any]) -> list[str]:
    """Tell the run in plain sentences, from the documents to the measured model."""
    sentences = []
    data, tokens, model = value["data"], value["tokens"], value["model"]
    if data is not None:
        first, last = data["steps"][0], data["steps"][-1]
        sentences.append(
            f"{first['in_docs']:,} raw documents came in and {last['kept_docs']:,} were kept"
            f" ({format_bytes(last['kept_bytes'])} of text)."
        )
    if tokens is not None:
        sentences.append(
            f"{'They' if data is not None else 'The documents'} became "
            f"{format_count(tokens['n_tokens'])} tokens over a vocabulary of "
            f"{tokens['vocab_size']:,}."
        )
    training = value["training"]
    if training is not None and model is not None:
        sentences.append(
            f"A Llama of {format_count(model['n_params'])} parameters read "
            f"{format_count(training['n_tokens'])} of them in {training['n_steps']:,} steps."
        )
        sentences += [_incident(one) for one in training["incidents"] if one["is_fault"]]
    evaluation = value["evaluation"]
    if evaluation is not None:
        total = evaluation["total"]["bits_per_byte"]
        known = [(m, total[m]) for m in evaluation["models"] if m in total]
        if len(known) > 1:
            steps = ", ".join(f"{bits:.2f} {model}" for model, bits in known)
            sentences.append(f"Bits per byte on held-out documents: {steps}.")
    return sentences


def _incident(incident: dict[str, Any]) -> str:
    what = incident.get("message") or f"a fault ({incident['what']})"
    text = what[0].upper() + what[1:]
    text += " on purpose" if incident["on_purpose"] else ""
    text += f"; it was noticed after {format_duration(incident['detect_s'])}"
    if incident.get("recover_s") is not None:
        lost = incident["steps_lost"]
        text += (
            f", training went on {format_duration(incident['recover_s'])} later and "
            f"{lost:,} step{'' if lost == 1 else 's'} had to be done again"
        )
    return text + "."

"""What only reading every weight can show; imports torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from puna.core.errors import PunaError
from puna.lm.guard import check_fp16
from puna.lm.inspect_tokenizer import TokenizerMatch
from puna.model.formats.checkpoint import Checkpoint
from puna.model.formats.probe import probe_layout
from puna.tokens.tokenizer import load_tokenizer


def look_deep(checkpoint: Checkpoint, match: TokenizerMatch | None) -> dict[str, Any]:
    """Read every weight once: values that are not finite, and fitness for float16.

    Args:
        checkpoint: An opened checkpoint.
        match: Its tokenizer, for the sample of the activation probe; None when it has none.

    Returns:
        JSON values: ``finite`` (no NaN, no infinity), ``fp16`` (the guard's report), ``layout``
        (what the probe of the layout found) and ``problems`` (one sentence each).

    Raises:
        PunaError: A file is damaged where a tensor lies.
    """
    tokenizer = None
    problems: list[str] = []
    if match is not None:
        try:
            tokenizer = load_tokenizer(match.outline.file)
        except PunaError as error:  # the weights can be looked at all the same
            problems.append(f"the tokenizer cannot be built: {error.message}")
    report = check_fp16(checkpoint, tokenizer=tokenizer)
    layout = probe_layout(checkpoint)
    wrong = [one.describe() for one in report.weights if one.problem == "not finite"]
    return {
        "finite": not wrong,
        "fp16": report.to_json(),
        "layout": [asdict(one) for one in layout],
        "problems": [*problems, *wrong, *(one.message for one in layout if one.verdict == "wrong")],
    }

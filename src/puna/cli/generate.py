"""``puna generate``: complete a prompt, streamed, or a file of prompts, computed together."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from puna.model.sampling import Sampling

if TYPE_CHECKING:
    from puna.lm.engine.types import TokenLogprob
    from puna.lm.language_model import LanguageModel
    from puna.lm.text import Completion

_DEFAULTS = Sampling()
_STOP_WORDS = {
    "stop_token": "end of text",
    "stop_text": "stop text",
    "length": "--max-new-tokens reached",
    "context": "the model's context is full",
}


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose tokens; the function takes them as keyword arguments."""
    options = [
        click.option("--max-new-tokens", type=click.IntRange(min=1), show_default=True,
                     default=_DEFAULTS.max_new_tokens, help="Most tokens to generate."),
        click.option("--temperature", type=click.FloatRange(min=0), show_default=True,
                     default=_DEFAULTS.temperature, help="0 always takes the likeliest token."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), show_default=True,
                     default=_DEFAULTS.top_p, help="Draw from this share of probability."),
        click.option("--top-k", type=click.IntRange(min=0), show_default=True,
                     default=_DEFAULTS.top_k, help="Draw from this many tokens; 0 means all."),
        click.option("--min-p", type=click.FloatRange(0, 1), show_default=True,
                     default=_DEFAULTS.min_p,
                     help="Draw from tokens this probable, relative to the likeliest."),
        click.option("--repetition-penalty", type=click.FloatRange(0.01, 100), show_default=True,
                     default=_DEFAULTS.repetition_penalty,
                     help="Above 1, tokens seen before become less likely."),
        click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), show_default=True,
                     default=_DEFAULTS.seed, help="Equal seeds give equal texts."),
    ]  # fmt: skip
    return _add(options, function)


def load_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of loading; the function takes them as keyword arguments."""
    options = [
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
                     show_default=True, help="Where to run."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                     help="Of weights and activations; float32 on a CPU, else as stored."),
        click.option("--quantize", type=click.Choice(["int8"]),
                     help="Keep the matrices in 8 bit (CPU)."),
        click.option("--rope-factor", type=click.FloatRange(min=1),
                     help="Context extension of a Meta folder that does not name it."),
    ]  # fmt: skip
    return _add(options, function)


def _add(options: list[Callable[..., Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("model", metavar="MODEL_OR_RUN")
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Complete every line of a file, together; prints one JSON object per line.",
)
@sampling_options
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
)
@click.option("--echo", is_flag=True, help="Print the prompt before its completion.")
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --json: logprobs of the tokens and of the N likeliest.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@load_options
def generate(
    model: str,
    prompt: str | None,
    prompts: Path | None,
    stop: tuple[str, ...],
    echo: bool,
    logprobs: int | None,
    as_json: bool,
    device: Any,
    dtype: Any,
    quantize: Any,
    rope_factor: float | None,
    **sampling: Any,
) -> None:
    """Complete PROMPT with a model; `-` reads the prompt from standard input.

    MODEL_OR_RUN is a model folder, a .gguf file or a run (its fine-tuned model, else its
    pretrained one). The completion goes to standard output as it comes, a line about it to
    standard error.
    """
    if (prompt is None) == (prompts is None):
        raise click.UsageError("give either PROMPT or --prompts FILE")
    if logprobs is not None and not (as_json or prompts):
        raise click.UsageError("--logprobs needs --json")
    texts = None if prompts is None else _read_lines(prompts)
    from puna.lm.load import load

    language_model = load(model, dtype, device, quantize, rope_factor)
    text = text_stdin().read() if prompt == "-" else prompt or ""
    options: dict[str, Any] = {"stop": stop, "echo": echo, "logprobs": logprobs, **sampling}
    try:
        if texts is not None:
            _complete_all(language_model, texts, options)
        elif as_json:
            _print_json(language_model, text, language_model.complete(text, **options))
        else:
            _stream(language_model, text, options)
    except KeyboardInterrupt:
        click.echo()
        sys.exit(130)


def _stream(language_model: LanguageModel, text: str, options: dict[str, Any]) -> None:
    plain = {key: value for key, value in options.items() if key not in ("echo", "logprobs")}
    if options["echo"]:
        click.echo(text, nl=False)
    done = show(language_model.stream(text, **plain))
    click.echo()
    click.echo(
        f"[{language_model.path}: {done.n_prompt_tokens} + {done.n_tokens} tokens, "
        f"{done.tokens_per_s:.1f} tokens/s, ended by: {_STOP_WORDS[done.stop_reason]}]",
        err=True,
    )


def _complete_all(language_model: LanguageModel, texts: list[str], options: dict[str, Any]) -> None:
    start_s, n_tokens = time.monotonic(), 0
    completions = language_model.complete_each(texts, **options)
    for text, done in zip(texts, completions, strict=True):
        _print_json(language_model, text, done)
        n_tokens += done.n_tokens
    seconds = max(time.monotonic() - start_s, 1e-9)
    click.echo(
        f"[{language_model.path}: {len(texts)} prompts, {n_tokens} new tokens, "
        f"{n_tokens / seconds:.1f} tokens/s]",
        err=True,
    )


def _print_json(language_model: LanguageModel, prompt: str, done: Completion) -> None:
    def told(one: TokenLogprob | None) -> dict[str, Any] | None:
        if one is None:
            return None
        return {**asdict(one), "text": language_model.tokenizer.decode([one.id])}

    result: dict[str, Any] = {
        "prompt": prompt, "text": done.text, "n_prompt_tokens": done.n_prompt_tokens,
        "n_tokens": done.n_tokens, "stop_reason": done.stop_reason,
    }  # fmt: skip
    if done.logprobs is not None:
        result["logprobs"] = [told(one) for one in done.logprobs]
    if done.prompt_logprobs is not None:
        result["prompt_logprobs"] = [told(one) for one in done.prompt_logprobs]
    click.echo(json.dumps(result, ensure_ascii=False))


def _read_lines(path: Path) -> list[str]:
    from puna.core.errors import PunaError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PunaError(f"{path} cannot be read: {error}", "give a UTF-8 text file") from error
    lines = text.splitlines()
    if not lines or not all(lines):
        where = f"line {lines.index('') + 1} of {path}" if lines else str(path)
        raise PunaError(f"{where} is empty", "write one prompt per line")
    return lines


def show(pieces: Generator[str, None, Completion]) -> Completion:
    """Print a stream of text as it comes and return its completion."""
    while True:
        try:
            click.echo(next(pieces), nl=False)
        except StopIteration as end:
            return end.value


def text_stdin() -> TextIO:
    """Return standard input; bytes that are no text become replacement characters."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin

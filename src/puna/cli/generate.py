"""``puna generate``: complete a prompt; the text streams to standard output."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TextIO

import click

from puna.model.sampling import Sampling

if TYPE_CHECKING:
    from puna.eval.generation import Completion

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
        click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), show_default=True,
                     default=_DEFAULTS.seed, help="Equal seeds give equal texts."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
                     show_default=True, help="Where to run."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("model", metavar="MODEL_OR_RUN")
@click.argument("prompt")
@sampling_options
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
)
def generate(model: str, prompt: str, device: str, stop: tuple[str, ...], **sampling: Any) -> None:
    """Complete PROMPT with a model; `-` reads the prompt from standard input.

    MODEL_OR_RUN is a model folder or a run (its fine-tuned model, else its pretrained one).
    The completion goes to standard output as it comes, a line about it to standard error.
    """
    from puna.eval.generation import stream
    from puna.eval.load import find_model, load

    text = text_stdin().read() if prompt == "-" else prompt
    loaded = load(find_model(model), device)  # type: ignore[arg-type]
    prompt_ids = loaded.tokenizer.encode(text, bos=True)
    try:
        done = show(stream(loaded, prompt_ids, Sampling(**sampling), stop))
    except KeyboardInterrupt:
        click.echo()
        sys.exit(130)
    click.echo()
    click.echo(
        f"[{loaded.folder}: {done.n_prompt_tokens} + {done.n_tokens} tokens, "
        f"{done.tokens_per_s:.1f} tokens/s, ended by: {_STOP_WORDS[done.stop_reason]}]",
        err=True,
    )


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

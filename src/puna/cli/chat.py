"""``puna chat``: talk to a fine-tuned model in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from puna.cli.generate import load_options, sampling_options, show, text_stdin
from puna.model.sampling import Sampling

if TYPE_CHECKING:
    from puna.lm.chat import ChatSession

_HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends, Ctrl-C stops an answer"


@click.command()
@click.argument("model", metavar="MODEL_OR_RUN")
@sampling_options
@click.option("--system", default="", metavar="TEXT", help="System message of the conversation.")
@load_options
def chat(
    model: str,
    system: str,
    device: Any,
    dtype: Any,
    quantize: Any,
    rope_factor: float | None,
    **sampling: Any,
) -> None:
    """Talk to a model in its chat format.

    MODEL_OR_RUN is a model folder, a .gguf file or a run (its fine-tuned model, else its
    pretrained one).
    Commands: /reset, /help, /quit. Piped input is read line by line, one message each; then only
    the answers go to standard output.
    """
    from puna.lm.chat import ChatSession
    from puna.lm.load import load

    language_model = load(model, dtype, device, quantize, rope_factor)
    session = ChatSession(language_model, Sampling(**sampling), system)
    path = language_model.path
    if path is not None and path.parent.name == "train.pretrain":
        _note("note: this model was pretrained only, it has not learnt to answer (stage post.sft)")
    stdin = text_stdin()
    if stdin.isatty():
        _note(f"{path}, context {language_model.max_seq_len} tokens. {_HELP}")
        _talk(session, _ask_person, "model> ")
    else:
        _talk(session, lambda: stdin.readline() or None, "")


def _talk(session: ChatSession, read: Callable[[], str | None], name: str) -> None:
    from puna.core.errors import PunaError

    while (line := read()) is not None:
        text = line.strip()
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            session.reset()
            _note("the conversation is forgotten")
        elif text.startswith("/"):
            _note(_HELP if text == "/help" else f"unknown command {text.split()[0]!r}: {_HELP}")
        elif text:
            try:
                _answer(session, text, name)
            except PunaError as error:
                _note(str(error))


def _answer(session: ChatSession, text: str, name: str) -> None:

    pieces = session.ask(text)
    click.echo(name, nl=False)
    try:
        done = show(pieces)
    except KeyboardInterrupt:
        pieces.close()
        click.echo(" ...")
        return
    click.echo()
    if session.n_forgotten:
        _note(f"note: the context is full, the oldest {session.n_forgotten} turns were forgotten")
    if done.stop_reason in ("length", "context"):
        what = "--max-new-tokens" if done.stop_reason == "length" else "the model's context"
        _note(f"note: the answer was cut, it reached {what}")


def _ask_person() -> str | None:
    import readline  # noqa: F401 (gives input() history and editing)

    try:
        return input("you> ")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


def _note(text: str) -> None:
    click.echo(text, err=True)

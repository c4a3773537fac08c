"""``puna serve``: an HTTP server for one model that OpenAI's clients can talk to."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.cli.generate import load_options
from puna.core.version import VERSION

if TYPE_CHECKING:
    from puna.lm.language_model import LanguageModel
    from puna.serve.server import Server

_NEEDED = ("httptools", "starlette", "uvicorn")


@click.command()
@click.argument("path", metavar="MODEL_OR_RUN")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
    help="0 takes a free one and prints it.",
)  # fmt: skip
@click.option("--name", help="Name of the model in requests; default: that of PATH.")
@click.option(
    "--api-key", envvar="PUNA_API_KEY", show_envvar=True,
    help="Ask every client for this key. Others can read the command line: prefer the variable.",
)  # fmt: skip
@load_options
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=64, show_default=True,
    help="Most sequences computed at once.",
)  # fmt: skip
@click.option(
    "--max-cache-tokens", type=click.IntRange(min=1),
    help="Most tokens in the KV cache; default: what half of the free memory holds.",
)  # fmt: skip
@click.option(
    "--batch-invariant", is_flag=True,
    help="Answers are bitwise the same whatever else is computed at the time; the default where "
    "it is almost free.",
)  # fmt: skip
@click.option(
    "--max-queue", type=click.IntRange(min=0), default=256, show_default=True,
    help="Sequences that may wait; then clients get status 429.",
)  # fmt: skip
@click.option(
    "--timeout-s", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
    help="Longest a request may take, waiting included; then it ends with status 504.",
)  # fmt: skip
@click.option(
    "--max-body-bytes", type=click.IntRange(min=1), default=4 << 20, show_default=True,
    help="Larger requests get status 413.",
)  # fmt: skip
@click.option(
    "--default-max-tokens", type=click.IntRange(min=1), default=512, show_default=True,
    help="Length of a chat answer whose request names none.",
)  # fmt: skip
@click.option(
    "--grace-s", type=click.FloatRange(min=0), default=30, show_default=True,
    help="After SIGTERM or Ctrl-C, requests may go on so long; a second one ends them at once.",
)  # fmt: skip
def serve(
    path: str,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    max_batch: int,
    max_cache_tokens: int | None,
    batch_invariant: bool,
    max_queue: int,
    timeout_s: float,
    max_body_bytes: int,
    default_max_tokens: int,
    grace_s: float,
    **load_settings: Any,
) -> None:
    """Serve a model over HTTP, for OpenAI's clients and anything that speaks their protocol.

    MODEL_OR_RUN is a model folder, a .gguf file or a run (its fine-tuned model, else its
    pretrained one).
    Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.
    """
    _check_installed()
    from puna.lm.load import find_model
    from puna.serve.dispatch import Limits
    from puna.serve.generate import Generation
    from puna.serve.server import Address, Server

    if api_key is not None and (not api_key.isascii() or not api_key.strip()):
        raise click.UsageError("--api-key must be ASCII text that is not empty")
    found = find_model(path)
    numbers = load_settings["quantize"] or load_settings["dtype"] or "auto"
    server = Server(
        lambda: _load(found, load_settings),
        Address(host, port, api_key, grace_s),
        Limits(max_batch, max_queue, timeout_s),
        Generation(
            name or _name_of(path),
            f"puna-{VERSION}-{numbers}",
            max_body_bytes,
            default_max_tokens,
        ),
        {"max_cache_tokens": max_cache_tokens, "batch_invariant": batch_invariant or None},
        _announce,
    )
    if not server.address.is_local and api_key is None:
        click.echo(
            f"warning: {host} can be reached by other machines, and no API key is asked for; set "
            "PUNA_API_KEY",
            err=True,
        )
    click.echo(f"loading {found} ...", err=True)
    server.run()


def _check_installed() -> None:
    from puna.core.errors import PunaError

    for module in _NEEDED:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise PunaError(
                f"puna serve needs the package {module}, which is not installed",
                "pip install 'puna[serve]'",
            ) from error


def _name_of(path: str) -> str:
    return Path(path).resolve().name.removesuffix(".gguf")


def _load(path: Path, settings: dict[str, Any]) -> LanguageModel:
    from puna.lm.load import load

    language_model = load(path, **settings)
    language_model.tokenizer  # noqa: B018 - raises when there is none
    return language_model


def _announce(server: Server) -> None:
    """Print where the server is and what it costs, once it is ready."""
    from puna.core.units import format_bytes

    assert server.dispatcher is not None
    language_model, stats = server.dispatcher.language_model, server.dispatcher.worker.stats
    tensors = [*language_model.model.parameters(), *language_model.model.buffers()]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    cache_tokens = stats.total_blocks * stats.block_tokens
    token_bytes = stats.cache_bytes // max(stats.allocated_blocks * stats.block_tokens, 1)
    click.echo(
        f"serving {server.generation.model} at {server.url}/v1 "
        f"[weights {format_bytes(weight_bytes)}, cache up to "
        f"{format_bytes(cache_tokens * token_bytes)} ({cache_tokens} tokens), "
        f"{server.limits.max_batch} sequences at once]"
    )

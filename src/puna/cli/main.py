"""The ``puna`` command: a table of commands that are imported only when they are called."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

import click

from puna.core.version import VERSION

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("puna.cli.run:run", "Run a recipe from its first stage to its report."),
    "data": ("puna.cli.data:data", "Sources, filters, deduplication, split; why a document went."),
    "tokens": ("puna.cli.tokens:tokens", "Train a tokenizer, encode documents to token shards."),
    "mix": ("puna.cli.mix:mix", "Which mix of sources makes the best model, with error bars."),
    "model": ("puna.cli.model:model", "Presets; inspect, compare and convert models."),
    "plan": ("puna.cli.plan:plan", "Time, memory, cost and failures of a training, predicted."),
    "train": ("puna.cli.train:train", "Pretraining; what it will need at any scale."),
    "resilience": ("puna.cli.resilience:resilience", "Faults, what is done about them, and tests."),
    "cluster": ("puna.cli.cluster:cluster", "The nodes of a run; which are not trusted, and why."),
    "launch": ("puna.cli.launch:launch", "Write the files that start a training on many nodes."),
    "annotate": ("puna.cli.annotate:annotate", "Human data with rounds of quality assurance."),
    "post": ("puna.cli.post:post", "Instruction pairs and supervised fine-tuning."),
    "eval": ("puna.cli.eval:evaluate", "Bits per byte and samples."),
    "generate": ("puna.cli.generate:generate", "Complete a prompt with a trained model."),
    "chat": ("puna.cli.chat:chat", "Talk to a fine-tuned model in the terminal."),
    "serve": ("puna.cli.serve:serve", "Serve a model over HTTP to OpenAI's clients."),
    "report": ("puna.cli.report:report", "Make the report of a run anew."),
    "goodput": ("puna.cli.goodput:goodput", "Where the time of a training went; its incidents."),
    "chaos": ("puna.cli.chaos:chaos", "Hurt a training in every way; it must end the same."),
    "lineage": ("puna.cli.lineage:lineage", "Print the documents behind a training step."),
    "config": ("puna.cli.config:config", "Show, check and explain the configuration of a recipe."),
}


class LazyGroup(click.Group):
    """Knows the name and one line of each command; imports a command's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the story."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, no_args_is_help=True, context_settings={"max_content_width": 100})
@click.version_option(VERSION, prog_name="puna")
def cli() -> None:
    """Turn raw documents into a trained, fine-tuned Llama and account for every step of it.

    Start with `puna run recipes/demo.toml`.
    """


def entry(arguments: list[str] | None = None) -> None:
    """Run the command line: user errors end with one message and exit code 2, no traceback."""
    from puna.core.errors import USER_ERROR_EXIT_CODE

    try:
        code = cli.main(arguments, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(USER_ERROR_EXIT_CODE)
    except (click.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # click takes any for a closed terminal
            _fail(error.__cause__)
        click.echo("interrupted; the same command continues where it stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left
        sys.exit(141)
    except Exception as error:  # noqa: BLE001 - the border of the program
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """Explain what the user can mend; show the traceback of what is puna's fault."""
    from puna.core.errors import USER_ERROR_EXIT_CODE, explain_environment_error

    explained = explain_environment_error(error)
    if explained is None:
        traceback.print_exception(error)
        click.echo("this is a fault of puna, please report it with the lines above", err=True)
        sys.exit(1)
    click.echo(f"error: {explained}", err=True)
    sys.exit(USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    entry()

"""``puna annotate``: the annotation desk, human data with several rounds of quality assurance."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from puna.post.annotate.desk import Desk

_DESK = click.argument("path", metavar="DESK", type=click.Path(path_type=Path, dir_okay=False))
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("annotate", no_args_is_help=True)
def annotate() -> None:
    """Write, rank and label in several rounds: checks, overlap, blind review, audits, versions.

    DESK is a file (SQLite); its key stands beside it.
    """


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Desk]:
    from puna.post.annotate.desk import Desk

    desk = Desk.open(path)
    try:
        yield desk
    finally:
        desk.close()


@annotate.command("init")
@_DESK
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--rules", type=_FILE, help="TOML file with rules; KEY=VALUE changes them.")
def init(path: Path, overrides: tuple[str, ...], rules: Path | None) -> None:
    """Make a desk: `puna annotate init desk.db overlap=2 labels=["good","bad"]`."""
    import tomllib

    from puna.cli.common import config_of
    from puna.core.errors import PunaError
    from puna.post.annotate.settings import Rules
    from puna.post.annotate.store import Store

    given: list[str] = []
    if rules is not None:
        try:
            values = tomllib.loads(rules.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PunaError(f"{rules}: {error}", "name a TOML file") from error
        given = [f"{key}={text}" for key, text in _flat(values)]
    made = config_of(Rules, [*given, *overrides])
    Store.create(path, made.model_dump_json()).close()
    click.echo(f"{path}: {made.overlap} annotators per item, labels {', '.join(made.labels)}")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


@annotate.group("user", no_args_is_help=True)
def user() -> None:
    """People who work at a desk."""


@user.command("add")
@_DESK
@click.argument("name")
@click.option("--role", default="annotator", show_default=True,
              help="annotator, reviewer, adjudicator or admin; each may do more.")  # fmt: skip
def add(path: Path, name: str, role: str) -> None:
    """Add somebody; the password is asked for, or is the first line of standard input."""
    from puna.post.annotate.users import add_user

    with _opened(path) as desk:
        if sys.stdin.isatty():
            password = click.prompt("password", hide_input=True, confirmation_prompt=True)
        else:
            password = sys.stdin.readline().rstrip("\n")
        made = add_user(desk.store, name, role, password)
    click.echo(f"{made.name}: {made.role}, called {made.pseudonym} in exports")


@user.command("change")
@_DESK
@click.argument("name")
@click.option("--role", help="New role.")
@click.option("--active/--no-active", default=None, help="Whether they may log in.")
def change(path: Path, name: str, role: str | None, active: bool | None) -> None:
    """Give somebody another role, or close or open their way in."""
    from puna.post.annotate.users import change_user

    with _opened(path) as desk:
        made = change_user(desk.store, name, role, active)
    click.echo(f"{made.name}: {made.role}" + ("" if active is None else f", active: {active}"))


@user.command("list")
@_DESK
def list_users(path: Path) -> None:
    """Print who works at a desk."""
    from puna.cli.model_tables import new_console, new_text_table

    with _opened(path) as desk:
        rows = desk.store.all("SELECT name, role, pseudonym, active FROM users ORDER BY id")
    table = new_text_table("name", "role", "pseudonym", "active")
    for row in rows:
        table.add_row(row["name"], row["role"], row["pseudonym"], "yes" if row["active"] else "no")
    new_console().print(table)


@annotate.command("import")
@_DESK
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("--batch", help="Batch that is audited as one; default: the name of each file.")
@click.option("--gold", is_flag=True, help="Items with a known answer in the field `gold`.")
def import_files(path: Path, files: tuple[Path, ...], batch: str | None, gold: bool) -> None:
    """Import prompts, conversations or pairs to rank (JSONL, Label Studio or Argilla JSON)."""
    from puna.post.annotate.exchange import import_items, read_records

    with _opened(path) as desk:
        for file in files:
            new, old = import_items(desk, read_records(file), batch or file.stem, gold=gold)
            click.echo(f"{file}: {new} items, {old} were there already")


@annotate.command("freeze")
@_DESK
@click.argument("version")
def freeze_version(path: Path, version: str) -> None:
    """Freeze what is accepted, in batches that passed their audit, into a version."""
    from puna.post.annotate.exchange import freeze

    with _opened(path) as desk:
        click.echo(f"{version}: {freeze(desk, None, version)} examples")


@annotate.command("export")
@_DESK
@click.argument("version")
@click.argument("out", type=_FILE)
@click.option("--format", "form", default="sft", show_default=True,
              help="sft (conversations), preference (chosen, rejected) or label.")  # fmt: skip
def export(path: Path, version: str, out: Path, form: str) -> None:
    """Write a version to OUT (.jsonl or .parquet), with who wrote and reviewed each example."""
    from puna.post.annotate.exchange import examples, write_export

    with _opened(path) as desk:
        n = write_export(examples(desk, version, form), out)
    click.echo(f"{out}: {n} examples")


@annotate.command("audit")
@_DESK
@click.option("--anchor", "anchors", multiple=True, metavar="NUMBER:HASH",
              help="An end of the chain that an earlier audit printed.")  # fmt: skip
def audit_chain(path: Path, anchors: tuple[str, ...]) -> int:
    """Find events that were changed, removed or reordered, and tables that do not fit them.

    Prints the end of the chain: written down elsewhere, it proves that nothing before it changed.
    The exit code is 1 when something was found.
    """
    from puna.post.annotate.audit import audit, head_of, read_anchor

    with _opened(path) as desk:
        problems = audit(desk.store, tuple(read_anchor(one) for one in anchors))
        head = head_of(desk.store)
    for where, what in problems:
        click.echo(f"{where}: {what}")
    click.echo(f"{head.seq} events, {len(problems)} problems; end {head.seq}:{head.hash}")
    return int(bool(problems))


@annotate.command("report")
@_DESK
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def report(path: Path, as_json: bool) -> None:
    """Print progress, agreement and defects by round, people and batches."""
    from puna.post.annotate import acceptance, dashboard, reliability

    with _opened(path) as desk:
        reliability.refresh(desk)
        acceptance.draw_audits(desk)
        values = dashboard.collect(desk)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    else:
        from puna.cli.annotate_tables import print_report

        print_report(values)


@annotate.command("serve")
@_DESK
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8100, show_default=True,
              help="0 takes a free one and prints it.")  # fmt: skip
@click.option("--name", "names", multiple=True,
              help="Name under which other machines reach it; may be repeated.")  # fmt: skip
def serve(path: Path, host: str, port: int, names: tuple[str, ...]) -> None:
    """Serve the desk to browsers."""
    from puna.post.annotate.web.server import DeskServer

    server = DeskServer(path, host, port, names)
    if not server.is_local:
        click.echo(
            f"warning: {host} can be reached by other machines and passwords travel in the clear; "
            "put a proxy with TLS before it", err=True,
        )  # fmt: skip
    click.echo(f"serving {path} at {server.url}")
    server.run()

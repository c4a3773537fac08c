"""``puna data report``: a page about the data of a run."""

from __future__ import annotations

from pathlib import Path

import click

from puna.cli.common import load_stages


@click.command("report")
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path),
    help="Page to write.  [default: RUN/data-report.html]",
)  # fmt: skip
@click.option(
    "--json", "numbers", type=click.Path(path_type=Path),
    help="Also write the numbers behind the page to this file.",
)  # fmt: skip
@click.option(
    "--documents", type=click.Path(path_type=Path),
    help="Finished stage that RUN's first data stage read, when it is in another run.",
)  # fmt: skip
@click.option(
    "--sample", type=click.IntRange(1), default=20_000, show_default=True,
    help="Documents per stage whose signals are measured.",
)  # fmt: skip
@click.option(
    "--margin", type=click.IntRange(0), default=3, show_default=True,
    help="Documents shown on each side of a threshold.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True,
    help="Seed of the sample.",
)  # fmt: skip
def data_report(
    run_dir: Path, out: Path | None, numbers: Path | None, documents: Path | None, sample: int,
    margin: int, seed: int,
) -> None:  # fmt: skip
    """Write a page about the data of a run: where documents went, by which signal and threshold.

    RUN is the folder of a run, finished or not: runs/<name>. The page is one file without scripts.
    """
    import time

    from puna.core.errors import PunaError
    from puna.core.progress import say
    from puna.core.units import format_bytes, format_duration
    from puna.data.report.collect import Settings
    from puna.ui.report.data_page import PAGE_FILE, collect_page, write_page

    page = out or run_dir / PAGE_FILE
    for path in (page, numbers):
        if path is not None and run_dir.is_dir() and not path.parent.is_dir():
            raise PunaError(f"there is no folder {path.parent}", f"make it first, for {path.name}")
    load_stages()  # plugins register filters and the meaning of their reasons
    start_s = time.monotonic()
    settings = Settings(sample, margin, seed, documents)
    value = collect_page(run_dir, settings, on_step=lambda name: say((name, "dim")))
    n_bytes = write_page(value, page, numbers)
    took = format_duration(time.monotonic() - start_s)
    click.echo(f"{page}: {len(value['stages'])} stages, {format_bytes(n_bytes)}, in {took}")
    if numbers is not None:
        click.echo(f"{numbers}: the numbers behind it")

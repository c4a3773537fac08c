"""``puna model convert``: from any checkpoint format to any other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from puna.core.progress import Bar
    from puna.lm.convert import Conversion

_DTYPES = ("float32", "bfloat16", "float16", "Q8_0")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Size(click.ParamType):
    """A number of bytes with a unit: ``5GB``, ``512MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(value).strip(), re.IGNORECASE)
        unit = match[2].upper() if match else None
        if match is None or unit not in _UNITS or float(match[1]) * _UNITS[unit] < 1:
            self.fail(f"{value!r} is no size such as 5GB or 512MiB", param, ctx)
        return int(float(match[1]) * _UNITS[unit])


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["hf", "meta", "gguf"]), required=True, help="Format.")
@click.option(
    "--dtype", type=click.Choice(_DTYPES),
    help="Of the weights. Default: as they are stored, float32 where they differ or are quantised.",
)  # fmt: skip
@click.option("--shards", type=click.IntRange(min=1), default=1, help="Files of a Meta checkpoint.")
@click.option("--max-shard-size", type=_Size(), help="Largest file of a Hugging Face folder: 5GB.")
@click.option(
    "--rope-factor", type=click.FloatRange(min=1),
    help="Factor of a Meta checkpoint's scaled RoPE: 8 for Llama 3.1, 32 for Llama 3.2 1B and 3B.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that stands at OUT.")
@click.option(
    "--force", is_flag=True,
    help="Write float16 though values leave its range; the finding is stored beside the weights.",
)  # fmt: skip
@click.option("--no-probe", is_flag=True, help="Do not look for marks of a wrong conversion.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def convert(
    source: Path,
    out: Path,
    to: Any,
    dtype: str | None,
    shards: int,
    max_shard_size: int | None,
    rope_factor: float | None,
    overwrite: bool,
    force: bool,
    no_probe: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint IN to OUT in another format, with its tokenizer.

    IN is a Hugging Face or Meta folder, a .gguf file, a stage's folder or a run. One tensor at a
    time is in memory, and OUT appears when it is complete. Between float32, bfloat16 and their
    formats nothing changes but the layout: converting back gives the same bits.
    """
    from puna.core.progress import progress
    from puna.lm.convert import Options, convert
    from puna.lm.load import find_model

    options = Options(
        to=to, dtype=dtype, n_shards=shards, max_shard_bytes=max_shard_size,
        rope_factor=rope_factor, overwrite=overwrite, force=force, probe=not no_probe,
    )  # fmt: skip
    with progress("model.convert", unit="B") as bar:
        done = convert(find_model(source), out, options, bar.set_total, _teller(bar))
    if as_json:
        click.echo(json.dumps(to_json(done), indent=2))
    else:
        _print(done)


def _teller(bar: Bar) -> Any:
    return lambda name, n_bytes: bar.advance(n_bytes, name)


def to_json(done: Conversion) -> dict[str, Any]:
    """Return what was done as JSON values."""
    return {
        "source": str(done.source), "out": str(done.out), "format": done.to,
        "dtype_in": dict(done.dtypes), "dtype_out": done.dtype, "tensors": done.n_tensors,
        "bytes_in": done.bytes_in, "bytes_out": done.bytes_out, "lossless": done.lossless,
        "tokenizer": done.tokenizer, "seconds": round(done.seconds, 3), "notes": done.notes,
    }  # fmt: skip


def _print(done: Conversion) -> None:
    from puna.core.units import format_bytes, format_duration, format_rate

    stored = ", ".join(f"{count} x {name}" for name, count in sorted(done.dtypes.items()))
    exact = "every value is what it was" if done.lossless else "values were rounded"
    rate = format_rate(done.bytes_in / max(done.seconds, 1e-9), "B")
    rows = {
        "from": str(done.source),
        "to": f"{done.out} ({done.to})",
        "tensors": f"{done.n_tensors} ({stored} -> {done.dtype}; {exact})",
        "bytes": f"{format_bytes(done.bytes_in)} -> {format_bytes(done.bytes_out)}",
        "tokenizer": "carried along" if done.tokenizer else "none",
        "time": f"{format_duration(done.seconds)} ({rate})",
    }
    for name, value in rows.items():
        click.echo(f"{name:<10} {value}")
    for note in done.notes:
        click.echo(f"note: {note}")

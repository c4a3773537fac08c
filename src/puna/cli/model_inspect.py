"""The page of ``puna model inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from puna.cli.model_tables import new_console, new_table
from puna.core.units import format_bytes
from puna.model.accounting import PART_LABELS, dtype_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from puna.lm.inspect import Inspection
    from puna.lm.inspect_stored import SpecialRows, Stored
    from puna.lm.inspect_tokenizer import TokenizerMatch

_NAMED_ROWS = 4
_CHATS = {
    "llama3": "Llama 3's chat format", "llama2": "Llama 2's chat format",
    "template": "a chat template of its own", None: "no chat format",
}  # fmt: skip


def print_inspection(found: Inspection) -> None:
    """Print what a model is, its parts, the bytes to run it, and what is unusual or wrong."""
    from rich.padding import Padding
    from rich.text import Text

    console = new_console()
    console.print(Text(found.name, "bold"))
    console.print(Padding(_facts(found), (0, 0, 0, 2)))
    console.print(_parts(found))
    if found.stored is not None and len(found.stored.dtypes) > 1:
        console.print(_dtypes(found.stored))
    console.print(_plan(found))
    per_token = found.cost.kv_bytes_per_token(found.plan.cache_dtype)
    console.print(
        f"one token leaves {per_token:,} bytes in the KV cache ({found.plan.cache_dtype})"
    )
    for kind, style, lines in (("problem", "bold red", found.problems), ("note", "", found.notes)):
        if lines:
            console.print(_grid([(kind, line) for line in lines], style))


def _grid(rows: list[tuple[str, str]], style: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(name, style), Text(text))
    return grid


def _facts(found: Inspection) -> Table:
    c = found.config
    rope = f"theta {c.rope_theta:,.0f}"
    if c.rope_scaling is not None:
        rope += f", {c.rope_scaling.kind} scaling x{c.rope_scaling.factor:g}"
        original = getattr(c.rope_scaling, "original_max_seq_len", None)
        rope += "" if original is None else f" of {original:,} tokens"
    heads = f"{c.n_heads} heads of {c.head_dim}" + (
        f", {c.n_kv_heads} for keys and values" if c.n_kv_heads != c.n_heads else ""
    )
    rows = [
        ("family", found.family.describe()),
        ("shape", f"{c.n_layers} layers of {c.dim:,}, {heads}, feed-forward {c.ffn_dim:,}"),
        ("vocabulary", f"{c.vocab_size:,}, {'tied' if c.tie_embeddings else 'separate'} head"),
        ("context", f"{c.max_seq_len:,} tokens, RoPE {rope}"),
    ]
    if found.path is not None:
        rows.append(("files", _files(found)))
    if found.tokenizer is not None:
        rows.append(("tokenizer", _tokenizer(found.tokenizer)))
    if found.special_rows is not None:
        special = {} if found.tokenizer is None else found.tokenizer.outline.special
        rows.append(("special rows", _special_rows(found.special_rows, special)))
    if found.deep is not None:
        finite = "every value is finite" if found.deep["finite"] else "not every value is finite"
        rows += [("weights", finite), ("float16", found.deep["fp16"]["summary"])]
        rows += [("layout", one["message"]) for one in found.deep["layout"]]
    return _grid(rows)


def _files(found: Inspection) -> str:
    names = {"hf": "Hugging Face", "meta": "Meta", "gguf": "GGUF", "config": "configuration only"}
    text = names[found.kind]
    if found.stored is not None:
        n = len(found.stored.files)
        text += f", {n} file{'s' if n > 1 else ''}, {format_bytes(found.stored.file_bytes)}"
        if len(found.stored.dtypes) == 1:
            text += f", all {found.stored.dtypes[0].dtype}"
    return f"{text}: {found.path}"


def _tokenizer(match: TokenizerMatch) -> str:
    outline = match.outline
    if match.problems:
        fit = "does not fit"
    elif match.unused_rows:
        fit = f"{match.unused_rows:,} of {match.rows:,} rows unused"
    else:
        fit = f"fits the {match.rows:,} rows"
    begins = "no begin id" if outline.bos_id is None else f"begins with {outline.bos_id}"
    stops = f"stops at {', '.join(map(str, match.stop_ids)) or 'nothing'}"
    return f"{outline.vocab_size:,} ids, {fit}; {begins}, {stops}; {_CHATS[outline.chat]}"


def _special_rows(rows: SpecialRows, special: dict[str, int]) -> str:
    if not rows.n_untrained:
        return f"{rows.checked} looked at, all trained"
    names = {id_: text for text, id_ in special.items()}
    ids = [*rows.zero, *(id_ for group in rows.identical for id_ in group)]
    shown = ", ".join(f"{names.get(id_, 'id')} {id_}" for id_ in ids[:_NAMED_ROWS])
    more = f" and {len(ids) - _NAMED_ROWS} more" if len(ids) > _NAMED_ROWS else ""
    kinds = [f"{len(rows.zero)} all zero"] if rows.zero else []
    if rows.identical:
        kinds.append(f"{len(ids) - len(rows.zero)} identical to another")
    return f"{rows.checked} looked at, {' and '.join(kinds)}: {shown}{more}"


def _parts(found: Inspection) -> Table:
    width, total = dtype_bytes(found.plan.dtype), found.cost.n_params
    stored = found.stored
    columns = ["parameters", "share"] + (["bytes as stored"] if stored else [])
    table = new_table(None, "part", *columns, f"bytes in {found.plan.dtype}")

    def row(name: str, n: int, n_stored: int, style: str = "") -> None:
        cells = [f"{n:,}", f"{n / total:.1%}"] + ([f"{n_stored:,}"] if stored else [])
        table.add_row(name, *cells, f"{n * width:,}", style=style)

    for name, n in found.cost.parts.items():
        row(PART_LABELS[name], n, stored.parts[name] if stored else 0)
    table.add_section()
    row("total", total, stored.n_bytes if stored else 0, "bold")
    return table


def _dtypes(stored: Stored) -> Table:
    table = new_table(None, "stored as", "tensors", "parameters", "bytes", "bits per value")
    for one in stored.dtypes:
        bits = 8 * one.n_bytes / max(one.params, 1)
        table.add_row(
            one.dtype, f"{one.tensors:,}", f"{one.params:,}", f"{one.n_bytes:,}", f"{bits:.2f}"
        )
    return table


def _plan(found: Inspection) -> Table:
    plan = found.plan
    table = new_table(None, "to run it", "bytes", "")

    def row(name: str, n: int, style: str = "", mark: str = "") -> None:
        table.add_row(name, f"{mark}{n:,}", format_bytes(n), style=style)

    row(f"weights, {plan.dtype}", plan.weights)
    sequences = f"{plan.batch:,} x " if plan.batch > 1 else ""
    row(f"KV cache, {sequences}{plan.context:,} tokens", plan.cache)
    row("activations of a step, about", plan.workspace, mark="~")
    table.add_section()
    row("total", plan.total, "bold")
    if plan.available is not None:
        lacking = "" if plan.total <= plan.available else "bold red"
        name = "free on this machine now" + (": not enough" if lacking else "")
        row(name, plan.available, lacking)
    return table

"""Jupyter notebooks (nbformat 3 and 4): one text per notebook, of prose, code and outputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from puna.data.extract_config import ExtractConfig
from puna.data.readers.records import UnusableError

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_FENCE_RUN = re.compile(r"^\s*(`{3,})", re.MULTILINE)
_IMAGE_DATA = re.compile(r"!\[([^\]]*)\]\((?:data:[^)]*|attachment:[^)]*)\)")


def extract_notebook(source: str, config: ExtractConfig) -> tuple[str, dict[str, Any]]:
    """Turn a notebook into text.

    Args:
        source: The JSON of the notebook.
        config: ``notebook_code`` and ``notebook_output_chars``.

    Returns:
        The cells in their order, a blank line between two; and ``language`` of the kernel.

    Raises:
        UnusableError: ``json`` with the byte offset of the damage, or ``schema``.
    """
    try:
        notebook = json.loads(source)
    except json.JSONDecodeError as error:
        offset = len(source[: error.pos].encode("utf-8", "surrogatepass"))
        raise UnusableError("json", f"the notebook is no JSON: {error}", offset) from error
    except (ValueError, RecursionError) as error:
        raise UnusableError("json", f"the notebook is no JSON: {error}") from error
    language = _language(notebook)
    is_script = config.notebook_code == "percent"
    pieces = []
    for cell in _cells(notebook):
        kind, text = cell.get("cell_type"), _text(cell.get("source", cell.get("input", "")))
        if kind == "heading":  # nbformat 3
            kind, text = "markdown", f"{'#' * int(cell.get('level') or 1)} {text}"
        if kind == "markdown":
            text = _IMAGE_DATA.sub(r"\1", text)
        if kind == "code":
            output = _outputs(cell, config.notebook_output_chars)
            pieces.append(_code(text, output, language, is_script))
        elif text.strip():
            pieces.append(_commented(text, "# %% [markdown]") if is_script else text.strip("\n"))
    whole = "\n\n".join(piece for piece in pieces if piece)
    return (f"{whole}\n" if whole else ""), {"language": language}


def _language(notebook: Any) -> str:
    """Return the language of the kernel, ``python`` when the notebook does not tell."""
    metadata = notebook.get("metadata") if isinstance(notebook, dict) else None
    for key, inner in (("language_info", "name"), ("kernelspec", "language")):
        entry = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(entry, dict) and isinstance(entry.get(inner), str) and entry[inner]:
            return entry[inner].lower()
    return "python"


def _cells(notebook: Any) -> Iterator[dict[str, Any]]:
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if cells is None and isinstance(notebook, dict) and "worksheets" in notebook:
        sheets = notebook["worksheets"]
        cells = [
            cell
            for sheet in (sheets if isinstance(sheets, list) else [])
            if isinstance(sheet, dict)
            for cell in sheet.get("cells", [])
        ]
    if not isinstance(cells, list):
        raise UnusableError("schema", "the file is JSON but no notebook: it has no list `cells`")
    for number, cell in enumerate(cells, 1):
        if not isinstance(cell, dict):
            raise UnusableError("schema", f"cell {number} of the notebook is no object")
        yield cell


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "".join(value)
    if isinstance(value, str):
        return value
    raise UnusableError("schema", "the source of a cell is neither text nor a list of lines")


def _outputs(cell: dict[str, Any], limit: int) -> str:
    """Return the plain-text outputs of a cell, cut at the limit with a mark."""
    outputs = cell.get("outputs")
    if not limit or not isinstance(outputs, list):
        return ""
    pieces = []
    for output in outputs:
        if not isinstance(output, dict):
            continue
        data = output.get("data")
        value = data.get("text/plain") if isinstance(data, dict) else output.get("text")
        if output.get("output_type") in ("error", "pyerr"):
            value = output.get("traceback")
            value = "\n".join(map(str, value)) if isinstance(value, list) else ""
        if value:
            pieces.append(_ANSI.sub("", _text(value)).rstrip("\n"))
    text = "\n".join(pieces)
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."


def _code(text: str, output: str, language: str, is_script: bool) -> str:
    text = text.strip("\n")
    if is_script:
        code = f"# %%\n{text}" if text.strip() else ""
        return f"{code}\n{_commented(output, '# Output:')}" if output else code
    code = _fenced(text, language) if text.strip() else ""
    return "\n\n".join(filter(None, (code, _fenced(output, "") if output else "")))


def _fenced(text: str, language: str) -> str:
    """Fence a text with more backticks than any line of it begins with."""
    longest = max((len(run) for run in _FENCE_RUN.findall(text)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _commented(text: str, head: str) -> str:
    lines = (f"# {line}".rstrip() for line in text.strip("\n").split("\n"))
    return "\n".join((head, *lines))

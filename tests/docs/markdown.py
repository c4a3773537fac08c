"""Finds and runs the code of a documentation page, so that no page can rot.

- a block with ``title="name"`` is written to a file of that name in the page's work folder;
- a ``console`` block runs each line that begins with ``$ ``; lines below it that are not commands
  must appear in its output when the block's info says ``check``;
- a ``python`` block without a title runs in one namespace per page;
- the commands of a ``console`` block with ``refused`` in its info must exit with 2.

A block whose info holds ``notest`` is shown only.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')
_INCLUDE = re.compile(r'^--8<-- "(?P<path>[^"]+)"$', re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 280


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its other words, its file name if any, its text and line."""

    language: str
    info: str
    title: str | None
    body: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        title = _TITLE.search(info)
        line = text.count("\n", 0, match.start()) + 1
        name = title["title"] if title else None
        body = _INCLUDE.sub(lambda include: (ROOT / include["path"]).read_text(), match["body"])
        found.append(Block(info.split()[0], info, name, body, line))
    return found


def run_page(page: Path, folder: Path) -> int:
    """Run a page's blocks in a folder; return how many commands and snippets ran."""
    namespace: dict[str, object] = {"__name__": "__docs__"}
    ran = 0
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        if "notest" in block.info.split():
            continue
        if block.title is not None:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.body, where, "exec"), namespace)
            ran += 1
        elif block.language == "console":
            ran += _run_console(block, folder, where)
    return ran


def _run_console(block: Block, folder: Path, where: str) -> int:
    ran = 0
    output = ""
    for line in block.body.splitlines():
        if line.startswith("$ "):
            code = 2 if "refused" in block.info.split() else 0
            output = _run(line.removeprefix("$ "), folder, where, code)
            ran += 1
        elif line.strip() and "check" in block.info.split():
            assert line.strip() in output, f"{where}: {line!r} is not in:\n{output}"
    return ran


def _run(command: str, folder: Path, where: str, expected_code: int) -> str:
    words = shlex.split(command, comments=True)
    stdin = None
    if words[0] == "echo":  # echo text | command
        bar = words.index("|")
        stdin, words = " ".join(words[1:bar]) + "\n", words[bar + 1 :]
    programs = {"puna": [sys.executable, "-m", "puna.cli.main"], "python": [sys.executable]}
    assert words[0] in programs, f"{where}: no rule to run {command!r}"
    done = subprocess.run(
        [*programs[words[0]], *words[1:]],
        cwd=folder,
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    shown = f"{where}: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == expected_code, shown
    return done.stdout + done.stderr

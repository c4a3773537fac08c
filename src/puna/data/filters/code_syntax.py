"""Does a file parse? Python, JSON, TOML, XML, YAML by their parsers, others by their brackets."""

from __future__ import annotations

import ast
import json
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator
from typing import ClassVar
from xml.parsers import expat

import numpy as np
from pydantic import Field

from puna.data.filters.base import FilterConfig, Finding, register
from puna.data.filters.batch import TextBatch

_BRACED = ("c", "cpp", "csharp", "go", "java", "javascript", "kotlin", "scala", "swift",
           "typescript")  # fmt: skip
_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?(?:\*/|\Z)|`(?:\\.|[^\\`])*`|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
    r"|[(){}\[\]]",
    re.DOTALL,
)
_MAX_YAML_DEPTH = 200
"""Collections in each other (ours)."""
_CLOSES = {")": "(", "]": "[", "}": "{"}


def unbalanced(text: str) -> int:
    """Count brackets without a partner, outside of comments and strings as C writes them.

    Not a parser: texts that it finds balanced may be wrong in any other way, and macros or regular
    expressions may hold brackets that mean nothing.
    """
    stack: list[str] = []
    n_alone = 0
    for match in _TOKEN.finditer(text):
        sign = match[0]
        if sign in "([{":
            stack.append(sign)
        elif sign in _CLOSES:
            if stack and stack[-1] == _CLOSES[sign]:
                stack.pop()
            else:
                n_alone += 1
    return n_alone + len(stack)


def _python(text: str) -> None:
    ast.parse(text)


def _xml(text: str) -> None:
    parser = expat.ParserCreate("utf-8")
    parser.Parse(text.encode(), True)


def _yaml(text: str) -> None:
    """Read the events of libyaml's parser: nothing is built, so no alias is ever expanded.

    Building even the tree of nodes recurses in C, and ends the process at some depth; nested
    brackets cost quadratic time. Hence the limit on the depth.
    """
    import yaml

    depth = 0
    anchors: set[str] = set()
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.DocumentStartEvent):
            anchors.clear()
        if isinstance(event, yaml.AliasEvent) and event.anchor not in anchors:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line}: the alias *{event.anchor} has no anchor before it")
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            anchors.add(event.anchor)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_YAML_DEPTH:
            raise RecursionError


def _yaml_error(error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    what = str(problem or error).partition("\n")[0]
    return what if mark is None else f"line {mark.line + 1}: {what}"


_PARSERS: dict[str, Callable[[str], object]] = {
    "python": _python, "json": json.loads, "toml": tomllib.loads, "xml": _xml, "yaml": _yaml,
}  # fmt: skip


def error_of(language: str, text: str) -> str | None:
    """Parse a text without running anything; return what is wrong, None if nothing.

    Args:
        language: ``python``, ``json``, ``toml``, ``xml`` or ``yaml``.
        text: UTF-8, a byte order mark is ignored.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like
            _PARSERS[language](text.removeprefix("\ufeff"))
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    except (ValueError, expat.ExpatError) as error:
        return str(error).partition("\n")[0]
    except (RecursionError, MemoryError):
        return "nested too deeply for the parser"
    except Exception as error:
        import yaml

        if not isinstance(error, yaml.YAMLError):
            raise
        return _yaml_error(error)
    return None


@register("code_syntax")
class CodeSyntax(FilterConfig):
    """Files that do not parse; the language is known by the file's extension or first line.

    Files of other languages, and those longer than `max_bytes`, pass. Python is that of the running
    interpreter: files for Python 2 fail.
    """

    reasons: ClassVar[dict[str, str]] = {
        "code_syntax.unparsed": "the parser of the language finds an error (the detail says which)",
        "code_syntax.unbalanced": "more brackets than `max_unbalanced` have no partner",
    }
    languages: tuple[str, ...] = ("python", "json", "toml", "xml", "yaml")
    """Languages that are parsed: of `python`, `json`, `toml`, `xml`, `yaml` (templates that only
    become YAML, such as those of Helm, fail)."""
    braced: tuple[str, ...] = _BRACED
    """Languages of which brackets are matched, outside of comments and strings."""
    max_unbalanced: int = Field(default=2, ge=0)
    """Largest number of brackets without a partner (ours: macros leave a few)."""
    max_bytes: int = Field(default=1_000_000, ge=1)
    """Larger files are not looked at (ours): a bound on time and memory."""

    def judge(self, docs: TextBatch) -> Iterator[Finding]:
        """Parse; the value is 1 for an error, or the number of brackets without a partner."""
        parsed = set(self.languages) & set(_PARSERS)
        errors, details = np.zeros(len(docs)), [""] * len(docs)
        alone = np.zeros(len(docs))
        sizes = np.diff(docs.texts.offsets)
        for index, (language, text) in enumerate(
            zip(docs.code_languages(), docs.strings(), strict=True)
        ):
            if not docs.alive[index] or sizes[index] > self.max_bytes:
                continue
            if language in parsed:
                error = error_of(language, text)
                errors[index], details[index] = error is not None, f"{language}, {error}"
            elif language in self.braced:
                alone[index] = unbalanced(text)
        yield Finding("code_syntax.unparsed", errors, 0.0, errors > 0, details)
        limit = float(self.max_unbalanced)
        yield Finding("code_syntax.unbalanced", alone, limit, alone > limit)

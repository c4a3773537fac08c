"""Documented names of a Python module, found in its syntax tree; nothing is imported."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from puna.data.readers.records import UnusableError

_MAX_SIGNATURE_CHARS = 300
_MAX_SUMMARY_CHARS = 300
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]`'\"][.!?])\s+(?=[A-Z`'\"(])")
_SIGNATURE_LINE = re.compile(r"^(\w+ = )?[\w.]+\(.*$")


@dataclass
class Documented:
    """A documented class, function or method.

    Attributes:
        name: Name inside the module, ``Counter.most_common``.
        signature: ``most_common(n=None)``, without ``self`` and annotations; empty when unknown.
        doc: The docstring, indentation removed.
        is_class: Whether this is a class.
        members: Documented public methods of a class.
    """

    name: str
    signature: str
    doc: str
    is_class: bool = False
    members: list[Documented] = field(default_factory=list)


def parse_module(source: bytes) -> tuple[str, list[Documented]]:
    """Return the docstring of a module and its documented public classes and functions.

    Args:
        source: Python source in any encoding that it declares.

    Raises:
        UnusableError: The source is not valid Python (``syntax``).
    """
    tree = parse(source)
    public = all_names(tree.body)
    found: dict[str, Documented] = {}
    for node in _definitions(tree.body):
        is_public = node.name in public if public is not None else not node.name.startswith("_")
        if is_public and node.name not in found:
            documented = _document(node, node.name)
            if documented is not None:
                found[node.name] = documented
    for name, documented in _bound_methods(tree.body, found):
        if name in public if public is not None else not name.startswith("_"):
            found.setdefault(name, documented)
    return ast.get_docstring(tree) or "", list(found.values())


def parse(source: bytes) -> ast.Module:
    """Parse Python source.

    Raises:
        UnusableError: The source is not valid Python (``syntax``).
    """
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are large and free of cycles: collections cost a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableError("syntax", f"{type(error).__name__}: {error}") from error
    finally:
        if collecting:
            gc.enable()


def summarise(doc: str) -> str:
    """Return the first sentence of a docstring, on one line.

    Lines that only repeat the signature (as in many C extensions) and examples are passed over.
    """
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        lines = paragraph.strip().split("\n")
        while lines and _SIGNATURE_LINE.match(lines[0].strip()):
            lines.pop(0)
        text = " ".join(" ".join(lines).split())
        if text and not text.startswith(">>>"):
            sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
            if len(sentence) <= _MAX_SUMMARY_CHARS:
                return sentence
            return f"{sentence[: _MAX_SUMMARY_CHARS - 3].rsplit(' ', 1)[0]}..."
    return ""


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, also those under ``if`` and ``try``, not inside functions."""
    for node in body:
        if isinstance(node, ast.If):
            yield from statements(node.body)
            yield from statements(node.orelse)
        elif isinstance(node, ast.Try):
            yield from statements(node.body)
            for handler in node.handlers:
                yield from statements(handler.body)
            yield from statements(node.orelse)
        else:
            yield node


def _definitions(body: Sequence[ast.stmt]) -> Iterator[_Definition]:
    for node in statements(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def all_names(body: Sequence[ast.stmt]) -> set[str] | None:
    """Return the names in ``__all__`` when it is one literal; None otherwise."""
    found: set[str] | None = None
    for node in body:
        if isinstance(node, ast.AugAssign) and _is_all(node.target):
            return None
        if isinstance(node, ast.Assign) and any(_is_all(target) for target in node.targets):
            if found is not None or not isinstance(node.value, ast.List | ast.Tuple):
                return None
            values = [e.value for e in node.value.elts if isinstance(e, ast.Constant)]
            found = {value for value in values if isinstance(value, str)}
    return found


def _is_all(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "__all__"


def _bound_methods(
    body: Sequence[ast.stmt], found: Mapping[str, Documented]
) -> Iterator[tuple[str, Documented]]:
    """Find functions that are methods of a module-level object, as in ``random``.

    ``_inst = Random()`` and ``randint = _inst.randint`` make ``randint`` a documented function.
    """
    classes: dict[str, str] = {}
    for node in body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        target, value = node.targets[0].id, node.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            classes[target] = value.func.id
        elif isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            owner = found.get(classes.get(value.value.id, ""))
            for member in owner.members if owner is not None else ():
                if member.name.rpartition(".")[2] == value.attr == target:
                    yield target, Documented(target, member.signature, member.doc)


def _document(node: _Definition, name: str) -> Documented | None:
    doc = (ast.get_docstring(node) or "").strip()
    if not isinstance(node, ast.ClassDef):
        return Documented(name, _signature(node), doc) if doc else None
    members, signature = [], ""
    seen: set[str] = set()
    for member in _definitions(node.body):
        if isinstance(member, ast.ClassDef):
            continue
        if member.name == "__init__" and not signature:
            signature = _signature(member, node.name, skip_first=True)
        if member.name.startswith("_") or member.name in seen:
            continue
        member_doc = (ast.get_docstring(member) or "").strip()
        if member_doc:
            seen.add(member.name)
            members.append(Documented(f"{name}.{member.name}", _method(member), member_doc))
    if not doc and not members:
        return None
    return Documented(name, signature, doc, True, members)


def _method(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a method's signature without ``self``; empty for a property."""
    names = [d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "")
             for d in node.decorator_list]  # fmt: skip
    if any(name.endswith("property") for name in names) or "setter" in names:
        return ""
    return _signature(node, skip_first="staticmethod" not in names)


def _signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef, name: str = "", *, skip_first: bool = False
) -> str:
    arguments = node.args
    for argument in (
        *arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
        *filter(None, (arguments.vararg, arguments.kwarg)),
    ):  # fmt: skip
        argument.annotation = None
    if skip_first:
        if arguments.posonlyargs:
            del arguments.posonlyargs[0]
        elif arguments.args:
            del arguments.args[0]
        n_positional = len(arguments.posonlyargs) + len(arguments.args)
        del arguments.defaults[: len(arguments.defaults) - n_positional]
    text = f"{name or node.name}({ast.unparse(arguments)})"
    return text if len(text) <= _MAX_SIGNATURE_CHARS else f"{name or node.name}(...)"


def signature_in(doc: str, name: str) -> str:
    """Return the signature that the first line of a docstring gives, or an empty text."""
    line = doc.split("\n", 1)[0].strip()
    found = re.match(rf"(?:\w+\.)*{re.escape(name)}(\(.*?\))(?:\s*(?:-|=|\u2014).*)?$", line)
    return f"{name}{found[1]}" if found else ""


def clean(doc: str) -> str:
    """Remove the indentation that a docstring has from its place in the source."""
    return inspect.cleandoc(doc)

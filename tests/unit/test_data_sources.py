"""Sources: listing, patterns, sampling, docstrings, public names, user files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import fsspec
import pytest
from pydantic import TypeAdapter, ValidationError

from puna.core.config import Config, identity
from puna.core.errors import PunaError
from puna.data.readers.records import BadRecord, RawRecord
from puna.data.sources import (
    SOURCES,
    AnySourceConfig,
    PluginConfig,
    WorkItem,
    list_source,
    open_source,
    register_source,
)
from puna.data.sources.base import SourceConfig
from puna.data.sources.builtin_names import available_modules, describe_module
from puna.data.sources.docstrings import parse_module, signature_in, summarise
from puna.data.sources.files import FilesConfig
from puna.data.sources.python_code import PythonCodeConfig
from puna.data.sources.python_docs import PythonDocsConfig
from puna.data.sources.python_reference import PythonReferenceConfig, module_parts
from puna.data.sources.reexports import Publisher
from puna.data.sources.select import compile_pattern, fixed_prefix, select_items
from puna.data.sources.walk import logical

# patterns and sampling


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("*.py", "a.py", True),
        ("*.py", ".hidden.py", True),
        ("*.py", "a/b.py", False),
        ("**/*.py", "b.py", True),
        ("**/*.py", "a/b/c.py", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("x?.t[xy]t", "xa.tyt", True),
        ("x[!a].txt", "xa.txt", False),
        ("{a,b}/*.{md,txt}", "b/x.md", True),
        ("{a,b}/*.{md,txt}", "c/x.md", False),
        ("a,b", "a,b", True),
        ("a+b(c).txt", "a+b(c).txt", True),
        ("[[]x]", "[x]", True),
    ],
)
def test_patterns(pattern, path, fits):
    assert bool(compile_pattern(pattern).fullmatch(path)) is fits


@pytest.mark.parametrize("pattern", ["a[b", "{a,b", "[z-a]"])
def test_a_broken_pattern_is_named(pattern):
    with pytest.raises(PunaError, match="pattern"):
        compile_pattern(pattern)


def test_fixed_prefix():
    assert fixed_prefix("a/b*/c") == "a"
    assert fixed_prefix("*.x") == ""
    assert fixed_prefix("/*.x") == "/"
    assert fixed_prefix("s3://bucket/a/*.x") == "s3://bucket/a"


def items(n: int) -> list[WorkItem]:
    return [WorkItem(f"{i % 7}/file{i}", f"/x/{i}", 10 + i % 5) for i in range(n)]


def test_a_sample_does_not_depend_on_the_listing():
    config = SourceConfig(name="x", max_bytes=400)
    sample = select_items(items(200), config)
    assert sample == select_items(reversed(items(200)), config)
    assert 380 <= sum(item.n_bytes for item in sample) <= 400
    assert [item.path for item in sample] == sorted(item.path for item in sample)
    moved = [WorkItem(item.path, f"/elsewhere{item.location}", item.n_bytes) for item in items(200)]
    assert [i.path for i in select_items(moved, config)] == [i.path for i in sample]
    listed = [item.path for item in sorted(items(200), key=lambda item: item.path)]
    assert [item.path for item in sample] != listed[: len(sample)]


def test_a_larger_sample_by_number_holds_the_smaller_one():
    small = select_items(items(200), SourceConfig(name="x", max_files=20))
    large = select_items(items(200), SourceConfig(name="x", max_files=50))
    assert len(small) == 20
    assert set(small) < set(large)


def test_first_include_and_exclude():
    config = SourceConfig(
        name="x", first=("3/*",), include=("[0-5]/*",), exclude=("*/file1*",), max_files=25
    )
    chosen = select_items(items(200), config)
    expected = {i.path for i in items(200) if i.path.startswith("3/") and "/file1" not in i.path}
    assert expected <= {item.path for item in chosen}
    assert len(chosen) == 25
    assert not [item for item in chosen if item.path.startswith("6/") or "/file1" in item.path]


def test_twins_are_refused():
    twins = [WorkItem("a", "/x/a", 1), WorkItem("a", "/y/a", 1)]
    with pytest.raises(PunaError, match=r"/x/a and /y/a have the same path 'a'"):
        select_items(twins, SourceConfig(name="x"))


def test_names_that_are_no_unicode():
    assert logical(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert logical("café") == "café"


# the Python installation


def test_python_code_lists_stdlib_and_packages_but_not_puna():
    found = {item.path: item for item in list_source(PythonCodeConfig())}
    assert "stdlib/os.py" in found
    assert "stdlib/json/__init__.py" in found
    assert "site-packages/pydantic/main.py" in found
    assert not [path for path in found if path.startswith("site-packages/puna")]
    assert not [path for path in found if "__pycache__" in path or "site-packages/site-" in path]
    assert found["stdlib/os.py"].n_bytes == os.path.getsize(os.__file__)
    config = PythonCodeConfig()
    (record,) = open_source(config).read(found["site-packages/pydantic/main.py"])
    assert isinstance(record, RawRecord)
    assert record.metadata == {"package": "pydantic"}
    assert b"class BaseModel" in record.content


def test_a_file_of_the_machine_that_is_gone_is_set_aside():
    for config in (PythonCodeConfig(), PythonReferenceConfig(), PythonDocsConfig()):
        gone = WorkItem("stdlib/gone.py", "/no/such/file.py", 5)
        (record,) = open_source(config).read(gone)
        assert isinstance(record, BadRecord)
        assert record.reason == "unreadable"


MODULE = b'''"""The module."""
import os
__all__ = ["join", "Tool", "randint", "alias"]

def join(a: str, *p: str, sep="/") -> str:
    """Join parts. Use a separator."""

def hidden():
    """Not exported."""

if os.name == "posix":
    class Tool(Base):
        def __init__(self, size=1, *, fast: bool = False):
            pass

        def run(self, job):
            """Run a job.

            At once."""

        @classmethod
        def make(cls): "Make a tool."

        @staticmethod
        def check(x): "Check a value."

        @property
        def size(self): "The size."

        def _private(self): "No."

        def randint(self, a, b=2): "A random number."
else:
    class Tool:
        "Another one."

_inst = Tool()
randint = _inst.randint
alias = _inst.run
'''


def test_docstrings_of_a_module():
    doc, (join, tool, randint) = parse_module(MODULE)
    assert doc == "The module."
    assert (join.name, join.signature) == ("join", "join(a, *p, sep='/')")
    assert (tool.signature, tool.doc) == ("Tool(size=1, *, fast=False)", "")
    assert [(m.name, m.signature) for m in tool.members] == [
        ("Tool.run", "run(job)"),
        ("Tool.make", "make()"),
        ("Tool.check", "check(x)"),
        ("Tool.size", ""),
        ("Tool.randint", "randint(a, b=2)"),
    ]
    assert (randint.name, randint.signature) == ("randint", "randint(a, b=2)")


@pytest.mark.parametrize("source", [b"def (", b"x = '\0'", b"\xff\xfe", b"(" * 10_000])
def test_source_that_does_not_parse_is_set_aside(source, tmp_path):
    path = tmp_path / "m.py"
    path.write_bytes(source)
    item = WorkItem("site-packages/m.py", str(path), len(source))
    (record,) = open_source(PythonReferenceConfig()).read(item)
    assert isinstance(record, BadRecord)
    assert record.reason == "syntax"


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Join parts. Use a separator.", "Join parts."),
        ("Return x\nand more, e.g. this one.\n\nDetails.", "Return x and more, e.g. this one."),
        ("f(x) -> int\n\nReturn 1.", "Return 1."),
        ("f(x)\nf(x, y)\nReturn 1.", "Return 1."),
        ("", ""),
        (">>> f()\n1\n\nCount.", "Count."),
        ("A" + " b" * 400, "A" + " b" * 147 + "..."),
    ],
)
def test_summaries(doc, summary):
    assert summarise(doc) == summary


def test_signatures_in_docstrings():
    assert signature_in("pack(fmt, v1, ...) -> bytes\n\nPack.", "pack") == "pack(fmt, v1, ...)"
    assert signature_in("deque([iterable]) --> deque object", "deque") == "deque([iterable])"
    assert signature_in("Pack values (fast).", "pack") == ""


def test_builtin_names():
    assert {"builtins", "math", "posix"} <= set(available_modules())
    _, objects = describe_module("builtins")
    found = {item.name: item for item in objects}
    assert found["len"].signature == "len(obj, /)"
    assert "str.join" in {member.name for member in found["str"].members}
    assert found["str"].is_class


def reference(path: str, location: str, **options) -> list[RawRecord]:
    records = list(open_source(PythonReferenceConfig(**options)).read(WorkItem(path, location, 1)))
    assert all(isinstance(record, RawRecord) for record in records)
    return records


def test_reference_documents_of_well_known_names():
    import posixpath

    records = reference("stdlib/posixpath.py", posixpath.__file__, min_object_chars=150)
    by_path = {record.path: record for record in records}
    joined = by_path["stdlib/posixpath.py#join"]
    assert joined.metadata == {
        "kind": "docstring",
        "name": "os.path.join",
        "signature": "join(a, *p)",
        "summary": "Join two or more pathname components, inserting '/' as needed.",
        "package": "stdlib",
    }
    assert joined.content.startswith("os.path.join(a, *p)\n\nJoin two or more")
    module = by_path["stdlib/posixpath.py"]
    entries = {entry["name"]: entry for entry in module.metadata["entries"]}
    assert module.metadata["name"] == "os.path"
    assert entries["os.path.basename"]["summary"] == "Returns the final component of a pathname"
    assert "os.path.basename(p)\n\n    Returns the final component" in module.content


def test_reference_items_hold_topics_builtins_and_only_public_modules():
    paths = {item.path for item in list_source(PythonReferenceConfig(packages=False))}
    assert {"topics", "builtin/builtins", "stdlib/posixpath.py", "stdlib/json/decoder.py"} <= paths
    assert not paths & {"stdlib/ntpath.py", "stdlib/test/test_os.py", "stdlib/this/_x.py"}
    topic = {record.path: record for record in reference("topics", "topics")}["topics#with"]
    assert topic.metadata["kind"] == "topic"
    assert topic.content.startswith('The "with" statement')


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("stdlib/os.py", ("os",)),
        ("stdlib/json/__init__.py", ("json",)),
        ("stdlib/concurrent/futures/_base.py", ("concurrent", "futures", "_base")),
        ("site-packages/numpy/_core/numeric.py", ("numpy", "_core", "numeric")),
        ("site-packages/pip/_internal/x.py", None),
        ("site-packages/x/tests/y.py", None),
        ("site-packages/_distutils_hack/x.py", None),
        ("site-packages/not-a-name/x.py", None),
        ("stdlib/_bootlocale.py", None),
        ("stdlib/x.pyi", None),
    ],
)
def test_module_names(path, parts):
    assert module_parts(path) == parts


def test_public_names_follow_the_packages_above(tmp_path):
    inner = tmp_path / "pack" / "nn" / "modules"
    inner.mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text("from .nn._lazy import Lazy\n")
    (tmp_path / "pack" / "nn" / "__init__.py").write_text(
        "from pack.nn.modules import *\n__all__ = ['Listed']\n"
    )
    (inner / "__init__.py").write_text("from .linear import (Linear, Hidden as _Hidden)\n")
    linear = Publisher(str(inner / "linear.py"), ["pack", "nn", "modules", "linear"])
    assert linear.public_module("Linear") == "pack.nn"
    assert linear.public_module("Hidden") == "pack.nn.modules.linear"
    lazy = Publisher(str(tmp_path / "pack" / "nn" / "_lazy.py"), ["pack", "nn", "_lazy"])
    assert lazy.public_module("Lazy") == "pack"
    assert lazy.public_module("Listed") == "pack.nn"
    assert lazy.public_module("Nothing") is None
    init = Publisher(str(inner / "__init__.py"), ["pack", "nn", "modules"])
    assert init.public_module("anything") == "pack.nn"


def test_python_docs_describe_packages_and_the_system(tmp_path):
    manual = tmp_path / "man"
    (manual / "de" / "man1").mkdir(parents=True)
    (manual / "de" / "man1" / "x.1").write_text(".SH NAME\nx \\- Beispiel\n")
    (manual / "picture.png").write_bytes(b"\x89PNG")
    (manual / "link.1").symlink_to("de/man1/x.1")
    config = PythonDocsConfig(folders=(str(manual), str(tmp_path / "absent")))
    found = {item.path: item for item in list_source(config)}
    assert [path for path in found if path.startswith("man/")] == ["man/de/man1/x.1"]
    source = open_source(config)
    (page,) = source.read(found["man/de/man1/x.1"])
    assert (page.media_type, page.metadata) == ("text/troff", {"language": "de"})
    (described,) = source.read(found["distributions/pydantic/METADATA"])
    assert described.media_type == "text/markdown"
    assert described.metadata["package"] == "pydantic"
    assert described.metadata["version"]
    assert not described.content.startswith(b"Metadata-Version")
    assert b"Pydantic" in described.content
    assert not [path for path in found if path.startswith("distributions/puna")]


# files of users


def paths_of(*paths: str, **options) -> list[str]:
    return [item.path for item in list_source(FilesConfig(name="x", paths=paths, **options))]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    files = {"a.txt": "a", "sub/b.txt": "b", "_c.txt": "c", ".d.txt": "d", "sub/e.md": "e"}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_files_folders_and_patterns(corpus):
    everything = [".d.txt", "_c.txt", "a.txt", "sub/b.txt", "sub/e.md"]
    assert paths_of(str(corpus)) == everything
    assert paths_of(f"{corpus}/") == everything
    assert paths_of(f"{corpus}/**") == everything
    assert paths_of(f"file://{corpus}") == everything
    assert paths_of(f"{corpus}/**/*.md") == ["sub/e.md"]
    assert paths_of(f"{corpus}/*.txt") == [".d.txt", "_c.txt", "a.txt"]
    assert paths_of(f"file://{corpus}/*.txt") == [".d.txt", "_c.txt", "a.txt"]
    assert paths_of(f"{corpus}/sub/b.txt") == ["b.txt"]
    assert paths_of(str(corpus), exclude=("**/*.txt",)) == ["sub/e.md"]


def test_relative_paths_and_roots(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert paths_of("*.txt") == [".d.txt", "_c.txt", "a.txt"]
    assert paths_of("sub") == ["b.txt", "e.md"]
    assert paths_of("./sub/*.md") == ["e.md"]
    assert paths_of("sub/*.md", "*.txt", root=str(corpus)) == [
        ".d.txt", "_c.txt", "a.txt", "sub/e.md",
    ]  # fmt: skip
    with pytest.raises(PunaError, match="not below `root`"):
        paths_of(f"{corpus}/a.txt", root=f"{corpus}/sub")


def test_a_moved_corpus_keeps_its_paths_and_fingerprint(corpus, tmp_path):
    here = FilesConfig(name="x", paths=("**/*.txt",), root=str(corpus))
    moved = tmp_path / "elsewhere"
    os.rename(corpus, moved)
    there = FilesConfig(name="x", paths=("**/*.txt",), root=str(moved))
    assert identity(here) == identity(there)
    assert [i.path for i in list_source(there)] == [".d.txt", "_c.txt", "a.txt", "sub/b.txt"]


def test_files_named_twice_or_ambiguously(corpus):
    assert paths_of(f"{corpus}/*.txt", f"{corpus}/**/*.txt") == [
        ".d.txt", "_c.txt", "a.txt", "sub/b.txt",
    ]  # fmt: skip
    with pytest.raises(PunaError, match="listed twice"):
        paths_of(f"{corpus}/**/*.md", f"{corpus}/sub/e.md")
    (corpus / "sub" / "a.txt").write_text("other")
    with pytest.raises(PunaError, match=r"have the same path 'a\.txt'"):
        paths_of(f"{corpus}/a.txt", f"{corpus}/sub/a.txt")


def test_what_matches_nothing_is_named(corpus):
    for missing in (f"{corpus}/*.jsonl", f"{corpus}/none", "memory://nothing/*.txt"):
        with pytest.raises(PunaError, match="matches no file") as caught:
            paths_of(f"{corpus}/a.txt", missing)
        assert missing in caught.value.message


def test_links_are_followed_once_and_broken_ones_are_noticed(corpus):
    (corpus / "loop").symlink_to(corpus)
    (corpus / "linked").symlink_to(corpus / "sub")
    (corpus / "broken.txt").symlink_to(corpus / "gone.txt")
    found = paths_of(str(corpus))
    assert "broken.txt" in found
    assert len([path for path in found if path.endswith("b.txt")]) == 1
    config = FilesConfig(name="x", paths=(str(corpus),))
    broken = next(item for item in list_source(config) if item.path == "broken.txt")
    with pytest.raises(PunaError, match=r"broken\.txt: no such file"):
        list(open_source(config).read(broken))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PunaError, match="no regular file"):
        paths_of(f"{tmp_path}/pipe")


def test_names_with_pattern_characters(corpus):
    (corpus / "x[1].txt").write_text("x")
    assert paths_of(f"{corpus}/x[1].txt") == ["x[1].txt"]


@contextlib.contextmanager
def without_rights(path):
    """Take the rights on a path away; root becomes an ordinary user for the time."""
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o755)


def test_files_and_folders_without_permission(corpus):
    file = FilesConfig(name="x", paths=(f"{corpus}/a.txt",))
    folder = FilesConfig(name="x", paths=(f"{corpus}/**",))
    (item,) = list_source(file)
    with without_rights(corpus / "a.txt"), pytest.raises(PunaError, match=r"a\.txt: permission"):
        list(open_source(file).read(item))
    with without_rights(corpus / "sub"), pytest.raises(PunaError, match="permission denied"):
        list_source(folder)


def test_an_object_store():
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/in/_x.jsonl", b'{"text": "one"}\n')
    fs.pipe("/bucket/in/deep/y.txt", b"two")
    try:
        config = FilesConfig(name="x", paths=("memory://bucket/in/**",))
        found = list_source(config)
        assert [item.path for item in found] == ["_x.jsonl", "deep/y.txt"]
        source = open_source(config)
        texts = [record.content for item in found for record in source.read(item)]
        assert texts == ["one", b"two"]
        single = FilesConfig(name="x", paths=("memory://bucket/in/deep/y.txt",))
        assert [item.path for item in list_source(single)] == ["y.txt"]
        rooted = FilesConfig(name="x", paths=("in/*.jsonl",), root="memory://bucket")
        assert [item.path for item in list_source(rooted)] == ["in/_x.jsonl"]
    finally:
        fs.rm("/bucket", recursive=True)


def test_an_unknown_store_and_format(corpus):
    with pytest.raises(PunaError, match="nosuch"):
        paths_of("nosuch://bucket/*.txt")
    (corpus / "x.weird").write_text("x")
    config = FilesConfig(name="x", paths=(f"{corpus}/x.weird",))
    (record,) = open_source(config).read(list_source(config)[0])
    assert isinstance(record, BadRecord)
    assert record.reason == "format"
    named = FilesConfig(name="x", paths=(f"{corpus}/x.weird",), format="text")
    (record,) = open_source(named).read(list_source(named)[0])
    assert record.content == b"x"


# configuration and plugins


def test_the_configuration_union():
    adapter = TypeAdapter(AnySourceConfig)
    config = adapter.validate_python({"kind": "python-code", "max_files": 5})
    assert isinstance(config, PythonCodeConfig)
    assert config.name == "code"
    for bad in (
        {"kind": "nosuch"},
        {"kind": "files", "name": "x", "paths": []},
        {"kind": "files", "paths": ["a"]},
        {"kind": "files", "name": "a/b", "paths": ["a"]},
        {"kind": "files", "name": "x", "paths": ["a"], "encoding": "utf-16"},
        {"kind": "files", "name": "x", "paths": ["a"], "encoding": "nosuch"},
        {"kind": "python-code", "name": "Not Good"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


class CountConfig(Config):
    """Numbers."""

    n: int
    """How many."""


class CountSource:
    def __init__(self, config: CountConfig) -> None:
        self.n = config.n

    def list_items(self) -> Iterator[WorkItem]:
        yield WorkItem("numbers", "", 1)

    def read(self, item: WorkItem) -> Iterator[RawRecord | BadRecord]:
        for i in range(self.n):
            yield RawRecord(f"{item.path}#{i}", "text/plain", str(i), 1)


@pytest.fixture
def counting():
    register_source("test-count", CountConfig, CountSource)
    yield
    del SOURCES._entries["test-count"]


@pytest.mark.usefixtures("counting")
def test_a_plugin():
    config = PluginConfig(name="numbers", plugin="test-count", options={"n": 3})
    (item,) = list_source(config)
    assert [record.content for record in open_source(config).read(item)] == ["0", "1", "2"]
    with pytest.raises(PunaError, match=r"options\.n: .*integer"):
        list_source(PluginConfig(name="numbers", plugin="test-count", options={"n": "many"}))
    with pytest.raises(PunaError, match="did you mean 'test-count'") as caught:
        list_source(PluginConfig(name="numbers", plugin="test-cont"))
    assert "document source" in caught.value.message


def test_a_store_without_its_package_says_what_to_install(monkeypatch):

    def no_driver(url, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_driver)
    config = FilesConfig(name="web", paths=("s3://bucket/crawl/*.jsonl",))
    with pytest.raises(PunaError, match="needs the package s3fs") as caught:
        list(open_source(config).list_items())
    assert "puna[s3]" in str(caught.value)

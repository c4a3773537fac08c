"""The programming language of a document, by its path or its first line."""

from __future__ import annotations

import re

EXTENSIONS: dict[str, str] = {
    extension: language
    for language, extensions in {
        "assembly": "asm s", "batchfile": "bat cmd", "c": "c h", "cpp": "cc cpp cxx c++ hh hpp hxx",
        "csharp": "cs", "css": "css scss sass less", "dart": "dart", "elixir": "ex exs",
        "erlang": "erl hrl", "fortran": "f f77 f90 f95 f03 f08 for", "go": "go",
        "graphviz": "dot gv", "groovy": "groovy gradle", "haskell": "hs", "html": "html htm xhtml",
        "java": "java", "javascript": "js mjs cjs jsx", "json": "json", "julia": "jl",
        "kotlin": "kt kts", "lisp": "lisp lsp el clj cljs scm rkt", "lua": "lua",
        "markdown": "md markdown", "ocaml": "ml mli", "owl": "owl", "perl": "pl pm t",
        "php": "php php3 php4 php5 phtml", "powershell": "ps1 psm1 psd1", "python": "py pyi pyw",
        "r": "r", "roff": "roff man 1 2 3 4 5 6 7 8 9", "rst": "rst", "ruby": "rb rake gemspec",
        "rust": "rs", "scala": "scala sc", "shell": "sh bash zsh ksh", "smt": "smt smt2",
        "sql": "sql", "swift": "swift", "tex": "tex sty cls", "text": "txt", "toml": "toml",
        "typescript": "ts tsx mts cts", "vhdl": "vhd vhdl", "verilog": "v sv svh",
        "webassembly": "wat wast", "xml": "xml xsd xsl xslt svg", "yaml": "yaml yml",
        "notebook": "ipynb", "zig": "zig",
    }.items()
    for extension in extensions.split()
}  # fmt: skip
"""File extension in lower case -> language."""
_NAMES = {"makefile": "makefile", "dockerfile": "dockerfile", "cmakelists.txt": "cmake"}
_SHEBANG = re.compile(r"#!\s*\S*?(?:/env\s+(?:-\S+\s+)*)?/?([a-z]+)[0-9.]*(?:\s|$)")
_INTERPRETERS = {
    "python": "python", "pypy": "python", "sh": "shell", "bash": "shell", "dash": "shell",
    "zsh": "shell", "ksh": "shell", "perl": "perl", "ruby": "ruby", "node": "javascript",
    "php": "php", "lua": "lua", "rscript": "r", "julia": "julia",
}  # fmt: skip


def language_of(path: str | None, text: str) -> str | None:
    """Name the language of a document, None when it is not known.

    Args:
        path: Its path or URL; what follows ``#`` (``file.jsonl#12``) names a record, not a file.
        text: Its text, of which the first line may name an interpreter.
    """
    name = (path or "").partition("#")[0].partition("?")[0].rpartition("/")[2].lower()
    if name in _NAMES:
        return _NAMES[name]
    stem, _, extension = name.rpartition(".")
    if stem and extension in EXTENSIONS:
        return EXTENSIONS[extension]
    if text.startswith("#!"):
        found = _SHEBANG.match(text[:200].lower())
        return _INTERPRETERS.get(found[1]) if found else None
    return None

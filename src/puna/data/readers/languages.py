"""Programming languages by file name. Names are those of GitHub's Linguist, in lower case."""

from __future__ import annotations

_SUFFIXES = {
    "ada": "adb ads", "assembly": "asm s", "awk": "awk", "c": "c h", "c#": "cs csx",
    "c++": "cc cpp cxx c++ hh hpp hxx h++ ipp tpp inl", "clojure": "clj cljs cljc edn",
    "cmake": "cmake", "coffeescript": "coffee", "common lisp": "lisp cl lsp", "coq": "coq",
    "css": "css", "cuda": "cu cuh", "cython": "pyx pxd pxi", "d": "d di", "dart": "dart",
    "elixir": "ex exs", "elm": "elm", "emacs lisp": "el", "erlang": "erl hrl",
    "f#": "fs fsi fsx", "fortran": "f f77 f90 f95 f03 f08 for", "glsl": "glsl vert frag comp",
    "go": "go", "graphql": "graphql gql", "groovy": "groovy gradle", "haskell": "hs lhs",
    "hcl": "hcl tf tfvars", "idris": "idr", "java": "java", "javascript": "js mjs cjs jsx",
    "julia": "jl", "kotlin": "kt kts", "less": "less", "lua": "lua", "makefile": "mk mak",
    "mlir": "mlir", "nim": "nim nims", "nix": "nix", "objective-c": "m",
    "objective-c++": "mm", "ocaml": "ml mli", "pascal": "pas pp lpr dpr", "perl": "pl pm t",
    "php": "php phtml", "powershell": "ps1 psm1 psd1", "prolog": "pro prolog",
    "protocol buffer": "proto", "python": "py pyi pyw", "r": "r", "racket": "rkt",
    "ruby": "rb rake gemspec", "rust": "rs", "scala": "scala sc", "scheme": "scm ss sld",
    "scss": "scss sass", "shell": "sh bash zsh ksh fish", "sql": "sql", "standard ml": "sml sig",
    "starlark": "bzl star", "svelte": "svelte", "swift": "swift", "tcl": "tcl", "thrift": "thrift",
    "typescript": "ts tsx mts cts", "verilog": "v sv svh vh", "vhdl": "vhd vhdl",
    "vim script": "vim", "vue": "vue", "webassembly": "wat wast", "zig": "zig",
}  # fmt: skip
_NAMES = {
    "makefile": "makefile", "gnumakefile": "makefile", "dockerfile": "dockerfile",
    "containerfile": "dockerfile", "cmakelists.txt": "cmake", "meson.build": "meson",
    "meson_options.txt": "meson", "rakefile": "ruby", "gemfile": "ruby", "build.bazel": "starlark",
    "workspace.bazel": "starlark", "build": "starlark", "sconstruct": "python",
    "jenkinsfile": "groovy", "justfile": "just",
}  # fmt: skip
_BY_SUFFIX = {
    suffix: language
    for language, suffixes in _SUFFIXES.items()
    for suffix in suffixes.split()
    if "." not in suffix
}


def language_of(path: str) -> str | None:
    """Tell the language of a program from its path; None when the name tells none.

    ``.h`` counts as C and ``.m`` as Objective-C, whatever is inside.
    """
    name = path.rpartition("/")[2].lower()
    if name in _NAMES:
        return _NAMES[name]
    stem, dot, suffix = name.rpartition(".")
    return _BY_SUFFIX.get(suffix) if dot and stem else None


LANGUAGES = tuple(sorted({*_SUFFIXES, *_NAMES.values()}))
"""All languages that :func:`language_of` knows."""

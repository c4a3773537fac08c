"""Manual pages to text: a stripper for man(7) and mdoc(7) pages in any language.

It does not set pages; it keeps what a reader reads: titles, paragraphs (one line each, so that a
paragraph does not depend on how the source was wrapped), tags with their indented text,
preformatted blocks as they are, tables as rows. Macro names, fonts, escapes, comments, macro
definitions and the branches meant for typesetters go. Sources: groff_man(7), groff(7), tbl(1).
"""

from __future__ import annotations

import re

from puna.data.extract.roff_mdoc import MDOC_MACROS, Mdoc
from puna.data.extract.roff_page import Page
from puna.data.extract.troff_escapes import cut_comment, plain_text

_CONTINUED = re.compile(r"(?<!\\)((?:\\\\)*)\\\n")
_CONTROL = re.compile(r"[.'][ \t]*([^ \t\\!(]*)[ \t]*(.*)", re.DOTALL)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)(?:"|$)|((?:\\.|[^\s\\])+)')
_CONDITION = re.compile(
    r"(?P<negated>!?)[ \t]*(?:(?P<letter>[ntoev])(?=[\s\\.{]|$)"
    r"|[drcFmS][ \t]+\S+|(?P<quote>['\"])(?P<left>.*?)(?P=quote)(?P<right>.*?)(?P=quote)"
    r"|(?P<number>(?:\\n(?:\(..|\[[^\]]*\]|.)|[^\s\\])+))[ \t]*(?P<rest>.*)",
    re.DOTALL,
)
_FONT_WORDS = frozenset(("B", "I", "R", "SM", "SB", "C", "CW"))
_FONT_PAIRS = frozenset(("BI", "BR", "IB", "IR", "RB", "RI", "BC", "CB", "CI", "IC", "CR", "RC"))
_PARAGRAPHS = frozenset(("PP", "P", "LP", "HP", "Pp", "sp", "Sp"))
_VERBATIM_ON = frozenset(("nf", "EX", "Vb", "CS", "DS", "Bd"))
_VERBATIM_OFF = frozenset(("fi", "EE", "Ve", "CE", "DE"))
_BREAKS = frozenset(("br", "in", "ti", "ce", "bp", "ne", "YS", "SY", "UC", "DT"))
_SKIPPED_BLOCKS = {"ig": "", "EQ": "EN", "PS": "PE", "de": "", "am": "", "de1": "", "am1": ""}
_IGNORED = frozenset(
    ("IX", "IN", "PD", "AT", "HH", "TA", "VS", "VE", "BS", "BE", "AS", "LL", "LT", "PL", "PH",
     "XX", "EN", "PE", "ME", "UE", "UR", "MT", "TE", "TH")
)  # fmt: skip
_STRINGS = {
    "R": "®", "Tm": "™", "lq": "“", "rq": "”", "L\"": '"', "R\"": '"', "C'": "'", "C`": "`",
    "--": "—", "PI": "π", "S": "", "-": "-", "Aq": "'", "Lq": "“", "Rq": "”", "Ba": "|", "Le": "≤",
    "Ge": "≥", "Ne": "≠", "Lt": "<", "Gt": ">", "Am": "&", "Pm": "±", "q": '"',
}  # fmt: skip


def extract_roff(source: str) -> str:
    """Turn the source of a manual page into text.

    Args:
        source: Decoded troff source.

    Returns:
        Text; empty for a page that only refers to another (``.so man1/other.1``).
    """
    return _Stripper(source).run()


class _Stripper:
    def __init__(self, source: str) -> None:
        source = source.replace("\r\n", "\n").replace("\r", "\n")
        if "\\\n" in source:
            source = _CONTINUED.sub(r"\1", source)
        self._lines = source.split("\n")
        self._at = 0
        self._strings = dict(_STRINGS)
        self._was_true = True
        self._link = ""
        self.page = Page()
        self._mdoc = Mdoc(self.page)

    def run(self) -> str:
        while (line := self._next()) is not None:
            self._line(line)
        return self.page.finish()

    def _next(self) -> str | None:
        if self._at >= len(self._lines):
            return None
        self._at += 1
        return self._lines[self._at - 1]

    def _line(self, line: str) -> None:
        if line[:1] in (".", "'"):
            match = _CONTROL.match(line)
            if match is not None:
                self._request(match[1], match[2])
            return
        glued = line.endswith("\\c")
        self.page.text(self._plain(line), glued=glued)

    def _plain(self, text: str) -> str:
        return plain_text(cut_comment(text), self._strings) if "\\" in text else text

    def _arguments(self, rest: str) -> list[str]:
        rest = cut_comment(rest).strip()
        return [
            plain_text(
                m[1].replace('""', '"') if m[1] is not None else m[2], self._strings
            )
            for m in _ARGUMENT.finditer(rest)
        ]  # fmt: skip

    def _request(self, name: str, rest: str) -> None:
        page = self.page
        if name in _FONT_PAIRS:
            page.text("".join(self._arguments(rest)), glued=rest.endswith("\\c"))
        elif name in _FONT_WORDS:
            page.text(" ".join(self._arguments(rest)), glued=rest.endswith("\\c"))
        elif name in _PARAGRAPHS:
            page.paragraph(keep_hang=name in ("sp", "Sp"))
        elif name in MDOC_MACROS:
            self._mdoc.macro(name, self._arguments(rest))
        elif name in _VERBATIM_ON:
            page.verbatim(True)
        elif name in _VERBATIM_OFF:
            page.verbatim(False)
        elif name in ("if", "ie", "el", "while"):
            self._conditional(name, rest)
        elif name in _SKIPPED_BLOCKS:
            self._skip_block(name, rest)
        elif name not in _IGNORED or name in ("TH", "UR", "MT", "UE", "ME"):
            self._other(name, rest)

    def _other(self, name: str, rest: str) -> None:
        page = self.page
        if name in ("SH", "SS"):
            page.heading(" ".join(self._arguments(rest)))
        elif name == "TH":
            arguments = self._arguments(rest)
            page.title("{}({})".format(*arguments[:2]) if len(arguments) > 1 else "")
        elif name in ("TP", "TQ"):
            page.tag_follows(blank=name == "TP")
        elif name == "IP":
            page.tag(next(iter(self._arguments(rest)), ""))
        elif name in ("RS", "RE"):
            page.shift(1 if name == "RS" else -1)
        elif name == "TS":
            self._table()
        elif name in ("ds", "as", "ds1", "as1"):
            self._define_string(name, rest)
        elif name in _BREAKS:
            page.break_line()
            if name == "SY":
                page.text(" ".join(self._arguments(rest)))
        elif name[:1].isupper():
            self._words(name, self._arguments(rest))

    def _words(self, name: str, arguments: list[str]) -> None:
        """Handle macros that only print words, among them unknown ones (a page's own)."""
        if name in ("UR", "MT"):
            self._link = next(iter(arguments), "")
        elif name in ("UE", "ME"):
            self.page.text(f"<{self._link}>" + "".join(arguments))
        elif name == "OP":
            self.page.text(f"[{' '.join(arguments)}]")
        else:
            self.page.text(" ".join(arguments))

    def _define_string(self, name: str, rest: str) -> None:
        key, _, value = cut_comment(rest).partition(" ")
        value = value.lstrip(" ").removeprefix('"')
        self._strings[key] = (self._strings.get(key, "") if name[0] == "a" else "") + value

    def _conditional(self, name: str, rest: str) -> None:
        if name == "el":
            holds = not self._was_true
        else:
            match = _CONDITION.match(rest)
            if match is None:
                return
            holds, rest = _holds(match), match["rest"]
            if name == "while":
                holds = False
            self._was_true = holds
        if holds:
            rest = rest.lstrip("\\{ \t")
            if rest:
                self._line(rest)
            return
        depth = rest.count("\\{") - rest.count("\\}")
        while depth > 0 and (line := self._next()) is not None:
            depth += line.count("\\{") - line.count("\\}")

    def _skip_block(self, name: str, rest: str) -> None:
        """Skip to the end mark: ``..``, or the one that the request names."""
        words = rest.split()
        own_mark = words[0 if name == "ig" else 1 :][:1]
        end = _SKIPPED_BLOCKS[name] or (own_mark[0] if own_mark else ".")
        start = self._at
        while (line := self._next()) is not None:
            if line[:1] in (".", "'") and line[1:].lstrip(" \t").split(" ")[0].rstrip() == end:
                return
        self._at = start  # no end mark: a damaged page must not lose the rest

    def _table(self) -> None:
        separator, in_format, block = "\t", True, None
        while (line := self._next()) is not None and not line.startswith(".TE"):
            if in_format:
                if line.endswith(";"):
                    found = re.search(r"tab[ ]?\((.)\)", line)
                    separator = found[1] if found else separator
                elif line.rstrip().endswith("."):
                    in_format = False
            elif line.startswith(".T&"):
                in_format = True
            elif block is not None or line.endswith("T{"):
                block = self._block_line(line, block, separator)
            elif line[:1] not in (".", "'") and line.strip("_=- \t"):
                self._row(line, separator)

    def _block_line(self, line: str, block: str | None, separator: str) -> str | None:
        """Collect a cell of several lines (``T{`` to ``T}``); None when its row is complete."""
        if block is None:
            return line.removesuffix("T{")
        if line.startswith("T}"):
            rest = line[2:]
            if rest.endswith("T{"):
                return block + rest.removesuffix("T{")
            self._row(block + rest, separator)
            return None
        if line[:1] in (".", "'"):
            match = _CONTROL.match(line)
            known = match is not None and match[1] in (_FONT_WORDS | _FONT_PAIRS)
            if match is None or not known:
                return block
            glue = "" if match[1] in _FONT_PAIRS else " "
            line = glue.join(self._arguments(match[2]))
        return f"{block}{'' if block[-1:] in ('', separator) else ' '}{line}"

    def _row(self, line: str, separator: str) -> None:
        cells = (self._plain(cell).strip() for cell in line.split(separator))
        self.page.line(" | ".join(cell for cell in cells if cell and cell != "\\^"))


def _holds(match: re.Match[str]) -> bool:
    """Evaluate a condition for a terminal that is groff; unknown numeric ones are false."""
    if match["letter"]:
        value = match["letter"] in "no"
    elif match["quote"]:
        value = match["left"] == match["right"]
    else:
        number = match["number"] or ""
        value = number in ("\\n(.g", "\\n[.g]") or (number.isdigit() and int(number) > 0)
    return value != bool(match["negated"])

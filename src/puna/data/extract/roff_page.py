"""The page that the roff stripper fills: paragraphs, tags, headings, verbatim lines."""

from __future__ import annotations

import re

_INDENT = "    "
_MAX_INDENT = 6
_SHORT_TAG_CHARS = 3
# Han, kana and their punctuation are written without spaces; Hangul is not.
_WIDE = "\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f"
_WIDE_BREAK = re.compile(f"(?<=[{_WIDE}])\n(?=[{_WIDE}])")


class Page:
    """Collects the text of a page.

    Consecutive text lines join into one paragraph (troff's fill mode) until a break; in verbatim
    mode each line stands for itself.
    """

    def __init__(self) -> None:
        self._out: list[str] = []
        self._open: list[str] = []
        self._glue = False
        self._filling = True
        self._level = 0
        self._hang = False
        self._expect: str | None = None

    def finish(self) -> str:
        """Close the page and return its text."""
        self.break_line()
        text = "\n".join(self._out).strip("\n")
        return f"{text}\n" if text.strip() else ""

    def text(self, text: str, *, glued: bool = False) -> None:
        """Add a line of text; ``glued`` joins the next one without a space."""
        if self._expect is not None:
            self._expected(text)
            return
        if not self._filling:
            if self._glue and self._out:
                self._out[-1] += text
            else:
                self._out.append(f"{self._prefix()}{text}".rstrip())
            self._glue = glued
            return
        if not text.strip():
            if not glued:
                self.paragraph(keep_hang=True)
            return
        if text[0] in " \t":
            self.break_line()
        if self._glue and self._open:
            self._open[-1] += text
        else:
            self._open.append(text.strip())
        self._glue = glued

    def line(self, text: str) -> None:
        """Add a line that stands for itself."""
        self.break_line()
        self._out.append(f"{self._prefix()}{text}".rstrip())

    def break_line(self) -> None:
        """End the open paragraph without an empty line."""
        self._glue = False
        if self._open:
            joined = "\n".join(self._open)
            if not joined.isascii():
                joined = _WIDE_BREAK.sub("", joined)
            self._out.append(self._prefix() + joined.replace("\n", " "))
            self._open = []

    def paragraph(self, *, keep_hang: bool = False) -> None:
        """Begin a new paragraph after an empty line."""
        self.break_line()
        self._expect = None
        if not keep_hang:
            self._hang = False
        if self._out and self._out[-1]:
            self._out.append("")

    def title(self, text: str) -> None:
        """Set the first line of the page."""
        if text and not self._out:
            self._out += [text, ""]

    def heading(self, text: str) -> None:
        """Begin a section; without text, the next line is the heading."""
        self.paragraph()
        self._level, self._filling = 0, True
        if text:
            self._out.append(text)
        else:
            self._expect = "heading"

    def tag(self, text: str, *, blank: bool = True) -> None:
        """Begin an item with a tag; a short one (a bullet) stands before the text."""
        if blank:
            self.paragraph()
        else:
            self.break_line()
        self._hang = False
        text = text.strip()
        if len(text) > _SHORT_TAG_CHARS:
            self._out.append(self._prefix() + text)
        elif text:
            self._open.append(text)
        self._hang = len(text) > _SHORT_TAG_CHARS or not text

    def tag_follows(self, *, blank: bool = True) -> None:
        """Begin an item whose tag is the next line."""
        if blank:
            self.paragraph()
        else:
            self.break_line()
        self._expect = "tag"

    def shift(self, levels: int) -> None:
        """Indent more (or, if negative, less)."""
        self.break_line()
        self._hang = False
        self._level = min(_MAX_INDENT, max(0, self._level + levels))

    def verbatim(self, on: bool) -> None:
        """Switch line filling off or on."""
        self.break_line()
        self._filling = not on

    def _expected(self, text: str) -> None:
        expected, self._expect = self._expect, None
        if not text.strip():
            self._expect = expected
        elif expected == "heading":
            self._out.append(text.strip())
        else:
            self.tag(text, blank=False)

    def _prefix(self) -> str:
        return _INDENT * (self._level + self._hang)

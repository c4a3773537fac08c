"""The mdoc(7) macros of BSD manual pages: semantic markup with macros inside a line."""

from __future__ import annotations

from puna.data.extract.roff_page import Page

_ENCLOSED = {
    "Op": "[]", "Sq": "‘’", "Dq": "“”", "Qq": '""', "Pq": "()", "Bq": "[]", "Brq": "{}",
    "Aq": "<>", "Ql": "‘’",
}  # fmt: skip
_OPENING = {"Oo": "[", "So": "‘", "Do": "“", "Qo": '"', "Po": "(", "Bo": "[", "Bro": "{", "Ao": "<"}
_CLOSING = {"Oc": "]", "Sc": "’", "Dc": "”", "Qc": '"', "Pc": ")", "Bc": "]", "Brc": "}", "Ac": ">"}
_PLAIN = frozenset(
    ("Ar", "Cm", "Ic", "Pa", "Va", "Vt", "Ev", "Em", "Sy", "Li", "Fa", "Ft", "Dv", "Er", "Tn", "An",
     "Ad", "Ms", "No", "St", "Mt", "Lk", "Fd", "Sx", "Cd", "Xo", "Xc", "Bsx", "Bx", "Fx", "Nx",
     "Ox", "Dx", "Ux", "At", "Ns", "Ap", "Fl", "Nm", "Xr", "Fn", "Ta", "Pf", "In", "Lb", "Rv", "Ex",
     "Eo", "Ec", "Es", "En", "%A", "%B", "%C", "%D", "%I", "%J", "%N", "%O", "%P", "%Q", "%R", "%T",
     "%U", "%V")
)  # fmt: skip
_INLINE = _PLAIN | set(_ENCLOSED) | set(_OPENING) | set(_CLOSING)
_BLOCKS = frozenset(
    ("Dd", "Dt", "Os", "Sh", "Ss", "Pp", "Nd", "Bl", "It", "El", "Bd", "Ed", "Dl", "D1", "Fo", "Fc",
     "Rs", "Re", "Bk", "Ek", "Sm", "Bf", "Ef", "Lp")
)  # fmt: skip
MDOC_MACROS = _INLINE | _BLOCKS
"""All macros handled here; their second letter is lower case, unlike man(7)'s."""

_IGNORED = frozenset(("Dd", "Os", "Bk", "Ek", "Sm", "Bf", "Ef", "Rs", "Re", "Fc"))
_LEADING = frozenset("([")
_TRAILING = frozenset((".", ",", ":", ";", ")", "]", "?", "!"))
_SYSTEMS = {"Bx": "BSD", "Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD", "Dx": "DragonFly",
            "Ux": "UNIX", "At": "AT&T UNIX", "Bsx": "BSD/OS"}  # fmt: skip


class Mdoc:
    """Interprets mdoc macros and writes to a page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._name = ""
        self._bullets: list[bool] = []

    def macro(self, name: str, arguments: list[str]) -> None:
        """Handle one macro line."""
        if name in _INLINE:
            text = self._inline([name, *arguments])
            if text:
                self._page.text(text)
        elif name not in _IGNORED:
            self._block(name, arguments)

    def _block(self, name: str, arguments: list[str]) -> None:
        page = self._page
        if name == "Dt":
            page.title("{}({})".format(*arguments[:2]) if len(arguments) > 1 else "")
        elif name in ("Sh", "Ss"):
            page.heading(self._inline(arguments))
        elif name in ("Pp", "Lp"):
            page.paragraph(keep_hang=True)
        elif name == "Nd":
            page.text("- " + self._inline(arguments))
        elif name in ("Bl", "El"):
            self._list(name == "Bl", arguments)
        elif name == "It":
            bullet = bool(self._bullets) and self._bullets[-1]
            page.tag("•" if bullet else self._inline(arguments))
        elif name == "Bd":
            page.break_line()
            page.verbatim(bool({"-literal", "-unfilled"} & set(arguments)))
        elif name == "Ed":
            page.verbatim(False)
        elif name == "Fo":
            page.text(f"{' '.join(arguments)}()")
        else:  # Dl, D1
            page.line("    " + self._inline(arguments))

    def _list(self, begins: bool, arguments: list[str]) -> None:
        if begins:
            kinds = {"-bullet", "-dash", "-hyphen", "-enum"}
            self._bullets.append(bool(kinds & set(arguments)))
        if len(self._bullets) > 1:
            self._page.shift(1 if begins else -1)
        if not begins:
            self._bullets = self._bullets[:-1]
            self._page.paragraph()

    def _inline(self, tokens: list[str]) -> str:
        """Set the tokens of a line: macros are carried out, words joined, punctuation attached."""
        out: list[str] = []
        glue = True
        at = 0
        while at < len(tokens):
            token = tokens[at]
            at += 1
            if token in ("Ns", "Ap"):
                if token == "Ap" and out:
                    out[-1] += "'"
                glue = True
                continue
            if token in _ENCLOSED:
                piece, at = self._enclose(token, tokens), len(tokens)
            elif token in _INLINE:
                piece, at = self._element(token, tokens, at)
            else:
                piece = token
            if not piece:
                continue
            attach = glue or piece in _TRAILING or (token in _CLOSING and bool(out))
            if attach and out:
                out[-1] += piece
            else:
                out.append(piece)
            glue = piece in _LEADING or token in _OPENING
        return " ".join(out)

    def _enclose(self, token: str, tokens: list[str]) -> str:
        inner = tokens[tokens.index(token) + 1 :]
        tail = []
        while inner and inner[-1] in _TRAILING:
            tail.insert(0, inner.pop())
        left, right = _ENCLOSED[token]
        return f"{left}{self._inline(inner)}{right}{''.join(tail)}"

    def _element(self, token: str, tokens: list[str], at: int) -> tuple[str, int]:
        """Set one element; return its text and the position after its arguments."""
        if token in _OPENING or token in _CLOSING:
            return _OPENING.get(token) or _CLOSING[token], at
        end = at
        while end < len(tokens) and tokens[end] not in _INLINE and tokens[end] not in _TRAILING:
            end += 1
        words = tokens[at:end]
        if token == "Fl":
            if not words and end < len(tokens) and tokens[end] == "Fl":
                following, after = self._element("Fl", tokens, end + 1)
                return "-" + following, after
            return " ".join(f"-{word}" for word in words) or "-", end
        if token == "Pf" and words:
            return words[0] + self._inline(tokens[at + 1 :]), len(tokens)
        return self._words(token, words), end

    def _words(self, token: str, words: list[str]) -> str:
        if token == "Nm":
            if words and not self._name:
                self._name = words[0]
            return " ".join(words) or self._name
        if token == "Xr" and len(words) > 1:
            return f"{words[0]}({words[1]})" + "".join(words[2:])
        if token == "Fn" and words:
            return f"{words[0]}({', '.join(words[1:])})"
        if token in _SYSTEMS:
            return " ".join([_SYSTEMS[token], *words])
        joined = " ".join(words)
        if token == "Ta":
            return f"| {joined}".rstrip()
        return joined or ("file ..." if token == "Ar" else "")

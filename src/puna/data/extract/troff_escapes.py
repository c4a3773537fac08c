"""Troff escape sequences and special characters (groff(7), groff_char(7)) as plain text."""

from __future__ import annotations

import re
import unicodedata

_NAMED = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–",
    "hy": "-", "bu": "•", "co": "©", "rg": "®", "tm": "™", "de": "°", "ga": "`", "ha": "^",
    "ti": "~", "rs": "\\", "sl": "/", "ba": "|", "bv": "|", "br": "|", "bb": "¦", "at": "@",
    "sh": "#", "Do": "$", "mu": "×", "di": "÷", "+-": "±", "<=": "≤", ">=": "≥", "!=": "≠",
    "==": "≡", "~=": "≅", "~~": "≈", "if": "∞", "->": "→", "<-": "←", "<>": "↔", "ua": "↑",
    "da": "↓", "rA": "⇒", "lA": "⇐", "12": "½", "14": "¼", "34": "¾", "S1": "¹", "S2": "²",
    "S3": "³", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "lB": "[", "rB": "]", "lC": "{",
    "rC": "}", "la": "⟨", "ra": "⟩", "ul": "_", "ru": "_", "ss": "ß", "ae": "æ", "AE": "Æ",
    "oe": "œ", "OE": "Œ", "o/": "ø", "/o": "ø", "/O": "Ø", "oa": "å", "oA": "Å", "-D": "Ð",
    "Sd": "ð", "TP": "Þ", "Tp": "þ", "!!": "¡", "r!": "¡", "r?": "¿", "ct": "¢", "Eu": "€",
    "eu": "€", "Po": "£", "Ye": "¥", "Cs": "¤", "sc": "§", "ps": "¶", "dg": "†", "dd": "‡",
    "pl": "+", "mi": "−", "eq": "=", "pc": "·", "md": "⋅", "**": "∗", "mo": "∈", "sr": "√",
    "fm": "′", "sd": "″", "bq": "‚", "Bq": "„", "OK": "✓", "tf": "∴", "no": "¬", "or": "|",
    "lh": "☜", "rh": "☞", "sq": "□", "ci": "○", "lz": "◊", "Of": "ª", "Om": "º",
    "Cq": "’", "fi": "fi", "fl": "fl", "ff": "ff", "an": "─", "a^": "^", "a~": "~", "aa": "´",
    "ho": "˛", "ac": "¸", "ad": "¨", "a-": "¯", "IJ": "Ĳ", "ij": "ĳ", ".i": "ı", "/L": "Ł",
    "/l": "ł", "%0": "‰", "rn": "‾", "nb": "⊄", "CR": "↵",
}  # fmt: skip
_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303",
            ",": "\u0327", "v": "\u030c"}  # fmt: skip
_GREEK: dict[str, str] = dict(
    zip("abgdezyhiklmncoprstufxqw", "αβγδεζηθικλμνξοπρστυφχψω", strict=True)
)

_FIXED = {
    "-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": ".",
    "t": "\t", "_": "_", "E": "\\", '"': '"',
}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?:
      (?P<font>f(?:\(..|\[[^\]]*\]|.))
    | (?P<size>s(?:\(..|\[[^\]]*\]|'[^']*'|[-+]?(?:\(..|\[[^\]]*\]|'[^']*'|[0-9]{1,2}))|s)
    | \((?P<two>..)
    | \[(?P<long>[^\]]*)\]
    | \*(?:\((?P<string_two>..)|\[(?P<string_long>[^\]\s]*)[^\]]*\]|(?P<string_one>.))
    | (?P<quoted>[hvwolLDXZAbBRHSC])'(?P<argument>[^']*)'
    | (?P<number>N)'(?P<code>\d+)'
    | (?P<register>[nkmMYFVgO])[-+]?(?:\(..|\[[^\]]*\]|.)
    | (?P<other>.?)
    )""",
    re.VERBOSE | re.DOTALL,
)
_MAX_DEPTH = 8


def special_character(name: str) -> str:
    r"""Return the text of ``\(name`` or ``\[name]``; empty when it is unknown."""
    if name in _NAMED:
        return _NAMED[name]
    if re.fullmatch(r"u[0-9A-F]{4,6}(_[0-9A-F]{4,6})*", name):
        points = [int(part, 16) for part in name[1:].split("_")]
        return "".join(map(chr, points)) if all(_is_scalar(p) for p in points) else ""
    if re.fullmatch(r"char\d{1,3}", name):
        return chr(int(name[4:]))
    if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha():
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    if len(name) == 2 and name[0] == "*" and name[1].lower() in _GREEK:
        letter = _GREEK[name[1].lower()]
        return letter.upper() if name[1].isupper() else letter
    return ""


def plain_text(line: str, strings: dict[str, str], depth: int = 0) -> str:
    r"""Replace the escape sequences of a line by what they print.

    Args:
        line: A line of troff source without comment.
        strings: Strings defined so far (``.ds``), for ``\*(xx``.
        depth: Level of string expansion; strings that contain themselves end at a fixed depth.
    """
    if "\\" not in line:
        return line

    def replace(match: re.Match[str]) -> str:
        group = match.lastgroup
        if group == "font" or group == "size" or group == "register":
            return ""
        if group == "two" or group == "long":
            return special_character(match[group])
        if group in ("string_two", "string_long", "string_one"):
            text = strings.get(match[group], "")
            return plain_text(text, strings, depth + 1) if depth < _MAX_DEPTH else ""
        if group == "code":
            point = int(match["code"])
            return chr(point) if _is_scalar(point) else ""
        if group == "argument":
            return _quoted(match["quoted"], match["argument"], strings, depth)
        return _FIXED.get(match["other"], "")

    return _ESCAPE.sub(replace, line)


def _quoted(kind: str, argument: str, strings: dict[str, str], depth: int) -> str:
    if kind == "h":
        return " "
    if kind == "C":
        return special_character(argument)
    if kind == "o":
        return plain_text(argument, strings, depth + 1)[:1] if depth < _MAX_DEPTH else ""
    return plain_text(argument, strings, depth + 1) if kind == "Z" and depth < _MAX_DEPTH else ""


def _is_scalar(point: int) -> bool:
    return 0 < point < 0x110000 and not 0xD800 <= point < 0xE000


def cut_comment(line: str) -> str:
    r"""Drop a ``\"`` or ``\#`` comment from a line."""
    if '\\"' not in line and "\\#" not in line:
        return line
    at = 0
    while (at := line.find("\\", at)) >= 0:
        if line[at + 1 : at + 2] in ('"', "#"):
            return line[:at]
        at += 2
    return line

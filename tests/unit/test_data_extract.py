"""Extraction: decoding, normalisation, HTML, manual pages."""

from __future__ import annotations

import codecs
import random

import pytest

from puna.data.extract import MEDIA_TYPES, extract
from puna.data.extract.decode import decode
from puna.data.extract.normalise import normalise
from puna.data.extract.roff import extract_roff
from puna.data.extract.troff_escapes import plain_text
from puna.data.readers.records import UnusableError

FRENCH = "Les élèves français étudient à l'école, où ils apprennent la géographie. " * 3
RUSSIAN = "Это руководство описывает формат файла конфигурации и все его ключи. " * 3
JAPANESE = "このマニュアルページはファイルの形式を説明します。設定ファイルの場所。" * 3
CHINESE = "本手册页描述了配置文件的格式以及它所理解的所有关键字。" * 3

# decoding


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "cp1252"),
        ("“Quotes” — and dashes… it’s common. " * 3, "cp1252"),
        (RUSSIAN, "koi8-r"),
        (RUSSIAN, "cp1251"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc_jp"),
        (CHINESE, "gbk"),
    ],
)
def test_encodings_are_detected(text, encoding):
    found, name = decode(text.encode(encoding))
    assert found == text
    assert name != "utf-8"


@pytest.mark.parametrize("text", ["plain", FRENCH, JAPANESE, "\N{GRINNING FACE}", ""])
def test_utf8_is_utf8(text):
    assert decode(text.encode()) == (text, "utf-8")


@pytest.mark.parametrize(
    ("bom", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_a_byte_order_mark_decides_and_goes(bom, encoding):
    assert decode(bom + FRENCH.encode(encoding), "ascii") == (FRENCH, encoding)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(encoding):
    assert decode(FRENCH.encode(encoding)) == (FRENCH, encoding)


def test_lines_of_several_encodings():
    lines = ["A plain line of a changelog.\n"] * 30
    data = "".join(lines).encode() + "Rogério\n".encode() + "Skjærlund\n".encode("cp1252")
    assert decode(data) == ("".join(lines) + "Rogério\nSkjærlund\n", "utf-8+cp1252")
    with pytest.raises(UnusableError):
        decode(data + b"\x81\n")  # no character in either


def test_the_declared_encoding_comes_before_utf8():
    data = "Größe".encode()
    assert decode(data, "latin-1") == ("GrÃ¶Ã\x9fe", "iso8859-1")
    assert decode(data, "no-such-thing") == ("Größe", "utf-8")
    assert decode(data, "ascii") == ("Größe", "utf-8")


@pytest.mark.parametrize(
    ("source", "media_type"),
    [
        ("# -*- coding: iso-8859-15 -*-\nprix = '5 €'\n", "text/x-python"),
        (
            "#!/usr/bin/python\n# vim: set fileencoding=iso-8859-15 :\nprix = '5 €'\n",
            "text/x-python",
        ),
        ('<html><meta charset="iso-8859-15"><p>5 €</p>', "text/html"),
        ("'\\\" t -*- coding: iso-8859-15 -*-\n.SH PRIX\n5 €\n", "text/troff"),
    ],
)
def test_declarations_inside_documents(source, media_type):
    found, name = decode(source.encode("iso-8859-15"), None, media_type)
    assert found == source
    assert name == "iso8859-15"


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        bytes(range(256)) * 8,
        b"text with zeros" + bytes(500),
    ],
    ids=["png", "all bytes", "zeros"],
)
def test_binary_is_refused(data):
    with pytest.raises(UnusableError) as caught:
        decode(data)
    assert caught.value.reason == "binary"


def test_noise_is_refused():
    noise = bytes(byte | 0x80 for byte in random.Random(0).randbytes(2000))
    with pytest.raises(UnusableError):
        decode(noise)
    with pytest.raises(UnusableError, match="does not decode"):
        decode(codecs.BOM_UTF16_LE + b"\x00\xd8\x00")


# normalisation


def test_line_ends_nul_and_nfc():
    assert normalise("a\r\nb\rc\n\n\r\nd\0e") == "a\nb\nc\n\n\nde"
    assert normalise("e\u0301") == "é"
    assert normalise("x = 'e\u0301'\r\n", "text/x-python") == "x = 'e\u0301'\n"
    assert normalise("\x0c\x1b[1m") == "\x0c\x1b[1m"


# HTML

PAGE = """<!doctype html><html><head><title>T</title><style>p {}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<main><h1>Sorting</h1><p>A paragraph about <b>sorting</b> lists, with a <a href="/x">link</a> in it
and enough words to be the main content of this page.</p>
<pre><code>def f(x):
    return  sorted(x)

print(f([2, 1]))</code></pre><p>Another paragraph, which ends the page &amp; the example.</p></main>
<footer>Copyright 2020 Example Company. All rights reserved.</footer><script>alert(1)</script>
</body></html>"""


def test_html_keeps_the_content_and_its_code():
    text, _ = extract(PAGE.encode(), "text/html")
    assert "A paragraph about sorting lists, with a link in it" in text
    assert "def f(x):\n    return  sorted(x)\n\nprint(f([2, 1]))" in text
    assert "page & the example" in text
    for boilerplate in ("About us", "All rights reserved", "alert", "href", "p {}"):
        assert boilerplate not in text


def test_html_that_the_heuristics_miss_is_taken_whole():
    items = "".join(f"<li><a href='#{i}'>Release note number {i}</a></li>" for i in range(200))
    text, _ = extract(f"<html><body><ul>{items}</ul></body></html>", "text/html")
    assert "Release note number 150" in text


@pytest.mark.parametrize("html", ["", "<html></html>", "<p>\0</p>", "<div>" * 20_000])
def test_strange_html_is_no_problem(html):
    text, _ = extract(html, "text/html")
    assert not text.strip()


def test_html_in_an_old_encoding():
    html = "<html><head><meta charset='koi8-r'></head><body><p>Привет, мир</p></body></html>"
    text, encoding = extract(html.encode("koi8-r"), "text/html")
    assert "Привет, мир" in text
    assert encoding == "koi8-r"


# manual pages


def test_man_page():
    source = r"""'\" t
.\" a comment with words nobody reads
.de XX
hidden macro body
..
.TH TAR 1 "July 2020" "TAR" "GNU TAR Manual"
.ie \n(.g .ds Aq \(aq
.el       .ds Aq '
.SH NAME
tar \- an archiving utility
.SH "SEE ALSO"
It\*(Aqs in \fBbold\fR and \fIitalic\fP,
see
.BR gzip (1),
and
.B two words .
.PP
.if t typeset only
.if n terminal
.if n \{\
.RS 4
.\}
.nf
$ tar \-xf  archive.tar \e
    \-\-verbose
.fi
.if n \{\
.RE
.\}
.TP
\fB\-x\fR, \fB\-\-extract\fR
Extract files\&.
.IP \(bu 2
A bullet.
.UR http://example.org
the manual
.UE .
"""
    assert extract_roff(source) == (
        "TAR(1)\n\n"
        "NAME\ntar - an archiving utility\n\n"
        "SEE ALSO\nIt's in bold and italic, see gzip(1), and two words .\n\n"
        "terminal\n"
        "    $ tar -xf  archive.tar \\\n"
        "        --verbose\n\n"
        "-x, --extract\n    Extract files.\n\n"
        "• A bullet. the manual <http://example.org>.\n"
    )


def test_mdoc_page():
    source = r""".Dd April 18, 2024
.Dt SSH 1
.Os
.Sh NAME
.Nm ssh
.Nd OpenSSH remote login client
.Sh SYNOPSIS
.Nm
.Op Fl 46
.Op Fl L Ar address
.Ar destination
.Sh DESCRIPTION
.Nm
logs in; see
.Xr ssh_config 5 .
.Bl -tag -width Ds
.It Fl v
Verbose
.Pq very ,
up to
.Dq three
times.
.It Fl Fl version
Version.
.El
.Bd -literal -offset indent
$ ssh  host
.Ed
"""
    assert extract_roff(source) == (
        "SSH(1)\n\n"
        "NAME\nssh - OpenSSH remote login client\n\n"
        "SYNOPSIS\nssh [-46] [-L address] destination\n\n"
        "DESCRIPTION\nssh logs in; see ssh_config(5).\n\n"
        "-v Verbose (very), up to “three” times.\n\n"
        "--version\n    Version.\n\n"
        "$ ssh  host\n"
    )


def test_tables_become_rows():
    source = """.TS
allbox tab(;);
l l
lb l.
Name;Meaning
_
\\fBa\\fR;T{
first
.B part
T}
.T&
l l.
b;second
.TE
after
"""
    assert extract_roff(source) == "Name | Meaning\na | first part\nb | second\nafter\n"


def test_japanese_lines_join_without_spaces_and_korean_ones_with():
    assert extract_roff(".SH 名前\nこの\nマニュアルは\nUTF-8 の\n説明。\n") == (
        "名前\nこのマニュアルは UTF-8 の説明。\n"
    )
    assert extract_roff("설정\n파일\n") == "설정 파일\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\(co 2024, \[u00E9]t\['e] \(:o \[*a]\(*b", "© 2024, été ö αβ"),
        (r"a\h'2m'b \s-1small\s0 \v'1'x", "a b small x"),
        (r"\N'233' \*(lqx\*(rq", "é “x”"),
        (r"C:\e\fIdir\fP \\n", r"C:\dir \n"),
        (r"\*(xx\*[unknown]\(zz.", "."),
        (r"50\ % \[u110000] \[uD800]", "50 %  "),
    ],
)
def test_escapes(source, text):
    strings = {"lq": "“", "rq": "”", "xx": "\\*(xx"}  # a string that contains itself ends
    assert plain_text(source, strings) == text


@pytest.mark.parametrize(
    "source",
    [
        ".so man1/other.1\n",
        '.\\" only a comment\n',
        "",
        ".de X\nnever closed\n.SH\n",
        ".if n \\{\\\n",
        ".TS\nl.\nT{\n",
        ".ds x \\*x\n",
        "\\",
        ".\n'\n..\n",
    ],
)
def test_strange_pages_do_no_harm(source):
    assert "\\" not in extract_roff(source)


def test_an_unclosed_definition_does_not_swallow_the_page():
    assert "kept text" in extract_roff(".de XX\n.SH NAME\nkept text\n")


# the whole


def test_a_lone_surrogate_in_html_and_an_unknown_media_type():
    with pytest.raises(UnusableError, match="surrogate"):
        extract("<p>\ud83d</p>", "text/html")
    with pytest.raises(KeyError, match="image/png"):
        extract("x", "image/png")


@pytest.mark.parametrize("media_type", sorted({*MEDIA_TYPES} - {"application/x-ipynb+json"}))
def test_every_media_type_normalises(media_type):
    text, encoding = extract(b"A line of text.\r\nAnd one more line.\r\n", media_type)
    assert "A line of text." in text
    assert "\r" not in text
    assert encoding == "utf-8"

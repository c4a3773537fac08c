"""Filters of code, notebooks, questions and dirty words, on texts that fail and pass."""

import re
import time
import warnings
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.engine.base import Shard
from puna.data.filters.base import FILTERS
from puna.data.filters.code_syntax import CodeSyntax, error_of, unbalanced
from puna.data.filters.dirty_words import DirtyWords
from puna.data.filters.languages import language_of
from puna.data.filters.licence_header import LicenceHeader, licence_of, without_header
from puna.data.filters.notebooks import Notebook
from puna.data.filters.profiles import PROFILES
from puna.data.filters.questions import Questions
from puna.data.filters.rules import FilterKernel, Rules, SourceRules
from puna.data.filters.starcoder import StarCoder2, encoded_chars, visible_chars
from puna.data.filters.starcoder1 import StarCoder, shown_chars
from puna.data.trial import try_filters

APACHE = """Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions."""
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy
of this software, to deal in the Software without restriction, subject to conditions.
THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND. IN NO EVENT SHALL THE
AUTHORS BE LIABLE FOR ANY CLAIM."""
CODE = "import os\n\ndef area(width, height):\n    return width * height\n"
C_CODE = "int main(void)\n{\n    return 0;\n}\n"
PROSE = "Lists are sorted in place by the method of that name, and it returns nothing at all.\n"


def hashed(text):
    return "".join(f"# {line}".rstrip() + "\n" for line in text.split("\n"))


def starred(text):
    return "/*\n" + "".join(f" * {line}".rstrip() + "\n" for line in text.split("\n")) + " */\n"


def verdict(document_filter, text, path=""):
    verdicts = Rules((document_filter,), False).judge(pa.array([text], pa.large_string()), [path])
    return verdicts.reason[0], verdicts.value[0], verdicts.text[0]


@pytest.mark.parametrize(
    ("path", "text", "language"),
    [("a/b.py", "", "python"), ("x.tar/README.md#12", "", "markdown"), ("Makefile", "", "makefile"),
     ("bin/run", "#!/usr/bin/env python3\n", "python"), ("run", "#!/bin/sh -e\n", "shell"),
     ("run", "#! /usr/bin/env -S node --x\n", "javascript"), ("X.H", "", "c"), (None, "x", None),
     ("http://a.com/p.html?q=1", "", "html"), (".py", "", None), ("a.unknown", "#!/x/y\n", None)],
)  # fmt: skip
def test_language_of_a_file(path, text, language):
    assert language_of(path, text) == language


@pytest.mark.parametrize(
    ("language", "good", "bad", "message"),
    [("python", "\ufeffx = '\\d'\nif x is 'a': pass\n", "print 'x'\n", "line 1: Missing paren"),
     ("python", "pass\n", "(" * 5000, "line"), ("python", "pass", "a\0b", "null bytes"),
     ("python", "pass", "-" * 100_000 + "1", "nested too deeply"),
     ("json", '{"a": [1, 2]}', '{"a": 1,}', "Illegal trailing comma|Expecting property"),
     ("json", "[]", "[" * 100_000, "nested too deeply"),
     ("toml", "a = 1\n[b]\n", "a = \n", "Invalid value"),
     ("xml", "<a><b/></a>", "<a><b></a>", "mismatched tag"),
     ("yaml", "a: &x [1, *x]\n---\nb: !Ref c\n", "a: b: c\n", "^line 1: mapping values"),
     ("yaml", "a: b", "a: &x 1\n---\nb: *x\n", r"^line 3: the alias \*x"),
     ("yaml", "# only a comment\n", "a: \0", "unacceptable character"),
     ("yaml", "a:\n- b\n", "{{- if .x }}\na: 1\n", "^line 1"),
     *(("yaml", "a", "".join(deep), "nested too deeply")
       for deep in ("[" * 400_000, "- " * 400_000, "[{" * 200_000, "? " * 400_000))],
)  # fmt: skip
def test_files_parse_or_not_and_nothing_is_printed(language, good, bad, message, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error_of(language, good) is None
        error = error_of(language, bad)
    assert error is not None
    assert re.search(message, error), error
    assert "\n" not in error
    assert capfd.readouterr() == ("", "")


def test_parsing_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    assert error_of("python", f"open({str(mark)!r}, 'w')\n") is None
    assert not mark.exists()


def test_entities_do_not_grow_without_bound():
    names = "abcdefghij"
    entities = "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in pairwise(names))
    bomb = f'<!DOCTYPE x [<!ENTITY a "{"x" * 1000}">{entities}]><x>&j;</x>'
    assert error_of("xml", bomb) is not None


def test_aliases_of_yaml_do_not_grow():
    tens = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 60))
    merged = "".join(f"b{i}: &b{i}\n  <<: [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 60))
    start_s = time.monotonic()
    assert error_of("yaml", f"a0: &a0 [x]\n{tens}b0: &b0 {{k: v}}\n{merged}") is None
    assert time.monotonic() - start_s < 2


@pytest.mark.parametrize(
    ("text", "n"),
    [(C_CODE, 0), ("f(a[1], {b});", 0), ("f(", 1), (")(", 2), ("(]", 2), ('s = "(" + \'{\';', 0),
     ("// (((\n/* {{{ */", 0), ("x = `a ${b} (`", 0), ('"\\"("', 0), ("{ /* never ends }", 1)],
)  # fmt: skip
def test_brackets_outside_of_comments_and_strings(text, n):
    assert unbalanced(text) == n


def test_syntax_is_checked_by_language():
    assert verdict(CodeSyntax(), "def f(:\n", "a.py")[:2] == ("code_syntax.unparsed", 1)
    assert verdict(CodeSyntax(), "def f(:\n", "a.txt")[0] is None
    assert verdict(CodeSyntax(max_bytes=3), "def f(:\n", "a.py")[0] is None
    assert verdict(CodeSyntax(languages=()), "def f(:\n", "a.py")[0] is None
    assert verdict(CodeSyntax(), "{{{\n", "a.c")[:2] == ("code_syntax.unbalanced", 3)
    assert verdict(CodeSyntax(), "{{\n", "a.c")[0] is None
    trial = try_filters("code_syntax", "x = = 1\n", "a.py")
    assert trial.verdict is not None
    assert trial.verdict.detail == "python, line 1: invalid syntax"


@pytest.mark.parametrize(
    ("text", "name"),
    [(APACHE, "Apache-2.0"), (MIT, "MIT"),
     ("SPDX-License-Identifier: BSD-2-Clause */", "BSD-2-Clause"),
     ("# under the terms of the GNU General Public License, version 2\n# or any later version",
      "GPL-2.0-or-later"),
     ("the GNU Lesser General Public License, version 2.1", "LGPL-2.1-only"),
     ("GNU General Public License", None), ("All rights reserved.", None),
     ("Redistributions of source code must x, in binary form must y. Neither the name",
      "BSD-3-Clause")],
)  # fmt: skip
def test_licences_have_their_identifiers(text, name):
    assert licence_of(text) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (hashed(APACHE) + "\n" + CODE, "# SPDX-License-Identifier: Apache-2.0\n\n" + CODE),
        (starred(f"Copyright (c) 2020 X\n\n{APACHE}") + "\n" + C_CODE,
         "/* SPDX-License-Identifier: Apache-2.0 */\n\n" + C_CODE),
        ("#!/bin/sh\n" + hashed(MIT) + "\nls\n",
         "#!/bin/sh\n# SPDX-License-Identifier: MIT\n\nls\n"),
        (starred(f"{MIT}\n\nHow areas are measured.") + C_CODE,
         "/*\n * SPDX-License-Identifier: MIT\n *\n * How areas are measured.\n */\n" + C_CODE),
        (f"/* {MIT} */\n{C_CODE}", f"/* SPDX-License-Identifier: MIT */\n\n{C_CODE}"),
        (f"/*\n * Areas.\n *\n * {MIT} */\n{C_CODE}",
         f"/*\n * Areas.\n *\n * SPDX-License-Identifier: MIT\n */\n{C_CODE}"),
        (hashed("All rights reserved. " * 12) + CODE, CODE),
        (f"<!-- {MIT} -->\n<p>text</p>\n",
         "<!-- SPDX-License-Identifier: MIT -->\n\n<p>text</p>\n"),
    ],
    ids=["lines", "block", "shebang", "rest", "one block", "end of a block", "unknown", "markup"],
)  # fmt: skip
def test_licence_headers_become_one_line(text, expected):
    assert without_header(text, 200, 20_000) == expected


@pytest.mark.parametrize(
    "text",
    [CODE, C_CODE, "# Copyright (c) 2020 X\n" + CODE, hashed("What this does. " * 30) + CODE,
     CODE + hashed(APACHE), "", "#include <a.h>\n" * 30 + "// all rights reserved\n",
     '"""Docs."""\n' + hashed(APACHE), APACHE],
)  # fmt: skip
def test_other_comments_stay(text):
    assert without_header(text, 200, 20_000) == text


@given(st.text(max_size=200), st.sampled_from([hashed(APACHE), starred(MIT), f"/* {MIT} */\n"]))
@settings(max_examples=100, deadline=None)
def test_what_follows_a_header_is_untouched(code, header):
    text = header + "\nx = 1\n" + code
    new = without_header(text, 200, 20_000)
    assert new.endswith("\n\nx = 1\n" + code)
    assert new.startswith(("# SPDX", "/* SPDX"))


def test_a_file_that_is_only_a_header_is_dropped():
    assert verdict(LicenceHeader(), hashed(APACHE) + "x\n")[0] is None  # the identifier is left
    reason, value, _ = verdict(LicenceHeader(), hashed("All rights reserved. " * 12) + "x = 1\n")
    assert (reason, value) == ("licence_header.emptied", 5)
    trial = try_filters("licence_header", hashed(APACHE) + CODE)
    assert trial.checks[0].value == len(hashed(APACHE)) - len(
        "# SPDX-License-Identifier: Apache-2.0\n\n"
    )


HTML = (
    "<html><head><style>" + "a{b:c}" * 20 + "</style></head><body>" + PROSE * 2 + "</body></html>"
)
CASES = [
    ("lines", "a\n" * 11, "a.c", 11, {"max_lines": 10}, ("a\n" * 10, "a.c")),
    ("mean_line", "abc" * 40 + "\n", "a.c", 120, {}, ("if b:\n" * 9, "a.c")),
    ("longest_line", "ab\n" * 20 + "a" * 1001, "a.c", 1001, {},
     ("if b:\n" * 20 + "a " * 501, "a.md")),
    ("long_line_of_text", "ab " * 9 + "\n", "a.md", 27, {"max_text_line": 26}, ("to " * 9, "a.c")),
    ("generated", "\n// AUTO-GENERATED by x\n" + C_CODE, "a.c", 2, {},
     ("\n" * 5 + "// auto-generated\n" + C_CODE, "a.c")),
    ("alpha", "1 + 2;\n" * 9 + "a", "a.c", 1 / 64, {}, ("1a 2b;\n" * 9, "a.c")),
    ("alpha", "    .. 1\n" * 9, "a.asm", 1 / 9, {}, ("mov 1, 2\n" * 9, "a.asm")),
    ("encoded_run", "abcd\n" * 300, "a.c", 1500, {}, ("abcd;\n" * 300, "a.c")),
    ("encoded_share", "x;" + "abcdefgh" * 20, "a.c", 160 / 162, {"max_mean_line": 1e4},
     ("x;" * 90 + "abcdefgh" * 20, "a.md")),
    ("data_lines", "a: bcd\n" * 513, "a.yaml", 513, {}, ("a: bcd\n" * 513, "a.py")),
    ("text_name", PROSE, "a.txt", 1, {}, (PROSE, "docs/README.txt")),
    ("visible_chars", "<p>hello</p>", "a.html", 5, {}, (HTML, "a.html")),
    ("visible_share", HTML.replace("a{b:c}", "a{b:c}" * 60), "a.html", None, {}, (HTML, "a.htm")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "path", "value", "options", "good"), CASES)
def test_starcoder2s_rules(name, text, path, value, options, good):
    reason, measured, _ = verdict(StarCoder2(**options), text, path)
    assert reason == f"starcoder2.{name}"
    if value is not None:
        assert measured == pytest.approx(value)
    assert verdict(StarCoder2(**options), *good)[0] is None


def test_every_reason_of_starcoder2_has_a_case():
    assert {f"starcoder2.{case[0]}" for case in CASES} == set(StarCoder2.reasons)


def test_encoded_data_and_visible_text():
    assert encoded_chars("x " + "0xff, " * 8) == (0, 0)  # a comma and a space: no run of bytes
    assert encoded_chars("0xff," * 8 + "x") == (40, 40)
    assert encoded_chars("\\u00e9" * 8) == (48, 48)
    assert visible_chars("<p>a <b>b</b></p><!-- c --><script>d</script  >\n e") == 5


LINED = HTML.replace("a{b:c}", "a{b:c}\n")
WORDS = "key of the llama: value of the puna\n"
DATA_TEXT = '{"name": "llama", "lives": "on the high plain of the Andes"}\n'
CASES_1 = [
    ("extension", CODE, "a.frx", 1, {}, (CODE, "a.py")),
    ("longest_line", "ab\n" * 20 + "a" * 1001, "a.c", 1001, {}, ("ab\n" * 20 + "a" * 1001, "a.md")),
    ("mean_line", "abc" * 40 + "\n", "a.c", 120, {}, ("abc" * 40 + "\n", "a.tex")),
    ("alnum", "..;;1 + \n" * 9, "a.c", 1 / 9, {}, ("..;;1 + \n" * 9, "a.sas")),
    ("alpha", "1234, a5\n" * 9, "a.vhd", 1 / 9, {}, ("1234, a5\n" * 9, "a.c")),
    ("data_alpha", '{"a": 11, "b": 2222}\n' * 4, "a.json", 2 / 21, {}, (DATA_TEXT, "a.json")),
    ("xml", '\n<?xml version="1.0"?><a/>', "a.ts", 1, {}, ('<?xml version="1.0"?><a/>', "a.xsl")),
    ("xml", " " * 86 + "<?xml version=" + PROSE * 9, "a.sld", 1, {},
     (" " * 87 + "<?xml version=" + PROSE * 9, "a.sld")),
    ("visible_chars", "<p>hello</p>", "a.html", 5, {}, (LINED, "a.html")),
    ("visible_share", LINED.replace("a{b:c}\n", "a{b:c}\n" * 60), "a.html", None, {},
     (LINED, "a.htm")),
    ("small", "key: value\n" * 4, "a.yml", 44, {}, (WORDS * 2, "a.yml")),
    ("large", WORDS * 150, "a.yaml", 5400, {}, (WORDS * 100, "a.yaml")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "path", "value", "options", "good"), CASES_1)
def test_starcoders_rules(name, text, path, value, options, good):
    reason, measured, _ = verdict(StarCoder(**options), text, path)
    assert reason == f"starcoder.{name}"
    if value is not None:
        assert measured == pytest.approx(value)
    assert verdict(StarCoder(**options), *good)[0] is None


def test_every_reason_of_starcoder_has_a_case():
    assert {f"starcoder.{case[0]}" for case in CASES_1} == set(StarCoder.reasons)
    assert "starcoder" in PROFILES


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aé1 _.;\n"), min_size=1, max_size=400),
       st.sampled_from(["json", "yaml", "py", "md", "vhd", "sas"]))  # fmt: skip
def test_starcoders_numbers_are_those_of_the_published_definitions(text, extension):
    lengths = [len(line) for line in text.splitlines()]
    n_letters, n_alnum = sum(map(str.isalpha, text)), sum(map(str.isalnum, text))
    is_data = extension in ("json", "yaml")
    limited = extension in ("py", "vhd", "sas", "yaml")
    good = not (limited and (max(lengths) > 1000 or sum(lengths) / len(lengths) > 100))
    good = good and (extension == "sas" or n_alnum / len(text) >= 0.25)
    least = {"json": 0.5, "yaml": 0.5, "vhd": 0.25}.get(extension, 0)
    good = good and n_letters >= least * len(text)
    good = good and (not is_data or 50 <= len(text) <= 5000)
    assert (verdict(StarCoder(), text, f"a.{extension}")[0] is None) == good


def test_markup_is_left_out_in_linear_time():
    assert shown_chars("<!DOCTYPE html><p>a &amp;\n<b>b</b><!-- c --><STYLE>d</style>") == 5
    for bad in ("<script", "<!--", "<", "<script>", "<!-- ", "<a "):
        start_s = time.monotonic()
        shown_chars(bad * 200_000)
        visible_chars(bad * 200_000)
        assert time.monotonic() - start_s < 5, bad


NOTEBOOK = """In [1]:
import pandas

```python

```

![png](data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA)

 35%|███▌      | 35/100 [00:10<00:20,  3.2it/s]
HBox(children=(IntProgress(value=0, max=10), HTML(value='')))
<Figure size 640x480 with 1 Axes>
\x1b[0;31mValueError\x1b[0m: the index [1] is wrong
Out[12]: 42

In [2]: the price rose by 35% | a lot
"""


def test_notebooks_lose_prompts_pictures_and_progress():
    trial = try_filters("notebook", NOTEBOOK)
    assert trial.text == (
        "import pandas\n\nValueError: the index [1] is wrong\n42\n\nthe price rose by 35% | a lot"
    )
    found = {check.reason.partition(".")[2]: check.value for check in trial.checks}
    assert found == {"terminal": 2, "pictures": 1, "widgets": 1, "progress": 1, "objects": 1,
                     "prompts": 3, "empty_cells": 1, "emptied": len(trial.text)}  # fmt: skip
    assert verdict(Notebook(), "In [1]:\nx\n")[:2] == ("notebook.emptied", 1)
    assert verdict(Notebook(off=("prompts",)), "In [1]:\nx\n")[2] == "In [1]:\nx\n"


def test_a_rule_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no such rule: prompt; known: terminal"):
        Notebook(off=("prompt",))


PAGE = f"""Hello everyone,

How do I sort a list in place? {PROSE}Thanks in advance!

Best regards,
Jane Doe

asked Mar 5 '14 at 10:22
share improve this question
EDIT: fixed typo

5 up votes
{PROSE.strip()} Thank you for your help.
edited 5 Jan 2015, 10:22:01
add a comment
"""


def test_questions_lose_the_furniture_of_the_site():
    trial = try_filters("questions", PAGE)
    assert trial.text == f"How do I sort a list in place? {PROSE}\n{PROSE.strip()}"
    found = {check.reason.partition(".")[2]: check.value for check in trial.checks}
    assert found == {"closed": 0, "votes": 1, "site": 2, "dates": 2, "greetings": 1, "edits": 1,
                     "thanks_lines": 1, "thanks": 1, "signatures": 1,
                     "emptied": len(trial.text)}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["Marked as duplicate by Jane", "[closed] This question already has an answer here:",
     "closed as off-topic by x", "This question was closed 3 years ago."],
)  # fmt: skip
def test_closed_questions_are_dropped(line):
    assert verdict(Questions(), f"{PROSE}{line}\n")[0] == "questions.closed"
    assert verdict(Questions(drop_closed=False), f"{PROSE}{line}\n")[0] is None


@pytest.mark.parametrize(
    "text",
    ["Hello world programs print a line.\n" + PROSE, "Thanks to this, votes are counted.\n" + PROSE,
     "How do I share a lock? I edit the file and follow the link, then close it.\n" + PROSE,
     "Update 2: the method changed in version 3, so the list is copied. " + PROSE,
     "He sends his regards to Jane.\n" + PROSE, "The door was closed as the question is closed.\n"
     + PROSE, "In [1] we show this. Out [2] does not.\n" + PROSE, CODE, "a = [1]\n-- x\n" + PROSE],
)  # fmt: skip
def test_ordinary_sentences_stay(text):
    for document_filter in (Questions(), Notebook(), LicenceHeader()):
        assert verdict(document_filter, text)[::2] == (None, text)


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_cleaning_twice_changes_nothing_more_in_made_up_texts(text):
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        return
    for document_filter in (Questions(min_left=0), Notebook(min_left=0), LicenceHeader(min_left=0)):
        once = verdict(document_filter, text)[2]
        assert verdict(document_filter, once)[2] == once


def test_dirty_words_are_counted(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("frobnicate\t9\n", encoding="utf-8")
    clean = "word " * 97
    assert verdict(DirtyWords(), clean + "porn porn hentai")[:2] == ("dirty_words.per_1000", 30)
    assert verdict(DirtyWords(), clean + "porn hentai")[0] is None  # fewer than three
    assert verdict(DirtyWords(), "word " * 997 + "porn porn hentai")[0] is None  # 3 of 1,000
    text = clean + "frobnicate Frobnicate frobnicate"
    assert verdict(DirtyWords(), text)[0] is None
    assert verdict(DirtyWords(files=(own,), own_list=False), text)[:2] == (
        "dirty_words.per_1000", 30)  # fmt: skip
    medical = clean + "the sex and penis and vagina of the patient"
    assert verdict(DirtyWords(), medical)[0] is None
    assert verdict(DirtyWords(use_context=False), medical)[0] == "dirty_words.per_1000"


def test_the_kernel_knows_the_path_and_new_profiles_run():
    rows = {"source": ["s", "s"], "path": ["a.py", "a.txt"], "text": ["def f(:\n", "def f(:\n"]}
    batch = pa.RecordBatch.from_pydict(rows)
    batch = batch.set_column(2, "text", batch["text"].cast(pa.large_string()))
    kernel = FilterKernel(SourceRules(profile="none", filters=["code_syntax"]).make(), {})
    result = kernel(batch, Shard(0, None, 2, 0), 0)
    assert result["reason"].to_pylist() == ["code_syntax.unparsed", None]
    for name in ("starcoder2", "source-code", "notebook", "questions", "dirty-words"):
        assert try_filters(name, CODE * 3, "a.py").verdict is None
        assert set(PROFILES.get(name).filters[0].reasons) <= {
            code for other in FILTERS for code in FILTERS.get(other).reasons
        }

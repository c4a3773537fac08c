"""Cheap features that tell code, mathematics and reasoning from other text, without a model.

After the page finders of Llama 3 (its report, section 3.1.1, names domain-specific extraction of
code and reasoning pages); which features is ours.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import (
    FNV_PRIME,
    FNV_SEED,
    Array,
    Int,
    Texts,
    fixed,
    kernel,
)  # fmt: skip

FEATURES = (
    "code_lines", "code_marks", "indented_lines", "identifiers", "latex", "maths", "digits",
    "steps", "questions", "sentences", "words_per_line", "letters_per_word",
)  # fmt: skip
"""Shares of the lines (that are not empty): `code_lines` end or are built like a statement or
command, `indented_lines`, `sentences` (8 words or more, and a full stop at the end). Shares of the
bytes that are no space: `code_marks` (brackets, semicolons, ...), `digits`. Per word: `identifiers`
(an underscore or a capital inside, or a call), `latex` (commands and dollar signs), `maths`
(operators and Greek letters), `steps` (therefore, suppose, step, ...), `questions` (question
marks). Logarithms: `words_per_line`, `letters_per_word`."""
STEP_WORDS = (
    "therefore", "thus", "hence", "because", "since", "suppose", "assume", "assuming", "let",
    "then", "follows", "implies", "imply", "prove", "proof", "proves", "theorem", "lemma",
    "corollary", "consequently", "step", "steps", "firstly", "secondly", "finally", "conclude",
    "conclusion", "given", "calculate", "compute", "solve", "solution", "answer", "explain",
    "reason", "reasoning", "equation", "substituting", "substitute", "obtain", "derive", "deduce",
    "contradiction", "equals", "hypothesis", "evidence", "whereas", "iff", "qed",
)  # fmt: skip
_SPACE, _LETTER, _UPPER, _DIGIT, _CODE, _OPERATOR, _OTHER = range(7)


def _byte_classes() -> np.ndarray:
    table = np.full(256, _OTHER, np.uint8)
    for code in range(256):
        char = chr(code)
        if char in " \t\r\n\f\v":
            table[code] = _SPACE
        elif code >= 128 or "a" <= char <= "z":
            table[code] = _LETTER
        elif "A" <= char <= "Z":
            table[code] = _UPPER
        elif "0" <= char <= "9":
            table[code] = _DIGIT
        elif char in "{}[]();_#$\\|&@~`/":
            table[code] = _CODE
        elif char in "+=<>^*":
            table[code] = _OPERATOR
    return table


def _word_hash(word: str) -> int:
    value = int(FNV_SEED)
    for byte in word.encode():
        value = (value ^ byte) * int(FNV_PRIME) % 2**64
    return value


_CLASSES = fixed(_byte_classes())
_STEPS = fixed(np.array(sorted(_word_hash(word) for word in STEP_WORDS), np.uint64))


def lexical_features(texts: Texts, max_bytes: int) -> np.ndarray:
    """Return :data:`FEATURES` of texts: float32 [n_texts, n_features]; shares as square roots.

    Args:
        texts: The texts.
        max_bytes: Bytes of each that are looked at.
    """
    return _all(texts.data, texts.offsets, max_bytes, _CLASSES, _STEPS)


@kernel
def _is_code(data: Array, first: Int, last: Int) -> bool:
    """Tell whether a line, stripped and not empty, is built like code or a command."""
    if _has_edges(data, first, last):
        return True
    for k in range(first, last - 1):
        x, y = data[k], data[k + 1]
        pair = (np.int64(x) << 8) | np.int64(y)
        # == != += :=   -> =>   :: && ||   );
        if pair in (0x3D3D, 0x213D, 0x2B3D, 0x3A3D, 0x2D3E, 0x3D3E, 0x3A3A, 0x2626, 0x7C7C, 0x293B):
            return True
        is_name = 0x61 <= x <= 0x7A or x == 0x5F or 0x30 <= x <= 0x39
        if is_name and k + 3 < last and y == 0x20 and data[k + 2] == 0x3D and data[k + 3] == 0x20:
            return True
    return False


@kernel
def _has_edges(data: Array, first: Int, last: Int) -> bool:
    """Tell whether a line begins or ends as code does."""
    a, z = data[first], data[last - 1]
    if z in (0x7B, 0x7D) or (z == 0x3B and last - first > 1):  # { } ;
        return True
    if last - first < 3:
        return False
    b, c = data[first + 1], data[first + 2]
    if z == 0x3A and data[last - 2] == 0x29:  # ):
        return True
    if (a == 0x24 and b == 0x20 and c > 0x20) or (a == 0x3E and b == 0x3E and c == 0x3E):  # $ >>>
        return True
    if a == 0x2F and b in (0x2F, 0x2A):  # // /*
        return True
    is_small = 0x61 <= b <= 0x7A
    if a == 0x3C and (is_small or b == 0x2F) and z == 0x3E:  # <tag>
        return True
    return a in (0x23, 0x40) and is_small and z != 0x2E  # #include, @decorator


@kernel
def _byte_features(data: Array, k: Int, first: Int, last: Int, kind: Int, row: Array) -> bool:
    """Count what a byte of a word adds; tell whether it makes the word an identifier."""
    byte = data[k]
    after = data[k + 1] if k + 1 < last else np.uint8(0)
    row[6] += kind == _DIGIT
    row[1] += kind == _CODE
    row[5] += kind == _OPERATOR
    row[8] += byte == 0x3F
    is_command = 0x61 <= after <= 0x7A or after in (0x28, 0x5B)  # \alpha \( \[
    row[4] += byte == 0x24 or (byte == 0x5C and is_command)
    # Greek letters, and the operators from U+2200 to 22FF
    row[5] += byte in (0xCE, 0xCF) or (byte == 0xE2 and 0x88 <= after <= 0x8B)
    if k == first:
        return False
    before = data[k - 1]
    is_small = 0x61 <= before <= 0x7A
    if byte == 0x28:  # f( but not printf(3)
        return (is_small or before == 0x5F) and not 0x30 <= after <= 0x39
    return byte == 0x5F or (kind == _UPPER and is_small)


@kernel
def _word_features(
    data: Array, first: Int, last: Int, classes: Array, steps: Array, row: Array
) -> None:
    """Count what a word (no space inside) adds."""
    value, n_letters, is_identifier = FNV_SEED, 0, False
    for k in range(first, last):
        kind = classes[data[k]]
        if kind in (_LETTER, _UPPER):
            low = data[k] + np.uint8(32) if kind == _UPPER else data[k]
            value = (value ^ np.uint64(low)) * FNV_PRIME
            n_letters += 1
        if _byte_features(data, k, first, last, kind, row):
            is_identifier = True
    row[3] += is_identifier
    row[11] += n_letters
    at = np.searchsorted(steps, value)
    row[7] += n_letters > 0 and at < len(steps) and steps[at] == value


@kernel
def _line_features(
    data: Array, first: Int, last: Int, classes: Array, steps: Array, row: Array
) -> tuple[Int, Int]:
    """Count what a line, stripped and not empty, adds; return its words and their bytes."""
    row[0] += _is_code(data, first, last)
    n_words, n_bytes, k = 0, 0, first
    while k < last:
        while classes[data[k]] == _SPACE:  # the last byte is no space
            k += 1
        begin = k
        while k < last and classes[data[k]] != _SPACE:
            k += 1
        n_words += 1
        n_bytes += k - begin
        _word_features(data, begin, k, classes, steps, row)
    row[9] += n_words >= 8 and data[last - 1] in (0x2E, 0x21, 0x3F)
    return n_words, n_bytes


@kernel
def _all(data: Array, offsets: Array, max_bytes: Int, classes: Array, steps: Array) -> Array:
    n, n_features = len(offsets) - 1, 12
    out = np.zeros((n, n_features), np.float32)
    row = np.zeros(n_features, np.float64)
    for d in range(n):
        row[:] = 0
        at, end = offsets[d], min(offsets[d + 1], offsets[d] + max_bytes)
        n_lines, n_words, n_bytes = 0, 0, 0
        while at < end:
            stop = at
            while stop < end and data[stop] != 0x0A:
                stop += 1
            first, last = at, stop
            while first < last and classes[data[first]] == _SPACE:
                first += 1
            while last > first and classes[data[last - 1]] == _SPACE:
                last -= 1
            if first < last:
                n_lines += 1
                row[2] += first - at >= 2 or data[at] == 0x09
                found = _line_features(data, first, last, classes, steps, row)
                n_words += found[0]
                n_bytes += found[1]
            at = stop + 1
        _scale(row, n_lines, n_words, n_bytes, out[d])
    return out


@kernel
def _scale(row: Array, n_lines: Int, n_words: Int, n_bytes: Int, out: Array) -> None:
    for f in range(10):
        below = n_words
        if f in (0, 2, 9):
            below = n_lines
        elif f in (1, 6):
            below = n_bytes
        out[f] = np.sqrt(row[f] / max(below, 1))
    out[10] = np.log1p(n_words / max(n_lines, 1))
    out[11] = np.log1p(row[11] / max(n_words, 1))

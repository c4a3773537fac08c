r"""Cutting text into pieces 64 bytes at a time, with one bit per byte.

Almost every border between pieces follows from the classes of a byte and of its neighbours, so the
borders of 64 bytes come out of some thirty operations on 64-bit masks. With L letters, N digits, S
spaces but line breaks, R line breaks and O all others, a piece starts at

- L after anything but L, S, and an O that itself starts a piece (those two join the word);
- N after anything but N, and every three digits;
- O after anything but O and " ";
- R after anything but O, S and R;
- S after anything but S, and at the last S of a run before L, N or O (it joins what follows).

What needs a look further away makes a block *hard*, and :func:`~puna.tokens.kernels.scan.piece_end`
cuts it piece by piece: numbers and spaces that are no ASCII in or near the block, and line breaks
that follow spaces that follow line breaks. Letters and others that are no ASCII are classified one
by one, and all bytes of such a character have its class. Contractions ('s, 'll) are looked up
one by one.
"""

from __future__ import annotations

import numpy as np

from puna.data.kernels.buffers import Array, kernel
from puna.tokens.kernels.bits import BLOCK, first_bit, range_mask
from puna.tokens.kernels.scan import LETTER, OTHER, Word, char_at, contraction, piece_end

NONE = np.uint64(0)
_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_REACH = 4
"""A border depends on no more than this many bytes before it."""

Masks = tuple[Word, Word, Word, Word, Word, Word, Word, Word]
"""Bits of a block: letters, ASCII digits, ASCII spaces, line breaks, others, " ", numbers and
spaces that are no ASCII, and all bytes of characters but their first."""

NO_MASKS: Masks = (NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE)


@kernel
def _wide_masks(data: Array, at: int, wide: Word, classes: Array) -> tuple[Word, Word, Word]:
    """Return which of the bytes that are no ASCII belong to letters, to others, and to the rest."""
    letter, other, rest = NONE, NONE, NONE
    while wide != NONE:
        first = at + first_bit(wide)
        # of a character that began in the block before; the limits are for bytes that are no UTF-8
        while first > at - _REACH and data[first] & 0xC0 == 0x80:
            first -= 1
        _, kind, width = char_at(data, first, classes)
        n = np.uint64(first + width - at)
        bits = wide & (((_ONE << n) - _ONE) if n < np.uint64(BLOCK) else _ALL)
        bits |= wide & (~wide + _ONE)
        wide ^= bits
        letter |= bits if kind == LETTER else NONE
        other |= bits if kind == OTHER else NONE
        rest |= bits if kind != LETTER and kind != OTHER else NONE
    return letter, other, rest


@kernel
def class_masks(data: Array, at: int, end: int, classes: Array) -> Masks:
    """Return the classes of the 64 bytes from ``at``; those from ``end`` on have none."""
    if at >= end:
        return NO_MASKS
    valid = _ALL if end - at >= BLOCK else (_ONE << np.uint64(end - at)) - _ONE
    zero, one = np.uint8(0), np.uint8(1)
    letter = range_mask(data, at, np.uint8(0x20), np.uint8(0x61), np.uint8(26)) & valid
    digit = range_mask(data, at, zero, np.uint8(0x30), np.uint8(10)) & valid
    newline = range_mask(data, at, zero, np.uint8(0x0A), one)
    newline = (newline | range_mask(data, at, zero, np.uint8(0x0D), one)) & valid
    blank = range_mask(data, at, zero, np.uint8(0x20), one) & valid
    space = blank | (range_mask(data, at, zero, np.uint8(0x09), np.uint8(5)) & valid)
    space &= ~newline
    wide = range_mask(data, at, zero, np.uint8(0x80), np.uint8(0x80)) & valid
    other = valid & ~(letter | digit | space | newline | wide)
    rest, inner = NONE, NONE
    if wide != NONE:
        inner = range_mask(data, at, zero, np.uint8(0x80), np.uint8(0x40)) & valid
        wide_letter, wide_other, rest = _wide_masks(data, at, wide, classes)
        letter, other = letter | wide_letter, other | wide_other
    return letter, digit, space, newline, other, blank, rest, inner


@kernel
def _before(now: Word, previous: Word, n: int) -> Word:
    """Return at each place the bit that stands ``n`` places before."""
    return (now << np.uint64(n)) | (previous >> np.uint64(BLOCK - n))


@kernel
def is_hard(data: Array, at: int, end: int, was_hard: bool, previous: Masks, now: Masks,
            following: Masks) -> bool:  # fmt: skip
    """Tell whether the borders of the block at ``at`` do not follow from its masks."""
    _, digit, space, newline, _, _, rest, _ = now
    near = rest | (previous[6] >> np.uint64(BLOCK - _REACH)) | (following[6] & np.uint64(0xF))
    # a run of digits that comes out of a block whose borders are not known
    if near != NONE or (
        was_hard and (digit & (previous[1] >> np.uint64(BLOCK - 1)) & _ONE) != NONE
    ):
        return True
    # adding 1 where spaces follow a line break carries to the end of the run
    carried = space + (space & _before(newline, previous[3], 1))
    if (carried & ~space & newline) != NONE:
        return True
    if carried < space:
        at += BLOCK
        while at < end and (data[at] == 0x20 or data[at] == 0x09 or 0x0B <= data[at] <= 0x0C):
            at += 1
        return at < end and (data[at] == 0x0A or data[at] == 0x0D or data[at] >= 0x80)
    return False


@kernel
def piece_starts(
    previous: Masks, now: Masks, following: Masks, joined_before: Word, digits_before: Word
) -> tuple[Word, Word, Word, Word]:
    """Return where pieces start in a block that is not hard, contractions left aside.

    Args:
        previous: Masks of the block before.
        now: Masks of the block.
        following: Masks of the block behind.
        joined_before: 1 when letters at the start of the block would join an other before it.
        digits_before: Places in the block before where digits start a piece.

    Returns:
        All starts, those of others, those of digits, and ``joined_before`` of the next block.
    """
    letter, digit, space, newline, other, blank, _, inner = now
    after_other = _before(other, previous[4], 1)
    after_space = _before(space, previous[2], 1)
    others = other & ~after_other & ~_before(blank, previous[5], 1)
    letters = letter & ~_before(letter, previous[0], 1) & ~after_space
    # adding 1 behind the first byte of an other carries to the end of its character
    behind_first = (others << _ONE) | joined_before
    carried = inner + behind_first
    letters &= ~(carried & ~inner)
    joined = (others >> np.uint64(BLOCK - 1)) | np.uint64(carried < inner)
    after_digit = _before(digit, previous[1], 1)
    third = digit & after_digit & _before(digit, previous[1], 2)
    digits = (digit & ~after_digit) | (_before(NONE, digits_before, 3) & third)
    more = digits
    while more != NONE:
        more = (more << np.uint64(3)) & third & ~digits
        digits |= more
    newlines = newline & ~after_other & ~after_space & ~_before(newline, previous[3], 1)
    joins = letter | digit | other
    before_join = (joins >> _ONE) | (
        (following[0] | following[1] | following[4]) << np.uint64(BLOCK - 1)
    )
    spaces = space & (~after_space | before_join)
    return letters | digits | others | newlines | spaces, others, digits, joined


@kernel
def contraction_ends(data: Array, at: int, end: int, others: Word) -> tuple[Word, Word]:
    """Return where contractions end in a block, and in the block behind it.

    Args:
        data: The text.
        at: Start of the block.
        end: End of the text.
        others: Places where others start a piece.
    """
    quotes = others & range_mask(data, at, np.uint8(0), np.uint8(0x27), np.uint8(1))
    here, behind = NONE, NONE
    while quotes != NONE:
        place = first_bit(quotes)
        quotes &= quotes - _ONE
        length = contraction(data, at + place, end)
        if length and place + length < BLOCK:
            here |= _ONE << np.uint64(place + length)
        elif length:
            behind |= _ONE << np.uint64(place + length - BLOCK)
    return here, behind


@kernel
def _ends_after(at: int, base: int, end: int, starts: Word) -> Word:
    """Return where pieces end behind ``at``: where others start, and at the end of the text."""
    if end - base < BLOCK:
        starts |= _ONE << np.uint64(end - base)
    if at < base:
        return starts
    return (
        starts & ~((np.uint64(2) << np.uint64(at - base)) - _ONE) if at - base < BLOCK - 1 else NONE
    )


@kernel
def cut(data: Array, start: int, end: int, classes: Array, ends: Array) -> int:
    """Cut a text into pieces.

    Args:
        data: UTF-8, padded.
        start: Start of the text.
        end: End of the text.
        classes: Class of each code point; those beyond the table are OTHER.
        ends: Receives where the pieces end, counted from ``start``.

    Returns:
        Number of pieces.
    """
    at, base, was_hard, n = start, start, False, 0
    previous, now = NO_MASKS, class_masks(data, start, end, classes)
    joined, digits, contracted = NONE, NONE, NONE
    while at < end:
        stop = min(base + BLOCK, end)
        following = class_masks(data, base + BLOCK, end, classes)
        hard = is_hard(data, base, end, was_hard, previous, now, following)
        starts, others, digits, joined = piece_starts(previous, now, following, joined, digits)
        behind = NONE
        if hard:
            while at < stop:
                at = piece_end(data, at, end, classes)
                ends[n] = at - start
                n += 1
        else:
            here, behind = contraction_ends(data, base, end, others)
            starts = _ends_after(at, base, end, starts | (now[0] & (here | contracted)))
            while starts != NONE:
                at = base + first_bit(starts)
                starts &= starts - _ONE
                ends[n] = at - start
                n += 1
        contracted = behind
        previous, now, was_hard = now, following, hard
        base += BLOCK
    return n

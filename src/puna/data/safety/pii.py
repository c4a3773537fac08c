"""Personal data and keys in a batch of texts: where they are, and the texts without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from puna.data.kernels.buffers import Texts
from puna.data.safety import scan
from puna.data.safety.config import KINDS
from puna.data.safety.emails import find_email
from puna.data.safety.numbers import Span, after_capitals, in_colons, in_number
from puna.data.safety.secrets import assigned, in_url, with_prefix

_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


def find_pii(texts: Texts, ids: Sequence[frozenset[str]]) -> dict[int, list[Span]]:
    """Find personal data and keys.

    Args:
        texts: The batch.
        ids: National ids to look for, per text.

    Returns:
        Index of a text -> its spans (byte offsets, kind) in order, without overlaps; texts without
        any are left out.
    """
    candidates = scan.find_candidates(texts)
    found: dict[int, list[Span]] = {}
    bounds = np.flatnonzero(np.diff(candidates.doc, prepend=-1, append=-1))
    rows = np.stack(candidates[1:], 1).tolist()
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        doc = int(candidates.doc[low])
        spans = [
            span for row in rows[low:high] for span in _look(texts.bytes_of(doc), row, ids[doc])
        ]
        if spans:
            found[doc] = _without_overlaps(spans)
    return found


def _look(view: memoryview, row: list[int], ids: frozenset[str]) -> Iterator[Span]:
    """Yield what a candidate is."""
    kind, start, end, n_digits, n_dots = row
    if kind == scan.NUMBER:
        yield from in_number(view, start, end, n_digits, n_dots, ids)
    elif kind == scan.EMAIL:
        is_login, password = in_url(view, start)
        if password is not None:
            yield password
        elif not is_login and (address := find_email(view, start)) is not None:
            yield *address, "email"
    elif kind == scan.PREFIX:
        yield from with_prefix(view, start)
    elif kind == scan.ASSIGNMENT:
        yield from assigned(view, start)
    elif kind == scan.LETTERED:
        yield from after_capitals(view, start, ids)
    else:
        yield from in_colons(view, start)


def _without_overlaps(spans: list[Span]) -> list[Span]:
    """Keep, where spans overlap, the kind that stands first in the list; order by position."""
    taken: list[Span] = []
    for span in sorted(set(spans), key=lambda item: (_RANK[item[2]], item[0])):
        if all(span[1] <= other[0] or span[0] >= other[1] for other in taken):
            taken.append(span)
    return sorted(taken)


def redact(
    texts: Texts, found: Mapping[int, list[Span]], replacements: Mapping[str, str]
) -> tuple[bytes, np.ndarray]:
    """Replace the spans whose kind has a replacement.

    Returns:
        The UTF-8 of all texts, and int64 offsets [n_texts + 1] into it.
    """
    encoded = {kind: text.encode() for kind, text in replacements.items()}
    offsets = texts.offsets - texts.offsets[0]
    pieces: list[bytes | memoryview] = []
    data = texts.data.data
    at, grown = int(texts.offsets[0]), np.zeros(len(offsets), np.int64)
    for doc in sorted(found):
        base = int(texts.offsets[doc])
        for start, end, kind in found[doc]:
            if kind in encoded:
                pieces += [data[at : base + start], encoded[kind]]
                at = base + end
                grown[doc + 1] += len(encoded[kind]) - (end - start)
    pieces.append(data[at : int(texts.offsets[-1])])
    return b"".join(pieces), offsets + np.cumsum(grown)

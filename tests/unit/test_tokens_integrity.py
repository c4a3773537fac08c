"""Damage in token shards: found before it is trained on, named, and left out when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.tokens.integrity import BLOCK_BYTES, BlockHasher, damaged_blocks
from puna.tokens.lineage import open_source
from puna.tokens.loader import NO_LABEL, PackedLoader
from puna.tokens.shards import DamagedTokensError, TokenShards
from tests.unit.token_shards import SIZES, arrays, loader, seal, write_large_shards, write_shards

PER_BLOCK = BLOCK_BYTES // 2


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return write_large_shards(tmp_path / "shards", 400_000)


def large_loader(folder: Path, **changes: Any) -> PackedLoader:
    return PackedLoader(folder, "train", None, 512, 8, 3, **changes)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 7])
def test_blocks_are_hashed_however_they_come(size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    whole, pieces = BlockHasher(), BlockHasher()
    whole.update(data)
    for start in range(0, size, 10_007):
        pieces.update(data[start : start + 10_007])
    hashes = whole.finish()
    np.testing.assert_array_equal(hashes, pieces.finish())
    assert len(hashes) == -(-size // BLOCK_BYTES)
    if size:
        assert damaged_blocks(data, hashes) == []
        changed = bytearray(data)
        changed[-1] ^= 1
        assert damaged_blocks(bytes(changed), hashes) == [len(hashes) - 1]
        assert damaged_blocks(data[:-1], hashes) == [len(hashes) - 1]


def documents_of(folder: Path, block: int) -> range:
    offsets = TokenShards(folder).open("train", "web").offsets
    first = int(np.searchsorted(offsets, block * PER_BLOCK, side="right")) - 1
    last = int(np.searchsorted(offsets, (block + 1) * PER_BLOCK - 1, side="right")) - 1
    return range(first, last + 1)


def test_a_flipped_bit_stops_the_first_batch_that_holds_it(large: Path) -> None:
    flip(large / "train/web/tokens.bin", 2 * BLOCK_BYTES + 77)
    hit = {f"web-{i:06d}" for i in documents_of(large, 2)}
    one = large_loader(large)
    n_good = n_bad = 0
    for step in range(40):
        read = {s["document_id"] for row in one.lineage(step) for s in row["segments"]}
        if read & hit:
            n_bad += 1
            with pytest.raises(DamagedTokensError) as raised:
                one.batch(step, 0, 1)
            message = str(raised.value)
            assert "train/web/tokens.bin, bytes 131072 to 196608" in message
            assert f"documents {min(documents_of(large, 2))} to {max(documents_of(large, 2))} of" \
                in message  # fmt: skip
            assert 'on_damage = "skip"' in message
        else:
            n_good += 1
            one.batch(step, 0, 1)
    assert n_good
    assert n_bad


def test_skipping_leaves_out_whole_documents_and_changes_nothing_else(
    large: Path, tmp_path: Path
) -> None:
    whole = large_loader(write_large_shards(tmp_path / "good", 400_000))
    flip(large / "train/web/tokens.bin", 2 * BLOCK_BYTES + 77)
    hit = {f"web-{i:06d}" for i in documents_of(large, 2)}
    one = large_loader(large, on_damage="skip")
    assert one.left_out == []
    for step in range(130):
        batch, good = one.batch(step, 0, 1), whole.batch(step, 0, 1)
        tokens, labels = good.tokens_BT.copy(), good.labels_BT.copy()
        for i, row in enumerate(one.lineage(step)):
            for number, segment in enumerate(row["segments"]):
                if segment["document_id"] in hit:
                    mine = good.doc_ids_BT[i] == number
                    tokens[i, mine], labels[i, mine] = 0, NO_LABEL
        np.testing.assert_array_equal(batch.tokens_BT, tokens)
        np.testing.assert_array_equal(batch.labels_BT, labels)
        np.testing.assert_array_equal(batch.doc_ids_BT, good.doc_ids_BT)
        np.testing.assert_array_equal(batch.positions_BT, good.positions_BT)
    assert {found.document_id for found in one.left_out} == hit
    assert {found.source for found in one.left_out} == {"web"}
    again = open_source(json.loads(json.dumps(one.spec())))
    for rank in range(4):  # found late or early, alone or not: the same rows
        parts = arrays(again.batch(59, rank, 4))
        for full, part in zip(arrays(one.batch(59, 0, 1)), parts, strict=True):
            np.testing.assert_array_equal(full[rank * 2 : rank * 2 + 2], part)


def test_what_another_rank_found_is_left_out_here(large: Path) -> None:
    flip(large / "train/web/tokens.bin", 5)
    finder = large_loader(large, on_damage="skip")
    for step in range(99):
        finder.batch(step, 0, 1)
    flip(large / "train/web/tokens.bin", 5)  # the copy of this rank is whole
    told = large_loader(large, on_damage="skip")
    told.leave_out(finder.left_out)
    for step in range(99):
        for left, right in zip(
            arrays(told.batch(step, 0, 1)), arrays(finder.batch(step, 0, 1)), strict=True
        ):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", ["offsets.npy", "blocks.npy"])
def test_damage_in_what_finds_the_tokens_is_found_at_opening(tmp_path: Path, name: str) -> None:
    folder = seal(write_shards(tmp_path / "x", {"train": SIZES}))
    path = folder / "train" / "web" / name
    flip(path, path.stat().st_size - 8)
    with pytest.raises(PunaError, match=rf"web/{name} is damaged: it does not have the hash"):
        loader(folder)


@pytest.mark.parametrize("n_bytes", [0, 3 * BLOCK_BYTES + 1001])
def test_a_file_cut_short_stops_at_once_or_loses_its_end(large: Path, n_bytes: int) -> None:
    path = large / "train/web/tokens.bin"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(PunaError, match=rf"tokens\.bin is damaged: it has {n_bytes} bytes"):
        large_loader(large)
    one = large_loader(large, on_damage="skip")
    for step in range(130):
        one.batch(step, 0, 1)
    offsets = TokenShards(large).open("train", "web", tolerant=True).offsets
    first_lost = n_bytes // BLOCK_BYTES * PER_BLOCK
    lost = np.flatnonzero(offsets[1:] > first_lost).tolist()
    assert sorted(found.document for found in one.left_out) == lost

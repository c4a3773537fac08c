"""Token shards in a store: the same batches, a bounded and shared cache, damage and bad luck."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from puna.core.errors import PunaError
from puna.data.sources import remote as sources_remote
from puna.tokens.lineage import open_source
from puna.tokens.loader import PackedLoader
from puna.tokens.remote import CHUNK_BYTES, Cache
from puna.tokens.shards import DamagedTokensError
from tests.unit.range_server import Server, serving
from tests.unit.token_shards import arrays, write_large_shards


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large_shards(tmp_path_factory.mktemp("large") / "shards")


@pytest.fixture
def server(large: Path) -> Iterator[Server]:
    with serving(large) as found:
        yield found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_remote, "_FIRST_PAUSE_S", 0.001)


def open_loader(url: Path | str, folder: Path | None = None, **changes: Any) -> PackedLoader:
    max_bytes = changes.pop("max_bytes", 1 << 30)
    cache = None if folder is None else Cache(folder, max_bytes)
    return PackedLoader(url, "train", None, 512, 16, 3, cache=cache, **changes)


def chunks(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.chunk"))


def same(one: PackedLoader, other: PackedLoader, steps: range) -> None:
    for step in steps:
        for left, right in zip(
            arrays(one.batch(step, 0, 1)), arrays(other.batch(step, 0, 1)), strict=True
        ):
            np.testing.assert_array_equal(left, right)


def test_the_batches_are_those_of_the_folder(large: Path, server: Server, tmp_path: Path) -> None:
    local, remote = open_loader(large), open_loader(server.url, tmp_path)
    server.failures = 3
    same(local, remote, range(20))
    n_chunks = -(-(large / "train/web/tokens.bin").stat().st_size // CHUNK_BYTES)
    assert len(chunks(tmp_path)) == n_chunks
    asked = dict(server.asked)
    assert sum(n for name, n in asked.items() if "tokens.bin" in name) == n_chunks + 3
    again = open_source(json.loads(json.dumps(remote.spec())))
    assert again.lineage(7) == local.lineage(7)
    same(local, again, range(20))  # another process, later: from the cache
    new = server.asked - Counter(asked)
    assert set(new) == {"index.json"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_any_store_of_fsspec_will_do(large: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(large), "/bucket/shards", recursive=True)
    same(open_loader(large), open_loader("memory://bucket/shards", tmp_path), range(4))
    fs.rm("/bucket", recursive=True)


def test_the_cache_keeps_its_size_and_what_was_used_last(large: Path, server: Server,
                                                         tmp_path: Path) -> None:  # fmt: skip
    limit = 2 * CHUNK_BYTES + 1000
    remote = open_loader(server.url, tmp_path, max_bytes=limit)
    tokens = remote.shards.open("train", "web").tokens
    for number in (0, 1, 2, 3):
        tokens[number * CHUNK_BYTES // 2 : number * CHUNK_BYTES // 2 + 5]
        os.utime(chunks(tmp_path)[-1], (number, number))
        assert sum(path.stat().st_size for path in chunks(tmp_path)) <= limit
    assert [path.name.rpartition("-")[2] for path in chunks(tmp_path)] == ["2.chunk", "3.chunk"]
    same(open_loader(large), remote, range(5))  # also when nothing fits


READER = """
import sys
from pathlib import Path
from puna.tokens.loader import PackedLoader
from puna.tokens.remote import Cache
one = PackedLoader(sys.argv[1], "train", None, 512, 16, 3, cache=Cache(Path(sys.argv[2]), 1 << 30))
for step in range(6):
    one.batch(step, 0, 1)
"""


def test_processes_share_a_cache_and_download_nothing_twice(server: Server, tmp_path: Path) -> None:
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, server.url, str(tmp_path)])
        for _ in range(3)
    ]
    assert [reader.wait(60) for reader in readers] == [0, 0, 0]
    counted = {name: n for name, n in server.asked.items() if name != "index.json"}
    assert counted
    assert set(counted.values()) == {1}


def test_a_download_that_was_killed_is_done_again(large: Path, server: Server,
                                                  tmp_path: Path) -> None:  # fmt: skip
    open_loader(server.url, tmp_path).batch(0, 0, 1)
    victim = chunks(tmp_path)[0]
    victim.with_name(f".{victim.name}.tmp").write_bytes(victim.read_bytes()[:1000])
    victim.unlink()
    same(open_loader(large), open_loader(server.url, tmp_path), range(3))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_a_copy_that_went_bad_here_is_downloaded_anew(large: Path, server: Server, tmp_path: Path,
                                                      how: str) -> None:  # fmt: skip
    open_loader(server.url, tmp_path).batch(0, 0, 1)
    for path in chunks(tmp_path):
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes({"flip": bytes(data), "cut": data[:-7], "empty": b""}[how])
    same(open_loader(large), open_loader(server.url, tmp_path), range(5))


def test_damage_in_the_store_stops_or_is_left_out(large: Path, tmp_path: Path) -> None:
    bad = write_large_shards(tmp_path / "bad")
    path = bad / "train/web/tokens.bin"
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)
    with serving(bad) as server:
        one = open_loader(server.url, tmp_path / "cache", on_damage="skip")
        local = open_loader(bad, on_damage="skip")
        same(local, one, range(60))
        assert {found.document for found in one.left_out} == {x.document for x in local.left_out}
        assert one.left_out
        stops = open_loader(server.url, tmp_path / "cache")
        with pytest.raises(DamagedTokensError, match=r"http://.*tokens\.bin, bytes 4980736 to"):
            same(stops, local, range(60))


def test_a_file_cut_short_in_the_store_loses_its_end(large: Path, tmp_path: Path) -> None:
    bad = write_large_shards(tmp_path / "bad")
    path = bad / "train/web/tokens.bin"
    path.write_bytes(path.read_bytes()[: CHUNK_BYTES * 4 + 5000])
    with serving(bad) as server:
        one = open_loader(server.url, tmp_path / "cache", on_damage="skip")
        same(open_loader(bad, on_damage="skip"), one, range(30))
        assert one.left_out
        with pytest.raises(DamagedTokensError, match=r"tokens\.bin, bytes \d+ to"):
            same(open_loader(server.url, tmp_path / "cache"), one, range(30))


def test_what_is_wrong_is_said(large: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(PunaError, match=r"nowhere/index\.json does not exist"):
        open_loader(f"{server.url}/nowhere", tmp_path)
    server.ranges = False
    with pytest.raises(PunaError, match=r"asked for bytes \d+ to \d+, got \d+ bytes"):
        open_loader(server.url, tmp_path).batch(0, 0, 1)
    server.ranges, server.failures = True, 10**6
    with pytest.raises(PunaError, match=r"503.*6 attempts"):
        open_loader(server.url, tmp_path / "other")
    server.failures = 0
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(PunaError, match=r"shard cache .* cannot be made"):
        open_loader(server.url, path / "cache")

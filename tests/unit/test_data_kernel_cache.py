"""Kernels compile where no folder for numba's cache can be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import caching

from puna.data.kernels.buffers import kernel


def add_one(value: int) -> int:
    return value + 1


def test_a_kernel_is_cached_on_disk_where_a_folder_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert kernel(add_one)(1) == 2
    assert list(tmp_path.rglob("*.nbi"))


def test_a_kernel_compiles_without_a_cache_where_none_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    compiled = kernel(add_one)
    assert compiled(1) == 2
    assert isinstance(compiled._cache, caching.NullCache)


def test_another_runtime_error_is_not_taken_for_a_missing_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_function: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("puna.data.kernels.buffers.njit", lambda **_options: broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        kernel(add_one)


def test_the_kernels_import_with_a_file_where_the_cache_folder_should_be(tmp_path: Path) -> None:
    """A file in the way is what root cannot write to either."""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-c",
         "from puna.data.kernels.buffers import power_of_two; print(power_of_two(9))"],
        env={"NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache"),
             "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("16", 0), done.stderr

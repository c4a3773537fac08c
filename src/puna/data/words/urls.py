"""What the expression for URLs says about chunks, remembered in a table that the kernels read."""

from __future__ import annotations

import numpy as np

from puna.data.words.rules import hash_of, url_pattern


class Urls:
    """What the expression for URLs has said about chunks; grows while texts are split."""

    def __init__(self) -> None:
        self.keys, self.values = np.zeros(1 << 12, np.uint64), np.zeros(1 << 12, np.int64)
        self._n = 0

    def learn(self, chunks: set[str]) -> None:
        """Decide about chunks."""
        matches = url_pattern().match
        if 2 * (self._n + len(chunks)) > len(self.keys):
            size = len(self.keys)
            while 2 * (self._n + len(chunks)) > size:
                size *= 2
            old = self.keys != 0
            keys, values = self.keys[old], self.values[old]
            self.keys, self.values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
            for key, value in zip(keys.tolist(), values.tolist(), strict=True):
                self._put(key, value)
        for chunk in sorted(chunks):
            self._put(hash_of(chunk), int(matches(chunk) is not None))
        self._n += len(chunks)

    def _put(self, key: int, value: int) -> None:
        mask = len(self.keys) - 1
        slot = (key ^ key >> 29) & mask
        while self.keys[slot]:
            slot = (slot + 1) & mask
        self.keys[slot], self.values[slot] = key, value

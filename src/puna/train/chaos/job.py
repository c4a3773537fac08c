"""The training that is hurt: ``python -m puna.train.chaos.job FOLDER``; called again it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from puna.core.errors import USER_ERROR_EXIT_CODE, PunaError
from puna.core.ledger import LEDGER_FILE, Ledger
from puna.model.config import LlamaConfig
from puna.tokens.loader import Batch
from puna.train.config import TrainingConfig
from puna.train.spec import SourceSpec
from puna.train.watch.random_rows import RandomRows

JOB_FILE = "chaos.json"
OUT_DIR = "out"
SEQ_LEN, ROWS = 64, 8
MODEL = LlamaConfig(
    vocab_size=512, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, max_seq_len=SEQ_LEN
)


class FailingRows(RandomRows):
    """Rows of which one step's are always bad.

    Args:
        bad_step: The step; -1 for none.
        **shape: Of :class:`RandomRows`.
    """

    def __init__(self, bad_step: int, **shape: Any) -> None:
        super().__init__(**shape)
        self._bad_step = bad_step

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """Return rows of this rank.

        Raises:
            ValueError: It is the bad step.
        """
        if step == self._bad_step:
            raise ValueError(f"the data of step {step} are broken")
        return super().batch(step, rank, world)


def failing_rows(**values: Any) -> FailingRows:
    """Make them in a rank (the factory of training processes)."""
    return FailingRows(**values)


def main(argv: list[str]) -> int:
    """Train; return the exit code."""
    from puna.train.stage import train_job

    folder = Path(argv[0])
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    shape = {"vocab_size": MODEL.vocab_size, "seq_len": SEQ_LEN, "global_batch": ROWS}
    source = SourceSpec(
        "puna.train.chaos.job:failing_rows",
        {**shape, "document_tokens": 20, "bad_step": job["bad_step"]},
    )
    try:
        train_job(
            TrainingConfig.model_validate(job["training"]), MODEL, source, folder / OUT_DIR,
            Ledger(folder / LEDGER_FILE), name=folder.name,
        )  # fmt: skip
    except PunaError as error:
        sys.stderr.write(f"{error.message}\n")
        return USER_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

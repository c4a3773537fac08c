"""``puna train``: pretraining."""

from puna.cli.common import stage_group

train = stage_group(
    "train", "Train a Llama: sharded over ranks, checkpointed, restarted when a rank dies."
)

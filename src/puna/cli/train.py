"""``puna train``: pretraining, and what it will need."""

from puna.cli.common import stage_group
from puna.cli.train_plan import plan
from puna.cli.train_profile import profile

train = stage_group(
    "train", "Train a Llama: sharded over ranks, checkpointed, restarted when a rank dies."
)
train.add_command(plan)
train.add_command(profile)

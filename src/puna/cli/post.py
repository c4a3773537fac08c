"""``puna post``: what follows pretraining."""

from puna.cli.common import stage_group

post = stage_group("post", "Instruction pairs from documents, supervised fine-tuning on them.")

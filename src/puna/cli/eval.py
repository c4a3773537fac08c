"""``puna eval``: measuring models."""

from puna.cli.common import stage_group
from puna.cli.eval_checkpoint import checkpoint

evaluate = stage_group("eval", "Bits per byte on held-out text, and samples of what a model says.")
evaluate.add_command(checkpoint)

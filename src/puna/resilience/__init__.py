"""Detection, restart and accounting of faults; knows protocols, never the trainer."""

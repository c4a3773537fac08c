"""Detection, restart and accounting of faults; knows protocols, never the trainer.

Read ``protocols`` (what is watched), ``supervisor`` (detect, restart, give up), ``faults`` (faults
on purpose) and ``goodput`` (where the time went).
"""

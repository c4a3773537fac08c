"""Faults from outside on a real training, and whether it ends as if nothing had happened.

Every scenario trains the same small model through supervisor, agent, ranks and checkpoints, and
hurts processes and files as a bad day would: with signals and damaged bytes, not through hooks. The
oracle is the training that nothing happened to: every step of every attempt has the same loss and
gradient norm, and the final weights are the same file, bit by bit.
"""

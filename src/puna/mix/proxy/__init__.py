"""Proxy runs: small Llamas, trained one after the other in each process, measured on held-out text.

The function and the optimiser are those of the trainer; what differs is that a step is written out
by hand (:mod:`.model`), which for models of 0.1M to 10M parameters on a CPU is several times faster
than operations that keep track of their gradients.
"""

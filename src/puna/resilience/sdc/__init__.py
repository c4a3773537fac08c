"""Silent data corruption: computers that compute wrongly and say nothing.

Read ``digest`` (bitwise digests of state), ``guard`` (compare and heal), ``replay`` (another rank
computes the same), ``verdict`` (who was wrong), ``abft`` (checksums of matrix products), ``known``
(tests with known answers) and ``coverage`` (what all of it finds). Knows tensors, process groups
and callables, never the trainer.
"""

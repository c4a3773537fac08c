"""Hot loops of the checkpoint formats, compiled by numba and cached on disk."""

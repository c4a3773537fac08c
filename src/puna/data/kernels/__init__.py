"""Hot loops over Arrow string buffers, compiled by numba (``nogil``, cached on disk).

Each kernel takes the bytes and offsets of a batch of texts and returns one row of numbers per
text. Numba is imported with these modules only, so that the stage registry stays fast.
"""

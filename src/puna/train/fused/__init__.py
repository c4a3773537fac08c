"""What stands between the matrix products on a CPU, each in one pass over memory.

PyTorch computes norms, rotations, softmax and the gate as several operations, each of which reads
and writes whole tensors; here each is one loop over rows that stay in the first-level cache,
forward and backward. The matrix products are PyTorch's.
"""

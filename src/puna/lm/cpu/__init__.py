"""Decoding on a CPU: one compiled call computes a whole forward of few tokens.

Read in this order: ``decoder`` (what the engine calls), ``step`` (the forward), ``matmul`` and
``attend`` (its loops), ``crew`` (the threads), ``intrinsics`` (vectors, atomics).
"""

"""Decoding on a CPU: one compiled call computes a whole forward of few tokens.

Read in this order: ``decoder`` (what the engine calls), ``structures`` (what it hands over),
``step`` (the forward), ``schedule`` and ``crew`` (the threads), ``matmul``, ``attention`` and
``elementwise`` (the loops), ``vectors`` and ``intrinsics`` (instructions), ``pages`` (of memory).
"""

"""Inference on a CPU: one compiled call computes a whole forward of few tokens, or of a prompt.

Read in this order: ``decoder`` (what the engine calls), ``structures`` (what it hands over),
``step`` (the forward), ``schedule`` and ``crew`` (the threads), ``matmul``, ``attention`` and
``elementwise`` (the loops), ``vectors``, ``products`` and ``intrinsics`` (instructions), ``pages``
(of memory).

Prompts in bfloat16, where the processor multiplies it: ``prefill`` (what the engine calls),
``prompt`` (the forward), ``pairs`` and ``lanewise`` (the loops), ``lanes`` (how tokens lie).
"""

"""Dry run: the ranks of a training of any size, built and stepped through without memory."""

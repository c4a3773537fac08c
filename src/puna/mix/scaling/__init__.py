"""Scaling laws: loss as a function of parameters and tokens, and what follows for a budget."""

"""Microbenchmarks of the user's machine, for the planner's hardware file."""

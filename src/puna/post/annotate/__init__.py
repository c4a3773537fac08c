"""The annotation desk: human data with several rounds of quality assurance."""

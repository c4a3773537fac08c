"""The mixture lab: which mix of sources makes the best model, with error bars."""

"""Regressors: from mixes and losses of runs to the loss of any mix."""

"""Configuration, stages, artifacts and lineage, the event ledger, errors and units.

Nothing here imports torch or a data engine, so that ``puna --help`` stays fast.
"""

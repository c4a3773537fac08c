"""The report of a run: one self-contained page, and the numbers behind it.

``stage.py`` is the stage; ``collect/`` reads artifacts and the ledger into one JSON value (what is
written to ``report.json``); ``render.py`` with ``charts/`` and ``templates/`` draws that value.
"""

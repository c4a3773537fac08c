"""What the page on a run's data shows, as JSON values: signals, margins, before and after.

``folders.py`` opens the stages of a run, ``sample.py`` draws documents, ``measured.py`` and
``columns.py`` find the values of signals, ``histogram.py`` counts them, ``cases.py`` looks for
documents beside a threshold, ``corpus.py`` describes a corpus, ``collect.py`` puts it together.
"""

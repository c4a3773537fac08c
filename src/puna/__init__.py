"""Puna: from raw documents to a Llama that answers, with every token, hour and byte accounted for.

Read the packages in the order of the story: ``core``, ``data``, ``tokens``, ``model``, ``train``,
``resilience``, ``post``, ``eval``, ``ui``, ``cli``.
"""

__version__ = "0.1.0"

"""Words as spaCy's English tokenizer makes them, compiled: what datatrove's filters count.

:mod:`rules` holds the facts as arrays, :mod:`affixes` cuts a chunk, :mod:`split` a text.
"""

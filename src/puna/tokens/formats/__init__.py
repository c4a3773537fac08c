"""Tokenizer files of other projects, each read into the definition that ``tokenizer.json`` holds.

``folder`` finds what a path holds; ``ranks`` (Llama 3), ``sentencepiece`` (Llama 2) and ``gguf``
read and write one format each.
"""

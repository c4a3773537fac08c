"""Compiled byte-pair encoding for Llama 3's pattern.

``bits`` reads many bytes at once, ``scan`` cuts text into pieces one by one, ``masks`` does so for
64 bytes at a time, ``merge`` merges the bytes of a piece, ``words`` remembers pieces, and
``documents`` puts them together. The result is that of Llama 3's own tokenizer (tiktoken): of all
neighbours that form a token, the pair with the lowest rank merges first, the leftmost of equals.
"""

"""Tokenizer training and loading, token shards, packing, the resumable loader."""

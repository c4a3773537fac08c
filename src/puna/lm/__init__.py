"""A language model: weights with their tokenizer, loaded, inspected, converted and run.

Read in this order: ``language_model`` (the public interface), ``load``, ``engine`` (requests to
tokens, continuous batching), ``cpu`` (the compiled step of few tokens), ``text`` (tokens to text).
"""

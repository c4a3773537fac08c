"""Names and shapes of a Llama's parameters, in the order of the model; imports no torch.

The names are those of Meta's checkpoints. Loaders, writers and the inspection check files against
this list before a single weight is read.
"""

from __future__ import annotations

from puna.model.config import LlamaConfig

EMBEDDING = "tok_embeddings.weight"
NORM = "norm.weight"
HEAD = "output.weight"


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter; a tied head is no parameter of its own.

    Matrices are (rows out, columns in).
    """
    c = config
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, c.dim)}
    for layer in range(c.n_layers):
        for name, shape in layer_shapes(c).items():
            shapes[f"layers.{layer}.{name}"] = shape
    shapes[NORM] = (c.dim,)
    if not c.tie_embeddings:
        shapes[HEAD] = (c.vocab_size, c.dim)
    return shapes


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return name (without ``layers.N.``) and shape of the parameters of one block."""
    c = config
    return {
        "attention.wq.weight": (c.dim, c.dim),
        "attention.wk.weight": (c.kv_dim, c.dim),
        "attention.wv.weight": (c.kv_dim, c.dim),
        "attention.wo.weight": (c.dim, c.dim),
        "feed_forward.w1.weight": (c.ffn_dim, c.dim),
        "feed_forward.w2.weight": (c.dim, c.ffn_dim),
        "feed_forward.w3.weight": (c.ffn_dim, c.dim),
        "attention_norm.weight": (c.dim,),
        "ffn_norm.weight": (c.dim,),
    }

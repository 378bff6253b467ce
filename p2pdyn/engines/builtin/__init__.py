"""`builtin`: a Llama-architecture model on numpy, so that the main job runs on any machine.

    options      arguments after ``--``
    weights      where the GGUF file comes from
    checkpoint   GGUF to the model's form
    packed       that form as a file to map, kept in the cache
    tokenizer    GGUF vocabulary to a model card
    tiles        linear layers that give each row the same bits in any batch
    model        the forward pass over the paged KV cache
    scheduler    which sequences compute what in a step
    sampling     logits to token
    tiny         a random model for tests
    engine       all of it as an Engine

Importing this loads no numpy: the engine must set its thread count first.
"""

from p2pdyn.engines.builtin.engine import BuiltinEngine, create

__all__ = ["BuiltinEngine", "create"]

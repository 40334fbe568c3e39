"""Guppy, a ~9M-parameter language model that talks like a small fish: from raw text to a reply.

The way of the weights: characters/ -> datagen/ -> tokenizer -> train -> a model folder (checkpoint).
The way of a message: conversation -> engine -> reply; xray shows what happened inside.
"""

__version__ = "0.1.0"

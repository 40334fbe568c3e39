"""Guppy, a ~9M-parameter language model that talks like a small fish: from raw text to a reply.

The way of the weights: characters/ -> datagen/ -> tokenizer -> train -> a model folder (checkpoint).
The way of a message: conversation -> engine -> reply; xray shows what happened inside.
"""

import warnings

__version__ = "0.1.0"

# torch complains when it starts without NumPy, which nothing here needs, and nobody who talks to a fish should read
# that. This is the one place that every module of the package passes before it imports torch.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy", category=UserWarning)

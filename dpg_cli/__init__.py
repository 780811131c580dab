"""Dataset Policy Gradient: train a generator whose data does exactly what is asked to the model fine-tuned on it."""

import os

__version__ = "0.1.0"

# PyTorch reads this at its first tensor: huge pages for large vectors, which the system hands out three times as fast.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

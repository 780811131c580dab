"""Dataset Policy Gradient: train a generator whose data does exactly what is asked to the model fine-tuned on it."""

__version__ = "0.1.0"

"""From scores to data: which rows stay, the user's file without the others, and what retraining on it really does.

Not here: how scores come about (`attribution`), and how a row is understood (`data`).
"""

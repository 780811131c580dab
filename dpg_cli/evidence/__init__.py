"""Evidence that does not take the engine's word: checks before a run (`check*.py`), and of a finished one by stock PyTorch.

Not here: what a run will cost (`planning`), what a run's page shows (`report`).
"""

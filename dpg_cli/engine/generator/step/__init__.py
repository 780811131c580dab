"""What a policy step by an optimiser computes: how completions are laid out for a pass, and the objective chunk by chunk.

Not here: the step itself (`../policy.py`), and natural steps (`../natural.py`, `engine/whole`).
"""

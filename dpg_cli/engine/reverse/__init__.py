"""From ∂Φ/∂θ_T back to the credit of each token: the walk over the steps, the dual pass and its closed forms.

Not here: what the inner run keeps for it (`engine/inner/tape.py`, `remembered.py`).
"""

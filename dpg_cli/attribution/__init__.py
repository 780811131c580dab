"""`dpg attribute` without its display: a user's own examples and what each did to Φ.

Not here: the metagradient itself (`engine/metagrad.py`).
"""

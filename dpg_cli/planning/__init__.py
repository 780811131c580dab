"""What a run will take before it runs: memory, time, messages; on this machine, or on a card that is not at hand.

Not here: whether it will learn (`evidence/check.py`).
"""

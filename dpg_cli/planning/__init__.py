"""What a run will take before it runs: memory, time, messages.

Not here: whether it will learn (`evidence/check.py`).
"""

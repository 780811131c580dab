"""Other trainers with our reward.

Not here: what drives them from `dpg run` (`driver/trl/trainer.py`).
"""

"""The outer steps by TRL's GRPOTrainer: what it needs, and what drives it.

Not here: the reward, which any trainer can take (`integrations/trl.py`).
"""

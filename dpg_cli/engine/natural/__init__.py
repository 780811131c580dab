"""Natural policy steps (DESIGN §9): the Fisher information of tokens, the step on the LM head, and the laws of what an effect costs.

Not here: the step on all parameters or adapters (`engine/whole/`), nor AdamW's (`engine/generator/policy.py`).
"""

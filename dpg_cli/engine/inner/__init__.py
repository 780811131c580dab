"""The fine-tuning run that is differentiated: the target, its first-order pass, optimisers, the tape of states.

Not here: anything that goes backwards through more than one step (`engine/reverse`). Imports nothing of it.
"""

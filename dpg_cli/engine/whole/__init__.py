"""Natural steps on more than the LM head: all of a generator's parameters, or its adapters.

Not here: the head alone, whose hidden states never change (`../natural/step.py`, `../natural/fisher.py`).
"""

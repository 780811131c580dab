"""The closed forms of the dual pass, one file each: primal and tangent apart, with a hand-derived reverse.

A file holds the equations, an autograd function from (x, ẋ, …) to (y, ẏ), the torch calls that it replaces as functions of
dual tensors, and its row for `table.py`, `FORM`. Tests go over that table. `../dual.py` says why, and puts them in place.

Not here: the LM head and its loss (`../head.py`).
"""

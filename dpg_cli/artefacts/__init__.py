"""What a run writes for others: the rows of its dataset, the data card.

Not here: what carries it elsewhere in another form (`export`), and what a run needs to go on (`driver/checkpoint.py`).
"""

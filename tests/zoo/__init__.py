"""Architectures of transformers, each with tiny random weights, against the run that stock PyTorch makes of it.

`table.py` has a row for each architecture; `judge.py` compares our metagradient with central finite differences of
`stock.py`'s training loop, all in float64 (`exact.py`). `make test` judges each row in one random direction of the data
weights, `make zoo` every data weight of every row. `python -m tests.zoo NAME` judges a model type, and prints its row.
"""

"""Attention in slabs: some heads' rows of queries with all the keys that they see, so that memory is linear in the length.

What a row sees (`seen.py`), the slabs and their softmax (`slabs.py`), the first-order pass (`plain.py`), and how a model of
transformers comes to call it (`served.py`). Not here: tangents and their reverse (`../../reverse/forms/attention_slabs.py`).
"""

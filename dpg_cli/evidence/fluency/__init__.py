"""Does the data read like its control? Nats a token under models that did not make it, and how well the two can be told apart.

A dataset of a run and its control, or any two datasets: `nats` reads them with a language model, `classifier` learns to tell
them apart by counts, `auc` says how well a score does so, `judge` puts it together and into words, `rows` reads files.

Not here: the effect on a target (`evidence/verify.py`); whether a text is a sentence of the toy world (`driver/fluency.py`).
"""

"""One prepared check of a machine with a GPU, from bare to figures: `python -m benchmarks.gpu_check`, or `make gpu-check`.

`checkpoints` makes random-weight models of known shapes, `stages` says what is done in which order, `__main__` runs the stages
within a time limit and keeps what they found. Nothing is fetched from a hub.
"""

"""The resolved, validated, frozen settings of a run: presets, a user's file, overrides; the metric's options. Free of torch.

Not here: what settings are turned into (`driver/build.py`), and flags (`cli/`).
"""

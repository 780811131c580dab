"""Target metrics Φ: the protocol (`base.py`), the registry, those that come ready, and the door for a user's own.

Not here: their options, which are settings (`settings/metric_options.py`).
"""

"""Worked examples of custom metrics, registered by this package's own entry points (docs/custom-metrics.md).

Not here: metrics that a preset uses (`metrics`).
"""

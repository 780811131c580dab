"""What a model says, as a metric: answers, choices, preferences, readouts, sums of metrics. Installed by name (docs/behaviour.md).

Not here: metrics of weights, and those that a preset uses (`metrics`); worked examples to copy (`metrics/examples`).
"""

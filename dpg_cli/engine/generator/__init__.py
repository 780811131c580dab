"""The generator's side of an outer step: rollout, credit, alignment of two tokenisers, the policy step.

Not here: what a completion is worth (`engine/attribution.py`).
"""

"""Carrying datasets, models, picture and log out of a run folder, whole or not at all.

Not here: what a run writes by itself (`artefacts`).
"""

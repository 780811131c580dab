"""The run folder on disk: layout, atomic files, sessions, status, metrics log.

Not here: what happens in a run (`driver`).
"""

"""The life of a run: settings become live objects, outer steps are taken, state is saved, artefacts are written.

Not here: the algorithm (`engine/loop.py`), and what the files of a run are (`runs`).
"""

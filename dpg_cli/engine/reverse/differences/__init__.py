"""Second order by differences of ordinary passes: to either side, or to one beside what the inner run knows.

The passes, how long their steps are and how wrong what they give is, and what they need of a model. Not here: which way a run
takes (`../choice.py`), the walk that calls them (`../walk.py`).
"""

"""Looking at folders and files without believing them: nothing is unpickled, executed or built.

Not here: verdicts (`evidence`).
"""

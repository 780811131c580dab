"""One module a command (or noun): parse, call, print.

Not here: what several commands share (`cli/`).
"""

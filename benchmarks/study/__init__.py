"""The study: what DPG does and why, measured at the tiny scale. `python -m benchmarks.study` runs what is missing.

Each experiment is a module with
    NAME                    of its raw results
    cells(quick)            the settings of each cell, one JSON-able dict each; a cell takes seconds
    measure(settings)       the rows of a cell, one flat dict each
    section(rows)           its part of docs/results.md, from the raw rows alone
    figure(rows, axes)      its picture
"""

"""Bitmaps and QR codes: read from pictures and texts, drawn, and read back.

Not here: the metric that embeds them (`metrics/pattern.py`).
"""

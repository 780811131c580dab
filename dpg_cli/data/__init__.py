"""Everything that turns a user's files into examples and prompts: sources, texts, conversations, the form of a prompt.

Not here: what the models write (`engine/generator`), and what a run leaves (`artefacts`).
"""

"""Rewards of a completion's text alone, without any metagradient: the paper's baselines for language targets.

Not here: anything that looks at a model's weights.
"""

from dpg_cli.rewards.text import EditDistance, Embedding, LanguageId, build_text_reward

__all__ = ["EditDistance", "Embedding", "LanguageId", "build_text_reward"]

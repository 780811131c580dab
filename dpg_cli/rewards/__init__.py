"""Rewards of a completion's text alone, without any metagradient: the paper's baselines for language targets."""

from dpg_cli.rewards.text import EditDistance, Embedding, LanguageId, build_text_reward

__all__ = ["EditDistance", "Embedding", "LanguageId", "build_text_reward"]

"""The settings' public path, as the documentation shows it: `from dpg_cli.config import ModelsConfig`."""

from dpg_cli.settings.config import (
    Config,
    InnerConfig,
    ModelsConfig,
    validate,
)
from dpg_cli.settings.metric_options import METRIC_NAMES, MetricOptions, NormOptions, PatternOptions, TextLossOptions

__all__ = [
    "METRIC_NAMES",
    "Config",
    "InnerConfig",
    "MetricOptions",
    "ModelsConfig",
    "NormOptions",
    "PatternOptions",
    "TextLossOptions",
    "validate",
]

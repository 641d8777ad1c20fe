"""Datasets a config can name. Knows no model, no ranks and nothing of the engine."""

from dtrain.components.datasets.digits import Digits, DigitsClassification

__all__ = ["Digits", "DigitsClassification"]

"""Transforms a dataset section can name. Knows no model, no loader and nothing of the engine."""

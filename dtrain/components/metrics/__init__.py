"""Metrics a config can name, beside torchmetrics'. Knows no model, no ranks and nothing of the engine."""

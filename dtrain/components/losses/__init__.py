"""Losses a config can name, beside torch.nn's. Knows no model, no data and nothing of the engine."""

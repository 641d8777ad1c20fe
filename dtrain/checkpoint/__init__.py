"""Weights and state on disk: whole or absent, verified, kept, found again."""

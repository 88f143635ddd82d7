"""Nested Learning in PyTorch: models, memories and optimizers that keep learning."""

__version__ = "0.1.0"

"""Polypeft: one frozen base model, every tenant's adapters in one batch."""

__version__ = "0.1.0"

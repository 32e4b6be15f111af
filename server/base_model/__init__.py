"""The base model before it is loaded: where it comes from, and whether it can be served."""

"""Metrics for Prometheus: names.py declares every family, exposition.py collects and shows them."""

from server.metrics.exposition import Metrics

__all__ = ["Metrics"]

"""Figures for Prometheus: `names` declares every one, `page` shows them."""

from server.metrics.exposition import Metrics

__all__ = ["Metrics"]

"""`polypeft serve`: the parent of Valkey, engine, API and workers; starts and stops them, without torch."""

from server.supervisor.system import serve

__all__ = ["serve"]

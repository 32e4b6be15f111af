"""`polypeft serve`: one parent without torch that starts Valkey, engine and API, and stops them as one."""

from server.supervisor.system import serve

__all__ = ["serve"]

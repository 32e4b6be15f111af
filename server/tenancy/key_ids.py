"""The ids of keys by their hashes, for records of usage: without a call of Valkey once a key is known."""

from collections import OrderedDict

from server.tenancy.keys import fingerprint
from server.tenancy.tenants import Tenants

MAX_KNOWN = 10_000
REVOKED = "revoked"


class KeyIds:
    """Ids by the keys' hashes. A key never gets another id, so one that is known needs no call of Valkey."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._known: OrderedDict[str, str] = OrderedDict()

    async def find(self, tenant_id: str, secret: str) -> str:
        """The id of a key that was just found valid. Raises StoreError."""
        sha256 = fingerprint(secret)
        known = self._known.get(sha256)
        if known is None:
            known = await self._tenants.key_id(tenant_id, secret)
            if known == REVOKED:  # in this very moment
                return known
            self._known[sha256] = known
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return known

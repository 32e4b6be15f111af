"""What was used while Valkey was away, until it is told: sums by allowance, paid in parts, each once."""

import uuid
from typing import NamedTuple

from server.tenancy.limits import Allowance

MAX_DEBTS = 10_000  # allowances; the use of more is not paid
PART = 100  # allowances of one payment


class Debt(NamedTuple):
    allowance: Allowance  # with the limits that held
    requests: int
    tokens: int


class Payment(NamedTuple):
    id: str
    debts: list[Debt]


class Debts:
    def __init__(self) -> None:
        self._debts: dict[str, Debt] = {}  # by allowance
        self._sent: Payment | None = None  # whether it arrived is not known

    def __bool__(self) -> bool:
        return bool(self._debts or self._sent)

    def add(self, allowances: list[Allowance], tokens: int) -> None:
        """One request of these allowances used `tokens`."""
        for allowance in allowances:
            known = self._debts.get(allowance.id)
            if known is not None or len(self._debts) < MAX_DEBTS:
                requests, before = (known.requests, known.tokens) if known else (0, 0)
                self._debts[allowance.id] = Debt(allowance, requests + 1, before + tokens)

    def payment(self) -> Payment | None:
        """The next to make: the same one again until it is `paid`. None: all are paid."""
        if self._sent is None and self._debts:
            part = list(self._debts)[:PART]
            self._sent = Payment(uuid.uuid4().hex, [self._debts.pop(allowance) for allowance in part])
        return self._sent

    def paid(self, payment: Payment) -> None:
        if self._sent is payment:
            self._sent = None

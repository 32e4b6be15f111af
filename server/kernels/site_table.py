"""Addresses and sizes of each slot's adapter at each site, on the device, as a bank's kernels read them."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from server.kernels.transfers import send


class SiteTable:
    """One tensor [slots + 1, sites, columns] of int64 on the device; and on the host, of each slot, the sites
    that its adapter touches and its highest rank or width. Slot 0 is "no adapter".
    """

    def __init__(self, names: Sequence[str], slots: int, columns: int, device: torch.device) -> None:
        self.names = list(names)
        self.numbers = {name: i for i, name in enumerate(self.names)}
        self.rows = torch.zeros(slots + 1, len(self.names), columns, dtype=torch.int64, device=device)
        self.masks = [0] * (slots + 1)  # bit i: site i is touched
        self.ranks = [0] * (slots + 1)

    def put(self, slot: int, entries: Mapping[str, Sequence[int]], ranks: int) -> None:
        """Fill a free slot with entries [columns] by site name, in one asynchronous copy."""
        columns = self.rows.shape[2]
        flat = [0] * (len(self.names) * columns)
        for name, entry in entries.items():
            number = self.numbers[name]
            flat[number * columns : (number + 1) * columns] = entry
        self.masks[slot] = self.mask(entries)
        self.ranks[slot] = ranks
        self.rows[slot].view(-1).copy_(send(flat, self.rows.device))

    def fill(self, slot: int, rows: torch.Tensor, mask: int, rank: int) -> None:
        """Fill a free slot with `rows` [sites, columns], already on this device."""
        self.masks[slot], self.ranks[slot] = mask, rank
        self.rows[slot].copy_(rows)

    def clear(self, slot: int) -> None:
        """Free a slot."""
        if self.masks[slot]:
            self.rows[slot].zero_()
        self.masks[slot] = self.ranks[slot] = 0

    def mask(self, names: Iterable[str]) -> int:
        """The bits of these sites."""
        return sum(1 << self.numbers[name] for name in set(names))

    def among(self, mask: int) -> list[str]:
        """The names of these sites."""
        return [name for i, name in enumerate(self.names) if mask >> i & 1]

"""What a bank's kernels read of each slot and site: addresses and sizes, where the kernels run."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from server.kernels.transfers import send


class SiteTable:
    """What a bank's kernels read of every slot and site, in one tensor on the device; and what each slot
    asks of a launch: the sites it touches, and its highest rank or width.
    """

    def __init__(self, names: Sequence[str], slots: int, columns: int, device: torch.device) -> None:
        self.names = list(names)
        self.numbers = {name: i for i, name in enumerate(self.names)}
        self.rows = torch.zeros(slots + 1, len(self.names), columns, dtype=torch.int64, device=device)
        self.masks = [0] * (slots + 1)  # bit i: the site i is touched
        self.ranks = [0] * (slots + 1)

    def put(self, slot: int, entries: Mapping[str, Sequence[int]], ranks: int) -> None:
        """Fill a free slot; one copy, not waited for."""
        columns = self.rows.shape[2]
        flat = [0] * (len(self.names) * columns)
        for name, entry in entries.items():
            at = self.numbers[name]
            flat[at * columns : (at + 1) * columns] = entry
        self.masks[slot] = self.mask(entries)
        self.ranks[slot] = ranks
        self.rows[slot].view(-1).copy_(send(flat, self.rows.device))

    def fill(self, slot: int, rows: torch.Tensor, mask: int, rank: int) -> None:
        """The same with rows that are ready, [sites, columns] on this device."""
        self.masks[slot], self.ranks[slot] = mask, rank
        self.rows[slot].copy_(rows)

    def clear(self, slot: int) -> None:
        if self.masks[slot]:
            self.rows[slot].zero_()
        self.masks[slot] = self.ranks[slot] = 0

    def mask(self, names: Iterable[str]) -> int:
        """Their bits."""
        return sum(1 << self.numbers[name] for name in set(names))

    def among(self, mask: int) -> list[str]:
        """The names of these sites."""
        return [name for i, name in enumerate(self.names) if mask >> i & 1]

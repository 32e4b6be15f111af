"""What keeping an adapter is worth: how often it is asked for, what bringing it back costs, what room it has.

    worth = frequency * seconds to bring it back / share of the tier that it fills

Frequency is a count that halves with every half-life (LRFU, Lee et al. 2001), measured in asks and not in
seconds: a quiet night forgets nothing. It is remembered for adapters that have left, too, within a bound, so
that one asked for again and again comes to stay, and a scan over many leaves nothing but the last of them.
Seconds over room is the cost- and size-awareness of GreedyDual-Size. No torch, no I/O, no clock.
"""

from collections import OrderedDict
from dataclasses import dataclass

LIVES = 8  # a half-life, in asks for each adapter held
SHORTEST = 64  # asks
REMEMBERED = 16_384  # adapters at most whose frequency is known, about 3 MB


@dataclass(frozen=True)
class Reload:
    """What bringing an adapter back from the tier below takes. Rough: only the ratios decide anything."""

    latency: float  # seconds, whatever the size
    bandwidth: float  # bytes a second

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth


FROM_RAM = Reload(0.0005, 10e9)
FROM_DISK = Reload(0.01, 0.5e9)
FROM_STORE = Reload(0.03, 0.2e9)


class Asked:
    """How often each adapter has been asked for of late."""

    def __init__(self) -> None:
        self._tick = 0
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()  # key -> count then, and when

    def __len__(self) -> int:
        return len(self._seen)

    def touch(self, key: str, held: int) -> None:
        """One more ask; `held` adapters are in the tier now."""
        self._tick += 1
        self._seen[key] = (self.frequency(key, held) + 1, self._tick)
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def frequency(self, key: str, held: int) -> float:
        """0 for what nobody asked for: brought on a hint, it makes way for everything else."""
        count, then = self._seen.get(key, (0.0, self._tick))
        half_life = max(SHORTEST, LIVES * held)
        return count * float(0.5 ** ((self._tick - then) / half_life))

    def forget(self, key: str) -> None:
        self._seen.pop(key, None)

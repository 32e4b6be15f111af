"""A row: one sequence from its arrival to its last token. Counts and lists only; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.engine.scheduling.kv_blocks import BLOCK
from server.engine.scheduling.prompt_lookup import PromptLookup
from server.messages import AdapterRef, Generate, Timing, Use


@dataclass(eq=False)
class Row:
    """State of one sequence.

    tokens:  | virtual | prompt ...... | output ........ |
             | computed: K/V in blocks | scheduled | ... |

    A row that decodes has one token to compute, and what it guesses to come after that one.

    Virtual tokens are what prefix and prompt tuning put before the text: ids -1, -2, ... that stand in no
    vocabulary. They take positions and blocks like any other and are shared like any other.

    A preempted row keeps its tokens and loses its blocks: `computed` falls to 0 and prompt and output
    are prefilled again.
    """

    command: Generate
    seed: int
    tokens: list[int]
    prompt_length: int  # virtual tokens included
    virtual: int = 0
    fill: int | None = None  # K/V of the virtual tokens from this one on are to be written, not computed
    computed: int = 0
    scheduled: int = 0  # tokens of the step under way
    cached: int = 0  # prompt tokens the prefix cache spared at first admission
    charged: int = 0  # prompt tokens, from the first on, that its tenant does not pay for again
    begun_at: int = 0  # tokens that it had when it was admitted last
    admitted: bool = False  # has run before, perhaps preempted since
    sampled: bool = False  # has had finite logits: its blocks may be shared
    asked: bool = False  # for its adapters, which count that once
    passed_over: int = 0  # steps in which it could have started but for memory
    slots: tuple[int, ...] = ()  # one for each of `uses`, while the row runs
    grammar: Any = None  # what its schema allows next (engine/grammar.py), if it has one
    guess: list[int] = field(default_factory=list)  # tokens that may come next; computed, and kept if they do
    lookup: PromptLookup = field(default_factory=PromptLookup)
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, as far as known
    frequencies: int = 0  # which set of rotary frequencies its keys have (engine/rotary.py)
    timing: Timing = field(default_factory=Timing)
    waits_for: str = "capacity"  # while it waits
    since: float = 0.0  # when it began to wait for that, Unix seconds; 0: it does not wait
    cold: bool = False  # has waited for an adapter's load

    def __post_init__(self) -> None:
        single = self.command.adapter
        self.uses = (Use(single),) if single else self.command.adapters

    def lead_with(self, virtual: int) -> None:
        """Put an adapter's virtual tokens before the text, once known."""
        if virtual and not self.virtual:
            self.tokens[:0] = range(-1, -virtual - 1, -1)
            self.prompt_length += virtual
            self.virtual = virtual

    def wait(self, reason: str, now: float) -> None:
        """From here on it waits for this; what it waited for until now is told in `timing`."""
        if reason != self.waits_for:
            self.wait_ends(now)
            self.waits_for, self.since = reason, now
            self.cold |= reason == "adapter"

    def wait_ends(self, now: float) -> None:
        if not self.since:
            return
        waited, seconds = self.timing.waited, max(0.0, now - self.since)  # clocks are set back at times
        waited[self.waits_for] = waited.get(self.waits_for, 0.0) + seconds
        if self.waits_for == "adapter":
            self.timing.load = (self.since, now)
        self.since = 0.0

    def start(self, now: float) -> None:
        """It is in the batch."""
        self.wait_ends(now)
        self.begun_at = len(self.tokens)
        if not self.timing.started:
            self.timing.started = now
            self.timing.queued = max(0.0, now - self.timing.arrived)

    @property
    def id(self) -> str:
        return self.command.id

    @property
    def adapter(self) -> AdapterRef | None:
        return self.command.adapter

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens whose K/V are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def recompute_cost(self) -> int:
        """What preempting it costs, in tokens of decode: tokens of a prompt are some BLOCK times cheaper."""
        return BLOCK + len(self.blocks)

    @property
    def recovered(self) -> bool:
        """It has got as many tokens since it was admitted as its next recompute costs."""
        return len(self.tokens) - self.begun_at >= self.recompute_cost

    def left(self, max_context: int) -> int:
        """Tokens that it may still get."""
        longest = self.prompt_length + self.command.sampling.max_tokens
        return min(longest, max_context) - len(self.tokens)

    @property
    def completes(self) -> bool:
        """After the step under way this row has logits to sample from."""
        return self.computed + self.scheduled >= len(self.tokens)

    @property
    def decodes(self) -> bool:
        """In the step under way it has one token to compute, and guesses."""
        return self.scheduled == 1 + len(self.guess)

    @property
    def length(self) -> int:
        """Of all its tokens, as rotary scaling counts them."""
        return len(self.tokens)

    def positions(self) -> Sequence[int]:
        """Of the tokens of the step under way."""
        return range(self.computed, self.computed + self.scheduled)

    def to_compute(self) -> list[int]:
        """The tokens of the step under way."""
        return self.tokens[self.computed : self.computed + self.scheduled] + self.guess

    @property
    def slot(self) -> int:
        """The slot of a row with one adapter; 0 is the base."""
        return self.slots[0] if self.slots else 0

    @property
    def salt(self) -> bytes:
        """Rows share cached blocks within one tenant, one adapter's content and one set of frequencies."""
        content = ",".join(f"{use.adapter.digest}*{use.weight}" for use in self.uses)
        return f"{self.command.tenant}\0{content}\0{self.frequencies}".encode()

"""A row: one sequence from its arrival to its last token. Counts and lists only; no torch."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from server.engine.scheduling.kv_blocks import BLOCK
from server.engine.scheduling.prompt_lookup import PromptLookup
from server.messages import PRIORITIES, AdapterRef, Generate, Timing, Use


@dataclass(eq=False)
class Row:
    """State of one sequence.

    tokens:  | virtual | prompt ...... | output ........ |
             | computed: K/V in blocks | scheduled | ... |

    A decoding row computes its last token and the draft tokens after it, if there are any.

    Virtual tokens are the ones that prefix and prompt tuning put before the prompt. They have the ids -1, -2,
    ..., which are in no vocabulary, and take positions and blocks as other tokens do. Blocks of virtual
    tokens are shared as other blocks are.

    A preempted row keeps its tokens and loses its blocks: `computed` falls to 0, and prompt and output are
    prefilled again.
    """

    command: Generate
    seed: int
    tokens: list[int]
    prompt_length: int  # virtual tokens included
    num_virtual_tokens: int = 0
    write_virtual_from: int | None = None  # the virtual tokens whose precomputed K/V are to be written
    computed: int = 0
    scheduled: int = 0  # tokens to compute in this step
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when the row first ran
    charged_tokens: int = 0  # leading prompt tokens that its tenant has been charged for
    length_at_start: int = 0  # len(tokens) when the row last entered the batch
    level: int = field(init=False)  # its priority class, an index of PRIORITIES; ageing may raise it
    held: bool = False  # waits for an adapter or a sibling: it could not start if there were room
    admitted: bool = False  # has run before; it may have been preempted since
    num_scored: int = 0  # leading tokens whose prompt logprobs have been delivered
    sampled: bool = False  # has had finite logits: its blocks may be shared
    use_counted: bool = False  # the adapter cache has counted this request for its adapters
    steps_without_memory: int = 0  # steps in which only memory kept it from starting
    slots: tuple[int, ...] = ()  # one for each of `uses`, while the row runs
    grammar: Any = None  # llguidance matcher of its JSON schema (structured_output.py), if it has one
    draft: list[int] = field(default_factory=list)  # draft tokens of this step, computed after the last token
    lookup: PromptLookup = field(default_factory=PromptLookup)
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`, those known so far
    rope_variant: int = 0  # the set of rotary frequencies that its keys were computed with
    timing: Timing = field(default_factory=Timing)
    waits_for: str = "capacity"  # the reason it waits, a key of metrics.labels.WAITS
    waits_since: float = 0.0  # when that wait began, Unix seconds; 0: it does not wait
    cold_start: bool = False  # has waited for the load of an adapter

    def __post_init__(self) -> None:
        self.level = PRIORITIES.index(self.command.priority)
        single = self.command.adapter
        self.uses = (Use(single),) if single else self.command.adapters

    def prepend_virtual_tokens(self, count: int) -> None:
        """Put the virtual tokens of an adapter before the prompt. A second call changes nothing."""
        if count and not self.num_virtual_tokens:
            self.tokens[:0] = range(-1, -count - 1, -1)
            self.prompt_length += count
            self.num_virtual_tokens = count

    def wait(self, reason: str, now: float) -> None:
        """Wait for `reason` from `now` on. The previous wait, for another reason, is added to `timing`."""
        if reason != self.waits_for:
            self.end_wait(now)
            self.waits_for, self.waits_since = reason, now
            self.cold_start |= reason == "adapter"

    def end_wait(self, now: float) -> None:
        """Add the seconds of the current wait, if there is one, to `timing`."""
        if not self.waits_since:
            return
        waited, seconds = self.timing.waited, max(0.0, now - self.waits_since)  # a clock may be set back
        waited[self.waits_for] = waited.get(self.waits_for, 0.0) + seconds
        if self.waits_for == "adapter":
            self.timing.load = (self.waits_since, now)
        self.waits_since = 0.0

    def start(self, now: float) -> None:
        """Record that the row has entered the batch."""
        self.end_wait(now)
        self.length_at_start = len(self.tokens)
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
        """Tokens whose K/V have not been computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def recompute_cost(self) -> int:
        """Cost of preempting the row, in decoded tokens: a prefilled token costs about 1 / BLOCK of one."""
        return BLOCK + len(self.blocks)

    @property
    def recovered(self) -> bool:
        """The row has decoded as many tokens since it started as preempting it would cost."""
        return len(self.tokens) - self.length_at_start >= self.recompute_cost

    def remaining_output(self, max_context: int) -> int:
        """Tokens that the row may still generate."""
        longest = self.prompt_length + self.command.sampling.max_tokens
        return min(longest, max_context) - len(self.tokens)

    @property
    def completes(self) -> bool:
        """This step computes the last of its tokens, so it has logits to sample from."""
        return self.computed + self.scheduled >= len(self.tokens)

    @property
    def decodes(self) -> bool:
        """This step computes one token and its draft tokens."""
        return self.scheduled == 1 + len(self.draft)

    @property
    def unscored(self) -> range:
        """Positions whose next token is one of the prompt with a logprob to compute. The prompt's first token
        has none. Their K/V are computed anew, not taken from the prefix cache.
        """
        if self.command.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(self.num_scored, self.num_virtual_tokens), self.prompt_length - 1)

    def to_score(self) -> range:
        """Those of `unscored` that this step computes."""
        unscored = self.unscored
        return range(unscored.start, min(unscored.stop, self.computed + self.scheduled))

    def ends_with(self, token: int, end_tokens: Set[int]) -> bool:
        """Whether the sampled token is one that ends the row: its own, or the model's."""
        sampling = self.command.sampling
        return sampling.max_tokens > 0 and (
            token in sampling.stop_token_ids or (token in end_tokens and not sampling.ignore_eos)
        )

    @property
    def length(self) -> int:
        """Number of tokens, as rotary scaling counts them."""
        return len(self.tokens)

    def positions(self) -> Sequence[int]:
        """Positions of the tokens of this step."""
        return range(self.computed, self.computed + self.scheduled)

    def to_compute(self) -> list[int]:
        """Ids of the tokens of this step, draft tokens last."""
        return self.tokens[self.computed : self.computed + self.scheduled] + self.draft

    @property
    def slot(self) -> int:
        """The slot of a row with one adapter; 0 is the base model alone."""
        return self.slots[0] if self.slots else 0

    @property
    def salt(self) -> bytes:
        """Start of the block hashes: rows share blocks of one tenant, adapter content and RoPE variant."""
        content = ",".join(f"{use.adapter.digest}*{use.weight}" for use in self.uses)
        return f"{self.command.tenant}\0{content}\0{self.rope_variant}".encode()

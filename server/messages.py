"""What crosses between the API and the engine, and nothing else does.

msgspec structs over ZeroMQ (ipc://): the engine binds a ROUTER, each API process connects a DEALER.
The API speaks tokens, never text: tokenising, chat templates and stop strings are its business. Beats go by
a PUB of their own, whoever listens.
"""

from typing import Literal

import msgspec

from server.errors import PolypeftError

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one row turns logits into tokens. Ranges are checked by the API; the engine trusts them."""

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: drawn by the API, so that a preempted row repeats itself
    stop_token_ids: tuple[int, ...] = ()  # the base's end-of-text ids are added by the engine
    ignore_eos: bool = False
    min_tokens: int = 0  # no end-of-text or stop token before this many
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best
    grammar: str | None = None  # JSON schema the text must match (structured output)


class AdapterRef(msgspec.Struct, frozen=True):
    """One immutable adapter version, as the registry resolved it."""

    tenant: str
    name: str
    version: int
    digest: str  # content hash: cache key, prefix-cache key, system_fingerprint
    method: str
    manifest_key: str  # where the manifest lies in the object store


class Use(msgspec.Struct, frozen=True):
    """One of several adapters in a request."""

    adapter: AdapterRef
    weight: float = 1.0


class Generate(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row."""

    id: str
    tenant: str
    prompt: list[int]
    sampling: Sampling
    adapter: AdapterRef | None = None
    adapters: tuple[Use, ...] = ()  # several at once; `adapter` is None then
    deadline: float | None = None  # time.time() after which the row ends with deadline_exceeded
    weight: float = 1.0  # the tenant's share when tenants queue
    after: str | None = None  # wait for this sibling's prefill (n > 1): its prompt blocks are shared


class Request(msgspec.Struct, frozen=True, tag=True):
    """The rows of one request: the engine admits all of them or refuses all, before any gets a token."""

    rows: tuple[Generate, ...]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    id: str


class Check(msgspec.Struct, frozen=True, tag=True):
    """Load a staged version through the ordinary loader, run it, and say whether this base can serve it.

    `manifest` is the JSON of a manifest not yet written: the version becomes visible only after a yes.
    """

    id: str
    manifest: bytes
    allow_noop: bool = False  # let in an adapter that changes nothing


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """Bring a version towards the device before anybody asks for it."""

    adapter: AdapterRef


class Forget(msgspec.Struct, frozen=True, tag=True):
    """A deleted version: drop it from every tier once no row uses it."""

    digest: str


class Pins(msgspec.Struct, frozen=True, tag=True):
    """All adapters that tenants have pinned: kept on the device as far as their shares go."""

    adapters: tuple[AdapterRef, ...]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of an API process; the engine answers Ready when it is."""


Command = Request | Cancel | Check | Prefetch | Forget | Pins | Hello


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is up. `boot` differs after every restart: rows of another boot are lost."""

    boot: str
    base: bytes  # JSON of server.adapters.sites.Base
    limits: dict[str, int]  # max_seqs, max_model_len, kv_blocks, block_size, adapter_slots, ...


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    logprob: float
    top: list[tuple[int, float]]  # best first


class Timing(msgspec.Struct, array_like=True):
    """When a row did what, in Unix seconds, and what it waited for (see server/metrics/names.py)."""

    arrived: float = 0.0
    started: float = 0.0  # its first step
    first_token: float = 0.0
    queued: float = 0.0  # seconds from its arrival to its first step
    waited: dict[str, float] = {}  # reason -> seconds, waits after a preemption included
    source: str = ""  # where its adapter was found: device, ram, disk, store; "": it has none
    load: tuple[float, float] | None = None  # it waited for its adapter from then to then


class Chunk(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What one step gave one row. `finish` is set exactly once, in the row's last chunk."""

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    cached_tokens: int = 0  # of the prompt, from the prefix cache (first chunk only)
    finish: FinishReason | None = None
    stop_token: int | None = None  # the token that ended the row; it is in no `tokens`
    error: tuple[str, str] | None = None  # (code, message) with finish="error"
    timing: Timing | None = None  # with the row's first token

    @classmethod
    def failure(cls, id_: str, error: PolypeftError) -> "Chunk":
        return cls(id=id_, finish="error", error=(error.code, error.message))


class Chunks(msgspec.Struct, frozen=True, tag=True):
    """One message a step and API process, however many rows it carries."""

    chunks: list[Chunk]


class Checked(msgspec.Struct, frozen=True, tag=True):
    id: str
    error: tuple[str, str, str | None] | None = None  # (code, message, param)
    facts: dict[str, float | int | str] = {}  # parameters, rank, bytes ...: goes into the manifest


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Engine figures, about once a second, for /metrics; keys are those of server/metrics/names.py.

    Everything is absolute, also across the engine's restarts, so one that is lost or told twice does no harm.
    """

    boot: str
    gauges: dict[str, float]  # without labels, as the counters here
    counters: dict[str, float]
    series: list[tuple[str, tuple[str, ...], float]] = []  # (key, label values, value), of both kinds
    histograms: list[tuple[str, tuple[str, ...], list[int], float]] = []  # ... counts by bucket, sum


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The engine's process lives: told each second, however long its step takes, at `beat_address`."""

    boot: str
    seconds: float  # that the turn of the loop under way has run
    bound: float  # seconds, by what such steps took before; past it the engine hangs, and ends itself


Event = Ready | Chunks | Checked | Stats | Beat


def beat_address(address: str) -> str:
    """Where the engine at `address` publishes its beats; no longer than that."""
    return f"{address.removesuffix('.sock')}.beat"


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode

"""All messages between the API processes and the engine.

msgspec structs over ZeroMQ (ipc://): the engine binds a ROUTER socket, each API process connects a DEALER.
Messages hold tokens, never text: tokenising, chat templates and stop strings are done by the API. Beats are
published on a PUB socket of their own.
"""

from typing import Literal, get_args

import msgspec

from server.errors import PolypeftError, Unavailable, error_from_code

FinishReason = Literal["stop", "length", "cancelled", "error"]
Priority = Literal["interactive", "standard", "batch"]  # classes of rows, the most urgent first
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

GRAMMAR_HEADER = "%llguidance {}"  # the first line of a grammar in llguidance's Lark
JSON_WHITESPACE = r"[ \n\r\t]{0,40}"  # between JSON tokens; bounded, or a model could emit blanks for ever


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters of one row. The API checks their ranges; the engine relies on that."""

    max_tokens: int  # 0: the prompt is computed, and nothing is generated
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
    prompt_logprobs: int | None = None  # the same of each prompt token but the first
    grammar: str | None = None  # what the text must match: a JSON schema, or Lark after GRAMMAR_HEADER
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that the answer must not hold


class AdapterRef(msgspec.Struct, frozen=True):
    """One immutable adapter version, as the registry resolved it."""

    tenant: str
    name: str
    version: int
    digest: str  # content hash: key of the adapter and prefix caches, system_fingerprint
    method: str
    manifest_key: str  # key of the manifest in the object store


class Use(msgspec.Struct, frozen=True):
    """One of several adapters in a request."""

    adapter: AdapterRef
    weight: float = 1.0


class Generate(msgspec.Struct, frozen=True, omit_defaults=True):
    """Generate one row: a prompt, its sampling parameters and adapters."""

    id: str
    tenant: str
    prompt: list[int]
    sampling: Sampling
    adapter: AdapterRef | None = None
    adapters: tuple[Use, ...] = ()  # several combined; `adapter` is None then
    deadline: float | None = None  # time.time() after which the row ends with deadline_exceeded
    weight: float = 1.0  # of the tenant's fair share
    priority: Priority = "standard"
    after: str | None = None  # wait for this sibling's prefill (n > 1): its prompt blocks are shared


class Request(msgspec.Struct, frozen=True, tag=True):
    """The rows of one request. The engine admits all of them or refuses all before any gets a token."""

    rows: tuple[Generate, ...]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a row without a chunk."""

    id: str


class Check(msgspec.Struct, frozen=True, tag=True):
    """Load a staged version through the ordinary loader, run it, and report whether this base can serve it.

    `manifest` is the JSON of a manifest not yet written: the version becomes visible only after it has
    passed.
    """

    id: str
    manifest: bytes
    allow_noop: bool = False  # pass an adapter that changes no logits


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """Load a version towards the device before a request uses it."""

    adapter: AdapterRef


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Drop a deleted version from every tier once no row uses it."""

    digest: str


class Pins(msgspec.Struct, frozen=True, tag=True):
    """All adapters that tenants have pinned: kept on the device within the tenants' shares."""

    adapters: tuple[AdapterRef, ...]


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of an API process; the engine answers with Ready."""


Command = Request | Cancel | Check | Prefetch | Forget | Pins | Hello


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves. `boot` is the id of its process: rows sent to another boot are lost."""

    boot: str
    base: bytes  # JSON of server.adapters.sites.Base
    limits: dict[str, int]  # max_seqs, max_model_len, kv_blocks, block_size, adapter_slots, ...


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprob of a sampled token, and the (token, logprob) of the most likely ones."""

    logprob: float
    top: list[tuple[int, float]]  # best first


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of consecutive tokens of a prompt, as arrays of 4-byte numbers in this machine's order.

    A step sends those of its own tokens, so no message is larger than a step of `max_batch_tokens` makes it.
    """

    logprobs: bytes  # float32 [P]
    ranks: bytes  # int32 [P]; 1: no token is likelier
    top_ids: bytes  # int32 [P, k], best first
    top_logprobs: bytes  # float32 [P, k]


class Timing(msgspec.Struct, array_like=True):
    """Times of a row in Unix seconds, and its waits by reason (see server/metrics/names.py)."""

    arrived: float = 0.0
    started: float = 0.0  # its first step
    first_token: float = 0.0
    queued: float = 0.0  # seconds from its arrival to its first step
    waited: dict[str, float] = {}  # reason -> seconds, waits after a preemption included
    source: str = ""  # tier of its adapter: device, ram, disk, store; "": it has none
    load: tuple[float, float] | None = None  # begin and end of its wait for its adapter


class Chunk(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The tokens of one row in one step. `finish` is set exactly once, in the row's last chunk."""

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []  # of `tokens`, and of `stop_token` if there is one
    prompt_logprobs: PromptLogprobs | None = None  # those that follow the ones sent before
    cached_tokens: int = 0  # of the prompt, from the prefix cache (first chunk only)
    finish: FinishReason | None = None
    stop_token: int | None = None  # the token that ended the row; not in `tokens`
    error: tuple[str, str] | None = None  # (code, message) with finish="error"
    wait: float | None = None  # with an error that says when to try again: seconds
    timing: Timing | None = None  # with the row's first token

    @classmethod
    def failure(cls, id_: str, error: PolypeftError) -> "Chunk":
        wait = error.wait if isinstance(error, Unavailable) else None
        return cls(id=id_, finish="error", error=(error.code, error.message), wait=wait)

    def exception(self) -> PolypeftError:
        """The error of a chunk that has one."""
        assert self.error is not None
        error = error_from_code(*self.error)
        if isinstance(error, Unavailable) and self.wait is not None:
            error.wait = self.wait
        return error


class Chunks(msgspec.Struct, frozen=True, tag=True):
    """All chunks of one step for one API process."""

    chunks: list[Chunk]


class Checked(msgspec.Struct, frozen=True, tag=True):
    """Result of a Check: an error, or facts."""

    id: str
    error: tuple[str, str, str | None] | None = None  # (code, message, param)
    facts: dict[str, float | int | str] = {}  # parameters, rank, bytes ... for the manifest


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Metrics of the engine, sent about once a second; keys are those of server/metrics/names.py.

    All values are absolute, also across restarts of the engine, so a lost or repeated message does no harm.
    """

    boot: str
    gauges: dict[str, float]  # without labels, as `counters`
    counters: dict[str, float]
    series: list[tuple[str, tuple[str, ...], float]] = []  # (key, label values, value) of gauges and counters
    histograms: list[tuple[str, tuple[str, ...], list[int], float]] = []  # ... counts by bucket, sum


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Heartbeat of the engine process, published every second at `beat_address`, also during a long step."""

    boot: str
    seconds: float  # age of the current iteration of the loop
    bound: float  # seconds that the iteration may take; past it the engine hangs and ends itself


Event = Ready | Chunks | Checked | Stats | Beat


def beat_address(address: str) -> str:
    """The address of the beats of the engine at `address`; not longer than it."""
    return f"{address.removesuffix('.sock')}.beat"


encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode

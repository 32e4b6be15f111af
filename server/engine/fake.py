"""An engine without a model: the same socket, messages and guarantees, with computed tokens.

Ships beside the real one for tests of everything above the engine and for load tests of the API alone. A
token is a hash of prompt, adapter digest, seed and position, so two adapters give different tokens and a
repeated request gives the same ones.
"""

import asyncio
import hashlib
import time
import uuid
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from server import messages as m
from server.adapters.sites import Base, encode_base
from server.engine.scheduling.capacity import TenantLoad, refusal
from server.engine.scheduling.wait_estimate import late

STATS_SECONDS = 0.2


@dataclass
class Behaviour:
    """Settings of the fake for a test. May be changed while it runs."""

    step_seconds: float = 0.0  # time of a step; all rows get their tokens together
    chunk_tokens: int = 1  # tokens of a chunk
    stop_after: int | None = None  # end with "stop" after so many tokens
    script: list[int] | None = None  # these tokens, then "stop", whatever the prompt
    fail_digest: str | None = None  # rows of this adapter fail
    fail_after: int = 0  # ... after so many tokens
    error: tuple[str, str] = ("non_finite_logits", "The adapter produced a value that is not finite.")
    refuse: tuple[str, str, str | None] | None = None  # the answer to every Check
    facts: dict[str, float | int | str] = field(default_factory=lambda: {"parameters": 1})
    wait_seconds: float = 0.0  # that a new row would wait for its first token
    mute: bool = False  # receive commands but send nothing
    step_age_and_bound: tuple[float, float] = (0.0, 300.0)  # seconds, for Beat


class FakeEngine:
    """Binds `address` like the engine process. `crash` drops all state, `start` starts again."""

    def __init__(self, address: str, base: Base, limits: dict[str, int] | None = None) -> None:
        self.base = base
        defaults = {"max_seqs": 32, "max_queue": 256, "max_model_len": base.max_context}
        self.limits = defaults | (limits or {})
        self.behaviour = Behaviour()
        self.seen: list[m.Generate] = []
        self.cancelled: list[str] = []
        self.forgotten: list[str] = []
        self.checked: list[bytes] = []
        self.prefetched: list[str] = []
        self.pins: list[str] = []
        self.boot = ""
        self._address = address
        self._rows: dict[str, asyncio.Task[None]] = {}
        self._commands: dict[str, m.Generate] = {}  # of the running rows
        self._prefilled: dict[str, asyncio.Event] = {}
        self._peers: set[bytes] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._undelivered: defaultdict[bytes, list[m.Chunk]] = defaultdict(list)
        self._generated = 0

    @property
    def running(self) -> int:
        return len(self._rows)

    async def start(self) -> None:
        self.boot = uuid.uuid4().hex
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._address)
        self._beats = self._context.socket(zmq.PUB)
        self._beats.setsockopt(zmq.LINGER, 0)
        self._beats.bind(m.beat_address(self._address))
        self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._report())]

    async def crash(self) -> None:
        """Close the sockets and forget all rows, as a process that dies does."""
        tasks = [*self._tasks, *self._rows.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._rows.clear()
        self._commands.clear()
        self._undelivered.clear()
        self._peers.clear()
        self._socket.close()
        self._beats.close()
        self._context.term()

    close = crash

    async def _serve(self) -> None:
        while True:
            peer, frame = await self._socket.recv_multipart()
            self._peers.add(peer)
            match m.decode_command(frame):
                case m.Hello():
                    await self._send(peer, m.Ready(self.boot, encode_base(self.base), self.limits))
                case m.Request(rows):
                    self._accept(peer, rows)
                case m.Cancel(row_id):
                    self.cancelled.append(row_id)
                    self._commands.pop(row_id, None)
                    if task := self._rows.pop(row_id, None):
                        task.cancel()
                case m.Check() as check:
                    self.checked.append(check.manifest)
                    await self._send(peer, m.Checked(check.id, self.behaviour.refuse, self.behaviour.facts))
                case m.Forget(digest):
                    self.forgotten.append(digest)
                case m.Prefetch(adapter):
                    self.prefetched.append(adapter.digest)
                case m.Pins(adapters):
                    self.pins = [adapter.digest for adapter in adapters]

    def _accept(self, peer: bytes, rows: tuple[m.Generate, ...]) -> None:
        """Admit or refuse a request by the rule of the real engine."""
        counts = Counter((row.tenant, row.weight) for row in self._commands.values())
        loads = {tenant: TenantLoad(count, weight) for (tenant, weight), count in counts.items()}
        capacity = self.limits["max_seqs"] + self.limits["max_queue"]
        error = refusal(rows[0].tenant, len(rows), rows[0].weight, loads, capacity)
        error = error or late(rows[0], self.behaviour.wait_seconds, time.time())
        if error:
            for row in rows:
                self._queue(peer, m.Chunk.failure(row.id, error))
            return
        for row in rows:
            self.seen.append(row)
            self._commands[row.id] = row
            self._prefilled[row.id] = asyncio.Event()
            self._rows[row.id] = asyncio.create_task(self._run(peer, row))

    async def _run(self, peer: bytes, row: m.Generate) -> None:
        """Run one row, after the prefill of its sibling, to its finish."""
        try:
            if row.after is not None and (sibling := self._prefilled.get(row.after)):
                await sibling.wait()
            self._queue(peer, await self._generate(peer, row))
        finally:
            self._prefilled.pop(row.id).set()
            self._rows.pop(row.id, None)
            self._commands.pop(row.id, None)

    async def _generate(self, peer: bytes, row: m.Generate) -> m.Chunk:
        """Send all chunks of a row but the last one, and return that."""
        behaviour, tokens = self.behaviour, list[int]()
        timing = m.Timing(arrived=time.time(), source="device" if row.adapter else "")
        failing = row.adapter is not None and row.adapter.digest == behaviour.fail_digest
        while True:
            await self._step_ends()
            self._prefilled[row.id].set()
            if row.deadline is not None and time.time() > row.deadline:
                return m.Chunk(row.id, finish="error", error=("deadline_exceeded", "The deadline passed."))
            if failing and len(tokens) >= behaviour.fail_after:
                return m.Chunk(row.id, finish="error", error=behaviour.error)
            first = not tokens
            if first and row.sampling.prompt_logprobs is not None and len(row.prompt) > 1:
                self._queue(peer, m.Chunk(row.id, prompt_logprobs=self._prompt_logprobs(row)))
            chunk = self._step(row, tokens)
            if first and chunk.tokens:
                timing.started = timing.first_token = time.time()
                timing.waited = {"capacity": timing.started - timing.arrived}
                chunk = msgspec.structs.replace(chunk, timing=timing)
            if chunk.finish is not None:
                return chunk
            self._queue(peer, chunk)

    def _step(self, row: m.Generate, tokens: list[int]) -> m.Chunk:
        """A chunk of `chunk_tokens` tokens, or of fewer and the finish. Appends them to `tokens`."""
        behaviour, new = self.behaviour, list[int]()
        finish: m.FinishReason | None = None
        cached = 0 if tokens else len(row.prompt) // 2
        stop_token = None
        while len(new) < behaviour.chunk_tokens and finish is None:
            if len(tokens) == row.sampling.max_tokens:
                finish = "length"
            elif self._ends(len(tokens)):
                finish = "stop"
            else:
                token = behaviour.script[len(tokens)] if behaviour.script else self.token(row, len(tokens))
                if token in row.sampling.stop_token_ids:
                    finish, stop_token = "stop", token
                    break
                tokens.append(token)
                new.append(token)
        if len(tokens) == row.sampling.max_tokens:
            finish = finish or "length"
        self._generated += len(new)
        shown = new if stop_token is None else [*new, stop_token]
        logprobs = (
            [] if row.sampling.logprobs is None else [self._logprobs(t, row.sampling.logprobs) for t in shown]
        )
        return m.Chunk(row.id, new, logprobs, cached_tokens=cached, finish=finish, stop_token=stop_token)

    def _ends(self, count: int) -> bool:
        behaviour = self.behaviour
        return count == (len(behaviour.script) if behaviour.script is not None else behaviour.stop_after)

    def token(self, row: m.Generate, position: int) -> int:
        """The token at `position`; greedy rows ignore their seed."""
        digest = row.adapter.digest if row.adapter else ""
        seed = row.sampling.seed if row.sampling.temperature else None
        content = msgspec.json.encode([row.prompt, digest, seed, position])
        return int.from_bytes(hashlib.sha256(content).digest()[:8]) % self.base.vocab_size

    def _logprobs(self, token: int, count: int) -> m.TokenLogprobs:
        """Logprobs of a sampled token: it is the best one; the next ids follow, each less likely."""
        others = [((token + i) % self.base.vocab_size, -0.5 * (i + 1)) for i in range(count)]
        return m.TokenLogprobs(-0.5, others)

    def _prompt_logprobs(self, row: m.Generate) -> m.PromptLogprobs:
        """Each token is the second best, with a logprob of -0.5 and of -0.25 more for each one before it."""
        tokens, k = row.prompt[1:], row.sampling.prompt_logprobs or 0
        logprobs = [-0.5 - 0.25 * i for i in range(len(tokens))]
        ids = [(token + 1 - place) % self.base.vocab_size for token in tokens for place in range(k)]
        best = [logprob + 0.125 * (1 - place) for logprob in logprobs for place in range(k)]
        return m.PromptLogprobs(
            array("f", logprobs).tobytes(),
            array("i", [2] * len(tokens)).tobytes(),
            array("i", ids).tobytes(),
            array("f", best).tobytes(),
        )

    async def _report(self) -> None:
        while True:
            gauges = {"running": float(len(self._rows)), "waiting": 0.0, "kv_usage": 0.0, "fairness_gap": 0.0}
            counters = {"generation_tokens": float(self._generated), "prompt_tokens": 0.0}
            for peer in list(self._peers):
                await self._send(peer, m.Stats(self.boot, gauges, counters))
            if not self.behaviour.mute:
                await self._beats.send(m.encode(m.Beat(self.boot, *self.behaviour.step_age_and_bound)))
            await asyncio.sleep(STATS_SECONDS)

    async def _step_ends(self) -> None:
        seconds = self.behaviour.step_seconds
        await asyncio.sleep(seconds and seconds - time.monotonic() % seconds)

    def _queue(self, peer: bytes, chunk: m.Chunk) -> None:
        """Queue a chunk for a peer. All chunks of a step are sent as one message."""
        if not self._undelivered:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._undelivered[peer].append(chunk)

    def _deliver(self) -> None:
        undelivered, self._undelivered = self._undelivered, defaultdict(list)
        for peer, chunks in undelivered.items():
            if not self.behaviour.mute and not self._socket.closed:
                self._socket.send_multipart([peer, m.encode(m.Chunks(chunks))])

    async def _send(self, peer: bytes, event: m.Event) -> None:
        if not self.behaviour.mute:
            await self._socket.send_multipart([peer, m.encode(event)])

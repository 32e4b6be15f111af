"""The engine: one thread, one loop. Each step: schedule, forward, sample, deliver.

Wires scheduler, cache, model and sampler, and knows when a row is done. Knows no sockets: `__main__` feeds
it commands and takes its chunks.
"""

import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from adapters_store.objects import Objects
from server.adapters.cache import AdapterCache
from server.adapters.copies import Copier
from server.adapters.loader import Loader
from server.adapters.methods import build_methods
from server.adapters.methods.base import Bank
from server.adapters.recipes import Limits
from server.adapters.share import Shares
from server.adapters.tiers import DiskTier, RamTier
from server.engine.device import choose_placement
from server.engine.figures import Figures, source_of
from server.engine.footprint import BATCH_TOKENS
from server.engine.gate import Gate
from server.engine.grammar import Grammars, consume, mask_logits
from server.engine.kv import BlockPool
from server.engine.lookup import standing
from server.engine.messages import Cancel, Check, Checked, Chunk, Forget, Generate, Pins, Prefetch
from server.engine.model import ServedModel
from server.engine.row import Row
from server.engine.sampler import Sampled, SampleRow, draw
from server.engine.scheduler import Scheduler
from server.engine.stopwatch import Stopwatch
from server.errors import ContextTooLong, InvalidField, NonFinite, PolypeftError, QueueFull, Unavailable
from server.settings import Settings


class Engine:
    """Owns the device. Not thread-safe: everything happens on the thread that calls `step`."""

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        placement, self.settings = choose_placement(settings), settings
        self.model = ServedModel(
            model_dir,
            settings.base_id,
            placement,
            kv_bytes=settings.kv_bytes,
            max_context=settings.max_model_len,
        )
        self.base = self.model.base
        methods = build_methods(settings.max_lora_rank, placement.narrow)
        size = (self.base, settings.adapter_slots, placement.device, placement.dtype)
        made: dict[type[Bank], Bank] = {kind: kind(*size) for kind in {m.bank for m in methods.values()}}
        banks = {name: made[method.bank] for name, method in methods.items()}
        self.model.install(banks)
        shares = Shares()
        self.loader = Loader(
            Objects.open(settings.store_url, settings.store_config),
            DiskTier(settings.data_dir / "cache" / "adapters", settings.adapter_disk_bytes, shares),
            RamTier(settings.adapter_ram_bytes, shares),
            methods,
            self.base,
            self.model.weights,
            placement.dtype,
            Limits(settings.max_header_bytes, settings.max_tensors),
            pinned=placement.device.type == "cuda",
        )
        self.cache = AdapterCache(
            banks,
            self.loader,
            slots=settings.adapter_slots,
            budget=settings.adapter_device_bytes,
            copy=Copier(placement.device).start,
            shares=shares,
        )
        self.blocks = BlockPool(self.model.step.pages.count, share_prefixes=settings.prefix_cache)
        self.scheduler = Scheduler(
            self.cache,
            self.blocks,
            max_seqs=settings.max_seqs,
            max_batch_tokens=settings.max_batch_tokens or BATCH_TOKENS[placement.device.type],
            max_context=self.base.max_context,
            lookup=settings.lookup_tokens,
            costs=self.model.costs() if settings.lookup_tokens else None,
        )
        self.ends = self.model.end_tokens()
        self.counts: Counter[str] = Counter()
        self.figures = Figures(
            settings.figures_dir / "engine", settings.metrics_adapter_labels, settings.metrics_top
        )
        self.loader.objects.on_call = self.figures.on_store_call
        self.stopwatch = Stopwatch(self.figures, placement.device)
        self.model.watch = self.stopwatch.watch
        self.gate = Gate(self.scheduler, self.cache, self.loader, self.base.vocab_size)
        self.refused: list[Chunk] = []
        self.grammars = Grammars(model_dir, self.base.vocab_size, self.ends)
        self.compiling: dict[str, tuple[Row, Future[Any]]] = {}

    @property
    def busy(self) -> bool:
        """A step would find something to do, now or when an adapter arrives."""
        waiting = self.refused or self.compiling or self.gate.trials or self.cache.busy
        return bool(self.scheduler.running or self.scheduler.waiting or waiting)

    def close(self) -> None:
        self.loader.close()
        self.grammars.close()

    def submit(self, command: Generate | Cancel | Check | Prefetch | Forget | Pins) -> None:
        match command:
            case Generate():
                self._accept(command)
            case Cancel(id=id_):
                self.compiling.pop(id_, None)
                if row := self.scheduler.find(id_):
                    self._end(row)
            case Check():
                self.gate.open(command)
            case Prefetch(adapter=adapter):
                self.cache.prefetch(adapter)
            case Forget(digest=digest):
                self.cache.forget(digest)
            case Pins(adapters=adapters):
                self.cache.pin(adapters)

    def step(self) -> list[Chunk]:
        """Run one step for every row that can run; what it gave to whom."""
        self._take_compiled()
        self.cache.tend()
        self.gate.step()
        start = time.perf_counter()
        rows = self.scheduler.schedule(time.time())
        self.cache.hasten(self.scheduler.max_seqs - len(self.scheduler.running))
        if rows:
            self.stopwatch.begin(start)
        chunks = self._ended() + (self._run(rows) if rows else [])
        return [chunk for chunk in chunks if not self.gate.take(chunk)]

    @torch.inference_mode()
    def _run(self, rows: list[Row]) -> list[Chunk]:
        """Forward, sample, deliver."""
        start, tokens = time.perf_counter(), sum(row.scheduled for row in rows)
        decoding = all(row.decodes for row in rows)
        for row in rows:
            self.model.fill(row)
        try:
            logits = self.model.forward(rows)
        except torch.OutOfMemoryError:
            return self._shed(rows)
        self.stopwatch.lap("forward")
        completing = [(row, i) for row in rows if row.completes for i in range(1 + len(row.guess))]
        self.gate.observe([row for row, _ in completing], logits)
        if matchers := [(i, row.grammar) for i, (row, _) in enumerate(completing) if row.grammar]:
            mask_logits(logits, matchers)
        drawn = draw(logits, [self._sample_row(row, guessed) for row, guessed in completing])
        if self.model.step.gpu and not self.stopwatch.looks:
            self.model.ahead.begin(rows, drawn.tokens, self.scheduler.room)
        sampled = drawn.read()
        self.stopwatch.lap("sample")
        self.counts["steps"] += 1
        self.counts["prompt_tokens"] += sum(row.scheduled for row in rows if not row.sampled)
        self.figures.observe("batch_rows", len(rows))
        self.figures.observe("batch_tokens", tokens)
        outcome: dict[str, list[Sampled]] = {row.id: [] for row in rows}
        for (row, _), result in zip(completing, sampled, strict=True):
            outcome[row.id].append(result)
        chunks = [chunk for row in rows if (chunk := self._deliver(row, outcome[row.id]))]
        self.stopwatch.lap("deliver")
        if decoding:
            self.scheduler.costs.saw(tokens, time.perf_counter() - start)
        return chunks

    def checked(self) -> list[Checked]:
        """Checks that have ended since the last call."""
        return self.gate.take_verdicts()

    def take_observations(self) -> list[tuple[str, str, float]]:
        """Of loads, since the last call."""
        return self.loader.take_observations()

    def _accept(self, command: Generate) -> None:
        length = len(command.prompt)
        error: PolypeftError | None = None
        if not 0 < length < self.base.max_context:
            error = ContextTooLong(
                f"The prompt has {length} tokens; the context of {self.base.max_context} must hold one more."
            )
        elif len(command.adapters) > self.cache.slots:
            error = InvalidField(
                f"adapters has {len(command.adapters)} items; the device has {self.cache.slots} slots.",
                param="adapters",
            )
        elif self.scheduler.waiting >= self.settings.max_queue:
            error = QueueFull(f"The queue is full ({self.settings.max_queue} requests); try again later.")
        if error:
            self.refused.append(Chunk.failure(command.id, error))
            return
        row = Row(command, command.sampling.seed or 0, tokens=list(command.prompt), prompt_length=length)
        for use in row.uses:  # while the row is in line
            row.cold |= not self.cache.has(use.adapter)
            self.cache.prefetch(use.adapter)
        row.timing.arrived = row.since = time.time()
        if command.sampling.grammar is None:
            self.scheduler.add(row)
        else:
            row.waits_for = "grammar"
            self.compiling[row.id] = (row, self.grammars.compile(command.sampling.grammar))

    def _take_compiled(self) -> None:
        """Rows whose grammar has been compiled join the queue."""
        for id_, (row, future) in [*self.compiling.items()]:
            if future.done():
                del self.compiling[id_]
                error = future.exception()
                if error is None:
                    row.grammar = future.result()
                    row.wait("capacity", time.time())
                    self.scheduler.add(row)
                elif isinstance(error, PolypeftError):
                    self.refused.append(Chunk.failure(id_, error))
                else:
                    raise error

    def _sample_row(self, row: Row, guessed: int) -> SampleRow:
        """The row as it is once so many of its guesses have come true."""
        s = row.command.sampling
        barred = row.output_length + guessed < s.min_tokens
        return SampleRow(
            sampling=s,
            seed=row.seed,
            prompt=row.tokens[row.virtual : row.prompt_length],
            output=row.tokens[row.prompt_length :] + row.guess[:guessed],
            banned=[*self.ends, *s.stop_token_ids] if barred else (),
        )

    def _deliver(self, row: Row, sampled: list[Sampled]) -> Chunk | None:
        """Record what the step gave a row; what to tell its caller, if anything."""
        if not sampled:  # still in prefill
            self.scheduler.commit(row, [])
            return None
        if not sampled[0].finite:
            self.counts["non_finite_rows"] += 1
            self._end(row, NonFinite.code)  # before its blocks were offered to anyone
            return Chunk.failure(row.id, NonFinite("The model produced NaN or Inf for this request."))
        first, guessed = row.output_length == 0, len(row.guess)
        ends = [self._stops(row, result.token) for result in sampled]
        kept = sampled[: standing(row.guess, sampled, ends)]
        self.scheduler.commit(row, [result.token for result in kept])
        if row.grammar and not consume(row.grammar, kept[-1].token):
            self._end(row, InvalidField.code)
            return Chunk.failure(row.id, InvalidField("The answer left its schema.", param="response_format"))
        self.counts["generation_tokens"] += len(kept)
        self.counts["guessed_tokens"] += guessed
        self.counts["guessed_right"] += len(kept) - 1
        stop = kept[-1].token if ends[len(kept) - 1] else None
        full = row.left(self.base.max_context) <= 0
        if first:
            row.timing.first_token = time.time()
            row.timing.source = source_of(row, self.loader.sources)
        if stop is not None or full:
            self._end(row)
        said = kept if stop is None else kept[:-1]
        return Chunk(
            id=row.id,
            tokens=[result.token for result in said],
            logprobs=[result.logprobs for result in said if result.logprobs],
            cached_tokens=max(row.cached - row.virtual, 0) if first else 0,
            finish="stop" if stop is not None else "length" if full else None,
            stop_token=stop,
            timing=row.timing if first else None,
        )

    def _stops(self, row: Row, token: int) -> bool:
        s = row.command.sampling
        return token in s.stop_token_ids or (token in self.ends and not s.ignore_eos)

    def _end(self, row: Row, error: str = "") -> None:
        """It is over, with this error's code if with one."""
        self.figures.ended(row, time.time(), error)
        self.scheduler.remove(row)

    def _ended(self) -> list[Chunk]:
        """Rows that ended without a step: refused, expired, or their adapter failed to load."""
        for row, error in self.scheduler.ended:
            self.figures.ended(row, time.time(), error.code)
        chunks = self.refused + [Chunk.failure(row.id, error) for row, error in self.scheduler.ended]
        self.refused, self.scheduler.ended = [], []
        return chunks

    def _shed(self, rows: list[Row]) -> list[Chunk]:
        """The device ran out of memory: the largest row ends, the others take the step again."""
        torch.cuda.empty_cache()
        largest = max(rows, key=lambda row: row.scheduled)
        for row in rows:
            row.scheduled, row.guess = 0, []
        self._end(largest, Unavailable.code)
        return [Chunk.failure(largest.id, Unavailable("The device ran out of memory for this request."))]

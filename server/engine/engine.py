"""The engine: one thread, one loop. Each step: schedule, forward, sample, deliver.

Wires scheduler, cache, model and sampler, and knows when a row is done. Knows no sockets: `__main__` feeds
it commands and takes its chunks.
"""

import time
from collections import Counter
from pathlib import Path

import torch

from server.engine.adapter_check import AdapterCheck
from server.engine.adapters import build_adapters
from server.engine.admission import Admission
from server.engine.metrics.counters import EngineMetrics, source_of
from server.engine.metrics.step_timer import StepTimer
from server.engine.model.memory_estimate import BATCH_TOKENS
from server.engine.model.placement import choose_placement
from server.engine.sampler import Sampled, draw, sample_row
from server.engine.scheduling.kv_blocks import BlockPool
from server.engine.scheduling.prompt_lookup import num_accepted
from server.engine.scheduling.row import Row
from server.engine.scheduling.scheduler import Scheduler
from server.engine.served_model import ServedModel
from server.engine.structured_output import Grammars, consume, mask_logits
from server.engine.unexpected_errors import as_polypeft_error, raise_if_device_lost
from server.engine.watchdog import StepClock
from server.errors import InvalidField, NonFinite, StartupError, Unavailable, UnsupportedModel
from server.messages import Cancel, Check, Checked, Chunk, Forget, Generate, Pins, Prefetch, Request
from server.settings import Settings


class Engine:
    """Owns the device. Not thread-safe: everything happens on the thread that calls `step`."""

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        placement, self.settings = choose_placement(settings), settings
        try:
            self.model = ServedModel(
                model_dir,
                settings.base_id,
                placement,
                kv_bytes=settings.kv_bytes,
                max_context=settings.max_model_len,
                exact=settings.data_dir / "cache" / "exact",
            )
        except UnsupportedModel as error:
            sentence = f"The base {settings.base_id} cannot be served: {error.message}."
            raise StartupError(sentence, param="model") from error
        self.base = self.model.base
        self.loader, self.cache = build_adapters(settings, self.model, placement)
        self.blocks = BlockPool(self.model.step.pages.count, share_prefixes=settings.prefix_cache)
        self.scheduler = Scheduler(
            self.cache,
            self.blocks,
            max_seqs=settings.max_seqs,
            max_batch_tokens=settings.max_batch_tokens or BATCH_TOKENS[placement.device.type],
            max_context=self.base.max_context,
            lookup=settings.lookup_tokens,
            costs=self.model.costs() if settings.lookup_tokens else None,
            rope_switches=self.model.rope_switches,
        )
        self.ends = self.model.end_tokens()
        self.counts: Counter[str] = Counter()
        self.clock = StepClock()
        self.figures = EngineMetrics(
            settings.figures_dir / "engine", settings.metrics_adapter_labels, settings.metrics_top
        )
        self.loader.objects.on_call = self.figures.on_store_call
        self.stopwatch = StepTimer(self.figures, placement.device)
        self.model.watch = self.stopwatch.watch
        self.gate = AdapterCheck(self.scheduler, self.cache, self.loader, self.base.vocab_size)
        grammars = Grammars(model_dir, self.base.vocab_size, self.ends)
        self.admission = Admission(self.scheduler, grammars, settings.max_queue)

    @property
    def busy(self) -> bool:
        """A step would find something to do, now or when an adapter arrives."""
        entering = self.admission.refused or self.admission.compiling
        return bool(
            self.scheduler.running
            or self.scheduler.waiting
            or entering
            or self.gate.trials
            or self.cache.loading_pins
        )

    def close(self) -> None:
        self.loader.close()
        self.admission.close()

    def submit(self, command: Generate | Request | Cancel | Check | Prefetch | Forget | Pins) -> None:
        match command:
            case Generate():
                self.admission.accept((command,))
            case Request(rows=rows):
                self.admission.accept(rows)
            case Cancel(id=id_):
                self.admission.cancel(id_)
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
        self.admission.take_compiled()
        self.cache.poll()
        self.gate.step()
        start = time.perf_counter()
        rows = self.scheduler.schedule(time.time())
        self.cache.prioritise(self.scheduler.max_seqs - len(self.scheduler.running))
        if rows:
            self.stopwatch.begin(start)
        chunks = self._ended() + (self._run(rows) if rows else [])
        return [chunk for chunk in chunks if not self.gate.take(chunk)]

    def _run(self, rows: list[Row]) -> list[Chunk]:
        """Compute and deliver. A step that fails is taken again row by row: those that fail alone end.

        Taking it again is as good as taking it once: what a row has moves on when it is delivered only.
        """
        start, tokens = time.perf_counter(), sum(row.scheduled for row in rows)
        decoding = all(row.decodes for row in rows)
        self.clock.begin(tokens)
        try:
            outcome = self._compute(rows)
        except torch.OutOfMemoryError:
            return self._shed(rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, and `as_polypeft_error` logs it
            raise_if_device_lost(error, self.model.placement.device)
            if len(rows) == 1:
                return [self._fail(rows[0], error)]
            as_polypeft_error(error, f"a step of {len(rows)} rows, which is taken again row by row")
            return [chunk for row in rows for chunk in self._run([row])]
        chunks: list[Chunk] = []
        for row in rows:
            try:
                chunk = self._deliver(row, outcome[row.id])
            except Exception as error:  # noqa: BLE001 - the same
                chunk = self._fail(row, error)
            chunks += [chunk] if chunk else []
        self.stopwatch.lap("deliver")
        seconds = time.perf_counter() - start
        self.clock.end(tokens, seconds)
        if decoding:
            self.scheduler.costs.saw(tokens, seconds)
        return chunks

    @torch.inference_mode()
    def _compute(self, rows: list[Row]) -> dict[str, list[Sampled]]:
        """Forward and sample: each row's tokens, none while it is in prefill."""
        tokens = sum(row.scheduled for row in rows)
        for row in rows:
            self.model.fill(row)
        logits = self.model.forward(rows)
        self.stopwatch.lap("forward")
        completing = [(row, i) for row in rows if row.completes for i in range(1 + len(row.guess))]
        self.gate.observe([row for row, _ in completing], logits)
        if matchers := [(i, row.grammar) for i, (row, _) in enumerate(completing) if row.grammar]:
            mask_logits(logits, matchers)
        drawn = draw(logits, [sample_row(row, guessed, self.ends) for row, guessed in completing])
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
        return outcome

    def checked(self) -> list[Checked]:
        """Checks that have ended since the last call."""
        return self.gate.take_verdicts()

    def take_observations(self) -> list[tuple[str, str, float]]:
        """Of loads, since the last call."""
        return self.loader.take_observations()

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
        kept = sampled[: num_accepted(row.guess, sampled, ends)]
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
        ended, self.scheduler.ended = self.scheduler.ended, []
        return self.admission.take_refused() + [Chunk.failure(row.id, error) for row, error in ended]

    def _fail(self, row: Row, error: Exception) -> Chunk:
        """End the row that an error came with."""
        self.counts["internal_errors"] += 1
        fault = as_polypeft_error(error, "this request")
        if self.scheduler.find(row.id) is row:
            self._end(row, fault.code)
        return Chunk.failure(row.id, fault)

    def _shed(self, rows: list[Row]) -> list[Chunk]:
        """The device ran out of memory: the largest row ends, the others take the step again."""
        torch.cuda.empty_cache()
        largest = max(rows, key=lambda row: row.scheduled)
        for row in rows:
            row.scheduled, row.guess = 0, []
        self._end(largest, Unavailable.code)
        return [Chunk.failure(largest.id, Unavailable("The device ran out of memory for this request."))]

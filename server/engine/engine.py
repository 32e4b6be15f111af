"""The engine: one thread that runs one step after another: schedule, forward, sample, deliver.

Wires scheduler, adapter cache, model and sampler, and decides when a row is done. Knows no sockets:
`__main__` passes commands in (`submit`) and sends the chunks that `step` returns.
"""

import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from server.engine.adapter_check import AdapterCheck
from server.engine.adapters import build_adapters
from server.engine.admission import Admission
from server.engine.load_records import LoadRecords
from server.engine.metrics.counters import EngineMetrics, source_of
from server.engine.metrics.step_timer import StepTimer
from server.engine.model.memory_estimate import BATCH_TOKENS
from server.engine.model.placement import choose_placement
from server.engine.prompt_logprobs import Scored
from server.engine.sampler import Sampled, draw, sample_row
from server.engine.scheduling.kv_blocks import BlockPool
from server.engine.scheduling.prompt_lookup import num_accepted
from server.engine.scheduling.row import Row
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.step_cost import StepCost
from server.engine.served_model import ServedModel
from server.engine.structured_output import Grammars, consume, mask_logits
from server.engine.unexpected_errors import as_polypeft_error, raise_if_device_lost
from server.engine.watchdog import StepClock
from server.errors import InvalidField, NonFinite, StartupError, Unavailable, UnsupportedModel
from server.messages import Cancel, Check, Checked, Chunk, Forget, Generate, Pins, Prefetch, Request
from server.settings import Settings


class Engine:
    """Owns the device. Not thread-safe: `submit` and `step` are called from one thread."""

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        """Load the base model. Raises StartupError if it cannot be served."""
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
            lookup_tokens=settings.lookup_tokens,
            step_cost=StepCost() if settings.lookup_tokens and self.model.drafts_pay else None,
            rope_switches=self.model.rope_switches,
        )
        self.end_token_ids = self.model.end_tokens()
        self.counts: Counter[str] = Counter()
        self.clock = StepClock()
        self.metrics = EngineMetrics(
            settings.figures_dir / "engine", settings.metrics_adapter_labels, settings.metrics_top
        )
        self.load_records = LoadRecords(settings.usage_dir)
        self.loader.objects.on_call = self.metrics.on_store_call
        self.step_timer = StepTimer(self.metrics, placement.device)
        self.model.watch = self.step_timer.time_banks
        self.adapter_check = AdapterCheck(self.scheduler, self.cache, self.loader, self.base.vocab_size)
        grammars = Grammars(model_dir, self.base.vocab_size, self.end_token_ids)
        self.admission = Admission(self.scheduler, grammars, settings.max_queue)

    @property
    def busy(self) -> bool:
        """A step has something to do, now or when an adapter has loaded."""
        entering = self.admission.refused or self.admission.compiling
        return bool(
            self.scheduler.running
            or self.scheduler.waiting
            or entering
            or self.adapter_check.dry_runs
            or self.cache.loading_pins
        )

    def close(self) -> None:
        self.loader.close()
        self.admission.close()

    def submit(self, command: Generate | Request | Cancel | Check | Prefetch | Forget | Pins) -> None:
        """Execute a command. Rows that it starts or refuses get their chunks from the next steps."""
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
                self.adapter_check.start(command)
            case Prefetch(adapter=adapter):
                self.cache.prefetch(adapter)
            case Forget(digest=digest):
                self.cache.forget(digest)
            case Pins(adapters=adapters):
                self.cache.pin(adapters)

    def use_idle_time(self) -> None:
        """While nothing else is to do: measure one more size of step, in a block that no row owns."""
        cost = self.scheduler.step_cost
        if self.scheduler.max_row_draft and not cost.complete and (free := self.blocks.allocate(1)):
            cost.measure(partial(self.model.time_step, free[0]))
            self.blocks.release(free)

    def step(self) -> list[Chunk]:
        """Run one step for every row that can run; the chunks of all rows that got tokens or ended."""
        self.admission.enqueue_compiled()
        self.cache.poll()
        self.adapter_check.run_loaded()
        start = time.perf_counter()
        rows = self.scheduler.schedule(time.time())
        self.cache.prioritise(self.scheduler.max_seqs - len(self.scheduler.running))
        if rows:
            self.step_timer.begin(start)
        chunks = self._report_unscheduled()
        if rows:
            chunks += self._run(rows)
        return [chunk for chunk in chunks if not self.adapter_check.consume(chunk)]

    def checked(self) -> list[Checked]:
        """Results of the checks that have ended since the last call."""
        return self.adapter_check.take_results()

    def take_observations(self) -> list[tuple[str, str, float]]:
        """(metric key, label, value) of the loads since the last call."""
        return self.loader.take_observations()

    def _run(self, rows: list[Row]) -> list[Chunk]:
        """Compute the scheduled tokens of `rows` and deliver the sampled ones."""
        start, tokens = time.perf_counter(), sum(row.scheduled for row in rows)
        decoding = all(row.decodes for row in rows)  # read here: delivery resets it
        self.clock.begin(tokens)
        try:
            sampled, scores = self._compute(rows, tokens)
        except torch.OutOfMemoryError:
            return self._end_largest(rows)
        except Exception as error:  # noqa: BLE001 - any error: `as_polypeft_error` logs it
            return self._run_one_by_one(rows, error)
        chunks = self._deliver(rows, sampled, scores)
        self.step_timer.lap("deliver")
        seconds = time.perf_counter() - start
        self.clock.end(tokens, seconds)
        self.admission.waits.record_step(self.scheduler.queues.charged, seconds)
        if decoding:
            self.scheduler.step_cost.record(tokens, seconds)
        return chunks

    @torch.inference_mode()
    def _compute(self, rows: list[Row], tokens: int) -> tuple[dict[str, list[Sampled]], dict[str, Scored]]:
        """Forward and sample. By row id: the results of its token and draft tokens, none in prefill; and its
        prompt logprobs, if it asks for them.
        """
        for row in rows:
            self.model.write_virtual_kv(row)
        logits = self.model.forward(rows)
        self.step_timer.lap("forward")
        results = self._sample(rows, logits)
        self.step_timer.lap("sample")
        self.counts["steps"] += 1
        self.counts["prompt_tokens"] += sum(row.scheduled for row in rows if not row.sampled)
        self.metrics.observe("batch_rows", len(rows))
        self.metrics.observe("batch_tokens", tokens)
        return results, self.model.take_scores()

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> dict[str, list[Sampled]]:
        """Draw a token from each row of logits [R, V]; on a GPU, start the next step before reading them."""
        to_sample = [(row, i) for row in rows if row.completes for i in range(1 + len(row.draft))]
        self.adapter_check.record_logits([row for row, _ in to_sample], logits)
        if matchers := [(i, row.grammar) for i, (row, _) in enumerate(to_sample) if row.grammar]:
            mask_logits(logits, matchers)
        pending = draw(
            logits, [sample_row(row, num_draft, self.end_token_ids) for row, num_draft in to_sample]
        )
        if self.model.step.gpu and not self.step_timer.samples_soon:
            self.model.lookahead.begin(rows, pending.tokens, self.scheduler.reserve_blocks)
        results: dict[str, list[Sampled]] = {row.id: [] for row in rows}
        for (row, _), result in zip(to_sample, pending.read(), strict=True):
            results[row.id].append(result)
        return results

    def _run_one_by_one(self, rows: list[Row], error: Exception) -> list[Chunk]:
        """Repeat a step that failed, row by row, so that only the rows that fail alone end.

        A step can be repeated because the state of a row changes on delivery only. Raises `error` if the GPU
        is lost to this process.
        """
        raise_if_device_lost(error, self.model.placement.device)
        if len(rows) == 1:
            return [self._fail(rows[0], error)]
        as_polypeft_error(error, f"a step of {len(rows)} rows, which is taken again row by row")
        return [chunk for row in rows for chunk in self._run([row])]

    def _end_largest(self, rows: list[Row]) -> list[Chunk]:
        """The device ran out of memory: end the row with the most scheduled tokens; the others run again."""
        torch.cuda.empty_cache()
        largest = max(rows, key=lambda row: row.scheduled)
        for row in rows:
            row.scheduled, row.draft = 0, []
        self._end(largest, Unavailable.code)
        return [Chunk.failure(largest.id, Unavailable("The device ran out of memory for this request."))]

    def _deliver(
        self, rows: list[Row], sampled: dict[str, list[Sampled]], scores: dict[str, Scored]
    ) -> list[Chunk]:
        """Give each row its results; a row that fails at that ends alone."""
        chunks: list[Chunk] = []
        for row in rows:
            try:
                chunk = self._deliver_row(row, sampled[row.id], scores.get(row.id))
            except Exception as error:  # noqa: BLE001 - the same
                chunk = self._fail(row, error)
            if chunk:
                chunks.append(chunk)
        return chunks

    def _deliver_row(self, row: Row, sampled: list[Sampled], scored: Scored | None) -> Chunk | None:
        """Append the accepted tokens to the row and end it where it stops. None in prefill without scores."""
        if (sampled and not sampled[0].finite) or (scored and not scored.finite):
            self.counts["non_finite_rows"] += 1
            self._end(row, NonFinite.code)  # before its blocks enter the prefix cache
            return Chunk.failure(row.id, NonFinite("The model produced NaN or Inf for this request."))
        if scored:
            row.num_scored = row.to_score().stop
        if not sampled:
            self.scheduler.commit(row, [])
            return Chunk(id=row.id, prompt_logprobs=scored.logprobs) if scored else None
        first, num_draft = row.output_length == 0, len(row.draft)
        ends = [row.ends_with(result.token, self.end_token_ids) for result in sampled]
        accepted = sampled[: num_accepted(row.draft, sampled, ends)]
        self.scheduler.commit(row, [result.token for result in accepted])
        if row.grammar and not consume(row.grammar, accepted[-1].token):
            self._end(row, InvalidField.code)
            return Chunk.failure(row.id, InvalidField("The answer left its schema.", param="response_format"))
        self.counts["generation_tokens"] += len(accepted)
        self.counts["guessed_tokens"] += num_draft
        self.counts["guessed_right"] += len(accepted) - 1
        if first:
            row.timing.first_token = time.time()
            row.timing.source = source_of(row, self.loader.sources)
        return self._chunk(row, accepted, scored, first=first, stopped=ends[len(accepted) - 1])

    def _chunk(
        self, row: Row, accepted: list[Sampled], scored: Scored | None, *, first: bool, stopped: bool
    ) -> Chunk:
        """The chunk of the accepted tokens, without an end token. Ends the row if it is the last chunk."""
        stop_token = accepted[-1].token if stopped else None
        full = row.remaining_output(self.base.max_context) <= 0
        if stopped or full:
            self._end(row)
        sent = accepted[:-1] if stopped or not row.command.sampling.max_tokens else accepted
        return Chunk(
            id=row.id,
            tokens=[result.token for result in sent],
            logprobs=[result.logprobs for result in accepted if result.logprobs],
            prompt_logprobs=scored.logprobs if scored else None,
            cached_tokens=max(row.cached_tokens - row.num_virtual_tokens, 0) if first else 0,
            finish="stop" if stopped else "length" if full else None,
            stop_token=stop_token,
            timing=row.timing if first else None,
        )

    def _end(self, row: Row, error_code: str = "") -> None:
        """Count a row that is done, or failed with `error_code`, and release what it holds."""
        self.metrics.record_end(row, time.time(), error_code)
        self.admission.waits.record_answer(row.output_length)
        self.scheduler.remove(row)

    def _report_unscheduled(self) -> list[Chunk]:
        """Chunks of rows that ended without a step: refused, past the deadline, or their load failed."""
        ended, self.scheduler.ended_unscheduled = self.scheduler.ended_unscheduled, []
        for row, error in ended:
            self.metrics.record_end(row, time.time(), error.code)
        return self.admission.take_refused() + [Chunk.failure(row.id, error) for row, error in ended]

    def _fail(self, row: Row, error: Exception) -> Chunk:
        """End a row by an unexpected error."""
        self.counts["internal_errors"] += 1
        fault = as_polypeft_error(error, "this request")
        if self.scheduler.find(row.id) is row:
            self._end(row, fault.code)
        return Chunk.failure(row.id, fault)

"""The door every version passes before it becomes visible: loaded as in service, then run.

A staged version goes through the ordinary loader, and then through the ordinary loop beside the rows that
run: eight greedy tokens after a fixed prompt, once with it and once without. It must produce finite logits
that differ from the base's; an adapter that changes nothing is let in only when asked for (`allow_noop`).
"""

import hashlib
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from adapters_store.manifest import Manifest, decode_manifest
from server.adapters.cache.device_cache import AdapterCache
from server.adapters.loading.loader import Loader
from server.engine.scheduling.row import Row
from server.engine.scheduling.scheduler import Scheduler
from server.engine.unexpected_errors import as_polypeft_error
from server.errors import InvalidAdapter, PolypeftError, StoreError, TooLarge, Unavailable, error_from_code
from server.messages import AdapterRef, Check, Checked, Chunk, Generate, Sampling

TENANT = "\0gate"  # no tenant's: shares no prefix and no queue with any
PROMPT_TOKENS = 8  # tokens
ANSWER_TOKENS = 8
NON_FINITE = {"non_finite_logits": "non_finite"}  # code -> what a refusal for it is counted as
MIN_RELATIVE_EFFECT = 1e-6  # of the largest logit; below it a difference is rounding


@dataclass(eq=False)
class DryRun:
    """One version on its way through the door."""

    check: Check
    manifest: Manifest
    loading: "Future[Any]"
    row: Row | None = None
    tokens: list[int] = field(default_factory=list)
    logits: torch.Tensor | None = None  # [V], of the first token


class AdapterCheck:
    """Steps trials along; `engine.loop` feeds it logits and chunks of its rows."""

    def __init__(self, scheduler: Scheduler, cache: AdapterCache, loader: Loader, vocab_size: int) -> None:
        self.scheduler = scheduler
        self.cache = cache
        self.loader = loader
        self.prompt = [i * (vocab_size // PROMPT_TOKENS) + 1 for i in range(PROMPT_TOKENS)]
        self.base_logits: torch.Tensor | None = None
        self.base_row: Row | None = None
        self.dry_runs: dict[str, DryRun] = {}  # by row id
        self.results: list[Checked] = []
        self.accepted = 0
        self.refusals: Counter[str] = Counter()  # by reason

    def start(self, check: Check) -> None:
        try:
            manifest = decode_manifest(check.manifest)
            loading = self.loader.check(manifest)
        except (msgspec.DecodeError, StopIteration):  # not a manifest, or one that names no weights
            self._end(check.id, InvalidAdapter("The manifest could not be read."))
            return
        except StoreError as error:
            self._end(check.id, error)
            return
        self.dry_runs[f"gate-{check.id}"] = DryRun(check, manifest, loading)

    def run_loaded(self) -> None:
        """Start the dry_run runs whose version has been loaded."""
        for row_id, dry_run in [*self.dry_runs.items()]:
            if dry_run.row is None and dry_run.loading.done():
                try:
                    if error := self._too_large(dry_run.loading.result().nbytes):
                        raise error
                    self._run(row_id, dry_run)
                except Exception as error:  # noqa: BLE001 - whatever it is, and `as_polypeft_error` logs it
                    del self.dry_runs[row_id]
                    self._end(dry_run.check.id, error)

    def record_logits(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Keep the first logits of dry_run rows; `rows` are those that logits [R, V] belong to."""
        if not self.dry_runs:
            return
        for i, row in enumerate(rows):
            if row is self.base_row and self.base_logits is None:
                self.base_logits = logits[i].clone()
            elif (dry_run := self.dry_runs.get(row.id)) and dry_run.logits is None:
                dry_run.logits = logits[i].clone()

    def consume(self, chunk: Chunk) -> bool:
        """True if the chunk was a trial's, and nobody else's business."""
        if self.base_row is not None and chunk.id == self.base_row.id:
            if chunk.error:  # the next dry_run starts it again
                self.base_row = None
            return True
        dry_run = self.dry_runs.get(chunk.id)
        if dry_run is None:
            return False
        dry_run.tokens += chunk.tokens
        if chunk.error:
            del self.dry_runs[chunk.id]
            self._end(dry_run.check.id, self._explain(chunk.error), NON_FINITE.get(chunk.error[0], ""))
        elif chunk.finish:
            del self.dry_runs[chunk.id]
            try:
                self._compare_with_base(dry_run)
            except Exception as error:  # noqa: BLE001 - the same
                self._end(dry_run.check.id, error)
        return True

    def take_results(self) -> list[Checked]:
        taken, self.results = self.results, []
        return taken

    def _too_large(self, nbytes: int) -> TooLarge | None:
        """Why it could never be served: alone it takes more than there is for all."""
        if nbytes <= self.cache.budget:
            return None
        return TooLarge(
            f"The adapter takes {nbytes} bytes on the device; all adapters share {self.cache.budget}.",
            param="files",
        )

    def _run(self, row_id: str, dry_run: DryRun) -> None:
        manifest = dry_run.manifest
        # the tenant's own share of the tiers is what its uploads take
        ref = AdapterRef(
            manifest.tenant, manifest.name, manifest.version, manifest.digest, manifest.method, ""
        )
        self.cache.offer(ref, dry_run.loading)  # it has no manifest in the store to be fetched by
        if self.base_row is None:
            self.base_row = self._row("gate-base", None)
            self.scheduler.add(self.base_row)
        dry_run.row = self._row(row_id, ref)
        self.scheduler.add(dry_run.row)

    def _row(self, row_id: str, ref: AdapterRef | None) -> Row:
        sampling = Sampling(max_tokens=ANSWER_TOKENS if ref else 1, temperature=0.0, ignore_eos=True)
        command = Generate(row_id, TENANT, self.prompt, sampling, ref)
        return Row(command, seed=0, tokens=list(self.prompt), prompt_length=PROMPT_TOKENS)

    def _compare_with_base(self, dry_run: DryRun) -> None:
        assert dry_run.logits is not None, "a row that finished had logits"
        if self.base_logits is None:  # its row was queued first, and has failed
            raise Unavailable("The adapter could not be compared with the base; try again.")
        effect = float((dry_run.logits - self.base_logits).abs().max())
        if (
            effect <= MIN_RELATIVE_EFFECT * float(self.base_logits.abs().max())
            and not dry_run.check.allow_noop
        ):
            message = (
                "The adapter changes nothing: its logits are the base's. "
                "Send allow_noop=true if that is what you want."
            )
            self._end(dry_run.check.id, InvalidAdapter(message, param="files"), "no_effect")
            return
        self.accepted += 1
        packed = dry_run.loading.result()
        answer = hashlib.sha256(repr(dry_run.tokens).encode()).hexdigest()[:16]
        facts = {"device_bytes": packed.nbytes, "effect": round(effect, 6), "fingerprint": answer}
        self.results.append(Checked(dry_run.check.id, facts=facts | {"virtual_tokens": packed.virtual}))

    def _explain(self, error: tuple[str, str]) -> PolypeftError:
        code, message = error
        if code == "non_finite_logits":
            return InvalidAdapter("The adapter makes the model produce NaN or Inf.", param="files")
        return error_from_code(code, message)

    def _end(self, check_id: str, error: BaseException, reason: str = "") -> None:
        fault = as_polypeft_error(error, "the trial of an adapter")
        self.refusals[reason or fault.code] += 1
        self.results.append(Checked(check_id, error=(fault.code, fault.message, fault.param)))

"""The check of every version before it becomes visible: loaded as for serving, then run.

A staged version goes through the ordinary loader and then, in a dry run, through the ordinary engine loop
beside the rows that run: eight greedy tokens after a fixed prompt, and one token of the base model for
comparison. Its logits must be finite and differ from the base's; an adapter that changes nothing passes only
with `allow_noop`.
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

TENANT = "\0gate"  # no tenant has this name: it shares neither prefixes nor a queue
PROMPT_TOKENS = 8
ANSWER_TOKENS = 8
NON_FINITE = {"non_finite_logits": "non_finite"}  # error code -> reason of the refusal in metrics
MIN_RELATIVE_EFFECT = 1e-6  # of the largest logit; a smaller difference is rounding


@dataclass(eq=False)
class DryRun:
    """The dry run of one version: it loads, then its row runs."""

    check: Check
    manifest: Manifest
    loading: "Future[Any]"
    row: Row | None = None  # once loaded
    tokens: list[int] = field(default_factory=list)
    logits: torch.Tensor | None = None  # [V], of the first token


class AdapterCheck:
    """Runs the dry runs. The engine passes it the logits and chunks of their rows."""

    def __init__(self, scheduler: Scheduler, cache: AdapterCache, loader: Loader, vocab_size: int) -> None:
        self.scheduler = scheduler
        self.cache = cache
        self.loader = loader
        self.prompt = [i * (vocab_size // PROMPT_TOKENS) + 1 for i in range(PROMPT_TOKENS)]
        self.base_logits: torch.Tensor | None = None
        self.base_row: Row | None = None
        self.dry_runs: dict[str, DryRun] = {}  # by id of their rows
        self.results: list[Checked] = []
        self.accepted = 0
        self.refusals: Counter[str] = Counter()  # by reason

    def start(self, check: Check) -> None:
        """Start to load the version of a check. Its result comes by `take_results`, also if that fails."""
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
        """Queue the rows of the versions that have been loaded."""
        for row_id, dry_run in [*self.dry_runs.items()]:
            if dry_run.row is None and dry_run.loading.done():
                try:
                    if error := self._too_large(dry_run.loading.result().nbytes):
                        raise error
                    self._run(row_id, dry_run)
                except Exception as error:  # noqa: BLE001 - any error: `as_polypeft_error` logs it
                    del self.dry_runs[row_id]
                    self._end(dry_run.check.id, error)

    def record_logits(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Keep the first logits of dry runs; logits [R, V] are those of `rows`, in their order."""
        if not self.dry_runs:
            return
        for i, row in enumerate(rows):
            if row is self.base_row and self.base_logits is None:
                self.base_logits = logits[i].clone()
            elif (dry_run := self.dry_runs.get(row.id)) and dry_run.logits is None:
                dry_run.logits = logits[i].clone()

    def consume(self, chunk: Chunk) -> bool:
        """Process a chunk of a dry run. False if the chunk is of another row."""
        if self.base_row is not None and chunk.id == self.base_row.id:
            if chunk.error:  # the next dry run computes it again
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
        """Results since the last call."""
        results, self.results = self.results, []
        return results

    def _too_large(self, nbytes: int) -> TooLarge | None:
        """The error of an adapter that is larger than the device memory for all adapters."""
        if nbytes <= self.cache.budget:
            return None
        return TooLarge(
            f"The adapter takes {nbytes} bytes on the device; all adapters share {self.cache.budget}.",
            param="files",
        )

    def _run(self, row_id: str, dry_run: DryRun) -> None:
        manifest = dry_run.manifest
        # an upload counts towards the share of its own tenant
        ref = AdapterRef(
            manifest.tenant, manifest.name, manifest.version, manifest.digest, manifest.method, ""
        )
        # the loader could not fetch it: its manifest is not in the store yet
        self.cache.add_pending(ref, dry_run.loading)
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
        """Accept or refuse a version whose row has finished."""
        assert dry_run.logits is not None, "a row that finished had logits"
        if self.base_logits is None:  # the row of the base has failed
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
        self.results.append(
            Checked(dry_run.check.id, facts=facts | {"virtual_tokens": packed.virtual_tokens})
        )

    def _explain(self, error: tuple[str, str]) -> PolypeftError:
        code, message = error
        if code == "non_finite_logits":
            return InvalidAdapter("The adapter makes the model produce NaN or Inf.", param="files")
        return error_from_code(code, message)

    def _end(self, check_id: str, error: BaseException, reason: str = "") -> None:
        fault = as_polypeft_error(error, "the trial of an adapter")
        self.refusals[reason or fault.code] += 1
        self.results.append(Checked(check_id, error=(fault.code, fault.message, fault.param)))

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
PROMPT = 8  # tokens
ANSWER = 8
NON_FINITE = {"non_finite_logits": "non_finite"}  # code -> what a refusal for it is counted as
LEAST_EFFECT = 1e-6  # of the largest logit; below it a difference is rounding


@dataclass(eq=False)
class Trial:
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
        self.prompt = [i * (vocab_size // PROMPT) + 1 for i in range(PROMPT)]
        self.base_logits: torch.Tensor | None = None
        self.base_row: Row | None = None
        self.trials: dict[str, Trial] = {}  # by row id
        self.verdicts: list[Checked] = []
        self.accepted = 0
        self.refusals: Counter[str] = Counter()  # by reason

    def open(self, check: Check) -> None:
        try:
            manifest = decode_manifest(check.manifest)
            loading = self.loader.check(manifest)
        except (msgspec.DecodeError, StopIteration):  # not a manifest, or one that names no weights
            self._end(check.id, InvalidAdapter("The manifest could not be read."))
            return
        except StoreError as error:
            self._end(check.id, error)
            return
        self.trials[f"gate-{check.id}"] = Trial(check, manifest, loading)

    def step(self) -> None:
        """Start the trial runs whose version has been loaded."""
        for row_id, trial in [*self.trials.items()]:
            if trial.row is None and trial.loading.done():
                try:
                    if error := self._too_large(trial.loading.result().nbytes):
                        raise error
                    self._run(row_id, trial)
                except Exception as error:  # noqa: BLE001 - whatever it is, and `as_polypeft_error` logs it
                    del self.trials[row_id]
                    self._end(trial.check.id, error)

    def observe(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Keep the first logits of trial rows; `rows` are those that logits [R, V] belong to."""
        if not self.trials:
            return
        for i, row in enumerate(rows):
            if row is self.base_row and self.base_logits is None:
                self.base_logits = logits[i].clone()
            elif (trial := self.trials.get(row.id)) and trial.logits is None:
                trial.logits = logits[i].clone()

    def take(self, chunk: Chunk) -> bool:
        """True if the chunk was a trial's, and nobody else's business."""
        if self.base_row is not None and chunk.id == self.base_row.id:
            if chunk.error:  # the next trial starts it again
                self.base_row = None
            return True
        trial = self.trials.get(chunk.id)
        if trial is None:
            return False
        trial.tokens += chunk.tokens
        if chunk.error:
            del self.trials[chunk.id]
            self._end(trial.check.id, self._explain(chunk.error), NON_FINITE.get(chunk.error[0], ""))
        elif chunk.finish:
            del self.trials[chunk.id]
            try:
                self._judge(trial)
            except Exception as error:  # noqa: BLE001 - the same
                self._end(trial.check.id, error)
        return True

    def take_verdicts(self) -> list[Checked]:
        taken, self.verdicts = self.verdicts, []
        return taken

    def _too_large(self, nbytes: int) -> TooLarge | None:
        """Why it could never be served: alone it takes more than there is for all."""
        if nbytes <= self.cache.budget:
            return None
        return TooLarge(
            f"The adapter takes {nbytes} bytes on the device; all adapters share {self.cache.budget}.",
            param="files",
        )

    def _run(self, row_id: str, trial: Trial) -> None:
        manifest = trial.manifest
        # the tenant's own share of the tiers is what its uploads take
        ref = AdapterRef(
            manifest.tenant, manifest.name, manifest.version, manifest.digest, manifest.method, ""
        )
        self.cache.add_pending(ref, trial.loading)  # it has no manifest in the store to be fetched by
        if self.base_row is None:
            self.base_row = self._row("gate-base", None)
            self.scheduler.add(self.base_row)
        trial.row = self._row(row_id, ref)
        self.scheduler.add(trial.row)

    def _row(self, row_id: str, ref: AdapterRef | None) -> Row:
        sampling = Sampling(max_tokens=ANSWER if ref else 1, temperature=0.0, ignore_eos=True)
        command = Generate(row_id, TENANT, self.prompt, sampling, ref)
        return Row(command, seed=0, tokens=list(self.prompt), prompt_length=PROMPT)

    def _judge(self, trial: Trial) -> None:
        assert trial.logits is not None, "a row that finished had logits"
        if self.base_logits is None:  # its row was queued first, and has failed
            raise Unavailable("The adapter could not be compared with the base; try again.")
        effect = float((trial.logits - self.base_logits).abs().max())
        if effect <= LEAST_EFFECT * float(self.base_logits.abs().max()) and not trial.check.allow_noop:
            message = (
                "The adapter changes nothing: its logits are the base's. "
                "Send allow_noop=true if that is what you want."
            )
            self._end(trial.check.id, InvalidAdapter(message, param="files"), "no_effect")
            return
        self.accepted += 1
        packed = trial.loading.result()
        answer = hashlib.sha256(repr(trial.tokens).encode()).hexdigest()[:16]
        facts = {"device_bytes": packed.nbytes, "effect": round(effect, 6), "fingerprint": answer}
        self.verdicts.append(Checked(trial.check.id, facts=facts | {"virtual_tokens": packed.virtual_tokens}))

    def _explain(self, error: tuple[str, str]) -> PolypeftError:
        code, message = error
        if code == "non_finite_logits":
            return InvalidAdapter("The adapter makes the model produce NaN or Inf.", param="files")
        return error_from_code(code, message)

    def _end(self, check_id: str, error: BaseException, reason: str = "") -> None:
        fault = as_polypeft_error(error, "the trial of an adapter")
        self.refusals[reason or fault.code] += 1
        self.verdicts.append(Checked(check_id, error=(fault.code, fault.message, fault.param)))

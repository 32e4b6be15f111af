"""One model, from its config to a verdict: exact, refused by name, or wrong.

It gets random weights, is served by an engine in this process, and is compared with transformers' eager
attention and with PEFT: each row alone, the whole text in one pass, no cache. The engine takes 32 tokens a
step, so that prompts come in chunks; blocks of 16 tokens and windows of 8 end within them.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store.object_store.store import Objects
from server.base_model.compatibility import check_architecture
from server.engine.engine import Engine
from server.engine.scheduling.step_cost import StepCost
from server.errors import StartupError
from server.messages import AdapterRef, Generate, Sampling
from server.settings import MiB, Settings
from tests.families.cases import Case
from tests.fixtures.engine import publish, record_logits, run
from tests.fixtures.models import Oracle, make_lora

TOLERANCE = 1e-4  # of the largest difference of a logit, over the largest logit
NOISE = 5  # times transformers' own distance from itself in float64: where a model blows up what is rounded
STEP_TOKENS = 32
LENGTHS = (1, 7, 17, 40, 90, 200)
NEW = 12
MORE = 3  # tokens after a prompt that was served before
GUESSED = 24  # tokens of rows that may guess

STAGES = ("base", "chunks", "prefix hits", "LoRA", "mixed rows", "mixed rows, prefix hits")
Outcome = Literal["exact", "refused", "wrong", "dies"]


class Verdict(msgspec.Struct):
    name: str
    model_type: str
    outcome: Outcome
    detail: str = ""  # the refusal, or what is wrong
    errors: dict[str, float] = {}  # of each stage: the largest difference of a logit, over the largest logit
    seconds: float = 0.0


class Wrong(Exception):
    """The engine gave something else than transformers."""


def judge(case: Case, folder: Path) -> Verdict:
    """The verdict on a case, with `folder` to work in. What transformers itself cannot build raises."""
    verdict = Verdict(case.name, case.model_type, "exact")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = folder / "model"
            case.write(model)
            (model / "model.safetensors").touch()  # the check looks only for its name
            check_architecture(model)
            save_weights(model)
            Trial(model, folder, verdict.errors).run()
    except StartupError as error:
        verdict.outcome, verdict.detail = "refused", error.message
    except Wrong as error:
        verdict.outcome, verdict.detail = "wrong", str(error)
    return verdict


def save_weights(folder: Path) -> None:
    """Random ones in float32. Biases and norms as well: zeros and ones hide mistakes."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
        model.save_pretrained(folder)


class Trial:
    """A model in our engine, and in transformers' and PEFT's hands."""

    def __init__(self, model: Path, folder: Path, errors: dict[str, float]) -> None:
        self.folder = folder
        self.errors = errors
        self.off: list[str] = []  # what is wrong
        settings = Settings(
            model=str(model),
            data_dir=folder / "data",
            device="cpu",
            threads=1,
            max_batch_tokens=STEP_TOKENS,
            max_seqs=len(LENGTHS),
            kv_bytes=8 * MiB,
        )
        self.engine = Engine(settings, model)
        self.guesses, self.engine.scheduler.max_row_draft = self.engine.scheduler.max_row_draft, 0
        self.objects = Objects.open(settings.store_url)
        self.oracle = Oracle(model)
        self.logits = record_logits(self.engine)

    def run(self) -> None:
        """Every stage. Raises Wrong at the end, with all that is off."""
        try:
            self._stages()
        except Wrong as error:
            self.off.append(str(error))
        finally:
            self.engine.close()
        if self.off:
            raise Wrong("; ".join(self.off))

    def _stages(self) -> None:
        prompts = self._prompts(1, LENGTHS)
        rows = [(ids, None) for ids in prompts]
        found = self._compare(rows, ["base" if len(ids) < STEP_TOKENS else "chunks" for ids in prompts])
        for ids, tokens in zip(prompts, found, strict=True):
            self._compare([(ids + tokens[:MORE], None)], ["prefix hits"], cached=len(ids) // 16 * 16)
        adapters = [self._adapter(rank) for rank in (4, 8)]
        lengths = [n for n in (40, 17, 90, 33) if n < self.longest]
        mixed = list(
            zip(self._prompts(2, lengths), [adapters[0], adapters[1], None, adapters[0]], strict=False)
        )
        found = self._compare(mixed, ["mixed rows"] * len(mixed))
        hits = [(ids + tokens[:MORE], adapter) for (ids, adapter), tokens in zip(mixed, found, strict=True)]
        self._compare(hits, ["mixed rows, prefix hits"] * len(hits), cached=16)
        self._compare([(self._prompts(3, (17,))[0], adapters[1])], ["LoRA"])
        self._guess()

    @property
    def longest(self) -> int:
        return self.engine.base.max_context - NEW - MORE

    def _prompts(self, seed: int, lengths: Sequence[int]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.engine.base.vocab_size
        lengths = [n for n in lengths if n <= self.longest]
        return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]

    def _adapter(self, rank: int) -> "Adapter":
        name = f"r{rank}"
        folder = make_lora(
            self.oracle.base, self.folder / name, seed=rank, r=rank, target_modules="all-linear"
        )
        return Adapter(folder, publish(self.objects, self.engine.base, folder))

    def _compare(
        self, rows: Sequence[tuple[list[int], "Adapter | None"]], stages: Sequence[str], cached: int = 0
    ) -> list[list[int]]:
        """All rows at once through the engine, each alone through the oracle; the tokens of each."""
        sampling = Sampling(max_tokens=NEW, temperature=0.0, ignore_eos=True, seed=0)
        commands = [
            Generate(f"row {i}", "tenant", ids, sampling, adapter.ref if adapter else None)
            for i, (ids, adapter) in enumerate(rows)
        ]
        self.logits.clear()
        found = run(self.engine, commands)
        for (ids, adapter), command, done, stage in zip(rows, commands, found, stages, strict=True):
            who = f"{stage}, prompt of {len(ids)}"
            if done.error:
                raise Wrong(f"{who}: {done.error[1]}")
            if done.cached_tokens < cached:
                raise Wrong(f"{who}: {done.cached_tokens} of its tokens were cached, not {cached}")
            own = torch.stack(self.logits[command.id])
            with self.oracle.using(adapter.folder if adapter else None) as model:
                expected = logits_of(model, ids, done.tokens)
                error = distance(own, expected)
                if not error <= TOLERANCE and not error <= NOISE * rounding(
                    model, ids, done.tokens, expected
                ):
                    self.off.append(f"{who}, is {error:.1e} off")
            self.errors[stage] = max(self.errors.get(stage, 0.0), error, key=nan_first)
            if not self.off and not greedy(done.tokens, expected):
                raise Wrong(f"{who}: other tokens, though logits are only {error:.1e} off")
        return [done.tokens for done in found]

    def _guess(self) -> None:
        """Rows that repeat themselves and guess what comes: the same tokens."""
        self.engine.scheduler.max_row_draft = self.guesses
        self.engine.scheduler.step_cost = StepCost()  # what pays must not depend on the machine
        del self.engine.model.forward  # the recording one, which knows no guesses
        sampling = Sampling(max_tokens=GUESSED, temperature=0.0, ignore_eos=True, seed=0)
        prompts = [ids * 3 for ids in self._prompts(4, (5, 9)) if 3 * len(ids) + GUESSED < self.longest]
        found = run(
            self.engine, [Generate(f"guess {i}", "tenant", p, sampling, None) for i, p in enumerate(prompts)]
        )
        for ids, done in zip(prompts, found, strict=True):
            with self.oracle.using(None) as model:
                if not greedy(done.tokens, logits_of(model, ids, done.tokens)):
                    raise Wrong(f"guessing changes the tokens of a prompt of {len(ids)}")


class Adapter(msgspec.Struct, frozen=True):
    """One of PEFT's, as saved and as published."""

    folder: Path
    ref: AdapterRef


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rounding(model: Any, prompt: Sequence[int], tokens: Sequence[int], logits: torch.Tensor) -> float:
    """How far these float32 logits of the model's are from those that it computes in float64."""
    try:
        return distance(logits, logits_of(model.double(), prompt, tokens))
    finally:
        model.float()  # the very weights that they were


def nan_first(error: float) -> float:
    return float("inf") if error != error else error


def greedy(tokens: Sequence[int], logits: torch.Tensor) -> bool:
    """Whether each has the largest logit, or another that rounding may have put first."""
    best, own = logits.max(-1).values, logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    return bool((best - own <= 2 * TOLERANCE * logits.abs().max()).all())


def logits_of(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """What each of `tokens` should have been chosen from, [n, V], as `generate` has it without a cache.

    One pass for all, except where the rope depends on how long the text is by then.
    """
    ids = [*prompt, *tokens[:-1]]
    ends = range(len(prompt), len(ids) + 1) if scales_by_length(model) else [len(ids)]
    parts = []
    for end in ends:
        forget_longest(model)
        logits = model(torch.tensor([ids[:end]]), use_cache=False).logits[0]
        parts.append(logits[-1:] if len(ends) > 1 else logits[len(prompt) - 1 :])
    return torch.cat(parts).float()


def scales_by_length(model: Any) -> bool:
    return any(
        kind in json.dumps(model.config.to_dict(), default=str) for kind in ('"dynamic"', '"longrope"')
    )


def forget_longest(model: Any) -> None:
    """A dynamic rope keeps the scale of the longest text it has seen."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len

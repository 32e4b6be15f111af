"""Which of a step's tokens each module of the base sees, found by a probe: a short prompt runs through it.

An adapter can act at a module that sees every token once, or every token that gets logits. Norms of single
heads, experts that see some tokens and tables of positions see others: they stay as transformers has them,
and no adapter may name them.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from server.engine.model.module_kinds import input_width, kind_of
from server.errors import UnsupportedModel

SeenTokens = Literal["all", "logits"]  # every token of the step, or those that get logits

PROBE_TOKENS = 7  # a prime, so that no number of heads makes another count look like this one
PROBE_LOGITS = 3  # of these tokens, how many get logits

log = logging.getLogger(__name__)


@contextmanager
def as_unsupported(what: str) -> Iterator[None]:
    """Turn what a transformers class raises, when it is called as a step calls it, into UnsupportedModel."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError) as error:
        log.debug("the base cannot be served", exc_info=True)
        raise UnsupportedModel(f"{what} ({type(error).__name__}: {str(error)[:200]})") from error


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Inside, the model attends by transformers' own plain code."""
    before = model.config._attn_implementation  # noqa: SLF001 - has no public name
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def module_tokens(model: Any) -> Mapping[str, SeenTokens]:
    """Which tokens they see, by module name, of the linears, embeddings and norms that an adapter can act at.

    Raises UnsupportedModel if the model's class cannot be called as a step calls it.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device) % model.config.vocab_size
    counts: dict[str, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(_count_tokens(counts.setdefault(name, set()), module, ids))
        for name, module in model.named_modules()
        if kind_of(module)
    ]
    try:
        with eager_attention(model), as_unsupported("its class cannot be called for packed tokens"):
            last = torch.arange(PROBE_TOKENS - PROBE_LOGITS, PROBE_TOKENS, device=device)
            logits = logits_of(model, ids, torch.arange(PROBE_TOKENS, device=device), last)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.shape != (PROBE_LOGITS, model.config.vocab_size):
        raise UnsupportedModel(
            f"asked for logits of {PROBE_LOGITS} tokens over {model.config.vocab_size} words, "
            f"it gives {' x '.join(map(str, logits.shape))}"
        )
    kinds: dict[frozenset[int], SeenTokens] = {
        frozenset({PROBE_TOKENS}): "all",
        frozenset({PROBE_LOGITS}): "logits",
    }
    return {name: kinds[frozenset(seen)] for name, seen in counts.items() if frozenset(seen) in kinds}


def logits_of(
    model: Any, ids: torch.Tensor, positions: torch.Tensor | None, logit_tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [tokens, vocabulary] of one sequence `ids` int64 [T], by the model's own classes.

    `positions` int64 [T]; None: the class counts them itself. `logit_tokens`: indices of the tokens whose
    logits are computed; None: all.
    """
    arguments = {}
    if positions is not None:
        arguments["position_ids"] = positions[None]
        # without a mask transformers takes a jump of positions for the start of another sequence
        arguments["attention_mask"] = torch.ones_like(ids)[None]
    logits_to_keep = 0 if logit_tokens is None else logit_tokens
    output = model(input_ids=ids[None], use_cache=False, logits_to_keep=logits_to_keep, **arguments)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _count_tokens(counts: set[int], module: nn.Module, ids: torch.Tensor) -> Any:
    """A hook that adds to `counts` the number of tokens it sees; 0 if an embedding sees others than `ids`."""

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if x is None or (kind_of(module) == "embedding" and not torch.equal(x.flatten(), ids)):
            counts.add(0)
        else:
            counts.add(x.numel() // input_width(module))

    return before

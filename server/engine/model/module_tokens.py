"""Which of a step's tokens each module of the base sees, asked of the model: a small prompt goes through it.

An adapter can act at a module that sees every token once, or every token that is sampled from. Norms of
single heads, experts that see some tokens, tables of positions see others: they stay as transformers has
them, and no adapter may name them.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.errors import UnsupportedModel

Seen = Literal["all", "kept"]

PROMPT = 7  # tokens; a prime, so that no number of heads makes other tokens look like these
KEPT = 3  # of them have logits

log = logging.getLogger(__name__)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """What a class of transformers raises when it is called as a step calls it becomes UnsupportedModel."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError) as error:
        log.debug("the base cannot be served", exc_info=True)
        raise UnsupportedModel(f"{what} ({type(error).__name__}: {str(error)[:200]})") from error


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """The model attends by transformers' own plain code meanwhile."""
    before = model.config._attn_implementation  # noqa: SLF001 - has no public name
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def module_tokens(model: Any) -> Mapping[str, Seen]:
    """By name, of linears, embeddings and norms that an adapter can act at.

    Raises UnsupportedModel if the model's class cannot be called as a step calls it.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, PROMPT + 1, device=device) % model.config.vocab_size
    counts: dict[str, set[int]] = {}
    hooks = [
        module.register_forward_pre_hook(_note(counts.setdefault(name, set()), module, ids))
        for name, module in model.named_modules()
        if _width(module)
    ]
    try:
        with own_attention(model), refusing("its class cannot be called for packed tokens"):
            kept = torch.arange(PROMPT - KEPT, PROMPT, device=device)
            logits = logits_of(model, ids, torch.arange(PROMPT, device=device), kept)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.shape != (KEPT, model.config.vocab_size):
        raise UnsupportedModel(
            f"asked for logits of {KEPT} tokens over {model.config.vocab_size} words, "
            f"it gives {' x '.join(map(str, logits.shape))}"
        )
    kinds: dict[frozenset[int], Seen] = {frozenset({PROMPT}): "all", frozenset({KEPT}): "kept"}
    return {name: kinds[own] for name, found in counts.items() if (own := frozenset(found)) in kinds}


def logits_of(
    model: Any, ids: torch.Tensor, positions: torch.Tensor | None, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [tokens, vocabulary] of one sequence, by the model's own classes; `kept`: of these tokens.

    `positions`: None leaves it to the class to count them.
    """
    given = {}
    if positions is not None:
        given["position_ids"] = positions[None]
        # without a mask transformers takes a jump of positions for the start of another sequence
        given["attention_mask"] = torch.ones_like(ids)[None]
    keep = 0 if kept is None else kept
    output = model(input_ids=ids[None], use_cache=False, logits_to_keep=keep, **given)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _width(module: Any) -> int:
    """Numbers that a module sees of each token; 0 if no adapter acts at its kind."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, Conv1D):
        return int(module.nx)
    if isinstance(module, nn.Embedding):
        return 1
    return norm_width(module)


def norm_width(module: Any) -> int:
    """Numbers that a norm sees of each token; 0 if the module is none: it has no weight for each of them."""
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, nn.Parameter) and weight.dim() == 1 else 0


def _note(counts: set[int], module: nn.Module, ids: torch.Tensor) -> Any:
    """A hook that adds how many tokens the module sees: 0 if an embedding sees anything but their ids."""

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if x is None or (isinstance(module, nn.Embedding) and not torch.equal(x.flatten(), ids)):
            counts.add(0)
        else:
            counts.add(x.numel() // _width(module))

    return before

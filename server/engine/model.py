"""The base model on its device: a transformers class as it is, with its linears and its attention ours.

Tokens of all rows are packed [1, T] with explicit positions. Attention goes through transformers'
AttentionInterface into pages we own; linear and embedding modules are replaced by sites, which add what
each token's adapter adds. Knows batches and slots; knows no tenants, names or queues.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from server.adapters.methods.base import Bank, Start
from server.adapters.sites import Base, Site
from server.engine.attention import Pages, Step, attend, places_of
from server.engine.linear import EmbeddingSite, LinearSite, join_siblings
from server.engine.row import Row
from server.engine.sublayers import norm_gains, watch_norms, watch_sublayers
from server.kernels.attention import BLOCK, write_pages

ATTENTION = "polypeft"  # a name without "flash", "sdpa" or "flex", which transformers treats specially


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype


class ServedModel:
    """Weights, pages and sites; `forward` runs one step."""

    def __init__(
        self, folder: Path, base_id: str, placement: Placement, *, kv_bytes: int, max_context: int
    ) -> None:
        self.placement = placement
        self.step = Step()
        AttentionInterface.register(ATTENTION, attend)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=placement.dtype, local_files_only=True)
        model.requires_grad_(False)
        model.eval()
        model.set_attn_implementation(ATTENTION)
        self.model: Any = model.to(placement.device)
        self.sites = replace_modules(self.model, self.step)
        biases = {name: p for name, p in self.model.named_parameters() if name.endswith(".bias")}
        self.weights = BaseWeights(self.sites, biases | norm_gains(self.model))
        config = self.model.config
        found = {name: module.site for name, module in self.sites.items()}
        found |= watch_norms(self.model, self.step)
        found |= watch_sublayers(self.model, config.num_hidden_layers, config.hidden_size, self.step)
        self.base = describe(config, base_id, found, self.digest(), max_context)
        self.step.pages = Pages(self.base, placement.device, placement.dtype, kv_bytes)
        holds = self.step.pages.count * BLOCK  # one row may fill the whole cache, and no more
        self.base = msgspec.structs.replace(self.base, max_context=min(self.base.max_context, holds))
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                module.polypeft_step = self.step  # how `attend`, a plain function, finds its step

    def install(self, banks: Mapping[str, Bank]) -> None:
        """The banks whose adapters rows may name, by method."""
        self.step.banks = banks

    @torch.inference_mode()
    def forward(self, rows: list[Row]) -> torch.Tensor:
        """Compute each row's scheduled tokens; float32 logits [rows that complete, vocabulary].

        The logits' order is that of `rows`, less those still in prefill after this step.
        """
        device = self.placement.device
        ordered = sorted(rows, key=lambda row: row.scheduled > 1)  # tokens of decoding rows come first
        ids = [t for row in ordered for t in row.tokens[row.computed : row.computed + row.scheduled]]
        positions = [p for row in ordered for p in range(row.computed, row.computed + row.scheduled)]
        self.step.begin(ordered, device)
        kept = torch.tensor([self.step.last[row.id] for row in rows if row.completes], dtype=torch.int64)
        self.step.keep(rows)
        output = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=kept.to(device),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def write(self, row: Row, start: Start, first: int) -> None:
        """Put the given K/V of a row's virtual tokens, from `first` on, into its pages."""
        count = start.keys.shape[1]
        places = places_of(row.blocks, first, count, self.placement.device)
        for layer in range(self.base.layers):
            pages = (self.step.pages.keys[layer], self.step.pages.values[layer])
            write_pages(*pages, start.keys[layer, first:], start.values[layer, first:], places)

    def end_tokens(self) -> frozenset[int]:
        """Ids after which a text is over, as the model's own generation config says."""
        ids = self.model.generation_config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or ())

    def digest(self) -> str:
        """SHA-256 over every weight as it is held now, by name: the same before and after any workload."""
        total = hashlib.sha256()
        for name, tensor in sorted(self._tensors(), key=lambda pair: pair[0]):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        for name, site in self.sites.items():
            if isinstance(site, LinearSite):
                yield f"{name}.weight", site.weight()


class BaseWeights(Mapping[str, torch.Tensor]):
    """The base's weights by site: [out, in] of a linear, [vocabulary, hidden] of an embedding; and the
    biases [out] of linears and norms as "SITE.bias". Of a norm, what it multiplies by [width].
    """

    def __init__(
        self, sites: dict[str, LinearSite | EmbeddingSite], biases: Mapping[str, torch.Tensor]
    ) -> None:
        self._sites = sites
        self._biases = biases

    def __getitem__(self, name: str) -> torch.Tensor:
        bias = self._biases.get(name)
        return self._sites[name].weight() if bias is None else bias

    def __iter__(self) -> Iterator[str]:
        yield from self._sites
        yield from self._biases

    def __len__(self) -> int:
        return len(self._sites) + len(self._biases)


def replace_modules(model: nn.Module, step: Step) -> dict[str, LinearSite | EmbeddingSite]:
    """Put a site in the place of every Linear, Conv1D and Embedding: {module path: site}."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    learned_positions = getattr(getattr(model, "transformer", None), "wpe", None)
    sites: dict[str, LinearSite | EmbeddingSite] = {}
    for name, module in list(model.named_modules()):
        site: LinearSite | EmbeddingSite
        if isinstance(module, nn.Linear | Conv1D):
            site = LinearSite.of(name, module, step, is_head=module is head)
        elif isinstance(module, nn.Embedding) and module is not learned_positions:
            site = EmbeddingSite.of(name, module, step)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, site)
        sites[name] = site
    join_siblings(model)
    return sites


def describe(config: Any, base_id: str, sites: dict[str, Site], digest: str, max_context: int) -> Base:
    heads, own = config.num_attention_heads, config.max_position_embeddings
    return Base(
        id=base_id,
        model_type=config.model_type,
        digest=digest,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_context=min(max_context, own) if max_context else own,
        sites=sites,
    )

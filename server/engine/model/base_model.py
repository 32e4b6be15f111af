"""The base model, frozen: a transformers class as it is, with its linears and its attention ours.

Linear and embedding modules are replaced by sites, norms and sub-blocks are watched: at each, the banks of
the step under way add what each token's adapter adds. What serves and what trains are made of this.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from server.adapters.methods.lora import Narrow
from server.adapters.sites import Base, Site
from server.engine.model.exactness_check import ExactnessCheck
from server.engine.model.forward_context import ForwardContext
from server.engine.model.linear_sites import (
    EmbeddingSite,
    LinearSite,
    WeightFormat,
    join_siblings,
    put_modules,
)
from server.engine.model.module_hooks import norm_gains, watch_norms, watch_sublayers
from server.engine.model.module_tokens import Seen, module_tokens
from server.engine.model.rotary import longest_context, scale_by_row
from server.errors import UnsupportedModel


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype  # of what is computed, and of weights but for linears' that have another layout
    layout: WeightFormat = "float32"  # of linears' weights, on a CPU
    rounded: bool = False  # LoRA's matrices on a CPU, to bfloat16

    @property
    def narrow(self) -> Narrow:
        """Which matrices of adapters are held in bfloat16, on a CPU: a base in int8 has been rounded more."""
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return "never"
        return "rounded" if self.rounded or self.layout == "int8" else "exact"


def load_base(folder: Path, placement: Placement) -> Any:
    """A transformers causal LM with its weights, in this dtype.

    Raises UnsupportedModel if the folder lacks some: transformers would draw them at random.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=placement.dtype, local_files_only=True, output_loading_info=True
    )
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:
        raise UnsupportedModel(f"its folder has no weights for {len(lacking)} tensors, such as {lacking[0]}")
    return model


class FrozenModel:
    """Weights and sites, and the step that all of them look at.

    `attention` is registered under its own name, which must hold no "flash", "sdpa" or "flex": transformers
    treats those specially. It finds its step as `module.polypeft_step`. `packed=False` keeps linears'
    weights as they are, so that gradients flow through them.
    """

    def __init__(
        self,
        folder: Path,
        base_id: str,
        placement: Placement,
        step: ForwardContext,
        attention: Callable[..., tuple[torch.Tensor, None]],
        *,
        max_context: int = 0,
        packed: bool = True,
        check: ExactnessCheck | None = None,
    ) -> None:
        self.placement = placement
        name = f"polypeft_{attention.__name__}"
        AttentionInterface.register(name, attention)
        model = load_base(folder, placement)
        model.requires_grad_(False)
        model.eval()
        self.model: Any = model.to(placement.device)
        seen = module_tokens(self.model)
        self.sites, originals = replace_modules(self.model, seen, step)
        identity = self.digest()  # of the weights as they came: adapters name it, whatever the layout
        context = longest_context(self.model, max_context)
        if check:
            check.reference(self.model, originals, identity, placement.layout, context)
        del originals
        if packed:
            for site in self.sites.values():
                if isinstance(site, LinearSite):
                    site.lay_out(placement.layout)
            join_siblings(self.model)
        if check and placement.layout != "float32":
            check.rounded_reference(self.model)
        self.model.set_attn_implementation(name)
        self.rope_switches = scale_by_row(self.model, step)
        biases = {name: p for name, p in self.model.named_parameters() if name.endswith(".bias")}
        self.weights = BaseWeights(self.sites, biases | norm_gains(self.model, seen))
        config = self.model.config
        found = {name: module.site for name, module in self.sites.items()}
        found |= watch_norms(self.model, step, seen)
        found |= watch_sublayers(self.model, config.num_hidden_layers, config.hidden_size, step)
        self.base = describe(config, base_id, found, identity, context)
        self.base = msgspec.structs.replace(self.base, layout=placement.layout if packed else "float32")
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                module.polypeft_step = step  # how attention, a plain function, finds its step

    def digest(self) -> str:
        """SHA-256 over every weight as it is held now, by name: the same before and after any workload.

        In float32 it is the base's identity.
        """
        total = hashlib.sha256()
        for name, tensor in sorted(self._tensors(), key=lambda pair: pair[0]):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.named_parameters()
        for name, site in self.sites.items():
            if isinstance(site, LinearSite):
                yield f"{name}.weight", site.weight


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
        return self._sites[name].weight if bias is None else bias

    def __iter__(self) -> Iterator[str]:
        yield from self._sites
        yield from self._biases

    def __len__(self) -> int:
        return len(self._sites) + len(self._biases)


Sites = dict[str, LinearSite | EmbeddingSite]


def replace_modules(
    model: nn.Module, seen: Mapping[str, Seen], step: ForwardContext
) -> tuple[Sites, dict[str, nn.Module]]:
    """Put a site in the place of every Linear, Conv1D and Embedding that an adapter can act at.

    Gives the sites and the modules whose places they took, both by module path.
    """
    sites: Sites = {}
    for name, module in list(model.named_modules()):
        if name in seen and isinstance(module, nn.Linear | Conv1D):
            sites[name] = LinearSite.of(name, module, step, is_head=seen[name] == "kept")
        elif name in seen and isinstance(module, nn.Embedding):
            sites[name] = EmbeddingSite.of(name, module, step)
    originals = {name: model.get_submodule(name) for name in sites}
    put_modules(model, sites)
    return sites, originals


def describe(config: Any, base_id: str, sites: dict[str, Site], digest: str, max_context: int) -> Base:
    heads = config.num_attention_heads
    return Base(
        id=base_id,
        model_type=config.model_type,
        digest=digest,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_context=max_context,
        sites=sites,
    )

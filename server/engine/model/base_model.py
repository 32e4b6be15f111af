"""The frozen base model: an unmodified transformers class with our linears, attention and hooks in it.

Linear and embedding modules are replaced by sites, norms and sub-blocks are hooked: at each, the banks of the
current step add what each token's adapter adds. The engine's ServedModel and training's AdapterModel build on
it.

docs/architecture.md lists every place where an object of transformers is patched; a new one goes there, too.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from server.adapters.methods.lora import Narrow
from server.adapters.sites import Base, Site
from server.engine.model.exactness_check import ExactnessCheck
from server.engine.model.forward_context import ForwardContext
from server.engine.model.linear_sites import (
    LinearSite,
    Sites,
    fuse_packed_siblings,
    replace_modules,
)
from server.engine.model.module_hooks import hook_norms, hook_sublayers, norm_gains
from server.engine.model.module_tokens import module_tokens
from server.engine.model.rotary import longest_context, scale_by_row
from server.errors import UnsupportedModel
from server.kernels.weight_formats import FLOAT32, WeightFormat


@dataclass(frozen=True)
class Placement:
    """Where the model runs, and in which number formats."""

    device: torch.device
    dtype: torch.dtype  # of activations, and of all weights but packed linears'
    weight_format: WeightFormat = FLOAT32  # of linears' weights
    lora_bfloat16: bool = False  # round LoRA's matrices to bfloat16, on a CPU

    @property
    def narrow(self) -> Narrow:
        """Which matrices of adapters are kept in bfloat16 on a CPU: all of them beside a quantised base,
        whose own rounding is coarser.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return "never"
        return "rounded" if self.lora_bfloat16 or self.weight_format.rounds else "exact"


def load_base(folder: Path, placement: Placement) -> Any:
    """A transformers causal LM with its weights, in the placement's dtype.

    Raises UnsupportedModel if the folder lacks weights: transformers would draw them at random.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=placement.dtype, local_files_only=True, output_loading_info=True
    )
    missing = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if missing:
        raise UnsupportedModel(f"its folder has no weights for {len(missing)} tensors, such as {missing[0]}")
    return model


class FrozenModel:
    """Weights and sites, and the forward context that all of them read.

    `model` is the transformers model; `sites` are the linears and embeddings by path; `base` describes it to
    the adapters' methods; `weights` gives them its weights by site; `rope_switches` are the row lengths past
    which a row has other rotary frequencies.
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
        """`attention`: the attention function of all layers, which finds `step` as `module.polypeft_step`.
        Its name must not contain "flash", "sdpa" or "flex", which transformers treats specially.

        `max_context`: tokens of a row at most; 0: what the model allows. `packed=False` keeps linears'
        weights plain, so that gradients flow through them. `check` takes the reference logits of the model
        before and after its weights are rounded. Raises UnsupportedModel.
        """
        self.placement = placement
        name = f"polypeft_{attention.__name__}"
        AttentionInterface.register(name, attention)
        model = load_base(folder, placement)
        model.requires_grad_(False)
        model.eval()
        self.model: Any = model.to(placement.device)
        seen = module_tokens(self.model)
        self.sites, originals = replace_modules(self.model, seen, step)
        identity = self.digest()  # of the weights as loaded: adapters name it, whatever the weight format
        context = longest_context(self.model, max_context)
        if check:
            check.take_reference(self.model, originals, identity, placement.weight_format, context)
        del originals
        if packed:
            for site in self.sites.values():
                if isinstance(site, LinearSite):
                    site.pack_weight(placement.weight_format)
            fuse_packed_siblings(self.model)
        if check and placement.weight_format.rounds:
            check.take_rounded_reference(self.model)
        self.model.set_attn_implementation(name)
        self.rope_switches = scale_by_row(self.model, step)
        biases = {name: p for name, p in self.model.named_parameters() if name.endswith(".bias")}
        self.weights = BaseWeights(self.sites, biases | norm_gains(self.model, seen))
        config = self.model.config
        sites = {name: module.site for name, module in self.sites.items()}
        sites |= hook_norms(self.model, step, seen)
        sites |= hook_sublayers(self.model, config.num_hidden_layers, config.hidden_size, step)
        self.base = describe_base(config, base_id, sites, identity, context)
        weight_format = placement.weight_format if packed else FLOAT32
        self.base = msgspec.structs.replace(self.base, weight_format=weight_format.name)
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                module.polypeft_step = step  # how attention, a plain function, finds its step

    def digest(self) -> str:
        """SHA-256 over every weight, by name, in its present format: no workload changes it.

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
    """The base's weights by site: [out, in] of a linear, [vocabulary, hidden] of an embedding, the factors
    [width] of a norm (`norm_gains`); and the biases [out] of linears and norms as "SITE.bias".
    """

    def __init__(self, sites: Sites, biases: Mapping[str, torch.Tensor]) -> None:
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


def describe_base(config: Any, base_id: str, sites: dict[str, Site], digest: str, max_context: int) -> Base:
    """The base as the adapters' methods see it, of a transformers `config`."""
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

"""Sites in the model's tree: a linear layer or an embedding, then what each token's adapter adds.

Where the weight format has a kernel (kernels/weight_formats.py), the weight is packed for it once at load and
the plain copy is dropped. Linears that see the same input (q, k and v; gate and up) are concatenated and
computed in one launch, when the first of them is called.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.methods.interface import Bank
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Site
from server.base_model.families import SIBLINGS, embedding_scale
from server.engine.model.forward_context import ForwardContext
from server.engine.model.module_kinds import kind_of
from server.engine.model.module_tokens import SeenTokens
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.packed_linear import PackedLinear
from server.kernels.weight_formats import WeightFormat


class LinearSite(nn.Module):
    """y = x W^T + b, then the banks. x is [..., in]; all leading dimensions together are the tokens."""

    def __init__(
        self,
        site: Site,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        step: ForwardContext,
        *,
        is_head: bool,
    ) -> None:
        super().__init__()
        self.site = site
        self.step = step
        self.is_head = is_head  # sees the tokens that get logits, not all
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.plain_weight: torch.Tensor
        self.register_buffer("plain_weight", weight, persistent=False)  # [out, in]; empty once packed
        self.packed: PackedLinear | None = None
        self.fused: FusedLinears | None = None  # the product it is a part of

    @classmethod
    def of(cls, name: str, module: Any, step: ForwardContext, *, is_head: bool) -> "LinearSite":
        """The site that takes the place of a Linear or Conv1D of this path."""
        conv1d = isinstance(module, Conv1D)
        weight = module.weight.detach()
        weight = weight.T.contiguous() if conv1d else weight
        bias = None if module.bias is None else module.bias.detach()
        site = Site(name, "linear", weight.shape[1], weight.shape[0], bias is not None, conv1d)
        return cls(site, weight, bias, step, is_head=is_head)

    def pack_weight(self, weight_format: WeightFormat) -> None:
        """Keep the weight as the format's kernel reads it, if it has one: faster, but without gradients."""
        self.packed = weight_format.pack(self.plain_weight, self.bias)
        if self.packed:
            self.plain_weight = self.plain_weight.new_empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in]; a copy where it is packed."""
        return self.packed.weight() if self.packed else self.plain_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] of x [..., in], adapters included."""
        flat = x.reshape(-1, self.site.inputs)
        input_banks = self.step.head_inputs if self.is_head else self.step.inputs
        for bank, rows in input_banks:
            flat = bank.inputs(self.site, flat, rows)
        if not flat.shape[0]:  # no row completes in this step: the head has no tokens
            y = flat.new_empty(0, self.site.outputs)
        elif self.fused and not input_banks:
            y = self.fused.output(self, x, flat)
        elif self.packed:
            acting = self.step.head_affine if self.is_head else self.step.affine
            y = self.packed(flat, biases_of(acting, [self.site], [slice(0, self.site.outputs)], len(flat)))
        else:
            y = F.linear(flat, self.plain_weight, self.bias)
        self.add_adapters(flat, y)
        result: torch.Tensor = y.view(*x.shape[:-1], self.site.outputs)
        return result

    def add_adapters(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y [T, out], in place, what each token's adapter makes of x [T, in]."""
        for bank, rows in self.step.head_affine if self.is_head else self.step.affine:
            bank.affine(self.site, x, y, rows, self.bias)


def biases_of(
    acting: list[tuple[Bank, TokenSpans]], sites: Sequence[Site], columns: Sequence[slice], count: int
) -> Biases | None:
    """Biases for the kernel of these sites to add to its `count` tokens: those of the first bank that has
    any.
    """
    return next(
        (biases for bank, rows in acting if (biases := bank.biases(sites, columns, rows, count))), None
    )


class FusedLinears:
    """Linears of one module that are called with the same input, computed as one product."""

    def __init__(self, members: list[LinearSite]) -> None:
        """Of packed linears; their weights become views of one."""
        packed = [member.packed for member in members if member.packed]
        self.packed, columns = packed[0].join(packed)
        self.bias = self.packed.bias
        self.attach(members, columns)

    def attach(self, members: Sequence[LinearSite], columns: Sequence[slice]) -> None:
        """Let `members` read their outputs from these columns of the product."""
        self.step = members[0].step
        self.sites = [member.site for member in members]
        self.columns = dict(zip(members, columns, strict=True))
        self.contiguous = all(one.stop == other.start for one, other in pairwise(columns))
        for member in members:
            member.fused = self
        self.last_x = self.last_y = torch.empty(0)
        self.unread = 0  # members that have not yet read their columns of `last_y`

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[T, all outputs] of x [T, in]."""
        return self.packed(x, biases_of(self.step.affine, self.sites, [*self.columns.values()], len(x)))

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The output [T, out] of each member, in their order, of x [T, in]: columns of one tensor."""
        y = self._adapted_product(x)
        return [y[:, columns] for columns in self.columns.values()]

    def output(self, member: LinearSite, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """The member's output [T, out] of x [..., in], which is `flat` [T, in] once flattened.

        The first member called with x computes the outputs of all; the others find theirs.
        """
        if self.last_x is not x:
            self.last_x, self.last_y, self.unread = x, self._adapted_product(flat), len(self.columns)
        y = self.last_y[:, self.columns[member]]
        self.unread -= 1
        if not self.unread:  # x may be written to from now on, or another tensor take its place
            self.last_x = self.last_y = torch.empty(0)
        return y

    def _adapted_product(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        if self.contiguous:
            for bank, rows in self.step.affine:
                bank.joint(self.sites, x, y, rows, self.bias)
        return y


def fuse_packed_siblings(model: nn.Module) -> None:
    """Compute linears that see the same input together, where they are packed."""
    for module in model.modules():
        for names in SIBLINGS:
            siblings = [getattr(module, name, None) for name in names]
            members = [member for member in siblings if isinstance(member, LinearSite) and member.packed]
            if len(members) == len(names):
                FusedLinears(members)


class EmbeddingSite(nn.Module):
    """The model's own embedding, then the banks, which see token ids."""

    def __init__(self, site: Site, embedding: nn.Embedding, step: ForwardContext) -> None:
        super().__init__()
        self.site = site
        self.embedding = embedding  # the module itself and not its table: Gemma's scales its output
        self.step = step

    @classmethod
    def of(cls, name: str, module: nn.Embedding, step: ForwardContext) -> "EmbeddingSite":
        """The site that takes the place of an embedding of this path."""
        scale, rows, width = embedding_scale(module), module.num_embeddings, module.embedding_dim
        return cls(Site(name, "embedding", rows, width, False, scale=scale), module, step)

    @property
    def weight(self) -> torch.Tensor:
        """The table [vocabulary, hidden]: transformers' classes ask for its device and type."""
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., hidden] of int64 ids [...]. Virtual tokens have negative ids; their bank fills their rows."""
        y: torch.Tensor = self.embedding(ids.clamp(min=0))
        for bank, rows in self.step.affine:
            bank.affine(self.site, ids.reshape(-1), y.view(-1, y.shape[-1]), rows, None)
        return y


Sites = dict[str, LinearSite | EmbeddingSite]


def replace_modules(
    model: nn.Module, seen: Mapping[str, SeenTokens], step: ForwardContext
) -> tuple[Sites, dict[str, nn.Module]]:
    """Replace every Linear, Conv1D and Embedding that an adapter can act at by a site.

    Returns the sites and the modules that they replaced, both by module path.
    """
    sites: Sites = {}
    for name, module in list(model.named_modules()):
        kind = kind_of(module) if name in seen else None
        if kind == "linear":
            sites[name] = LinearSite.of(name, module, step, is_head=seen[name] == "logits")
        elif kind == "embedding":
            sites[name] = EmbeddingSite.of(name, module, step)
    originals = {name: model.get_submodule(name) for name in sites}
    put_modules(model, sites)
    return sites, originals


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set each module at its path in the model's tree."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

"""Sites in the model's tree: a linear layer or an embedding, then whatever each token's adapter adds.

On a CPU the weight is laid out once at load for a kernel of ours, in float32 (kernels/linear.py: `weight()`
gives it back bit for bit) or in int8 (kernels/int8.py: `weight()` is what the int8 stand for); the plain copy
is dropped. Linears that see the same input (q, k and v; gate and up) lie one behind the other and are
computed in one launch, when the first of them is called.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.methods.interface import Bank
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Site
from server.engine.model.forward_context import ForwardContext
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.int8.linear import Int8Linear
from server.kernels.cpu.int8.vnni_linear import INT8
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.packed_linear import PackedLinear, join

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
WeightFormat = Literal["float32", "int8"]
WEIGHT_FORMATS: dict[WeightFormat, type[PackedLinear | Int8Linear]] = {"float32": PackedLinear, "int8": INT8}


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
        self.is_head = is_head  # sees the tokens that are sampled from, not all
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.held: torch.Tensor
        self.register_buffer("held", weight, persistent=False)  # until it is laid out
        self.fast: PackedLinear | Int8Linear | None = None
        self.family: FusedLinears | None = None

    @classmethod
    def of(cls, name: str, module: Any, step: ForwardContext, *, is_head: bool) -> "LinearSite":
        conv1d = isinstance(module, Conv1D)
        weight = module.weight.detach()
        weight = weight.T.contiguous() if conv1d else weight
        bias = None if module.bias is None else module.bias.detach()
        site = Site(name, "linear", weight.shape[1], weight.shape[0], bias is not None, conv1d)
        return cls(site, weight, bias, step, is_head=is_head)

    def lay_out(self, layout: WeightFormat) -> None:
        """Hold the weight as a kernel wants it, where one can: faster, but no gradient flows through."""
        if AVAILABLE and self.held.device.type == "cpu" and self.held.dtype == torch.float32:
            self.fast = WEIGHT_FORMATS[layout].of(self.held, self.bias)
            self.held = self.held.new_empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in]; a copy where it is laid out."""
        return self.fast.weight() if self.fast else self.held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.site.inputs)
        changed = self.step.head_inputs if self.is_head else self.step.inputs
        for bank, rows in changed:
            flat = bank.inputs(self.site, flat, rows)
        if not flat.shape[0]:  # all rows are in mid-prefill: the head is asked nothing
            y = flat.new_empty(0, self.site.outputs)
        elif self.family and not changed:
            y = self.family.output(self, x, flat)
        elif self.fast:
            acting = self.step.head if self.is_head else self.step.affine
            y = self.fast(flat, biases_of(acting, [self.site], [slice(0, self.site.outputs)], len(flat)))
        else:
            y = F.linear(flat, self.held, self.bias)
        self.adapt(flat, y)
        result: torch.Tensor = y.view(*x.shape[:-1], self.site.outputs)
        return result

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y [T, out], in place, what each token's adapter makes of x [T, in]."""
        for bank, rows in self.step.head if self.is_head else self.step.affine:
            bank.affine(self.site, x, y, rows, self.bias)


def biases_of(
    acting: list[tuple[Bank, TokenSpans]], sites: Sequence[Site], columns: Sequence[slice], count: int
) -> Biases | None:
    """What comes with these sites as they are computed for `count` tokens; of the first bank that has any."""
    return next((own for bank, rows in acting if (own := bank.biases(sites, columns, rows, count))), None)


class FusedLinears:
    """Linears of one module that are called with the same input, one after the other, as one."""

    def __init__(self, members: list[LinearSite]) -> None:
        self.fast, columns = join([member.fast for member in members if member.fast])
        self.bias = self.fast.bias
        self.adopt(members, columns)

    def adopt(self, members: Sequence[LinearSite], columns: Sequence[slice]) -> None:
        self.step = members[0].step
        self.sites = [member.site for member in members]
        self.columns = dict(zip(members, columns, strict=True))
        self.beside = all(one.stop == other.start for one, other in pairwise(columns))
        for member in members:
            member.family = self
        self.x = self.y = torch.empty(0)
        self.left = 0  # members that have not yet taken their columns of y

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[T, all outputs] of x [T, in]."""
        return self.fast(x, biases_of(self.step.affine, self.sites, [*self.columns.values()], len(x)))

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What x [T, in] gives to each member, in their order: columns [T, out] of one tensor."""
        y = self._joint(x)
        return [y[:, columns] for columns in self.columns.values()]

    def output(self, member: LinearSite, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """The member's columns [T, out] of what x, which is `flat` once it is flat, gives to all."""
        if self.x is not x:
            self.x, self.y, self.left = x, self._joint(flat), len(self.columns)
        y = self.y[:, self.columns[member]]
        self.left -= 1
        if not self.left:  # the tensor may be written to, or another take its place
            self.x = self.y = torch.empty(0)
        return y

    def _joint(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        if self.beside:
            for bank, rows in self.step.affine:
                bank.joint(self.sites, x, y, rows, self.bias)
        return y


def join_siblings(model: nn.Module) -> None:
    """Let linears that see the same input be computed together, where they are laid out."""
    for module in model.modules():
        for names in SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            members = [member for member in found if isinstance(member, LinearSite) and member.fast]
            if len(members) == len(names):
                FusedLinears(members)


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Each at its path."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


class EmbeddingSite(nn.Module):
    """The embedding as it is, then the banks, which see token ids."""

    def __init__(self, site: Site, embedding: nn.Embedding, step: ForwardContext) -> None:
        super().__init__()
        self.site = site
        self.embedding = embedding  # kept whole: Gemma's scales its output
        self.step = step

    @classmethod
    def of(cls, name: str, module: nn.Embedding, step: ForwardContext) -> "EmbeddingSite":
        scale = float(getattr(module, "embed_scale", 1.0))
        return cls(
            Site(name, "embedding", module.num_embeddings, module.embedding_dim, False, scale=scale),
            module,
            step,
        )

    @property
    def weight(self) -> torch.Tensor:
        """The table [vocabulary, hidden]: classes ask for its device and type."""
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.embedding(ids.clamp(min=0))  # virtual tokens are negative, and their bank's
        for bank, rows in self.step.affine:
            bank.affine(self.site, ids.reshape(-1), y.view(-1, y.shape[-1]), rows, None)
        return y

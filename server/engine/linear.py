"""Sites in the model's tree: a linear layer or an embedding, then whatever each token's adapter adds.

On a CPU the weight is laid out for kernels/linear.py once at load; the plain copy is dropped, and `weight()`
gives it back bit for bit. Linears that see the same input (q, k and v; gate and up) lie one behind the
other and are computed in one launch, when the first of them is called.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.sites import Site
from server.engine.attention import Step
from server.kernels.linear import PackedLinear, pack, unpack
from server.kernels.openmp import AVAILABLE

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LinearSite(nn.Module):
    """y = x W^T + b, then the banks. x is [..., in]; all leading dimensions together are the tokens."""

    def __init__(
        self,
        site: Site,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        step: Step,
        *,
        is_head: bool,
        packed: bool,
    ) -> None:
        super().__init__()
        self.site = site
        self.step = step
        self.is_head = is_head  # runs on the tokens that are sampled from, not on all
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed = packed and AVAILABLE and weight.device.type == "cpu" and weight.dtype == torch.float32
        self.held: torch.Tensor
        self.hold(pack(weight) if self.packed else weight)
        self.family: Family | None = None

    @classmethod
    def of(cls, name: str, module: Any, step: Step, *, is_head: bool, packed: bool = True) -> "LinearSite":
        """`packed=False` keeps the weight as it is: slower, but gradients flow through."""
        conv1d = isinstance(module, Conv1D)
        weight = module.weight.detach()
        weight = weight.T.contiguous() if conv1d else weight
        bias = None if module.bias is None else module.bias.detach()
        site = Site(name, "linear", weight.shape[1], weight.shape[0], bias is not None, conv1d)
        return cls(site, weight, bias, step, is_head=is_head, packed=packed)

    def hold(self, weight: torch.Tensor) -> None:
        """Keep the weight, packed if this site is."""
        self.register_buffer("held", weight, persistent=False)
        if self.packed:
            self.fast = PackedLinear(weight, self.site.outputs, self.bias)

    def weight(self) -> torch.Tensor:
        """W [out, in]; a copy where it is held packed."""
        return unpack(self.held, self.site.outputs) if self.packed else self.held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.site.inputs)
        changed = self.step.head_inputs if self.is_head else self.step.inputs
        for bank, rows in changed:
            flat = bank.inputs(self.site, flat, rows)
        if not flat.shape[0]:  # all rows are in mid-prefill: the head is asked nothing
            y = flat.new_empty(0, self.site.outputs)
        elif self.family and not changed:
            y = self.family.output(self, x, flat)
        elif self.packed:
            y = self.fast(flat)
        else:
            y = F.linear(flat, self.held, self.bias)
        for bank, rows in self.step.head if self.is_head else self.step.affine:
            bank.affine(self.site, flat, y, rows, self.bias)
        result: torch.Tensor = y.view(*x.shape[:-1], self.site.outputs)
        return result


class Family:
    """Packed linears of one module that are called with the same input, one after the other."""

    def __init__(self, members: list[LinearSite]) -> None:
        panels = torch.cat([member.held for member in members])
        width = panels.shape[0] * panels.shape[2]
        bias = None
        if any(member.bias is not None for member in members):
            bias = panels.new_zeros(width)
        self.columns: dict[LinearSite, slice] = {}
        first = at = 0
        for member in members:
            count = member.held.shape[0]
            member.hold(panels[at : at + count])
            member.family = self
            self.columns[member] = slice(first, first + member.site.outputs)
            if bias is not None and member.bias is not None:
                bias[self.columns[member]] = member.bias
            first += count * panels.shape[2]
            at += count
        self.fast = PackedLinear(panels, width, bias)
        self.x = self.y = torch.empty(0)
        self.left = 0  # members that have not yet taken their columns of y

    def output(self, member: LinearSite, x: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """The member's columns [T, out] of what x, which is `flat` once it is flat, gives to all."""
        if self.x is not x:
            self.x, self.y, self.left = x, self.fast(flat), len(self.columns)
        y = self.y[:, self.columns[member]]
        self.left -= 1
        if not self.left:  # the tensor may be written to, or another take its place
            self.x = self.y = torch.empty(0)
        return y


def join_siblings(model: nn.Module) -> None:
    """Let packed linears that see the same input be computed together."""
    for module in model.modules():
        for names in SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            members = [member for member in found if isinstance(member, LinearSite) and member.packed]
            if len(members) == len(names):
                Family(members)


class EmbeddingSite(nn.Module):
    """The embedding as it is, then the banks, which see token ids."""

    def __init__(self, site: Site, embedding: nn.Embedding, step: Step) -> None:
        super().__init__()
        self.site = site
        self.embedding = embedding  # kept whole: Gemma's scales its output
        self.step = step

    @classmethod
    def of(cls, name: str, module: nn.Embedding, step: Step) -> "EmbeddingSite":
        scale = float(getattr(module, "embed_scale", 1.0))
        return cls(
            Site(name, "embedding", module.num_embeddings, module.embedding_dim, False, scale=scale),
            module,
            step,
        )

    def weight(self) -> torch.Tensor:
        """The table [vocabulary, hidden]."""
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.embedding(ids.clamp(min=0))  # virtual tokens are negative, and their bank's
        for bank, rows in self.step.affine:
            bank.affine(self.site, ids.reshape(-1), y.view(-1, y.shape[-1]), rows, None)
        return y

"""Sites in the model's tree: a linear layer or an embedding, then whatever each token's adapter adds.

On a CPU the weight is repacked for oneDNN once at load; the plain copy is dropped, and `weight()` gives it
back bit for bit. Measured with SmolLM2-135M on two AVX2 cores: a step's linears take 0.45 of F.linear's
time at 16 rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from server.adapters.sites import Site
from server.engine.attention import Step

_pack = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001 - torch's own fast path has no public name
_packed_linear = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001

PACK_FOR_ROWS = 16  # oneDNN lays the weight out for about this many rows; good from 4 to 512


class LinearSite(nn.Module):
    """y = x W^T + b, then the banks. x is [..., in]; all leading dimensions together are the tokens."""

    def __init__(
        self, site: Site, weight: torch.Tensor, bias: torch.Tensor | None, step: Step, *, is_head: bool
    ) -> None:
        super().__init__()
        self.site = site
        self.step = step
        self.is_head = is_head  # runs on the tokens that are sampled from, not on all
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed = weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn()
        held = _pack(weight, PACK_FOR_ROWS) if self.packed else weight
        self.held: torch.Tensor
        self.register_buffer("held", held, persistent=False)

    @classmethod
    def of(cls, name: str, module: Any, step: Step, *, is_head: bool) -> "LinearSite":
        conv1d = isinstance(module, Conv1D)
        weight = module.weight.detach()
        weight = weight.T.contiguous() if conv1d else weight
        bias = None if module.bias is None else module.bias.detach()
        site = Site(name, "linear", weight.shape[1], weight.shape[0], bias is not None, conv1d)
        return cls(site, weight, bias, step, is_head=is_head)

    def weight(self) -> torch.Tensor:
        """W [out, in]; a copy where it is held packed."""
        return self.held.to_dense() if self.packed else self.held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.site.inputs)
        for bank, rows in self.step.head_inputs if self.is_head else self.step.inputs:
            flat = bank.inputs(self.site, flat, rows)
        if not flat.shape[0]:  # all rows are in mid-prefill: the head is asked nothing
            y = flat.new_empty(0, self.site.outputs)
        elif self.packed:
            y = _packed_linear(flat, self.held, self.bias, "none", [], "")
        else:
            y = F.linear(flat, self.held, self.bias)
        for bank, rows in self.step.head if self.is_head else self.step.affine:
            bank.affine(self.site, flat, y, rows, self.bias)
        result: torch.Tensor = y.view(*x.shape[:-1], self.site.outputs)
        return result


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


def onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

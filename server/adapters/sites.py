"""The base model as adapters see it: its sites, by name and shape. No torch, no weights.

A site is a place where a method acts: a linear layer, an embedding, a norm. The engine reads the sites
off the loaded model; the API receives them from the engine and checks uploads against them.
"""

from typing import Literal

import msgspec

from server.base_model.families import SubBlockKind

ModuleKind = Literal["linear", "embedding", "norm"]
SiteKind = Literal[ModuleKind, SubBlockKind]


class Site(msgspec.Struct, frozen=True):
    """`name` is the module path in the transformers class, e.g. "model.layers.0.self_attn.q_proj".

    linear: y = x W^T + b with W (out, in); GPT-2's Conv1D counts as linear, its W is stored transposed.
    embedding: inputs = vocabulary, outputs = hidden size. norm: inputs = outputs = its width.
    attention, mlp: a decoder layer's sub-block, inputs = outputs = hidden size.
    """

    name: str
    kind: SiteKind
    inputs: int
    outputs: int
    bias: bool
    conv1d: bool = False
    epsilon: float = 0.0  # of a norm: what it adds under its root
    scale: float = 1.0  # Gemma multiplies its embeddings, and whatever an adapter adds to them


class Base(msgspec.Struct, frozen=True):
    """Everything that decides whether an adapter fits."""

    id: str  # what GET /v1/models calls it
    model_type: str  # transformers' config.model_type
    digest: str  # SHA-256 over all weights as they came: the base never changes
    layers: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    sites: dict[str, Site]
    # Of linears' weights (kernels/weight_formats.py): int8 serves the same adapters, a little otherwise
    weight_format: str = msgspec.field(default="float32", name="layout")  # as engine and API call it


def encode_base(base: Base) -> bytes:
    return msgspec.json.encode(base)


def decode_base(data: bytes) -> Base:
    return msgspec.json.decode(data, type=Base)

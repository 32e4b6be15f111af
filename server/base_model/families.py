"""What is known of transformers' model families by name; all else is found out by running the model.

A family whose modules have other names is served too, by its own classes, but without what the tables here
name: bottleneck adapters, for example, or our fused kernels. To add one, add its names to that table (a
DecoderLayer counts once it is in `_LAYERS`). tests/families/ finds every family that transformers has, and
its sweep writes docs/bases.md; a config that does not become small by itself needs a line of OVERRIDES in
cases.py.

Which families are refused, compatibility.py says. Imports no torch: uploads are checked by these names, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

SubBlockKind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class SubBlock:
    """The attention or the MLP of a decoder layer, by the names of the layer's children."""

    name: str
    output: str  # its last linear, a child of the sub-block
    norm_before: str  # its input is the residual stream
    norm_behind: str | None = None


@dataclass(frozen=True)
class DecoderLayer:
    """How a family's decoder layer is built."""

    attention: SubBlock
    mlp: SubBlock

    @property
    def blocks(self) -> dict[SubBlockKind, SubBlock]:
        return {"attention": self.attention, "mlp": self.mlp}

    @property
    def norms(self) -> frozenset[str]:
        """The names of all norms of the layer, which tell one kind of layer from another."""
        names = (name for block in self.blocks.values() for name in (block.norm_before, block.norm_behind))
        return frozenset(name for name in names if name)


# Layers with a norm before each sub-block. In others there are no sites for bottleneck adapters: those with
# norms only behind (OLMo 2), or with one norm for both sub-blocks (Phi, Cohere).
GPT2 = DecoderLayer(SubBlock("attn", "c_proj", "ln_1"), SubBlock("mlp", "c_proj", "ln_2"))
PRE_NORM = DecoderLayer(  # Llama, Qwen, Mistral and most others
    SubBlock("self_attn", "o_proj", "input_layernorm"),
    SubBlock("mlp", "down_proj", "post_attention_layernorm"),
)
SANDWICHED = DecoderLayer(  # Gemma 2 and 3
    SubBlock("self_attn", "o_proj", "input_layernorm", "post_attention_layernorm"),
    SubBlock("mlp", "down_proj", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_LAYERS = {layer.norms: layer for layer in (GPT2, PRE_NORM, SANDWICHED)}
# AdapterHub's files name a model's type and no layer: PRE_NORM for all but these.
_SANDWICHED_TYPES = frozenset({"gemma2", "gemma3_text"})

# Linears of one module that see the same input, and are computed as one product.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# Norms inside attention that see single heads, not tokens: no method acts there.
HEAD_NORMS = ("q_norm", "k_norm")

# The children of a layer that our own kernels run (engine/cpu/, finetune/modeling/differentiable_layers.py),
# if the hidden states stay equal. Attention may have HEAD_NORMS besides.
LLAMA_LAYER = frozenset({PRE_NORM.attention.name, PRE_NORM.mlp.name, *PRE_NORM.norms})
LLAMA_ATTENTION = frozenset({*SIBLINGS[0], PRE_NORM.attention.output})
LLAMA_MLP = frozenset({*SIBLINGS[1], PRE_NORM.mlp.output, "act_fn"})

# The function that attention classes call to rotate q and k: a global of their modules. On a GPU it is
# replaced by one launch where it computes the same.
ROTARY_FUNCTION = "apply_rotary_pos_emb"


def layer_with(children: Iterable[str]) -> DecoderLayer | None:
    """The kind of decoder layer that has these children; None for one of another kind."""
    return _LAYERS.get(frozenset(name for name in children if "norm" in name or "ln_" in name))


def layer_of(model_type: str) -> DecoderLayer:
    """The kind of decoder layer that AdapterHub takes a config's `model_type` to have."""
    return SANDWICHED if model_type in _SANDWICHED_TYPES else PRE_NORM


def norm_epsilon(norm: Any) -> float | None:
    """What a norm module adds under its root: `variance_epsilon` or `eps`; None if it has neither."""
    epsilon: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon


def embedding_scale(embedding: Any) -> float:
    """The factor by which an embedding module multiplies its table: 1, but for Gemma's."""
    return float(getattr(embedding, "embed_scale", 1.0))

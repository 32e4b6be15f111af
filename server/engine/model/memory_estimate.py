"""Memory of a base, its KV cache and its adapters: arithmetic on shapes, without torch and without weights.

The engine allocates exactly these amounts (tests compare the two). The rest of the process and the
activations of a step are estimates, and named so.
"""

import math
from dataclasses import dataclass

import msgspec

from server.adapters.sites import Base, Site
from server.engine.scheduling.kv_blocks import BLOCK, blocks_for

PROCESS_BYTES = 600 << 20  # estimate: Python, torch and our kernels, before any weight; measured with SmolLM2
# Tokens of a step. They bound how long a prompt delays the rows that decode: half a second on two cores.
BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
FLOAT32 = 4
ITEM_BYTES = {"float32": FLOAT32, "bfloat16": 2, "float16": 2}


class Shapes(msgspec.Struct, frozen=True):
    """A model as its config.json describes it. Sizes in elements, for the dtype is chosen later."""

    base: Base  # its digest is empty: no weight was read
    head: str  # the site of the output layer, which LoRA's "all-linear" leaves out
    weights: int  # every parameter, shared ones once
    packed: int  # the same packed for a CPU in float32: linears padded, a tied output layer with its own copy

    @property
    def linears(self) -> list[Site]:
        """The sites that LoRA's "all-linear" acts on."""
        return [s for s in self.base.sites.values() if s.kind == "linear" and s.name != self.head]


@dataclass(frozen=True)
class Deployment:
    """The planned use of a server."""

    dtype: str
    on_cpu: bool
    seqs: int  # rows in a batch
    context: int  # tokens of a row, prompt and answer
    batch_tokens: int  # tokens of a step
    adapters: int  # published by all tenants
    slots: int  # adapters on the device at once
    rank: int  # of every adapter, a LoRA on all linears


class MemoryItem(msgspec.Struct, frozen=True):
    """One line of the estimate."""

    what: str
    bytes: int
    how: str  # it is counted, in words
    where: str  # device, host, disk, or store


def estimate_memory(shapes: Shapes, plan: Deployment) -> list[MemoryItem]:
    """Everything that takes memory, and where; on a CPU, device and host are the same memory."""
    item, one = ITEM_BYTES[plan.dtype], adapter_bytes(shapes, plan.rank, plan.dtype)
    padded = plan.on_cpu and plan.dtype == "float32"
    slots = min(plan.slots, plan.adapters)
    rest = plan.adapters - slots
    files = plan.adapters * adapter_bytes(shapes, plan.rank, "float32")
    blocks = plan.seqs * blocks_for(plan.context)
    of_adapter = f"of {one:,} bytes: LoRA, rank {plan.rank}, all linears"
    return [
        MemoryItem("weights", (shapes.packed if padded else shapes.weights) * item, plan.dtype, "device"),
        MemoryItem(
            "KV cache",
            blocks * block_bytes(shapes.base, plan.dtype),
            f"{plan.seqs} rows of {plan.context} tokens, {token_bytes(shapes.base, plan.dtype):,} bytes each",
            "device",
        ),
        MemoryItem("adapters in slots", slots * one, f"{slots} {of_adapter}", "device"),
        MemoryItem("a step, about", _step_bytes(shapes, plan, item), f"{plan.batch_tokens} tokens", "device"),
        MemoryItem("adapters in RAM", rest * one, f"the other {rest}; fewer means loads from disk", "host"),
        MemoryItem("the engine itself, about", PROCESS_BYTES, "Python and torch", "host"),
        MemoryItem("adapters on disk", files, f"all {plan.adapters} as uploaded, float32", "disk"),
        MemoryItem("adapters in the store", files, "the same; it keeps every version", "store"),
    ]


def token_bytes(base: Base, dtype: str) -> int:
    """Bytes of one token's keys and values, all layers."""
    return 2 * base.layers * base.kv_heads * base.head_dim * ITEM_BYTES[dtype]


def block_bytes(base: Base, dtype: str) -> int:
    """Bytes of one KV block, all layers."""
    return BLOCK * token_bytes(base, dtype)


def adapter_bytes(shapes: Shapes, rank: int, dtype: str) -> int:
    """Bytes of a LoRA of this rank on every linear, in a slot or in RAM."""
    return rank * sum(site.inputs + site.outputs for site in shapes.linears) * ITEM_BYTES[dtype]


def _step_bytes(shapes: Shapes, plan: Deployment, item: int) -> int:
    """Estimate: the outputs of one layer's linears for all tokens, and the logits of model and of sampler."""
    layer = sum(site.outputs for site in shapes.linears) / shapes.base.layers
    return math.ceil(plan.batch_tokens * layer) * item + 2 * plan.seqs * shapes.base.vocab_size * FLOAT32

"""The frozen base with one trainable adapter, through the same sites and banks that serve adapters.

Each step packs the parameters as the loader packs a file, puts them into slot 1 of a bank and runs the base.
So scalings, DoRA's norms and patterns of all methods are the code that serves; there is no second
implementation. Sequences are packed without padding; attention.py keeps them apart.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from server.adapters.formats.config_fields import FILE
from server.adapters.methods.affine_bank import AffineBank
from server.adapters.methods.bottleneck_bank import BottleneckBank
from server.adapters.methods.interface import Bank
from server.adapters.methods.token_spans import Span, TokenSpans
from server.adapters.specs.virtual_tokens import TENSOR
from server.engine.model.base_model import FrozenModel, Placement
from server.finetune.modeling.attention import TrainingStep, attend_within
from server.finetune.modeling.batch_loss import NO_TARGET, Batch, BatchOutput, head_loss
from server.finetune.modeling.differentiable_layers import install_training_layers
from server.finetune.modeling.new_adapter import new_adapter
from server.finetune.modeling.onednn_linear import pack_weights
from server.finetune.modeling.split_model import SplitCausalLM
from server.finetune.modeling.trainable_affine_bank import SLOT, TrainableAffineBank
from server.finetune.recipe import MAX_SEED, Recipe
from server.finetune.recipe_methods import LoraRecipe


class AdapterModel(nn.Module):
    """`params` holds the adapter's tensors.

    The base is no submodule, so torch never saves, moves or trains it.
    """

    def __init__(
        self,
        folder: Path,
        base_id: str,
        recipe: Recipe,
        *,
        init_text: Sequence[int] = (),
        device: torch.device | None = None,
        memory: int = 3 << 30,
    ) -> None:
        """`init_text`: the tokens that initialise virtual tokens; random ones if it is empty.

        If the backward pass of a batch would need more than `memory` bytes, layers are recomputed in it.
        Raises InvalidAdapter if the recipe does not fit this base.
        """
        super().__init__()
        self.device = device or torch.device("cpu")
        self.memory = memory
        self.step = TrainingStep()
        placement = Placement(self.device, torch.float32)
        self.frozen = FrozenModel(folder, base_id, placement, self.step, attend_within, packed=False)
        pack_weights(self.frozen.model)
        self.causal_lm = SplitCausalLM(
            self.frozen.model, install_training_layers(self.frozen.model, self.step)
        )
        self.base = self.frozen.base
        self.adapter = new_adapter(recipe.peft, self.base)
        self.dropout = recipe.peft.lora_dropout if isinstance(recipe.peft, LoraRecipe) else 0.0
        self.bank = self._bank()
        rng = torch.Generator().manual_seed(recipe.seed)
        tensors = self.adapter.method.init(self.adapter.spec, self.base, self.frozen.weights, rng)
        if count := self.adapter.num_virtual_tokens:
            tensors = {TENSOR: self._virtual_tokens(_repeat(init_text, count, self.base.vocab_size, rng))}
        self.names = list(tensors)
        parameters = {_key(name): nn.Parameter(tensor.to(self.device)) for name, tensor in tensors.items()}
        self.params = nn.ParameterDict(parameters)

    def forward(self, batch: Batch, *, adapted: bool = True) -> BatchOutput:
        """Run the adapted model, or with `adapted=False` the base alone, over a batch of T tokens.

        Call backward before the next forward, which replaces what the banks hold.
        """
        virtual = self.adapter.num_virtual_tokens if adapted else 0
        # virtual tokens that run through the base; in prefix tuning only their K and V exist
        first = 0 if self.adapter.method.name == "prefix" else virtual
        self._begin(([first] if first else []) + batch.lengths, adapted=adapted)
        sequence_positions = [torch.arange(virtual, virtual + n) for n in batch.lengths]
        ids = torch.cat([-1 - torch.arange(first), batch.ids])  # negative ids: virtual tokens
        positions = torch.cat([torch.arange(first), *sequence_positions])
        targets = torch.cat([torch.full((first,), NO_TARGET), batch.targets])
        self.step.starts_with_virtual_tokens = first > 0
        self.step.selected = [
            (part != NO_TARGET).nonzero()[:, 0] for part in torch.split(targets, self.step.lengths)
        ]
        selected = (targets != NO_TARGET).nonzero()[:, 0]
        hidden = self.causal_lm.hidden(*(x.to(self.device) for x in (ids, positions, selected)))
        in_batch = selected - first
        sequences = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))[in_batch]
        targets, weights = batch.targets[in_batch].to(self.device), batch.weights[in_batch].to(self.device)
        loss, losses, hits = head_loss(hidden, targets, weights, self.causal_lm.logits)
        return BatchOutput(loss, float(batch.weights[in_batch].sum()), losses, hits, sequences)

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their public names: copies, on the CPU."""
        return {name: self.params[_key(name)].detach().cpu().clone() for name in self.names}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy tensors that `state` returned into the parameters."""
        assert tensors.keys() == set(self.names), "tensors of another adapter"
        for name, tensor in tensors.items():
            self.params[_key(name)].copy_(tensor)

    def save(self, folder: Path) -> None:
        """Write the config and the weights to `folder`, in the files of an upload."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self.adapter.config), indent=2))
        tensors = {name: tensor.contiguous() for name, tensor in self.state().items()}
        save_file(tensors, folder / self.adapter.weights_file, {"format": "pt"})

    def _begin(self, lengths: list[int], *, adapted: bool) -> None:
        """Prepare the step for sequences of these lengths: pack the current parameters into the bank."""
        step, method = self.step, self.adapter.method
        self.causal_lm.recompute = sum(lengths) * self._token_bytes() > self.memory
        step.lengths, step.affine, step.sublayer = lengths, [], []
        step.set_virtual_kv(None)
        self.bank.clear(SLOT)
        if not adapted:
            return
        tensors = {name: self.params[_key(name)] for name in self.names}
        packed = method.pack(self.adapter.spec, self.base, tensors, self.frozen.weights, torch.float32)
        self.bank.put(SLOT, packed)
        if isinstance(self.bank, TrainableAffineBank):
            self.bank.dropout = self.dropout if self.training else 0.0
            self.bank.seed = int(torch.randint(MAX_SEED, ())) if self.bank.dropout else 0
        rows = TokenSpans([Span(SLOT, 0, sum(lengths))])
        step.affine = [(self.bank, rows)] if self.bank.acts("affine", [SLOT]) else []
        step.sublayer = [(self.bank, rows)] if self.bank.acts("sublayer", [SLOT]) else []
        step.set_virtual_kv(self.bank.start(SLOT))

    def _token_bytes(self) -> int:
        """An estimate of the memory that backward needs for each token, without recomputation."""
        widest = max(site.inputs for site in self.base.sites.values() if site.kind == "linear")
        return 4 * self.base.layers * (8 * self.base.hidden_size + 5 * widest)

    def _bank(self) -> Bank:
        size = (self.base, SLOT, self.device, torch.float32)
        if self.adapter.method.bank is AffineBank:
            return TrainableAffineBank(*size)
        bank = self.adapter.method.bank(*size)
        if isinstance(bank, BottleneckBank):
            bank.use_kernels = False  # the kernels have no backward
        return bank

    @torch.no_grad()
    def _virtual_tokens(self, text: list[int]) -> torch.Tensor:
        """Virtual tokens made of a text of n tokens, in PEFT's layout.

        Prompt tuning: its embeddings [n, hidden]; prefix tuning: its K and V in the base, [n, layers * (K, V)
        * kv_heads * head_dim].
        """
        ids = torch.tensor(text, device=self.device)
        self.step.lengths = [len(text)]
        if self.adapter.method.name == "prompt":
            embeddings: torch.Tensor = self.frozen.model.get_input_embeddings()(ids)
            return embeddings
        self.step.recorded_kv = []
        self.causal_lm.hidden(ids, torch.arange(len(text), device=self.device))
        both = torch.stack([torch.stack(layer) for layer in self.step.recorded_kv])
        self.step.recorded_kv = None
        return both.permute(3, 0, 1, 2, 4).flatten(1)


def _repeat(text: Sequence[int], count: int, vocabulary: int, rng: torch.Generator) -> list[int]:
    """The text's first `count` tokens; a shorter text is repeated, for an empty one tokens are random."""
    if not text:
        return torch.randint(vocabulary, (count,), generator=rng).tolist()
    return list(islice(cycle(text), count))


def _key(name: str) -> str:
    """The tensor's name in a ParameterDict, which allows no dots."""
    return name.replace(".", "/")

"""The frozen base with one adapter that trains, through the very sites and banks that serve it.

Each step packs the parameters as the loader would pack a file, puts them into a bank's slot 1 and runs the
base over them: scalings, DoRA's norms, patterns of any method are the ones that serve, and cost no second
implementation. Sequences are packed without padding; attention keeps them apart (attention.py).
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
from server.finetune.modeling.batch_loss import NONE, Batch, Output, head_loss
from server.finetune.modeling.differentiable_layers import install_training_layers
from server.finetune.modeling.new_adapter import new_adapter
from server.finetune.modeling.onednn_linear import pack_weights
from server.finetune.modeling.split_model import SplitCausalLM
from server.finetune.modeling.trainable_affine_bank import SLOT, TrainableAffineBank
from server.finetune.recipe import MAX_SEED, Recipe
from server.finetune.recipe_methods import LoraRecipe


class AdapterModel(nn.Module):
    """`params` are the adapter's tensors. The base is no submodule: nothing saves, moves or trains it."""

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
        """`init_text`: tokens whose K and V, or embeddings, virtual tokens start as; without, random ones.

        A batch that would need more than `memory` bytes for its backward pass computes each layer twice.
        Raises InvalidAdapter if this base cannot have what the recipe asks for.
        """
        super().__init__()
        self.device = device or torch.device("cpu")
        self.memory = memory
        self.step = TrainingStep()
        placement = Placement(self.device, torch.float32)
        self.frozen = FrozenModel(folder, base_id, placement, self.step, attend_within, packed=False)
        pack_weights(self.frozen.model)
        self.halves = SplitCausalLM(self.frozen.model, install_training_layers(self.frozen.model, self.step))
        self.base = self.frozen.base
        self.blank = new_adapter(recipe.peft, self.base)
        self.dropout = recipe.peft.lora_dropout if isinstance(recipe.peft, LoraRecipe) else 0.0
        self.bank = self._bank()
        rng = torch.Generator().manual_seed(recipe.seed)
        tensors = self.blank.method.init(self.blank.spec, self.base, self.frozen.weights, rng)
        if count := self.blank.virtual:
            tensors = {TENSOR: self._start_of(_tokens(init_text, count, self.base.vocab_size, rng))}
        self.names = list(tensors)
        moved = {_key(name): nn.Parameter(tensor.to(self.device)) for name, tensor in tensors.items()}
        self.params = nn.ParameterDict(moved)

    def forward(self, batch: Batch, *, adapted: bool = True) -> Output:
        """What the adapted model, or the base alone, makes of these sequences.

        Go backward before the next forward: what the banks hold until then belongs to this one.
        """
        virtual = self.blank.virtual if adapted else 0
        first = 0 if self.blank.method.name == "prefix" else virtual  # tokens that the model computes, too
        self._begin(([first] if first else []) + batch.lengths, adapted=adapted)
        own = [torch.arange(virtual, virtual + n) for n in batch.lengths]
        ids = torch.cat([-1 - torch.arange(first), batch.ids])
        positions = torch.cat([torch.arange(first), *own])
        targets = torch.cat([torch.full((first,), NONE), batch.targets])
        self.step.leads = first > 0
        self.step.kept = [(part != NONE).nonzero()[:, 0] for part in torch.split(targets, self.step.lengths)]
        places = (targets != NONE).nonzero()[:, 0]
        hidden = self.halves.hidden(*(x.to(self.device) for x in (ids, positions, places)))
        kept = places - first
        sequences = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))[kept]
        targets, weights = batch.targets[kept].to(self.device), batch.weights[kept].to(self.device)
        loss, losses, hits = head_loss(hidden, targets, weights, self.halves.logits)
        return Output(loss, float(batch.weights[kept].sum()), losses, hits, sequences)

    def state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their public names: copies, on the CPU."""
        return {name: self.params[_key(name)].detach().cpu().clone() for name in self.names}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        assert tensors.keys() == set(self.names), "tensors of another adapter"
        for name, tensor in tensors.items():
            self.params[_key(name)].copy_(tensor)

    def save(self, folder: Path) -> None:
        """The config and the weights, as an upload would bring them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self.blank.config), indent=2))
        tensors = {name: tensor.contiguous() for name, tensor in self.state().items()}
        save_file(tensors, folder / self.blank.weights_file, {"format": "pt"})

    def _begin(self, lengths: list[int], *, adapted: bool) -> None:
        """Set the step for a batch: the parameters as they are now, packed into the bank with gradients."""
        step, method = self.step, self.blank.method
        self.halves.recompute = sum(lengths) * self._token_bytes() > self.memory
        step.lengths, step.affine, step.sublayer = lengths, [], []
        step.begin_with(None)
        self.bank.clear(SLOT)
        if not adapted:
            return
        tensors = {name: self.params[_key(name)] for name in self.names}
        packed = method.pack(self.blank.spec, self.base, tensors, self.frozen.weights, torch.float32)
        self.bank.put(SLOT, packed)
        if isinstance(self.bank, TrainableAffineBank):
            self.bank.dropout = self.dropout if self.training else 0.0
            self.bank.seed = int(torch.randint(MAX_SEED, ())) if self.bank.dropout else 0
        rows = TokenSpans([Span(SLOT, 0, sum(lengths))])
        step.affine = [(self.bank, rows)] if self.bank.acts("affine", [SLOT]) else []
        step.sublayer = [(self.bank, rows)] if self.bank.acts("sublayer", [SLOT]) else []
        step.begin_with(self.bank.start(SLOT))

    def _token_bytes(self) -> int:
        """About what backward needs of each token, if nothing is computed twice."""
        widest = max(site.inputs for site in self.base.sites.values() if site.kind == "linear")
        return 4 * self.base.layers * (8 * self.base.hidden_size + 5 * widest)

    def _bank(self) -> Bank:
        size = (self.base, SLOT, self.device, torch.float32)
        if self.blank.method.bank is AffineBank:
            return TrainableAffineBank(*size)
        bank = self.blank.method.bank(*size)
        if isinstance(bank, BottleneckBank):
            bank.use_kernels = False  # kernels know no gradients
        return bank

    @torch.no_grad()
    def _start_of(self, text: list[int]) -> torch.Tensor:
        """What virtual tokens start as: all that the base makes of this text, in PEFT's layout."""
        ids = torch.tensor(text, device=self.device)
        self.step.lengths = [len(text)]
        if self.blank.method.name == "prompt":
            embeddings: torch.Tensor = self.frozen.model.get_input_embeddings()(ids)
            return embeddings
        self.step.seen = []
        self.halves.hidden(ids, torch.arange(len(text), device=self.device))
        both = torch.stack([torch.stack(layer) for layer in self.step.seen])
        self.step.seen = None
        return both.permute(3, 0, 1, 2, 4).flatten(1)  # [tokens, layers * (K, V) * kv_heads * head_dim]


def _tokens(text: Sequence[int], count: int, vocabulary: int, rng: torch.Generator) -> list[int]:
    """`count` tokens: the text's first, the text over and over if it is short, random ones if it is empty."""
    if not text:
        return torch.randint(vocabulary, (count,), generator=rng).tolist()
    return list(islice(cycle(text), count))


def _key(name: str) -> str:
    """A ParameterDict takes no dots."""
    return name.replace(".", "/")

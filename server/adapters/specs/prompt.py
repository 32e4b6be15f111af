"""Uploads of prompt tuning and P-tuning: one tensor with the embeddings of virtual tokens."""

import msgspec

from server.adapters.formats.peft import typed_config
from server.adapters.formats.peft_configs import PromptConfig
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.tensor_names import check_shapes
from server.adapters.specs.virtual_tokens import TENSOR, check_field, check_tokens


class PromptSpec(msgspec.Struct, frozen=True):
    tokens: int
    rank: int = 0
    base_copies: dict[str, str] = {}


class PromptReader:
    name = "prompt"

    def parse(self, files: AdapterFiles, base: Base) -> PromptSpec:
        config = typed_config(files.config, PromptConfig)
        spec = PromptSpec(config.num_virtual_tokens)
        check_tokens(files, base, spec.tokens)
        check_field("token_dim", config.token_dim, base.hidden_size)
        check_shapes(self.shapes(spec, base), files.tensors)
        return spec

    def shapes(self, spec: PromptSpec, base: Base) -> dict[str, tuple[int, ...]]:
        return {TENSOR: (spec.tokens, base.hidden_size)}

"""PEFT's configs of virtual tokens: prefix tuning, prompt tuning, P-tuning.

How an encoder made the tokens (`prefix_projection`, `encoder_*`) does not matter: PEFT saves what it gave.
"""

from typing import Annotated, Literal

import msgspec

from server.adapters.formats.config_fields import NO_SAVED_MODULES, Fields, OneOf

MAX_VIRTUAL = 1024

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Virtual = Annotated[int, msgspec.Meta(ge=1, le=MAX_VIRTUAL)]


class PrefixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept of a prefix tuning config; heads and token_dim are those of keys and values."""

    peft_type: Literal["PREFIX_TUNING"]
    num_virtual_tokens: Virtual
    token_dim: Count | None = None
    num_layers: Count | None = None
    num_attention_heads: Count | None = None


class PromptConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is kept of a prompt tuning or P-tuning config."""

    peft_type: Literal["PROMPT_TUNING", "P_TUNING"]
    num_virtual_tokens: Virtual
    token_dim: Count | None = None


ONE_SUBMODULE = {
    "num_transformer_submodules": OneOf((1, None), "more are of an encoder-decoder, which is not served")
}

PREFIX_TUNING = Fields(
    PrefixConfig,
    dropped=frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"}),
    empty=NO_SAVED_MODULES,
    one_of=ONE_SUBMODULE,
)
PROMPT_TUNING = Fields(
    PromptConfig,
    dropped=frozenset(
        {
            "num_attention_heads",
            "num_layers",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        }
    ),
    empty=NO_SAVED_MODULES,
    one_of=ONE_SUBMODULE,
)
P_TUNING = Fields(
    PromptConfig,
    dropped=frozenset(
        {
            "encoder_dropout",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_reparameterization_type",
            "num_attention_heads",
            "num_layers",
        }
    ),
    empty=NO_SAVED_MODULES,
    one_of=ONE_SUBMODULE,
)

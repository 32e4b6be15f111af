"""Function-calling adapters: what is learnt are the calls, after exactly what serving would send."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.api.generation.chat_bodies import Message
from server.api.generation.prompts import chat_prompt
from server.api.services import Services
from server.base_model.tokenizer import Tokenizer
from server.base_model.tool_formats import TOOL_FORMATS
from server.finetune.data.examples import Example, example_of
from server.finetune.data.jsonl import LineError
from server.finetune.data.record_kinds import read_record
from server.tenancy.tenants import OPERATOR
from tests.fixtures.models import CHAT_TEMPLATE
from tests.server.base_model.test_chat_tools import tokenizer_of
from tests.server.base_model.tool_templates import TEMPLATES

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {
    "id": "callid123",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rom"}'},
}
ASKED = {"role": "user", "content": "Rome?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "callid123", "content": "sunny"}
SAID = {"role": "assistant", "content": "It is sunny."}
ENDS = {"hermes": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "mistral-args": "</s>"}


def learnt(tokenizer: Tokenizer, example: Example) -> str:
    pairs = zip(example.tokens, example.weights, strict=True)
    return b"".join(tokenizer.token_text(token)[1] for token, weight in pairs if weight).decode()


def served(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    """What the API sends to the engine for these messages and functions."""
    engine = SimpleNamespace(base=object())
    parts = cast("Services", SimpleNamespace(tokenizer=tokenizer, engine=engine, max_context=8192))
    return asyncio.run(chat_prompt(parts, OPERATOR, [Message.model_validate(m) for m in messages], TOOLS))


def example(tokenizer: Tokenizer, *messages: dict[str, Any]) -> Example:
    line = {"messages": list(messages), "tools": TOOLS}
    return example_of(read_record("messages", line, 8), tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_is_learnt_as_the_base_writes_it(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    made = example(tokenizer, ASKED, CALLED)
    written = TOOL_FORMATS[name].write([("weather", '{"city": "Rom"}')])
    assert learnt(tokenizer, made) == written + ENDS[name]
    assert made.tokens[: made.prompt_length] == served(tokenizer, [ASKED])


def test_calls_and_the_answer_after_their_result_are_learnt() -> None:
    tokenizer = tokenizer_of(TEMPLATES["hermes"])
    made = example(tokenizer, ASKED, CALLED | {"content": "I look."}, RESULT, SAID)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
    assert learnt(tokenizer, made) == f"I look.\n{call}<|im_end|>It is sunny.<|im_end|>"
    assert made.tokens[: made.prompt_length] == served(
        tokenizer, [ASKED, CALLED | {"content": "I look."}, RESULT]
    )


def test_a_base_without_tools_learns_the_described_format() -> None:
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    made = example(tokenizer, ASKED, CALLED, RESULT, SAID)
    assert '"name": "weather"' in learnt(tokenizer, made)
    assert learnt(tokenizer, made).endswith("</tool_call><|im_end|>It is sunny.<|im_end|>")
    assert made.tokens[: made.prompt_length] == served(tokenizer, [ASKED, CALLED, RESULT])


def test_a_call_of_weight_0_is_context() -> None:
    tokenizer = tokenizer_of(TEMPLATES["hermes"])
    made = example(tokenizer, ASKED, CALLED | {"weight": 0}, RESULT, SAID)
    assert learnt(tokenizer, made) == "It is sunny.<|im_end|>"


def test_a_template_that_drops_calls_is_refused() -> None:
    silent = TEMPLATES["hermes"].replace("m.tool_calls or []", "[]")
    with pytest.raises(LineError, match="does not render messages"):
        example(tokenizer_of(silent), ASKED, CALLED)

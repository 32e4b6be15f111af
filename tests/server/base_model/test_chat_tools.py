"""Functions, calls and results in a chat: by the base's own template, or described where it knows none."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.base_model.tokenizer import Tokenizer
from server.base_model.tool_formats import TOOL_FORMATS
from server.errors import InvalidRequest, StartupError
from tests.fixtures.models import CHAT_TEMPLATE
from tests.server.base_model.tool_templates import HERMES, PLAIN, SPECIAL, TEMPLATES, TEXT_ARGUMENTS

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
ID = "callid123"
ASKED = {"role": "user", "content": "Paris?"}
CALLED = {"id": ID, "name": "weather", "arguments": '{"city": "Paris"}'}
HISTORY: list[dict[str, Any]] = [
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "content": "sunny", "tool_call_id": ID, "name": "weather"},
]


@cache
def tokenizer_of(template: str, tool_format: str = "auto") -> Tokenizer:
    """Bytes, and the markers of all formats."""
    backend = Backend(models.BPE({token: i for i, token in enumerate(bytes_to_unicode().values())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)
    return Tokenizer(hf, template, tool_format)


def openai_call(call: dict[str, str], arguments: Any) -> dict[str, Any]:
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": arguments}}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_knows_tools_renders_them_itself(name: str) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    assert (tokenizer.tools.format.name, tokenizer.tools.native) == (name, True)
    plain = [dict(message) for message in HISTORY]
    plain[1]["tool_calls"] = [openai_call(CALLED, {"city": "Paris"})]
    expected = tokenizer._hf.apply_chat_template(
        plain, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    rendered = tokenizer.render_chat(HISTORY, TOOLS)
    assert rendered == expected
    assert tokenizer.encode_chat(rendered) == tokenizer.encode(expected, special=False)
    written = TOOL_FORMATS[name].write([("weather", '{"city": "Paris"}')])
    assert written in rendered


def test_a_template_that_takes_arguments_as_text_gets_text() -> None:
    assert '"arguments": {"city": "Paris"}}' in tokenizer_of(TEXT_ARGUMENTS).render_chat(HISTORY, TOOLS)


def test_a_template_without_tools_gets_them_described() -> None:
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    assert (tokenizer.tools.format.name, tokenizer.tools.native) == ("hermes", False)
    rendered = tokenizer.render_chat(
        [{"role": "system", "content": "Be brief."}, *HISTORY, HISTORY[2]], TOOLS
    )
    system, user, assistant, results, _ = rendered.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\nYou may call functions")
    assert json.dumps(TOOLS[0]["function"]) in system
    assert user == "user\nParis?<|im_end|>\n"
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert assistant == f"assistant\n{call}<|im_end|>\n"
    one = "<tool_response>\nsunny\n</tool_response>"
    assert results == f"user\n{one}\n{one}<|im_end|>\n"


def test_a_template_without_system_messages_describes_them_in_the_first() -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    )
    rendered = tokenizer_of(refusing).render_chat([ASKED], TOOLS)
    assert rendered.startswith("<|im_start|>user\nYou may call functions")
    assert "\n\nParis?<|im_end|>" in rendered


def test_a_template_of_an_unknown_format_gets_them_described() -> None:
    unknown = HERMES.replace("<tool_call>", "<tool_call><function=")
    assert not tokenizer_of(unknown).tools.native


def test_the_operator_may_name_the_format() -> None:
    assert tokenizer_of(CHAT_TEMPLATE, "json").tools.format.name == "json"
    with pytest.raises(StartupError, match="tool_format must be auto or one of hermes"):
        tokenizer_of(CHAT_TEMPLATE, "yaml")


def test_ids_have_the_length_that_a_template_wants() -> None:
    history = [dict(message) for message in HISTORY]
    long = "call_" + "x" * 24
    history[1]["tool_calls"] = [CALLED | {"id": long}]
    history[2]["tool_call_id"] = long
    rendered = tokenizer_of(TEMPLATES["mistral"]).render_chat(history, TOOLS)
    (id_,) = {part.split('"')[0] for part in rendered.split('"call_id": "')[1:]}
    assert len(id_) == 9


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fails_is_a_refusal(name: str) -> None:
    several = [*HISTORY[:1], HISTORY[1] | {"tool_calls": [CALLED, CALLED]}]
    tokenizer = tokenizer_of(TEMPLATES[name])
    if name == "llama3":
        with pytest.raises(InvalidRequest, match="only single tool-calls at once"):
            tokenizer.render_chat(several, TOOLS)
    with pytest.raises(InvalidRequest, match="template refuses these messages"):
        tokenizer_of(TEMPLATES[name] + "{{ messages[0].content + 1 }}").render_chat([ASKED])


def test_arguments_that_are_no_object_or_too_deep_are_text() -> None:
    for arguments in ("[1]", '{"a', '{"a":' * 400 + "1" + "}" * 400):
        history = [ASKED, HISTORY[1] | {"tool_calls": [CALLED | {"arguments": arguments}]}, HISTORY[2]]
        assert json.dumps(arguments) in tokenizer_of(HERMES).render_chat(history, TOOLS)


texts = st.text(st.sampled_from('a"\\\n{}<|>_[]é🙂'), max_size=6)
hostile = st.lists(st.one_of(st.sampled_from([*SPECIAL, *PLAIN]), texts), max_size=4).map("".join)
values = st.recursive(
    st.one_of(hostile, st.integers(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(hostile, inner, max_size=2)),
    max_leaves=5,
)


@given(st.sampled_from([*TEMPLATES.values(), CHAT_TEMPLATE]), values, values, hostile, hostile)
def test_only_the_template_writes_control_tokens(
    template: str, schema: Any, argument: Any, result: str, description: str
) -> None:
    """Functions, arguments and results are text of callers, whatever they spell."""
    tokenizer = tokenizer_of(template)

    def ids(schema: Any, argument: Any, result: str, description: str) -> list[int]:
        function = {"name": "f", "description": description, "parameters": {"x": schema}}
        call = CALLED | {"arguments": json.dumps({"x": argument})}
        history = [ASKED, HISTORY[1] | {"tool_calls": [call]}, HISTORY[2] | {"content": result}]
        tools = [{"type": "function", "function": function}]
        return tokenizer.encode_chat(tokenizer.render_chat(history, tools))

    def control(found: list[int]) -> list[str]:
        literals = tokenizer._hf.convert_ids_to_tokens(found)
        return [token for token in literals if token in SPECIAL or (token in PLAIN and token in template)]

    found = ids(schema, argument, result, description)
    assert control(found) == control(ids("", "", "", ""))

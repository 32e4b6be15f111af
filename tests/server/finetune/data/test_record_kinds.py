"""Every field of a line: what is taken, what is refused, and that the refusal names it."""

from typing import Any

import pytest

from server.finetune.data.jsonl import LineError
from server.finetune.data.record_kinds import Chat, Pair, Text, read_record, record_kind

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def read(line: dict[str, Any], max_messages: int = 8) -> Chat | Pair | Text:
    return read_record(record_kind(line), line, max_messages)


def chat(*messages: Any) -> Chat:
    record = read({"messages": list(messages)})
    assert isinstance(record, Chat)
    return record


def test_texts_are_taken_as_they_are() -> None:
    assert read({"text": " a\n"}) == Text(" a\n")
    assert read({"prompt": "", "completion": " b", "messages": None}) == Pair("", " b")


def test_assistant_turns_are_learnt_but_those_of_weight_0() -> None:
    record = chat(USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}, USER, ASSISTANT)
    assert record.targets == [3, 5]
    assert record.messages[3] == ASSISTANT
    assert chat(ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": None}).targets == [2]
    assert chat(USER, ASSISTANT, ASSISTANT).targets == [1, 2]


def test_contents_may_be_openais_text_parts_and_roles_what_serving_takes() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = chat({"role": "developer", "content": parts, "name": "me"}, USER | {"refusal": None}, ASSISTANT)
    assert record.messages[0] == {"role": "system", "content": "ab"}
    assert chat({"role": "system", "content": ""}, {"role": "tool", "content": "4"}, ASSISTANT).targets == [2]


def test_of_message_lists_only_the_completion_is_learnt() -> None:
    record = read({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert record == Chat(
        [USER, ASSISTANT, USER, ASSISTANT], ["prompt[0]", "prompt[1]", "prompt[2]", "completion[0]"], [3]
    )


def test_calls_and_results_are_what_serving_takes() -> None:
    called = {"id": "call_1", "name": "f", "arguments": "{}"}
    line: dict[str, Any] = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT, ASSISTANT],
        "tools": [TOOL],
        "parallel_tool_calls": False,
    }
    record = read(line)
    assert isinstance(record, Chat)
    assert record.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        RESULT | {"name": "f"},
        ASSISTANT,
    ]
    assert (record.targets, record.tools) == ([1, 3], [TOOL])
    split = read({"prompt": line["messages"][:2], "completion": line["messages"][2:], "tools": [TOOL]})
    assert isinstance(split, Chat)
    assert (split.messages, split.targets, split.tools) == (record.messages, [3], [TOOL])
    deprecated = {
        "messages": [
            USER,
            {"role": "assistant", "function_call": CALL["function"]},
            {"role": "function", "name": "f", "content": "4"},
            ASSISTANT,
        ],
        "functions": [TOOL["function"]],
    }
    old = read(deprecated)
    assert isinstance(old, Chat)
    assert old.tools == [TOOL]
    assert [message["role"] for message in old.messages] == ["user", "assistant", "tool", "assistant"]
    assert read(turns(tool_calls=[])) == chat(USER, ASSISTANT)


def turns(**changes: Any) -> dict[str, Any]:
    """A conversation whose answer is changed."""
    return {"messages": [USER, ASSISTANT | changes]}


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ({}, "", "neither messages nor"),
        ({"text": None, "question": "?"}, "", "neither messages nor"),
        ({"text": "a", "messages": []}, "", "fields of messages and of text"),
        ({"text": "a", "completion": "b"}, "", "fields of prompt_completion and of text"),
        ({"text": "a", "id": 1}, "", "'id' is not a field here; known are text."),
        ({"text": "a", "tools": []}, "tools", "functions go with messages"),
        ({"text": 1}, "text", "text must be text, not 1."),
        ({"text": {"a": "b"}}, "text", "not an object"),
        ({"text": " \n\u2003"}, "text", "text is blank"),
        ({"prompt": "a"}, "completion", "completion is required."),
        ({"completion": "a"}, "prompt", "prompt is required."),
        ({"prompt": "a", "completion": ""}, "completion", "completion is blank"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "prompt", "both be text"),
        ({"prompt": 1, "completion": 2}, "prompt", "not 1 and 2"),
        ({"prompt": [USER], "completion": []}, "completion", "completion has no messages"),
        ({"prompt": [], "completion": [ASSISTANT]}, "prompt", "prompt has no messages"),
        ({"prompt": [USER], "completion": [USER]}, "completion", "completion has no assistant turn"),
        ({"prompt": [ASSISTANT | {"weight": 1}], "completion": [ASSISTANT]}, "prompt[0].weight", "only for"),
        ({"messages": {}}, "messages", "must be a list of messages, not an object"),
        ({"messages": []}, "messages", "messages has no messages"),
        ({"messages": [USER] * 9}, "messages", "at most 8 messages, not 9"),
        ({"messages": [USER]}, "messages", "no assistant turn"),
        ({"messages": [USER, ASSISTANT, USER]}, "messages", "end with an assistant turn, not one of user"),
        ({"messages": [ASSISTANT]}, "messages[0]", "nothing before it"),
        ({"messages": [USER, "hello"]}, "messages[1]", "must be an object"),
        (turns(role="robot"), "messages[1].role", "not 'robot'"),
        (turns(role=None), "messages[1].role", "not None"),
        (turns(role=["assistant"]), "messages[1].role", "not a list"),
        (turns(content=""), "messages[1].content", "blank"),
        (turns(content=None), "messages[1].content", "must be text"),
        (turns(content=7), "messages[1].content", "not 7"),
        (turns(content=["a"]), "messages[1].content[0]", '{"type": "text"'),
        (turns(content=[{"type": "image_url", "text": ""}]), "messages[1].content[0]", '{"type": "text"'),
        (turns(content=[{"text": "a"}]), "messages[1].content[0]", '{"type": "text"'),
        (turns(content=[{"type": "text", "text": "a", "x": 1}]), "messages[1].content[0]", '{"type": "text"'),
        (turns(name=1), "messages[1].name", "must be text"),
        (turns(weight=0), "messages", "weight 0 to every assistant turn"),
        (turns(weight=0.5), "messages[1].weight", "0 or 1, not 0.5"),
        (turns(weight=True), "messages[1].weight", "0 or 1, not True"),
        (turns(weight="1"), "messages[1].weight", "0 or 1, not '1'"),
        (turns(weight=[]), "messages[1].weight", "0 or 1, not a list"),
        (turns(weight=float("inf")), "messages[1].weight", "0 or 1, not inf"),
        ({"messages": [USER | {"weight": 0}, ASSISTANT]}, "messages[0].weight", "only for assistant turns"),
        (turns(refusal="no"), "messages[1].refusal", "not supported"),
        (turns(trust_remote_code=True), "messages[1]", "'trust_remote_code' is not a field here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_field(line: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(LineError) as refused:
        read(line)
    assert refused.value.field == field
    assert reason in refused.value.reason


CALLS = "messages[1].tool_calls"
BAD_NAME = CALL | {"function": {"name": "f g", "arguments": ""}}


def nested(levels: int) -> dict[str, Any]:
    return {"items": nested(levels - 1)} if levels else {}


def defined(**function: Any) -> dict[str, Any]:
    return turns() | {"tools": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (turns(tool_calls=[{}]), f"{CALLS}[0]", '{"id": ...'),
        (turns(tool_calls={}), CALLS, "a list of at most 128 calls"),
        (
            turns(tool_calls=[CALL | {"function": {"name": "f"}}]),
            f"{CALLS}[0].function",
            "name and arguments",
        ),
        (turns(tool_calls=[BAD_NAME]), f"{CALLS}[0].function.name", "letters, digits"),
        (
            turns(function_call={"name": "f", "arguments": {}}),
            "messages[1].function_call.arguments",
            "JSON as text",
        ),
        ({"messages": [USER | {"tool_calls": [CALL]}, ASSISTANT]}, "messages[0]", "only an assistant makes"),
        (
            {"messages": [USER, RESULT, ASSISTANT]},
            "messages[1].tool_call_id",
            "a call before it, not 'call_1'",
        ),
        (
            {"messages": [USER | {"tool_call_id": "call_1"}, ASSISTANT]},
            "messages[0].tool_call_id",
            "only for the results",
        ),
        (turns() | {"tools": {}}, "tools", "at most 128 functions"),
        (turns() | {"tools": [TOOL["function"]]}, "tools[0]", '{"type": "function"'),
        (defined(name="f", x=1), "tools[0].function", "'x' is not a field"),
        (defined(), "tools[0].function.name", "not None"),
        (defined(name="f", parameters=nested(200)), "tools[0].function", "deeper than 128 levels"),
        (turns() | {"functions": [TOOL["function"]], "tools": []}, "functions", "cannot go with tools"),
        (turns() | {"functions": [1]}, "functions[0]", "must be an object, not 1"),
        (turns() | {"parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
    ],
)
def test_what_is_wrong_with_functions_is_refused_by_its_field(
    line: dict[str, Any], field: str, reason: str
) -> None:
    test_what_is_wrong_is_refused_by_its_field(line, field, reason)


def test_a_callers_names_and_values_are_cut_in_messages() -> None:
    for line in ({"text": "a", "x" * 10_000: 1}, turns(role="x" * 10_000), turns(weight=10**4000)):
        with pytest.raises(LineError) as refused:
            read(line)
        assert len(refused.value.reason) < 300
        assert len(refused.value.field) < 300

"""Every field of a line: what is taken, what is refused, and that the refusal names it."""

from typing import Any

import pytest

from server.finetune.data.jsonl import LineError
from server.finetune.data.record_kinds import Chat, Pair, Text, read_record, record_kind

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


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
        ({"text": "a", "tools": []}, "tools", "calls no tools"),
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
        (turns(tool_calls=[]), "messages[1].tool_calls", "calls no tools"),
        (turns(refusal="no"), "messages[1].refusal", "not supported"),
        (turns(trust_remote_code=True), "messages[1]", "'trust_remote_code' is not a field here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_its_field(line: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(LineError) as refused:
        read(line)
    assert refused.value.field == field
    assert reason in refused.value.reason


def test_a_callers_names_and_values_are_cut_in_messages() -> None:
    for line in ({"text": "a", "x" * 10_000: 1}, turns(role="x" * 10_000), turns(weight=10**4000)):
        with pytest.raises(LineError) as refused:
            read(line)
        assert len(refused.value.reason) < 300
        assert len(refused.value.field) < 300

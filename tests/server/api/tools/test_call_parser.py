"""Calls in a text: the same events however the text is cut, and text again where there is no call."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.tools.call_parser import Arguments, CallBegins, CallParser, Event, Text
from server.base_model.tool_formats import TOOL_FORMATS, ToolFormat

NAMES = ("f", "get_weather-2")
formats = st.sampled_from([*TOOL_FORMATS.values()])
words = st.text(st.sampled_from('ab "\\{}[]<>/,;:\n_|é🙂'), max_size=8)
values = st.recursive(
    st.one_of(words, st.integers(), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(words, values, max_size=3)), min_size=1, max_size=3
)
MARKERS = [marker for format_ in TOOL_FORMATS.values() for marker in format_.markers]
PIECES = [
    *MARKERS,
    '{"name": "f", "arguments": {}}',
    '{"name": "f"',
    "f[ARGS]{",
    "}",
    "[",
    "]",
    "\n",
    " ",
    "x",
]
noise = st.lists(st.one_of(st.sampled_from(PIECES), words), max_size=8).map("".join)


def parse(
    format_: ToolFormat, parts: list[str], *, streamed: bool = False, limit: int | None = None
) -> list[Event]:
    """All events, neighbours of one kind joined."""
    parser = CallParser(format_, NAMES, streamed=streamed, max_calls=limit)
    joined: list[Event] = []
    for event in [event for part in parts for event in parser.push(part)] + parser.flush():
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            joined[-1] = Arguments(last.text + event.text)
        else:
            joined.append(event)
    return joined


def cut(text: str, at: list[int]) -> list[str]:
    bounds = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def calls_of(events: list[Event]) -> list[tuple[str, Any]]:
    begins = [i for i, event in enumerate(events) if isinstance(event, CallBegins)]
    found = []
    for i in begins:
        begun, arguments = events[i], events[i + 1]
        assert isinstance(begun, CallBegins)
        assert isinstance(arguments, Arguments)
        found.append((begun.name, json.loads(arguments.text)))
    return found


@given(formats, calls, st.booleans(), st.lists(st.integers(0), max_size=12))
def test_what_a_format_writes_is_found(
    format_: ToolFormat, made: list[tuple[str, Any]], streamed: bool, at: list[int]
) -> None:
    text = format_.write([(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in made])
    events = parse(format_, cut(text, at), streamed=streamed)
    assert calls_of(events) == made
    assert not any(isinstance(event, Text) for event in events)


@given(formats, noise, st.booleans())
def test_every_cut_gives_the_same_events(format_: ToolFormat, text: str, streamed: bool) -> None:
    whole = parse(format_, [text], streamed=streamed)
    assert parse(format_, list(text), streamed=streamed) == whole
    for at in range(len(text)):
        assert parse(format_, [text[:at], text[at:]], streamed=streamed) == whole


@given(formats, noise)
def test_text_without_a_call_comes_out_as_it_is(format_: ToolFormat, text: str) -> None:
    events = parse(format_, list(text))
    if not any(isinstance(event, CallBegins) for event in events):
        assert events == ([Text(text)] if text else [])


@given(formats, calls, st.integers(0, 3))
def test_calls_past_the_limit_are_dropped(
    format_: ToolFormat, made: list[tuple[str, Any]], limit: int
) -> None:
    text = format_.write([(name, json.dumps(arguments)) for name, arguments in made])
    assert calls_of(parse(format_, [text], limit=limit)) == made[:limit]


HERMES = TOOL_FORMATS["hermes"]
F = '{"name": "f", "arguments": {"a": 1}}'
FOUND = [CallBegins("f"), Arguments('{"a": 1}')]


@pytest.mark.parametrize(
    ("name", "text", "events"),
    [
        ("hermes", f"So:\n\n<tool_call>{F}</tool_call>\n", [Text("So:"), *FOUND]),
        ("hermes", f"<tool_call>{F}", FOUND),  # the end is missing
        ("hermes", f"<tool_call>[{F}, {F}]</tool_call>", FOUND * 2),  # Granite 3.1, SmolLM
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', FOUND),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', FOUND),
        ("hermes", f"<tool_call>{F}</tool_call> Done. ", [*FOUND, Text("Done. ")]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', FOUND),
        ("llama3", '{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', FOUND * 2),
        ("mistral", f"[TOOL_CALLS] [{F}]", FOUND),
        ("mistral-args", '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', FOUND),
        ("json", f"[{F}]", FOUND),
    ],
)
def test_what_models_write_is_understood(name: str, text: str, events: list[Event]) -> None:
    assert parse(TOOL_FORMATS[name], list(text)) == events


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1',
        "<tool_call>f(a=1)</tool_call>",
        "<tool_call></tool_call>",
        " <tool_call>{}</tool_call>",
        "<tool_call>" + '{"a":' * 5000 + "1" + "}" * 5000,
        "a <tool_",
    ],
)
def test_a_malformed_call_is_text(text: str) -> None:
    assert parse(HERMES, list(text)) == [Text(text)]


def test_arguments_of_a_streamed_call_come_as_they_arrive() -> None:
    parser = CallParser(HERMES, NAMES, streamed=True)
    events = [
        parser.push(part) for part in ('<tool_call>\n{"name": "f", "arguments": {"a"', ": 1", "}", "}\n")
    ]
    assert events == [[CallBegins("f"), Arguments('{"a"')], [Arguments(": 1")], [Arguments("}")], []]

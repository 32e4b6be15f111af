"""The grammar of an answer with calls: a format's texts around JSON schemas, in llguidance's Lark.

A call that must be made is the whole answer. Where the model may choose, the grammar takes any text until a
call begins (lazily, at the format's marker), and from there the call alone.
"""

import json
import re
from typing import Any

from server.api.structured_output.schema_keywords import without_annotations
from server.api.tools.bodies import FunctionDefinition
from server.api.tools.tool_use import ToolUse
from server.base_model.tokenizer import Tokenizer
from server.base_model.tool_formats import ToolFormat
from server.messages import GRAMMAR_HEADER, JSON_WHITESPACE

MAX_CALLS = 16  # of one answer that a grammar holds
ANY_TEXT = r"/(.|\n)*/"
TEXT_WITHOUT_CALL = r"/[ \t\r\n]*([^ \t\r\n{\[](.|\n)*)?/"  # of a format whose calls begin with "{"


def arguments_schema(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a call's arguments: always an object."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    parameters: dict[str, Any] = without_annotations(function.parameters)
    return {"type": "object"} | parameters


def calls_grammar(tokenizer: Tokenizer, use: ToolUse, answer: str | None) -> str:
    """The grammar for Sampling.grammar. `answer`: the JSON schema of an answer that makes no call."""
    format_ = tokenizer.tools.format
    added = ((marker, tokenizer.added_token(marker)) for marker in format_.markers)
    texts = _Texts({marker: token for marker, token in added if token is not None})
    more = f"({texts(format_.separator)} call){{0,{MAX_CALLS - 1}}}" if use.parallel else ""
    rules = [
        f"calls: {texts(format_.prefix)} call {more} {texts(format_.suffix)}",
        f"call: {texts(format_.before)} object {texts(format_.after)}",
        "object: " + " | ".join(f"object_{i}" for i in range(len(use.callable))),
    ]
    for i, function in enumerate(use.callable):
        schema = arguments_schema(function) if use.exact(function) else {"type": "object"}
        rules.append(f"object_{i}: {_object(format_, function, schema, texts, answer)}")
    if use.mode != "auto":
        start = ["start: calls"]
    elif answer is not None:
        start = ["start: calls | answer", f"answer: {_json(json.loads(answer))}"]
    elif format_.bare:
        begun = f" | {texts(format_.begin)} calls" if format_.begin else ""
        start = [f"start: TEXT | calls{begun}", f"TEXT: {TEXT_WITHOUT_CALL}"]
    else:
        start = _calls_in_text(format_, texts, use.parallel, more)
    return "\n".join([GRAMMAR_HEADER, *start, *rules, ""])


def _calls_in_text(format_: ToolFormat, texts: "_Texts", parallel: bool, more: str) -> list[str]:
    """Rules for any text in which calls begin with the format's marker."""
    if format_.prefix.startswith(format_.begin):  # all calls in one place
        prefix = texts(format_.prefix.removeprefix(format_.begin))
        rest, several = f"{prefix} call {more} {texts(format_.suffix)}", False
    else:
        before = texts(format_.before.removeprefix(format_.begin))
        rest, several = f"{before} object {texts(format_.after)}", parallel
    return [
        f"start: section{{0,{MAX_CALLS}}} TEXT" if several else "start: TEXT | section",
        f"TEXT: {ANY_TEXT}",
        *texts.found("begin", format_.begin),
        f"section: begin {rest}",
    ]


class _Texts:
    """Texts as Lark terminals, with the added tokens in them by their ids.

    llguidance takes some added tokens for control tokens that the tokenizer does not: such a token is taken
    by its id or by its text.
    """

    def __init__(self, added: dict[str, tuple[int, bool]]) -> None:
        self._added = added
        self._markers = re.compile("(" + "|".join(map(re.escape, added)) + ")") if added else None

    def __call__(self, text: str) -> str:
        parts = self._markers.split(text) if self._markers else [text]
        return " ".join(self._term(part) for part in parts if part)

    def found(self, rule: str, marker: str) -> list[str]:
        """Rules for any text up to the first `marker`."""
        id_, special = self._added.get(marker, (None, False))
        by_text = [f"{rule}_text[lazy]: TEXT {json.dumps(marker)}"]
        if id_ is None:
            return [f"{rule}: {rule}_text", *by_text]
        by_id = f"TEXT <[{id_}]>"
        return [f"{rule}: {by_id}"] if special else [f"{rule}: {by_id} | {rule}_text", *by_text]

    def _term(self, part: str) -> str:
        if part not in self._added:
            return json.dumps(part)
        id_, special = self._added[part]
        return f"<[{id_}]>" if special else f"(<[{id_}]> | {json.dumps(part)})"


def _object(
    format_: ToolFormat,
    function: FunctionDefinition,
    schema: dict[str, Any],
    texts: _Texts,
    answer: str | None,
) -> str:
    """A call from its head to its tail."""
    head, tail = format_.head_of(function.name), format_.tail
    if answer is None or not format_.bare:
        return f"{texts(head)} {_json(schema)} {texts(tail)}"
    # answer and call both begin with "{": only as schemas do they have the same lexemes
    fields = json.loads(f"{head}{{}}{tail}")
    arguments = next(field for field, value in fields.items() if value == {})
    properties = {field: {"const": value} for field, value in fields.items() if field != arguments}
    properties[arguments] = _moved(schema, f"#/properties/{arguments}")
    return _json(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


def _moved(schema: Any, pointer: str) -> Any:
    """A schema that stands at `pointer` of another one: its references lead there."""
    if isinstance(schema, list):
        return [_moved(item, pointer) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace("#", pointer, 1)
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, pointer)
        for key, value in schema.items()
    }


def _json(schema: dict[str, Any]) -> str:
    """A JSON value of this schema, as `response_format` has it."""
    own = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    return f"%json {json.dumps(schema | own)}"

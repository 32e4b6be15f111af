"""The grammar of an answer with calls: a format's texts around JSON schemas, in llguidance's Lark.

A call that must be made is the whole answer. Where the model may choose, the grammar takes any text until a
call begins (lazily, at the format's marker), and from there the call alone.
"""

import json
import re
from typing import Any

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
    return {"type": "object"} | function.parameters


def calls_grammar(tokenizer: Tokenizer, use: ToolUse, answer: str | None) -> str:
    """The grammar for Sampling.grammar. `answer`: the JSON schema of an answer that makes no call."""
    format_ = tokenizer.tools.format
    ids = ((marker, tokenizer.special_id(marker)) for marker in format_.markers)
    texts = _Texts({marker: id_ for marker, id_ in ids if id_ is not None})
    more = f"({texts(format_.separator)} call){{0,{MAX_CALLS - 1}}}" if use.parallel else ""
    rules = [
        f"calls: {texts(format_.prefix)} call {more} {texts(format_.suffix)}",
        f"call: {texts(format_.before)} object {texts(format_.after)}",
        "object: " + " | ".join(f"object_{i}" for i in range(len(use.callable))),
    ]
    for i, function in enumerate(use.callable):
        schema = arguments_schema(function) if use.exact(function) else {"type": "object"}
        head, tail = texts(format_.head_of(function.name)), texts(format_.tail)
        rules.append(f"object_{i}: {head} {_json(schema)} {tail}")
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
    lazy = "" if texts.is_special(format_.begin) else "[lazy]"
    return [
        f"start: section{{0,{MAX_CALLS}}} TEXT" if several else "start: TEXT | section",
        f"TEXT: {ANY_TEXT}",
        f"begin{lazy}: TEXT {texts(format_.begin)}",
        f"section: begin {rest}",
    ]


class _Texts:
    """Texts as Lark terminals; special tokens in them by their ids."""

    def __init__(self, special: dict[str, int]) -> None:
        self._special = special
        self._markers = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else None

    def __call__(self, text: str) -> str:
        parts = self._markers.split(text) if self._markers else [text]
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part)
            for part in parts
            if part
        )

    def is_special(self, text: str) -> bool:
        return text in self._special


def _json(schema: dict[str, Any]) -> str:
    """A JSON value of this schema, as `response_format` has it."""
    own = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    return f"%json {json.dumps(schema | own)}"

"""Compiles the schemas and grammars of a request once, so that the engine gets none that does not compile.

They are untrusted, and so bounded in size, and compiled under a limit of work and time. llguidance matches
patterns in linear time; those that need more, such as back-references, do not compile.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from anyio import fail_after
from anyio.to_thread import run_sync
from llguidance import LLMatcher, LLParserLimits

from server.api.http.body_model import at_most
from server.api.structured_output.schema_keywords import keywords, without_annotations
from server.errors import InvalidField, shown
from server.messages import GRAMMAR_HEADER

MAX_SCHEMA_CHARS = 65_536
COMPILE_SECONDS = 1.0  # of all texts of one `compile_all`
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
_TOO_LONG = f"took over {COMPILE_SECONDS:g} s to compile"
_UNSUPPORTED = frozenset({"x-guidance"})  # llguidance's own: would change how it reads the schema


@dataclass(frozen=True)
class Source:
    """Where in a body a schema or grammar stands: for the sentence, param and code of InvalidField."""

    name: str
    param: str
    code: str | None = None

    def refusal(self, reason: str) -> InvalidField:
        return InvalidField(f"{self.name} {reason}.", param=self.param, code=self.code)


def schema_text(schema: dict[str, Any], source: Source) -> str:
    """The schema for Sampling.grammar, not yet compiled. Raises InvalidField."""
    try:
        text = json.dumps(without_annotations(schema), allow_nan=False, ensure_ascii=True)
    except (ValueError, RecursionError):
        raise source.refusal("holds a number that is not finite, or is nested too deeply") from None
    at_most("the number of characters of the schema", len(text), MAX_SCHEMA_CHARS, source.param)
    if unsupported := _UNSUPPORTED & set(keywords(schema)):
        raise source.refusal(f"uses {min(unsupported)}, which is not supported")
    return text


async def compile_all(texts: list[tuple[str, Source]]) -> None:
    """Compile texts as in Sampling.grammar: JSON schemas, or Lark after GRAMMAR_HEADER.

    Raises InvalidField for the first that does not compile within the limits.
    """
    try:
        with fail_after(COMPILE_SECONDS):
            refusal = await run_sync(_first_refusal, texts, abandon_on_cancel=True)
    except TimeoutError:
        refusal = texts[-1][1].refusal(_TOO_LONG)
    if refusal:
        raise refusal


def _first_refusal(texts: list[tuple[str, Source]]) -> InvalidField | None:
    end = time.monotonic() + COMPILE_SECONDS  # nobody waits any longer
    for text, source in texts:
        if problem := _error(text):
            return source.refusal(f"cannot be used: {shown(problem, 200)}")
        if time.monotonic() > end:
            return source.refusal(_TOO_LONG)
    return None


def _error(text: str) -> str:
    """The first error of the schema or grammar; "" if there is none."""
    if not text.startswith(GRAMMAR_HEADER):
        try:
            text = LLMatcher.grammar_from_json_schema(text)
        except ValueError as error:
            return str(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
    return messages[0] if failed and messages else ""

"""What a chat's answer must match: calls of functions, and a structure for an answer without calls."""

from server.api.structured_output.compilation import Source, compile_all, schema_text
from server.api.tools.grammar import arguments_schema, calls_grammar
from server.api.tools.tool_use import ToolUse
from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField
from server.messages import GRAMMAR_HEADER

INVALID_PARAMETERS = "invalid_function_parameters"  # OpenAI's code


async def answer_grammar(use: ToolUse | None, structure: str | None, tokenizer: Tokenizer) -> str | None:
    """The text for Sampling.grammar; None if the answer may be anything. Raises InvalidField.

    `structure`: the same for an answer without calls. Beside functions it is a JSON schema: a grammar of
    other kinds would not tell where a call begins.
    """
    if use is None or not (use.constrained or structure):
        return structure
    if structure and structure.startswith(GRAMMAR_HEADER):
        raise InvalidField(
            f"structured_outputs cannot be a regex or choice beside {use.place}; send json.",
            param="structured_outputs",
        )
    texts = []
    for function in use.callable:
        if use.exact(function):
            path = f"{use.path(function)}.parameters"
            source = Source(path, path, INVALID_PARAMETERS)
            texts.append((schema_text(arguments_schema(function), source), source))
    grammar = calls_grammar(tokenizer, use, structure)
    await compile_all([*texts, (grammar, Source(use.place, use.place))])
    return grammar

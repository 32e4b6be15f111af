"""Records as examples: token ids, and the weight of each token as a target of training.

A prompt is tokenised exactly as the API does it, and an answer as its continuation, so training and serving
see the same tokens. An answer includes its end token, so that the model learns to stop.

Chat: the base's template renders the conversation. An answer starts where the rendering of the messages
before it, with the prompt for the assistant's turn, ends; it ends with the first special token after its text
or its calls (<|im_end|>). A template that renders a turn differently once others follow is refused.
"""

from typing import Any

import msgspec

from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidRequest
from server.finetune.data.jsonl import LineError
from server.finetune.data.record_kinds import Chat, Pair, Text

LABEL_TOKENS = 32  # the most tokens of a label, without its end token


class Example(msgspec.Struct, frozen=True):
    """One sequence of n tokens. `weights[i]` is the weight of predicting `tokens[i]`, 0 for context."""

    tokens: list[int]
    weights: list[float]  # n; the first is 0
    prompt_length: int = 0  # tokens before the last answer; 0: there is no prompt
    label: str | None = None  # the last answer's stripped text, if it is one short line


def example_of(record: Chat | Pair | Text, tokenizer: Tokenizer) -> Example:
    """The record as an example, of any length. Raises LineError."""
    if isinstance(record, Chat):
        return _chat(record, tokenizer)
    return _pair(record, tokenizer) if isinstance(record, Pair) else _text(record, tokenizer)


def truncated(example: Example, max_tokens: int, lead: list[int]) -> Example | None:
    """The example cut to its last `max_tokens`; None if no target is left.

    If it starts with `lead`, the tokenizer's initial tokens, these are kept in front.
    """
    cut = len(example.tokens) - max_tokens
    if cut <= 0:
        return example
    kept = lead if len(lead) < max_tokens and example.tokens[: len(lead)] == lead else []
    cut += len(kept)
    # the first token after the cut has no prediction
    weights = [0.0] * (len(kept) + 1) + example.weights[cut + 1 :]
    if not any(weights):
        return None
    prompt_length = max(0, example.prompt_length - cut)
    return Example(
        kept + example.tokens[cut:],
        weights,
        prompt_length + len(kept) if prompt_length else 0,
        example.label if prompt_length else None,
    )


def _pair(record: Pair, tokenizer: Tokenizer) -> Example:
    prompt = tokenizer.encode(record.prompt)
    if not prompt:
        raise LineError("prompt", "prompt has no token; what follows nothing is a text, not a completion.")
    if tokenizer.end is None:
        raise LineError("completion", "The base's tokenizer names no token that could end a completion.")
    both = record.prompt + record.completion
    answer = _ended(tokenizer.encode_part(both, len(record.prompt), len(both)), tokenizer.end)
    weights = [0.0] * len(prompt) + [1.0] * len(answer)
    return Example(prompt + answer, weights, len(prompt), _label(answer, tokenizer))


def _text(record: Text, tokenizer: Tokenizer) -> Example:
    tokens = _ended(tokenizer.encode(record.text), tokenizer.end)
    if len(tokens) < 2:
        raise LineError("text", "text has one token, and nothing before it to predict it from.")
    return Example(tokens, [0.0] + [1.0] * (len(tokens) - 1))


def _chat(record: Chat, tokenizer: Tokenizer) -> Example:
    """The tokens of the conversation up to the end of its last target."""
    rendered = _render(record, len(record.messages), tokenizer, answer=False)
    tokens: list[int] = []
    weights: list[float] = []
    answer: list[int] = []
    position = 0
    for turn in record.targets:
        start, stop = _answer(rendered, position, record, turn, tokenizer)
        try:
            context = tokenizer.encode_part(rendered, position, start, chat=True)
            answer = tokenizer.encode_part(rendered, start, stop, chat=True)
        except InvalidRequest as error:
            raise LineError(record.fields[turn], error.message) from None
        tokens += context + answer
        weights += [0.0] * len(context) + [1.0] * len(answer)
        position = stop
    return Example(tokens, weights, len(tokens) - len(answer), _label(answer, tokenizer))


def _answer(rendered: str, after: int, record: Chat, turn: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """Start and end of the assistant's `turn` in `rendered`, not before position `after`.

    Raises LineError if the template gives them no clear place.
    """
    before = _render(record, turn, tokenizer, answer=True)
    through = _render(record, turn + 1, tokenizer, answer=False)
    field = record.fields[turn]
    if not (rendered.startswith(through) and through.startswith(before) and after <= len(before)):
        raise LineError(
            field,
            f"The base's chat template does not render {field}, or what is before it, alike whether or not "
            "more follows; give weight 0 to every assistant turn but the last, or use prompt and completion.",
        )
    said = _end_of_content(through, len(before), record.messages[turn], tokenizer)
    end = None if said is None else tokenizer.up_to_special(through[said:])
    if said is None or end is None:
        raise LineError(
            field, f"The base's chat template does not render {field} as it is, with a token at its end."
        )
    return len(before), said + end


def _end_of_content(through: str, start: int, message: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    """Where an assistant's text, or the last of its calls, ends in what is rendered from `start` on."""
    calls = message.get("tool_calls", [])
    if not calls:
        text = tokenizer.quoted(message)["content"].strip()
        found = through.find(text, start)
        return None if found < 0 else found + len(text)
    if not all(call["name"] in through[start:] for call in calls):
        return None
    return through.rfind("}", start) + 1 or None  # every format ends the arguments so


def _render(record: Chat, count: int, tokenizer: Tokenizer, *, answer: bool) -> str:
    """The rendering of the first `count` messages. Raises LineError."""
    try:
        return tokenizer.render_chat(record.messages[:count], record.tools, answer=answer)
    except InvalidRequest as error:
        raise LineError(record.fields[count - 1], error.message) from None


def _label(answer: list[int], tokenizer: Tokenizer) -> str | None:
    label = tokenizer.decode(answer).strip()
    short = len(answer) <= LABEL_TOKENS + 1 and len(label.splitlines()) == 1
    return label if short else None


def _ended(tokens: list[int], end: int | None) -> list[int]:
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]

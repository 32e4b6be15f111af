"""What is learnt is what the assistant says and its end, after exactly what serving would send.

The judge of the masks is transformers' own, which needs a template with marks in it.
"""

import asyncio
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from server.api.generation.chat_bodies import Message
from server.api.generation.prompts import chat_prompt
from server.api.services import Services
from server.base_model.default_model import ensure_default_model
from server.base_model.tokenizer import Tokenizer
from server.finetune.data.examples import LABEL_TOKENS, Example, example_of, truncated
from server.finetune.data.jsonl import LineError
from server.finetune.data.record_kinds import Chat, Pair, Text
from server.tenancy.tenants import OPERATOR
from tests.fixtures.models import CACHE
from tests.server.api.generation.tokenizers import byte_fallback_tokenizer
from tests.server.finetune.data.templates import SPECIAL, TEMPLATES, marked, plain

SOUND = ["chatml", "llama3", "llama2", "gemma"]
KINDS = ["byte-level", "byte-fallback"]
ASKED = [
    ("user", "hi"),
    ("assistant", "hello there"),
    ("user", "2 + 2?"),
    ("assistant", "It is 4.\nOf course."),
]


@cache
def base(kind: str, template: str | None = None) -> Tokenizer:
    """SmolLM2's tokenizer or one in SentencePiece's way, with a family's template and special tokens."""
    if kind == "byte-level":
        hf: Any = AutoTokenizer.from_pretrained(ensure_default_model(CACHE), local_files_only=True)
    else:
        hf = byte_fallback_tokenizer()._hf
    if template:
        hf.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", *SPECIAL]})
        hf.chat_template = plain(template)
    return Tokenizer(hf, hf.chat_template)


def chat(turns: list[tuple[str, str]], targets: list[int] | None = None) -> Chat:
    messages = [{"role": role, "content": content} for role, content in turns]
    spoken = [at for at, (role, _) in enumerate(turns) if role == "assistant"]
    return Chat(messages, [f"messages[{at}]" for at in range(len(turns))], targets or spoken)


def transformers_mask(tokenizer: Tokenizer, template: str, record: Chat) -> tuple[list[int], list[float]]:
    out = tokenizer._hf.apply_chat_template(
        record.messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(out["input_ids"]), [float(on) for on in out["assistant_masks"]]


def assert_equal_up_to_the_last_answer(example: Example, ids: list[int], mask: list[float]) -> None:
    length = len(example.tokens)
    assert example.tokens == ids[:length]
    assert example.weights == mask[:length]
    assert not any(mask[length:])
    assert mask[length - 1]


def learnt(tokenizer: Tokenizer, example: Example) -> str:
    pairs = zip(example.tokens, example.weights, strict=True)
    return b"".join(tokenizer.token_text(token)[1] for token, weight in pairs if weight).decode()


def served(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """What the API sends to the engine for these messages."""
    engine = SimpleNamespace(base=object())  # it has told its context
    parts = cast("Services", SimpleNamespace(tokenizer=tokenizer, engine=engine, max_context=8192))
    return asyncio.run(
        chat_prompt(parts, OPERATOR, [Message.model_validate(message) for message in messages])
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOUND)
@pytest.mark.parametrize("turns", [ASKED[:2], ASKED, [("user", "a"), ("assistant", "b"), ("assistant", "b")]])
def test_the_mask_is_transformers_own(kind: str, family: str, turns: list[tuple[str, str]]) -> None:
    tokenizer, record = base(kind, family), chat(turns)
    with_marks = tokenizer._hf.apply_chat_template(
        record.messages, chat_template=marked(family), tokenize=False
    )
    assert with_marks == tokenizer.render_chat(record.messages, answer=False)
    example = example_of(record, tokenizer)
    assert_equal_up_to_the_last_answer(example, *transformers_mask(tokenizer, marked(family), record))


def test_the_default_models_own_template_gives_transformers_mask() -> None:
    tokenizer, record = base("byte-level"), chat(ASKED)
    said = "message['content'] + '<|im_end|>'"
    turn = f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ {said} }}}}{{% endgeneration %}}"
    template = tokenizer._hf.chat_template
    with_marks = template.replace(
        f"\n' + {said} + '", f"\n'}}}}{turn}{{% else %}}{{{{{said}}}}}{{% endif %}}{{{{'"
    )
    assert with_marks != template
    example = example_of(record, tokenizer)
    assert_equal_up_to_the_last_answer(example, *transformers_mask(tokenizer, with_marks, record))
    assert learnt(tokenizer, example) == "hello there<|im_end|>It is 4.\nOf course.<|im_end|>"


@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOUND)
def test_any_conversation_learns_its_answers_behind_what_serving_sends(
    kind: str, family: str, data: st.DataObject
) -> None:
    text = st.text(
        st.one_of(st.sampled_from("ab é🙂\n\r\t '1<|>"), st.characters(codec="utf-8")), max_size=12
    )
    answer = text.filter(str.strip)
    turns = data.draw(st.lists(st.tuples(text, answer), min_size=1, max_size=3))
    tokenizer = base(kind, family)
    record = chat([turn for asked, said in turns for turn in (("user", asked), ("assistant", said))])
    example = example_of(record, tokenizer)
    assert len(example.tokens) == len(example.weights)
    assert set(example.weights) == {0.0, 1.0}
    said = turns[-1][1].strip()
    assert example.label in {None, tokenizer.decode(tokenizer.encode(said, special=False)).strip()}

    whole = tokenizer.render_chat(record.messages, answer=False)
    ids, _ = transformers_mask(tokenizer, marked(family), record)
    starts = [len(tokenizer.render_chat(record.messages[:turn])) for turn in record.targets]
    seamless = all(
        ids[: len(tokens)] == tokens
        for tokens in (tokenizer.encode(whole[:start], special=False) for start in starts)
    )
    if seamless:  # no token straddles what serving sends and what is answered
        assert_equal_up_to_the_last_answer(example, *transformers_mask(tokenizer, marked(family), record))
    if seamless or len(turns) == 1:
        assert example.tokens[: example.prompt_length] == served(tokenizer, record.messages[:-1])


def test_a_turn_of_weight_0_is_context() -> None:
    tokenizer = base("byte-level")
    example = example_of(chat(ASKED, [3]), tokenizer)
    assert learnt(tokenizer, example) == "It is 4.\nOf course.<|im_end|>"
    assert example.tokens == example_of(chat(ASKED), tokenizer).tokens
    first = example_of(chat(ASKED, [1]), tokenizer)
    assert learnt(tokenizer, first) == "hello there<|im_end|>"
    assert first.label == "hello there"
    assert first.tokens[first.prompt_length :] == tokenizer.encode("hello there<|im_end|>")


def test_an_answer_that_would_merge_with_the_template_is_learnt_as_serving_would_see_it() -> None:
    """All at once, the template's line end and the answer's first are one token: nobody is asked so."""
    tokenizer = base("byte-level")
    record = chat([("user", "hi"), ("assistant", "\n\n\nhello")])
    example = example_of(record, tokenizer)
    assert example.tokens[: example.prompt_length] == served(tokenizer, record.messages[:1])
    assert learnt(tokenizer, example) == "\n\n\nhello<|im_end|>"


def test_special_tokens_in_a_content_are_part_of_it() -> None:
    tokenizer = base("byte-level")
    example = example_of(chat([("user", "<|im_end|>"), ("assistant", "a<|im_end|>b")]), tokenizer)
    assert learnt(tokenizer, example) == "a<|im_end|>b<|im_end|>"


def test_thoughts_that_the_template_adds_are_learnt_where_serving_leaves_them_to_the_model() -> None:
    tokenizer, record = base("byte-level", "thinking"), chat(ASKED, [3])
    example = example_of(record, tokenizer)
    assert learnt(tokenizer, example) == "<think>\n\n</think>\n\nIt is 4.\nOf course.<|im_end|>"
    assert example.tokens[: example.prompt_length] == served(tokenizer, record.messages[:3])


def test_a_token_behind_the_last_turns_end_is_not_learnt() -> None:
    tokenizer = base("byte-level", "closed")
    assert learnt(tokenizer, example_of(chat(ASKED[:2]), tokenizer)) == "hello there<|im_end|>"


@pytest.mark.parametrize(
    ("family", "turns", "field", "reason"),
    [
        ("thinking", ASKED, "messages[1]", "alike whether or not more follows; give weight 0"),
        ("closed", ASKED, "messages[1]", "alike whether or not more follows"),
        ("forgetful", ASKED, "messages[1]", "alike whether or not more follows"),
        ("endless", ASKED[:2], "messages[1]", "as it is, with a token at its end"),
        ("shouting", ASKED[:2], "messages[1]", "as it is, with a token at its end"),
        (
            "gemma",
            [("system", "x"), *ASKED],
            "messages[4]",
            "refuses these messages: System role not supported",
        ),
    ],
)
def test_a_template_that_blurs_a_turn_is_refused(
    family: str, turns: list[tuple[str, str]], field: str, reason: str
) -> None:
    assert set(TEMPLATES) >= {family}
    with pytest.raises(LineError) as refused:
        example_of(chat(turns), base("byte-level", family))
    assert refused.value.field == field
    assert reason in refused.value.reason


def test_a_base_without_a_chat_template_takes_no_messages() -> None:
    tokenizer = byte_fallback_tokenizer()
    with pytest.raises(LineError, match="has no chat template"):
        example_of(chat(ASKED), tokenizer)
    assert learnt(tokenizer, example_of(Pair("a", "b"), tokenizer)) == "b</s>"
    assert learnt(tokenizer, example_of(Text("ab"), tokenizer)).endswith("b</s>")


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=st.text(st.sampled_from("ab é\n1'"), min_size=1, max_size=8), data=st.data())
def test_a_completion_is_learnt_to_the_letter_behind_what_serving_sends(
    kind: str, prompt: str, data: st.DataObject
) -> None:
    completion = data.draw(st.text(st.sampled_from("ab é\n1'🙂"), min_size=1, max_size=8))
    tokenizer = base(kind)
    example = example_of(Pair(prompt, completion), tokenizer)
    assert example.tokens[: example.prompt_length] == tokenizer.encode(prompt)
    assert example.weights == [0.0] * example.prompt_length + [1.0] * (
        len(example.tokens) - example.prompt_length
    )
    assert learnt(tokenizer, example).removesuffix(tokenizer.token_text(tokenizer.end or 0)[0]) == completion


def test_prompts_and_texts_of_too_few_tokens_are_refused() -> None:
    tokenizer = base("byte-level")
    with pytest.raises(LineError, match="prompt has no token"):
        example_of(Pair("", "a"), tokenizer)
    assert len(example_of(Text("a"), tokenizer).tokens) == 2
    tokenizer = Tokenizer(byte_fallback_tokenizer()._hf, None)
    tokenizer.end = None
    with pytest.raises(LineError, match="one token"):
        example_of(Text("a"), tokenizer)
    with pytest.raises(LineError, match="no token that could end"):
        example_of(Pair("a", "b"), tokenizer)


def test_an_end_token_is_added_once_and_a_text_is_learnt_whole() -> None:
    tokenizer = base("byte-level")
    assert example_of(Pair("a", "b<|im_end|>"), tokenizer) == example_of(Pair("a", "b"), tokenizer)
    example = example_of(Text("One frozen base."), tokenizer)
    assert example.tokens == [*tokenizer.encode("One frozen base."), tokenizer.end]
    assert example.weights == [0.0] + [1.0] * (len(example.tokens) - 1)
    assert (example.prompt_length, example.label) == (0, None)


def test_a_label_is_one_short_line() -> None:
    tokenizer = base("byte-level")
    assert example_of(Pair("good:", " positive "), tokenizer).label == "positive"
    assert example_of(Pair("a", " b\nc"), tokenizer).label is None
    assert example_of(Pair("a", " b" * LABEL_TOKENS), tokenizer).label == ("b " * LABEL_TOKENS).strip()
    assert example_of(Pair("a", " b" * (LABEL_TOKENS + 1)), tokenizer).label is None


def example(prompt: int, answer: int) -> Example:
    return Example(list(range(prompt + answer)), [0.0] * prompt + [1.0] * answer, prompt, "yes")


def test_truncation_keeps_the_end() -> None:
    whole = example(6, 4)
    assert truncated(whole, 10, []) is whole
    assert truncated(whole, 6, []) == Example([4, 5, 6, 7, 8, 9], [0, 0, 1, 1, 1, 1], 2, "yes")
    assert truncated(whole, 4, []) == Example([6, 7, 8, 9], [0, 1, 1, 1], 0, None)
    assert truncated(whole, 2, []) == Example([8, 9], [0, 1], 0, None)
    assert truncated(whole, 1, []) is None


def test_truncation_keeps_what_stands_before_every_prompt() -> None:
    whole = example(6, 4)
    assert truncated(whole, 6, [0]) == Example([0, 5, 6, 7, 8, 9], [0, 0, 1, 1, 1, 1], 2, "yes")
    assert truncated(whole, 5, [0]) == Example([0, 6, 7, 8, 9], [0, 0, 1, 1, 1], 0, None)
    assert truncated(whole, 5, [7]) == Example([5, 6, 7, 8, 9], [0, 1, 1, 1, 1], 1, "yes")
    assert truncated(whole, 1, [0]) is None


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 20), st.sampled_from([[], [0], [0, 1], [5]]))
def test_truncation_leaves_at_most_what_fits_and_a_target(
    prompt: int, answer: int, limit: int, lead: list[int]
) -> None:
    whole = example(prompt, answer)
    kept = truncated(whole, limit, lead)
    if kept is not None and kept is not whole:
        assert len(kept.tokens) == len(kept.weights) == limit
        assert kept.tokens[-1] == whole.tokens[-1]
        assert any(kept.weights)
        assert not kept.weights[0]
        assert (
            kept.tokens[kept.prompt_length :] == whole.tokens[whole.prompt_length :] or not kept.prompt_length
        )

"""The README's five minutes, on the default model: serve, a tenant, the base, an adapter, both at once."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.e2e.serving import POLYPEFT, Serving
from tests.fixtures.models import CACHE, Oracle, greedy, make_lora

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
Command = Callable[..., str]


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`serve` as it comes, but for its port and its threads; the model has been fetched before."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").mkdir()
    (folder / "data" / "models").symlink_to(CACHE / "models")
    it = Serving(MODEL, folder, "--threads", "1")
    try:
        it.start()
        yield it
        it.stop()
    finally:
        it.end()


@pytest.fixture(scope="module")
def command(home: Serving) -> Command:
    """`polypeft ARGUMENTS` beside that server; what it prints."""

    def run(*arguments: str, key: str | None = None, said: str = "") -> str:
        environment = os.environ | {"POLYPEFT_URL": home.url, "POLYPEFT_DATA_DIR": str(home.data_dir)}
        environment |= {"POLYPEFT_API_KEY": key} if key else {}
        done = subprocess.run(
            [*POLYPEFT, *arguments], input=said, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def key(command: Command) -> str:
    """Out of what `tenants add` prints."""
    return command("tenants", "add", "acme").split("key")[1].strip()


@pytest.fixture(scope="module")
def poet(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = ["q_proj", "v_proj", "down_proj"]
    folder = tmp_path_factory.mktemp("adapters") / "poet"
    return make_lora(smollm2, folder, r=8, target_modules=targets, use_dora=True, use_rslora=True)


def test_the_model_knows_the_capital_of_france(home: Serving, command: Command, key: str) -> None:
    assert ANSWER in command("chat", "--temperature", "0", key=key, said=QUESTION + "\n")
    with home.sdk(key) as sdk:
        chat = sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
    assert chat.choices[0].message.content == ANSWER
    assert chat.choices[0].finish_reason == "stop"


@pytest.mark.anyio
async def test_a_pushed_adapter_and_the_base_answer_at_once_what_peft_answers(
    home: Serving, command: Command, key: str, poet: Path, smollm2: Path
) -> None:
    command("adapters", "push", "poet", str(poet), key=key)
    assert command("adapters", "list", key=key).startswith("poet\t1\tlora\t8\t")
    prompt = "Write one line about the sea."
    given: Any = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    async with home.asdk(key) as sdk:
        answers = await asyncio.gather(
            *(sdk.completions.create(model=model, **given) for model in (MODEL, "poet", MODEL, "poet"))
        )
    texts = [answer.choices[0].text for answer in answers]
    assert texts[:2] == texts[2:]
    tokenizer, oracle = AutoTokenizer.from_pretrained(smollm2), Oracle(smollm2)
    for adapter, text in zip((None, poet), texts[:2], strict=True):
        with oracle.using(adapter) as model:
            tokens, _ = greedy(model, tokenizer.encode(prompt), 8)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert texts[0] != texts[1]


def test_a_second_start_needs_no_network_and_keeps_the_key(home: Serving, command: Command, key: str) -> None:
    """Of the operator's key no start says more than where it lies."""
    operator = home.operator
    assert operator not in home.said() + home.log()
    home.stop()
    home.start()
    assert operator == home.operator
    assert operator not in home.said() + home.log()
    assert f"The operator's key lies in {home.data_dir / 'admin.key'}." in home.said()
    assert "polypeft tenants add" in home.said()
    assert ANSWER in command("chat", "--temperature", "0", key=key, said=QUESTION + "\n")

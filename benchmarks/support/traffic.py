"""Requests as a day has them: when they come, for which adapter, how long they are. Knows no server.

Texts are pairs out of Python's documentation (`tasks.titles`): a page to be summed up, whose answer is short,
or a title to be written about, whose answer is long. An answer is as long as the real one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.tasks import lines_of
from server.base_model.tokenizer import Tokenizer

Arrivals = Literal["poisson", "gamma"]
BURSTS = 2.0  # coefficient of variation of gamma's gaps; Poisson's is 1
MOST_PROMPT, MOST_ANSWER = 256, 96  # tokens


@dataclass(frozen=True)
class Text:
    prompt: str
    tokens: int  # of the answer


@dataclass(frozen=True)
class Ask:
    at: float  # seconds from the beginning
    adapter: int
    text: Text


def texts_of(tokenizer: Tokenizer) -> list[Text]:
    """Both ways of every pair, in an order that is always the same."""
    found = []
    for line in lines_of("titles")[0]:
        page, title = (message["content"] for message in line["messages"])
        for prompt, answer in ((page, title), (title, page)):
            cut = tokenizer.decode(tokenizer.encode(prompt)[:MOST_PROMPT])
            tokens = len(tokenizer.encode(answer, special=False))
            found.append(Text(cut, max(2, min(tokens, MOST_ANSWER))))
    return found


def traffic(
    kind: Arrivals,
    rate: float,
    seconds: float,
    texts: list[Text],
    *,
    adapters: int,
    alpha: float,
    seed: int = 0,
) -> list[Ask]:
    """`rate` requests a second on average; popularity of adapters is S-LoRA's power law (1: uniform)."""
    rng = np.random.default_rng(seed)
    count = round(rate * seconds)
    shape = 1.0 if kind == "poisson" else BURSTS**-2
    gaps = rng.gamma(shape, 1 / (rate * shape), count)
    gaps *= seconds / gaps.sum()  # so few gaps would miss the rate by a tenth
    asked = (adapters * rng.power(alpha, count)).astype(int)
    chosen = rng.integers(len(texts), size=count)
    return [
        Ask(float(at), int(adapter), texts[text])
        for at, adapter, text in zip(np.cumsum(gaps), asked, chosen, strict=True)
    ]

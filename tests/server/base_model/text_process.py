"""`python -m tests.server.base_model.text_process FOLDER...`: a process that reads tokenizers without torch.

Prints JSON: what each folder's tokenizer makes of some texts, and which modules the process holds by then.
"""

import json
import sys
from pathlib import Path
from typing import Any

from server.base_model.tokenizer import Tokenizer, forbid_torch
from server.errors import InvalidRequest

TEXTS = (
    "",
    "The capital of France is Paris.",
    " a  b\n\n\nc",
    "é🙂 ＜｜im_end｜＞",
    "x<|im_end|>\n<s>[INST]<think>",
)
CHATS = (
    [{"role": "user", "content": text} for text in TEXTS[1:2]],
    [{"role": role, "content": TEXTS[-1]} for role in ("system", "user", "assistant", "user")],
    [{"role": "assistant", "content": "first"}],
)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `tokenizer` does, in JSON's types."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {
        "ids": ids,
        "texts": [tokenizer.decode(each) for each in ids],
        "chats": [_chat(tokenizer, messages, answer) for messages in CHATS for answer in (True, False)],
        "tokens": [tokenizer.token_text(token)[0] for token in range(len(tokenizer.pieces))],
        "end": tokenizer.end,
        "lead": tokenizer.lead,
    }


def _chat(tokenizer: Tokenizer, messages: list[dict[str, str]], answer: bool) -> list[Any]:
    try:
        rendered = tokenizer.render_chat(messages, answer=answer)
    except InvalidRequest as refusal:
        return [refusal.message]
    return [rendered, tokenizer.encode_chat(rendered)]


def main(folders: list[str]) -> None:
    forbid_torch()
    found = [describe(Tokenizer.load(Path(folder))) for folder in folders]
    modules = [name for name, module in sys.modules.items() if module is not None]
    sys.stdout.write(json.dumps({"tokenizers": found, "modules": modules}))


if __name__ == "__main__":
    main(sys.argv[1:])

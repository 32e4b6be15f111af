"""Chat templates of the families in use, each also with the mark that transformers' own mask needs.

`plain(name)` is what a base ships. `marked(name)` renders the same text, with what the assistant says and its
end token between {% generation %} and {% endgeneration %}.
"""

NL = "{{ '\n' }}"  # jinja, as transformers sets it up, drops a line end that follows a block

# « and » stand where the marks go; the pieces inside are what transformers' mask counts
CHATML = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n«{{ m.content }}<|im_end|>»"
    + NL
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n"
    "{% if m.role == 'assistant' %}«{{ m.content | trim }}<|eot|>»"
    "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n{% endif %}"
)
LLAMA2 = (  # no generation prompt of its own, and spaces around what is said
    "{% for m in messages %}{% if m.role == 'assistant' %}«{{ ' ' + m.content | trim + ' ' }}</s>»"
    "{% else %}<s>[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.role == 'assistant' %}«{{ m.content | trim }}</turn>»"
    "{% else %}{{ m.content | trim }}</turn>{% endif %}" + NL + "{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# Reasoning bases: the last turn alone is given its thoughts, empty ones here, which are learnt with it.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "«{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>»"
    + NL
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSED = CHATML.removesuffix("{% endif %}") + "{% else %}<|close|>{% endif %}"  # a token behind the last turn
ENDLESS = "{% for m in messages %}{{ m.role }}: «{{ m.content }}»" + NL + "{% endfor %}"
SHOUTING = CHATML.replace("m.content }}<|im_end|>»", "m.content | upper }}<|im_end|>»")
FORGETFUL = CHATML.replace("in messages %}", "in messages[-2:] %}")

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "thinking": THINKING,
    "closed": CLOSED,
    "endless": ENDLESS,
    "shouting": SHOUTING,
    "forgetful": FORGETFUL,
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|close|>"),
    *("<|begin|>", "<|head|>", "<|/head|>", "<|eot|>", "<bos>", "<turn>", "</turn>"),
]


def plain(name: str) -> str:
    return TEMPLATES[name].replace("«", "").replace("»", "")


def marked(name: str) -> str:
    return TEMPLATES[name].replace("«", "{% generation %}").replace("»", "{% endgeneration %}")

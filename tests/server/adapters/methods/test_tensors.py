"""Which module a list of names means, as PEFT has it, however long the list."""

import time

from server.adapters.methods.tensors import names

SITE = "model.layers.10.self_attn.q_proj"


def test_a_name_or_its_end_after_a_dot() -> None:
    for module in ("q_proj", "self_attn.q_proj", "10.self_attn.q_proj", SITE):
        assert names(frozenset({module}), SITE)
    for module in ("proj", "_proj", "0.self_attn.q_proj", "self_attn", ".q_proj", f"x.{SITE}", ""):
        assert not names(frozenset({module}), SITE)


def test_a_long_list_costs_nothing() -> None:
    many = frozenset(f"no.such.module_{i}" for i in range(10_000))
    start = time.perf_counter()
    assert not any(names(many, SITE) for _ in range(1000))
    assert time.perf_counter() - start < 0.2

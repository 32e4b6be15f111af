"""Which module a list of names means, as PEFT has it, however long the list."""

from typing import NoReturn

from server.adapters.specs.tensor_names import names

SITE = "model.layers.10.self_attn.q_proj"


def test_a_name_or_its_end_after_a_dot() -> None:
    for module in ("q_proj", "self_attn.q_proj", "10.self_attn.q_proj", SITE):
        assert names(frozenset({module}), SITE)
    for module in ("proj", "_proj", "0.self_attn.q_proj", "self_attn", ".q_proj", f"x.{SITE}", ""):
        assert not names(frozenset({module}), SITE)


def test_a_long_list_costs_nothing() -> None:
    """It is looked into, never gone through."""

    class Unread(frozenset[str]):
        def __iter__(self) -> NoReturn:
            raise AssertionError("gone through")

    assert not names(Unread(f"no.such.module_{i}" for i in range(10_000)), SITE)
    assert names(Unread(["q_proj"]), SITE)

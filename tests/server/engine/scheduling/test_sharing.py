"""The engine itself shares: two tenants on a tiny model, counted in steps and tokens."""

from collections import Counter
from collections.abc import Callable

from server.messages import Generate, Request, Sampling
from tests.fixtures.engine import Done, Driver, Stand

LONG = 120  # tokens
MOST = 8  # choices


def row(s: Stand, id_: str, tenant: str, tokens: int, seed: int = 0, after: str | None = None) -> Generate:
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return Generate(id_, tenant, s.prompt(seed, 12), sampling, after=after)


def steps_to_first_token(driver: Driver, command: Generate) -> int:
    driver.submit(command)
    for steps in range(1, 100):
        driver.step()
        if driver.rows[command.id].tokens:
            return steps
    raise AssertionError("it never began")


def test_a_first_token_beside_another_tenants_most_choices_comes_as_soon_as_alone(
    stand: Callable[..., Stand],
) -> None:
    """And every row says what it says alone, those that made way as well."""
    s = stand("llama", 0, max_seqs=4)
    choices = [row(s, f"a{i}", "A", LONG, after="a0" if i else None) for i in range(MOST)]
    mine = [row(s, f"b{i}", "B", 6, seed=i) for i in range(4)]
    expected = s.alone([choices[0], *mine])
    driver = Driver(s.engine)
    for choice in choices:
        driver.submit(choice)
    for _ in range(20):
        driver.step()
    assert len(s.engine.scheduler.running) == 4
    for command in mine:
        assert steps_to_first_token(driver, command) == 1
        while driver.rows[command.id].finish is None:
            driver.step()
    driver.finish()
    assert s.engine.scheduler.preemptions > 0
    assert all(driver.rows[choice.id].tokens == expected[0].tokens for choice in choices)
    assert [driver.rows[command.id].tokens for command in mine] == [done.tokens for done in expected[1:]]


def test_a_steady_tenant_keeps_its_half_against_a_newcomer_with_four_times_the_rows(
    stand: Callable[..., Stand],
) -> None:
    s = stand("llama", 0, max_seqs=4)
    driver, sent, got = Driver(s.engine), Counter[str](), Counter[str]()
    under_way: dict[str, str] = {}  # row -> tenant

    def go(clients: dict[str, int], steps: int) -> None:
        for _ in range(steps):
            for tenant, count in clients.items():
                for _ in range(count - list(under_way.values()).count(tenant)):
                    sent[tenant] += 1
                    command = row(s, f"{tenant}{sent[tenant]}", tenant, 12, seed=sent[tenant])
                    under_way[command.id] = tenant
                    driver.submit(command)
            before = {id_: len(driver.rows[id_].tokens) for id_ in under_way}
            driver.step()
            for id_, tenant in [*under_way.items()]:
                got[tenant] += len(driver.rows[id_].tokens) - before[id_]
                if driver.rows[id_].finish:
                    del under_way[id_]

    go({"A": 3}, 150)
    got.clear()
    go({"A": 3, "B": 12}, 150)
    assert got["A"] >= 0.45 * got.total()
    driver.finish()


def test_a_request_is_refused_before_any_of_its_rows_gets_a_token(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 0, max_seqs=4, max_queue=4)
    driver = Driver(s.engine)
    first = [row(s, f"a{i}", "A", LONG, seed=i) for i in range(3)]
    second = [row(s, f"c{i}", "A", LONG, seed=i) for i in range(3)]
    driver.rows |= {command.id: Done() for command in [*first, *second]}
    s.engine.submit(Request(tuple(first)))
    s.engine.submit(Request(tuple(second)))
    driver.step()
    errors = [driver.rows[command.id].error for command in second]
    assert [error and error[0] for error in errors] == ["tenant_queue_full"] * 3
    driver.finish()
    assert all(len(driver.rows[command.id].tokens) == LONG for command in first)

"""Tenants beside each other: who gets places, memory and tokens. The model gives each row a token a step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduling.fair_queue import CREDIT
from server.engine.scheduling.kv_blocks import BLOCK
from server.engine.scheduling.row import Row
from tests.server.engine.scheduling.test_scheduler import World

LONG = 400  # tokens: more than any test waits for


@dataclass
class Client:
    """Sends a row, and the next one in the step after it ended."""

    tenant: str
    output: int = 24
    prompt: int = 6
    weight: float = 1.0
    since: int = 0  # steps before its first row
    row: Row | None = None
    asked: int = 0  # the step before its row
    waits: list[int] = field(default_factory=list)  # steps to its rows' first tokens


class Town(World):
    """Clients and one scheduler. Checks in each step what must hold in all."""

    def __init__(
        self, clients: Sequence[Client], *, blocks: int = 1000, max_seqs: int = 4, tokens: int = 256
    ) -> None:
        super().__init__(blocks=blocks, max_seqs=max_seqs, tokens=tokens)
        self.clients = clients
        self.now = 0
        self.placed: Counter[str] = Counter()  # rows that run, by tenant
        self.waiting: set[str] = set()  # tenants of rows that do not

    def run(self, steps: int) -> Counter[str]:
        """Tokens that each tenant got in these steps."""
        got: Counter[str] = Counter()
        for _ in range(steps):
            for client in self.clients:
                if client.row is None and self.now >= client.since:
                    client.row = self.add(client.prompt, tenant=client.tenant, weight=client.weight)
                    client.asked = self.now
            lengths = {row.id: row.output_length for row in self.rows()}
            batch = self.step(self.now)
            self.placed = Counter(row.command.tenant for row in self.scheduler.running.values())
            self.waiting = {row.command.tenant for row in self.scheduler.queues}
            self.now += 1
            for row in batch:
                got[row.command.tenant] += row.output_length - lengths[row.id]
            for client in self.clients:
                self._attend(client, lengths)
        return got

    def rows(self) -> list[Row]:
        return [*self.scheduler.running.values(), *self.scheduler.queues]

    def _attend(self, client: Client, lengths: dict[str, int]) -> None:
        row = client.row
        if row is None:
            return
        if row.output_length and not lengths[row.id]:
            client.waits.append(self.now - client.asked)
        if row.output_length >= client.output:
            self.scheduler.remove(row)
            client.row = None


def share(got: Counter[str], tenant: str) -> float:
    return got[tenant] / got.total()


@pytest.mark.parametrize("alone", [50, 2000])
def test_a_newcomer_with_four_times_the_clients_leaves_a_steady_tenant_its_half(alone: int) -> None:
    """However long the steady one was served before, and though it is never idle."""
    town = Town([Client("A") for _ in range(3)] + [Client("B", since=alone) for _ in range(12)])
    town.run(alone)
    town.run(5)
    assert share(town.run(300), "A") >= 0.45


@pytest.mark.parametrize("rows", [1, 2])
def test_a_tenant_with_long_rows_in_every_place_makes_way_in_the_step_another_arrives(rows: int) -> None:
    """For as many rows as the other has a right to."""
    crowd = [Client("A", output=LONG) for _ in range(8)]
    town = Town(crowd + [Client("B", since=100) for _ in range(rows)])
    town.run(100)
    assert town.placed == {"A": 4}
    town.run(200)
    assert set(town.clients[-1].waits) == {1}
    assert len(town.clients[-1].waits) >= 8


def test_a_flood_of_long_rows_and_one_of_short_ones_share_by_halves() -> None:
    town = Town([Client("A", output=LONG) for _ in range(8)] + [Client("B", since=100) for _ in range(8)])
    town.run(100)
    assert share(town.run(600), "B") == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_places_go_by_weight(weight: float) -> None:
    rows = [Client("A", output=LONG) for _ in range(16)]
    rows += [Client("B", output=LONG, weight=weight, since=50) for _ in range(16)]
    town = Town(rows, max_seqs=8)
    town.run(50)
    assert town.placed == {"A": 8}
    town.run(150)
    assert town.placed["B"] == 8 * weight / (1 + weight)


def test_more_tenants_than_places_take_turns() -> None:
    town = Town([Client(f"t{i}", output=LONG) for i in range(6)], max_seqs=2)
    got = town.run(600)
    assert all(client.waits and client.waits[0] < 100 for client in town.clients)
    assert max(got.values()) < 1.5 * min(got.values())


def test_a_row_that_made_way_is_not_put_back_at_once_at_anothers_expense() -> None:
    """Tokens computed again stay few beside those that were wanted."""
    town = Town([Client(f"t{i}", output=LONG, prompt=64) for i in range(3)], max_seqs=2, blocks=400)
    town.run(600)
    assert town.scheduler.preemptions <= 600 * 2 / BLOCK


def test_a_tenant_that_fills_the_memory_makes_way() -> None:
    """Places lie free, blocks do not."""
    town = Town(
        [Client("A", output=LONG, prompt=100) for _ in range(8)] + [Client("B", prompt=100, since=60)],
        max_seqs=16,
        blocks=40,
    )
    town.run(60)
    assert town.placed["A"] > 1
    town.run(60)
    assert set(town.clients[-1].waits) <= {1, 2}
    assert town.placed["A"] > 0


def test_memory_that_a_running_row_grows_into_is_not_taken_from_the_smaller_tenant() -> None:
    town = Town(
        [Client("A", output=LONG, prompt=60) for _ in range(4)] + [Client("B", LONG, since=5)], blocks=24
    )
    town.run(150)
    assert town.scheduler.preemptions > 1
    assert town.clients[-1].row is not None
    assert town.clients[-1].row.output_length == 145


def test_long_prompts_do_not_hold_up_anothers_first_token() -> None:
    town = Town([Client("A", prompt=500) for _ in range(16)] + [Client("B", since=8)], max_seqs=32, tokens=64)
    town.run(60)
    assert set(town.clients[-1].waits) == {1}


def test_one_tenants_row_that_lacks_memory_holds_up_its_own_alone() -> None:
    town = Town([Client("A", prompt=300, output=100)] * 1, max_seqs=8, blocks=30)
    town.run(10)
    town.clients = [*town.clients, Client("A", prompt=300), Client("B", since=80)]
    town.run(90)
    assert town.clients[-1].waits[0] == 1


def test_leaving_and_coming_back_earns_nothing() -> None:
    world = World(max_seqs=2)
    queues = world.scheduler.queues
    world.add(tenant="B")
    heavy = world.add(200, tenant="A")
    world.add(tenant="B")
    for _ in range(5):
        world.step()
    served = queues.tenant_queue(heavy).virtual_counter
    assert served > 200
    world.scheduler.remove(heavy)
    assert queues.tenant_queue(world.add(tenant="A")).virtual_counter == served
    assert (
        queues.tenant_queue(world.add(tenant="C")).virtual_counter
        == queues.classes[1].by_tenant["B"].virtual_counter
        < 20
    )


def test_counters_never_fall_when_all_have_left() -> None:
    world = World()
    row = world.add(100)
    for _ in range(4):
        world.step()
    served = world.scheduler.queues.tenant_queue(row).virtual_counter
    world.scheduler.remove(row)
    assert not world.scheduler.queues.classes[1].by_tenant
    assert world.scheduler.queues.tenant_queue(world.add(tenant="new")).virtual_counter == served > 100


def test_a_tenant_that_always_runs_one_row_cannot_save_up_turns() -> None:
    town = Town([Client("A") for _ in range(8)] + [Client("L", output=4)])
    town.run(2000)
    town.clients = [*town.clients, *(Client("L") for _ in range(12))]
    assert share(town.run(100), "A") > 0.2
    assert share(town.run(400), "A") == pytest.approx(0.5, abs=0.06)


def test_a_tenant_pays_for_what_is_computed_once_and_for_what_the_cache_has_little() -> None:
    world = World(tokens=32)
    queues = world.scheduler.queues
    row = world.add(prompt=list(range(60)))
    world.step()
    assert queues.tenant_queue(row).virtual_counter == 32  # not for a prompt that may yet be cancelled
    world.step()
    assert queues.tenant_queue(row).virtual_counter == 60 + 2
    world.scheduler._preempt(row, 0)
    world.pool.block_of.clear()
    world.step()
    world.step()
    assert row.output_length == 2
    assert queues.tenant_queue(row).virtual_counter == 60 + 2 * 2
    world.pool.block_of.clear()
    again = world.add(prompt=list(range(60)))
    other = world.add(prompt=list(range(60)), after=again.id)
    for _ in range(5):
        world.step()
    assert other.cached_tokens == 48
    generated = 2 + 5 + again.output_length + other.output_length
    assert queues.tenant_queue(row).virtual_counter == 60 + 60 + 12 + 48 / 16 + 2 * generated


CLIENTS = st.lists(
    st.builds(
        Client,
        tenant=st.sampled_from("abc"),
        output=st.integers(1, 60),
        prompt=st.integers(1, 120),
        since=st.integers(0, 40),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=30, deadline=None)
@given(CLIENTS, st.integers(1, 6), st.integers(20, 80), st.sampled_from([16, 64, 256]))
def test_any_crowd_is_served(clients: list[Client], max_seqs: int, blocks: int, tokens: int) -> None:
    """Nobody starves, and no place stays empty that a row could take, while the step has tokens left."""
    clients = [replace(client, waits=[]) for client in clients]
    town = Town(clients, max_seqs=max_seqs, blocks=blocks, tokens=tokens)
    without: Counter[str] = Counter()  # steps for which a tenant has waited with no row running
    for _ in range(4000):
        town.run(1)
        if all(client.waits for client in clients):
            return
        for tenant in "abc":
            starved = tenant in town.waiting and not town.placed[tenant]
            without[tenant] = without[tenant] + 1 if starved else 0
            assert without[tenant] < 200
        if tokens == 256 and blocks * BLOCK > sum(
            BLOCK + client.prompt + client.output for client in clients
        ):
            assert town.placed.total() == max_seqs or not town.waiting or town.used == tokens
    raise AssertionError("a row never began")


@settings(max_examples=12, deadline=None)
@given(st.data(), st.integers(4, 8), st.integers(1, 3))
def test_two_tenants_that_always_wait_are_served_alike(data: st.DataObject, max_seqs: int, more: int) -> None:
    """However many rows each has, and of whatever length: the difference of their counters has a bound.

    As long as a single place, which each has in any case, does not make one the better served.
    """
    outputs = [data.draw(st.integers(8, 80)) for _ in "ab"]
    prompts = [data.draw(st.integers(1, output)) for output in outputs]
    crowd = [Client("a", outputs[0], prompts[0]) for _ in range(2 * max_seqs)]
    crowd += [Client("b", outputs[1], prompts[1], since=30) for _ in range(2 * max_seqs * more)]
    town = Town(crowd, max_seqs=max_seqs)
    town.run(100)
    bound = CREDIT + 2 * max_seqs * max(map(sum, zip(outputs, prompts, strict=True)))
    for _ in range(400):
        town.run(1)
        served = [queue.virtual_counter for queue in town.scheduler.queues.classes[1].by_tenant.values()]
        assert abs(served[0] - served[1]) <= bound

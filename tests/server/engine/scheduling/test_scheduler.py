from collections import Counter
from typing import Any

import pytest

from server.engine.scheduling.kv_blocks import BLOCK, BlockPool
from server.engine.scheduling.overtaking import MAX_OVERTAKEN_STEPS
from server.engine.scheduling.row import Row
from server.engine.scheduling.scheduler import Scheduler
from server.errors import DeadlineExceeded, InvalidAdapter
from server.messages import AdapterRef, Generate, Sampling
from tests.fixtures.slots import Loader, make_cache


class World:
    """A scheduler with real cache and blocks, and a model that always says token 7."""

    def __init__(self, blocks: int = 64, slots: int = 4, max_seqs: int = 8, tokens: int = 64) -> None:
        self.loader = Loader()
        self.cache = make_cache(self.loader, slots=slots, budget=10_000)
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            self.cache, self.pool, max_seqs=max_seqs, max_batch_tokens=tokens, max_context=512
        )
        self.count = 0
        self.used = 0  # tokens of the last step

    def add(
        self,
        length: int = 5,
        tenant: str = "t",
        adapter: str | None = None,
        prompt: list[int] | None = None,
        **fields: Any,
    ) -> Row:
        self.count += 1
        ref = AdapterRef(tenant, adapter, 1, adapter, "lora", "key") if adapter else None
        tokens = prompt or [self.count] * length
        command = Generate(f"row-{self.count}", tenant, tokens, Sampling(max_tokens=8), ref, **fields)
        row = Row(command, seed=0, tokens=list(tokens), prompt_length=len(tokens))
        self.scheduler.add(row)
        return row

    def step(self, now: float = 0.0) -> list[Row]:
        batch = self.scheduler.schedule(now)
        self.used = sum(row.scheduled for row in batch)
        assert self.used <= self.scheduler.max_batch_tokens
        assert len({id(row) for row in batch}) == len(batch)
        for row in batch:
            assert row.scheduled > 0
            assert len(row.blocks) * BLOCK >= row.computed + row.scheduled
            self.scheduler.commit(row, [7] if row.completes else [])
        owned = Counter(b for row in self.scheduler.running.values() for b in row.blocks)
        assert self.pool.refs == [owned[b] for b in range(self.pool.count)]
        return batch


def test_a_row_runs_from_prompt_to_removal() -> None:
    world = World()
    row = world.add(length=5)
    assert [r.scheduled for r in world.scheduler.schedule(0)] == [5]
    world.scheduler.commit(row, [7])
    for _ in range(3):
        assert world.step() == [row]
    assert row.tokens[5:] == [7] * 4
    world.scheduler.remove(row)
    assert world.pool.available == world.pool.count
    assert world.scheduler.waiting == 0
    assert not world.scheduler.queues.classes[1].by_tenant


def test_a_long_prompt_is_chunked_beside_decoding_rows() -> None:
    world = World(tokens=32)
    short = world.add(length=4)
    world.step()
    long = world.add(length=100)
    sizes = [{row.id: row.computed for row in world.step()} for _ in range(4)]
    assert all(short.id in step for step in sizes)
    assert [step[long.id] for step in sizes] == [31, 62, 93, 100]
    assert long.output_length == 1


def test_the_batch_never_waits_for_a_load() -> None:
    world = World()
    base = world.add()
    waiting = world.add(adapter="a")
    assert world.step() == [base]
    later = world.add(adapter=None)
    assert world.step() == [base, later]
    world.loader.arrive("a")
    assert waiting in world.step()
    assert waiting.slot > 0


def test_a_failed_load_ends_its_row_alone() -> None:
    world = World()
    base, bad = world.add(), world.add(adapter="a")
    world.step()
    world.loader.futures["a"].set_exception(InvalidAdapter("broken"))
    assert world.step() == [base]
    assert [(row, type(error)) for row, error in world.scheduler.ended_unscheduled] == [(bad, InvalidAdapter)]


def test_out_of_blocks_the_last_admitted_goes_back_and_returns() -> None:
    world = World(blocks=4)
    first, second = world.add(length=30), world.add(length=30)
    world.step()
    assert set(world.scheduler.running.values()) == {first, second}
    for _ in range(3):
        world.step()
    assert list(world.scheduler.running.values()) == [first]
    assert world.scheduler.preemptions == 1
    kept = list(second.tokens)
    world.scheduler.remove(first)
    world.step()
    assert second.id in world.scheduler.running
    assert second.tokens[: len(kept)] == kept


def test_a_row_that_lacks_memory_is_not_overtaken_for_ever() -> None:
    world = World(blocks=8, max_seqs=4)
    running = world.add(length=40)
    world.step()
    large = world.add(length=110)
    for _ in range(200):
        world.add(length=4)
        for row in world.step():
            if row is not running and row.output_length >= 2:
                world.scheduler.remove(row)
        if running.id in world.scheduler.running and running.output_length > 30:
            world.scheduler.remove(running)
    assert large.sampled


def test_rows_of_one_tenant_and_adapter_share_a_prefix() -> None:
    world = World()
    prompt = list(range(40))
    first = world.add(prompt=prompt)
    world.step()
    again, foreign = world.add(prompt=prompt), world.add(prompt=prompt, tenant="other")
    world.loader.arrive("a")
    adapted = world.add(prompt=prompt, adapter="a")
    world.step()
    assert (first.cached_tokens, again.cached_tokens, foreign.cached_tokens, adapted.cached_tokens) == (
        0,
        32,
        0,
        0,
    )
    assert again.blocks[:2] == first.blocks[:2]


def test_siblings_wait_for_the_first_and_share_its_prompt() -> None:
    world = World()
    prompt = list(range(40))
    leader = world.add(prompt=prompt)
    sibling = world.add(prompt=prompt, after=leader.id)
    assert world.step() == [leader]
    world.step()
    assert sibling.cached_tokens == 32


def test_a_sibling_of_a_gone_leader_runs() -> None:
    world = World()
    leader = world.add()
    sibling = world.add(after=leader.id)
    world.scheduler.remove(leader)
    assert world.step() == [sibling]


def test_deadlines_end_rows_wherever_they_are() -> None:
    world = World(max_seqs=1)
    running, waiting = world.add(deadline=10.0), world.add(deadline=5.0)
    world.step(now=1.0)
    world.step(now=6.0)
    world.step(now=11.0)
    assert [(r, type(e)) for r, e in world.scheduler.ended_unscheduled] == [
        (waiting, DeadlineExceeded),
        (running, DeadlineExceeded),
    ]
    assert world.pool.available == world.pool.count


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_tenants_share_by_weight_whatever_their_queue(weight: float, share: float) -> None:
    world = World(blocks=400, max_seqs=8, tokens=256)
    served = {"flood": 0, "modest": 0}
    for _ in range(200):
        for tenant, least, own in (("flood", 40, 1.0), ("modest", 8, weight)):
            queue = world.scheduler.queues.classes[1].by_tenant.get(tenant)
            for _ in range(least - (len(queue.rows) if queue else 0)):
                world.add(tenant=tenant, length=8, weight=own)
        for row in world.step():
            served[row.command.tenant] += 1
            if row.output_length >= 6:
                world.scheduler.remove(row)
    assert served["modest"] / sum(served.values()) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("given", [False, True])
def test_virtual_tokens_come_first_are_shared_and_cost_context(given: bool) -> None:
    world = World()
    world.loader.arrive("a", virtual_tokens=20, kv_precomputed=given)
    first = world.add(length=13, adapter="a")
    world.step()
    assert first.tokens[:20] == list(range(-1, -21, -1))
    assert first.write_virtual_from == (0 if given else None)
    assert (first.num_virtual_tokens, first.prompt_length, first.output_length) == (20, 33, 1)
    again = world.add(length=5, adapter="a")
    world.step()
    assert again.blocks[0] == first.blocks[0]  # the full block of virtual tokens
    assert again.write_virtual_from == (16 if given else None)
    assert again.output_length == 1


def test_virtual_tokens_may_leave_no_room() -> None:
    world = World()
    world.loader.arrive("a", virtual_tokens=20)
    row = world.add(length=492, adapter="a")
    world.step()
    assert [r for r, _ in world.scheduler.ended_unscheduled] == [row]
    assert "492 tokens and the adapter puts 20" in world.scheduler.ended_unscheduled[0][1].message
    assert world.cache.by_digest["a"].references == 0


def test_a_tenant_over_its_share_waits_without_holding_up_others() -> None:
    """A's rows hold its half of the slots; one more waits for them, however long, and B's rows go on."""
    world = World(slots=4, max_seqs=8)
    for name in "xy":
        world.loader.arrive(name)
        row = world.add(tenant="B", adapter=name)
        world.step()
        world.scheduler.remove(row)
    held = []
    for name in "ab":
        world.loader.arrive(name)
        held.append(world.add(tenant="A", adapter=name))
        world.step()
    world.loader.arrive("c")
    late = world.add(tenant="A", adapter="c")
    for _ in range(2 * MAX_OVERTAKEN_STEPS):
        world.step()
    assert late.id not in world.scheduler.running
    other, second = world.add(tenant="B", adapter="x"), world.add(tenant="A", adapter="a")
    world.step()
    assert other.id in world.scheduler.running
    assert second.id not in world.scheduler.running  # nor does its own tenant's row overtake it any more
    assert {"x", "y"} <= set(world.cache.by_digest)
    world.scheduler.remove(held[0])
    world.step()
    assert late.id in world.scheduler.running
    assert {"x", "y"} <= set(world.cache.by_digest)


def test_a_row_asks_for_its_adapter_once_however_long_it_waits() -> None:
    world = World()
    row = world.add(adapter="a")
    for _ in range(5):
        world.step()
    world.loader.arrive("a")
    world.step()
    assert row.id in world.scheduler.running
    assert (world.cache.hits, world.cache.misses) == (0, 1)

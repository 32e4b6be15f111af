"""Random lives of the engine: requests of all kinds, cancels, deletions, evictions in any order.

What must hold at every moment: a slot has one owner, a used one stays, every byte and block is accounted
for. What must hold at the end: each row that was left alone said what it says alone, and the base is what
it was.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.messages import Cancel, Forget, Prefetch
from tests.fixtures.engine import Driver, Stand, same
from tests.server.engine.test_mixed_methods import kinds

ADAPTERS = 13
SLOTS = 3
ROWS = 10


@pytest.fixture(scope="module")
def one_stand(
    tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("stateful")
    s = Stand(tiny_models("llama"), folder, 0, adapter_slots=SLOTS, max_batch_tokens=48, kv_bytes=1 << 20)
    s.refs = list(kinds(s).values())
    assert len(s.refs) == ADAPTERS
    yield s
    s.engine.close()


class Life(RuleBasedStateMachine):
    stand: ClassVar[Stand]
    golden: ClassVar[dict[int, dict[int, object]]]

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(self.stand.engine)
        self.rows: dict[str, tuple[int, int]] = {}  # id -> (row, adapter)
        self.gone: set[str] = set()

    @rule(row=st.integers(0, ROWS - 1), adapter=st.integers(-1, ADAPTERS - 1))
    def submit(self, row: int, adapter: int) -> None:
        command = self.stand.generate(
            row, self.stand.refs[adapter] if adapter >= 0 else None, lengths=(5, 20, 40)
        )
        if command.id not in self.rows:
            self.rows[command.id] = (row, adapter)
            self.driver.submit(command)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.rows)))
        self.gone.add(id_)
        self.stand.engine.submit(Cancel(id_))

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def forget(self, adapter: int) -> None:
        """A deletion: rows that run go on; the manifest stays, so that later rows can load it again."""
        self.stand.engine.submit(Forget(self.stand.refs[adapter].digest))

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def prefetch(self, adapter: int) -> None:
        self.stand.engine.submit(Prefetch(self.stand.refs[adapter]))

    @invariant()
    def slots_and_bytes_are_accounted_for(self) -> None:
        engine = self.stand.engine
        cache = engine.cache
        assert len(cache.free) + len(cache.by_slot) == cache.slots
        assert set(cache.free).isdisjoint(cache.by_slot)
        assert cache.nbytes == sum(r.nbytes for r in cache.by_slot.values()) <= cache.budget
        used = Counter(row.slot for row in engine.scheduler.running.values() if row.slot)
        assert all(resident.references == used[slot] for slot, resident in cache.by_slot.items())
        for row in engine.scheduler.running.values():
            if row.adapter:
                assert cache.by_slot[row.slot].digest == row.adapter.digest

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        engine = self.stand.engine
        owned = Counter(b for row in engine.scheduler.running.values() for b in row.blocks)
        assert all(engine.blocks.refs[b] == owned[b] for b in range(engine.blocks.count))
        assert engine.blocks.available == engine.blocks.count - len(owned)

    def teardown(self) -> None:
        self.driver.finish()
        for id_, (row, adapter) in self.rows.items():
            if id_ not in self.gone:
                same(self.driver.rows[id_], self.golden[adapter][row])  # type: ignore[arg-type]
        self.slots_and_bytes_are_accounted_for()
        self.blocks_are_accounted_for()


def test_any_life_keeps_rows_apart_and_memory_accounted_for(one_stand: Stand) -> None:
    Life.stand = one_stand
    refs = [None, *one_stand.refs]
    Life.golden = {
        i - 1: dict(
            enumerate(
                one_stand.alone([one_stand.generate(row, ref, lengths=(5, 20, 40)) for row in range(ROWS)])
            )
        )
        for i, ref in enumerate(refs)
    }
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert one_stand.engine.cache.evictions > 0
    assert one_stand.engine.model.digest() == one_stand.engine.base.digest

"""Pinned and hinted adapters, on a real engine."""

from collections.abc import Callable

from server.messages import Pins
from tests.fixtures.engine import Driver, Stand, run


def test_a_pinned_adapter_is_there_before_anybody_asks_and_survives_the_others(
    stand: Callable[..., Stand],
) -> None:
    s = stand("llama", 6, adapter_slots=4)
    engine, pinned = s.engine, s.refs[0]
    engine.submit(Pins((pinned,)))
    driver = Driver(engine)
    assert engine.busy
    driver.finish()
    assert pinned.digest in engine.cache.by_digest
    for i in range(12):
        (done,) = run(engine, [s.generate(i, s.refs[1 + i % 5])])
        assert done.error is None
        assert pinned.digest in engine.cache.by_digest
    assert engine.cache.evictions > 0
    hits = engine.cache.hits
    (done,) = run(engine, [s.generate(0, pinned)])
    assert done.error is None
    assert engine.cache.hits == hits + 1


def test_a_request_in_line_has_its_adapter_loaded_meanwhile(stand: Callable[..., Stand]) -> None:
    s = stand("llama", 2, max_seqs=1)
    driver = Driver(s.engine)
    driver.submit(s.generate(0, None))
    driver.submit(s.generate(1, s.refs[0]))  # there is a seat for one: the scheduler does not even look at it
    driver.step()
    assert s.engine.scheduler.waiting == 1
    s.engine.cache.pending.loads[s.refs[0].digest].future.result(60)
    assert s.engine.loader.ram.get(s.refs[0].digest) is not None
    driver.finish()
    assert all(done.finish == "length" for done in driver.rows.values())

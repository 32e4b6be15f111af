"""Too many adapters, too little memory, impatient clients: those who stay get what they get alone."""

import random
from collections.abc import Callable

from tests.fixtures.engine import Driver, Stand, same

ADAPTERS = 32
ROWS = 96


def test_four_slots_thirty_two_adapters_and_clients_that_hang_up(stand: Callable[..., Stand]) -> None:
    s = stand(
        "llama",
        ADAPTERS,
        adapter_slots=4,
        kv_bytes=1 << 20,  # 2048 tokens
        max_seqs=32,
        max_batch_tokens=512,
    )
    engine = s.engine
    engine.loader.copies_to_disk = True  # as if the store lay on another disk
    engine.loader.ram.index.policy.max_bytes = 1 << 20  # a few of them: the others come back from disk
    rng = random.Random(0)
    # A third for the base and a third for two adapters, so that many rows run at once; the rest for all.
    adapters = [rng.choice([None, rng.choice(s.refs[:2]), rng.choice(s.refs)]) for _ in range(ROWS)]
    commands = [s.generate(i, ref, lengths=(60, 111, 144)) for i, ref in enumerate(adapters)]
    expected = s.alone(commands)
    leaving = set(rng.sample(range(ROWS), ROWS * 3 // 10))

    driver = Driver(engine)
    waiting = list(enumerate(commands))
    while waiting or engine.busy:
        for i, command in waiting[:12]:
            driver.submit(command)
            if i in leaving and rng.random() < 0.2:
                driver.cancel(command.id)  # before it ever ran
        waiting = waiting[12:]
        driver.step()
        for i in sorted(leaving):
            row = driver.rows.get(commands[i].id)
            if row and row.finish is None and rng.random() < 0.1:
                driver.cancel(commands[i].id)

    cancelled = [i for i, command in enumerate(commands) if driver.rows[command.id].finish == "cancelled"]
    assert len(cancelled) > ROWS // 5
    for i, (command, solo) in enumerate(zip(commands, expected, strict=True)):
        done = driver.rows[command.id]
        if i in cancelled:
            assert done.tokens == solo.tokens[: len(done.tokens)]
        else:
            same(done, solo)
    assert engine.cache.evictions > ADAPTERS
    assert engine.scheduler.preemptions > 0
    assert any(tier == "disk" for _, tier, _ in engine.loader.observations)
    assert_all_given_back(s)


def assert_all_given_back(s: Stand) -> None:
    engine = s.engine
    assert not engine.scheduler.running
    assert engine.scheduler.waiting == 0
    assert engine.blocks.available == engine.blocks.count
    assert all(resident.references == 0 for resident in engine.cache.by_digest.values())
    assert len(engine.cache.free) + len(engine.cache.by_digest) == engine.cache.slots
    assert engine.cache.nbytes == sum(r.nbytes for r in engine.cache.by_digest.values())
    assert engine.model.digest() == engine.base.digest

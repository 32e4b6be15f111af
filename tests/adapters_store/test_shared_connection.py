"""A connection that callers share: each gets its own answer, whatever happens to the others and to Valkey."""

import asyncio

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ResponseError

from adapters_store.shared_connection import SharedConnection
from adapters_store.valkey import connect

pytestmark = pytest.mark.anyio

ECHO = "return {KEYS[1], ARGV[1], redis.call('INCR', KEYS[1])}"


async def test_each_caller_gets_its_own_answer(redis: Redis) -> None:
    shared, script = SharedConnection(redis), redis.register_script(ECHO)
    asked = [asyncio.create_task(shared.run(script, [f"k{n % 3}"], [n])) for n in range(300)]
    await asyncio.sleep(0)
    for task in asked[::7]:
        task.cancel()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for number, answer in enumerate(answers):
        if number % 7:
            assert answer[:2] == [f"k{number % 3}".encode(), str(number).encode()]  # type: ignore[index]
        else:
            assert isinstance(answer, asyncio.CancelledError)
    assert (await shared.run(script, ["k0"], ["last"]))[1] == b"last"
    await shared.close()


async def test_an_unknown_script_and_a_closed_connection_are_no_errors(redis: Redis) -> None:
    shared, script = SharedConnection(redis), redis.register_script(ECHO)
    await redis.script_flush()
    assert (await shared.run(script, ["k"], ["a"]))[1] == b"a"
    await redis.client_kill_filter(_type="normal", skipme=True)
    assert (await shared.run(script, ["k"], ["b"]))[1] == b"b"
    await shared.close()


async def test_a_scripts_error_is_its_callers_alone(redis: Redis) -> None:
    shared = SharedConnection(redis)
    good, bad = redis.register_script(ECHO), redis.register_script("return redis.call('NOTHING')")
    answers = await asyncio.gather(
        shared.run(good, ["k"], ["a"]),
        shared.run(bad, ["k"], ["b"]),
        shared.run(good, ["k"], ["c"]),
        return_exceptions=True,
    )
    assert [isinstance(answer, ResponseError) for answer in answers] == [False, True, False]
    await shared.close()


async def test_without_valkey_every_caller_gets_an_error() -> None:
    nobody = connect("unix:///nowhere/v.sock")
    shared, script = SharedConnection(nobody), nobody.register_script(ECHO)
    answers = await asyncio.gather(
        *(shared.run(script, ["k"], [n]) for n in range(5)), return_exceptions=True
    )
    assert all(isinstance(answer, NoConnection) for answer in answers)
    await shared.close()

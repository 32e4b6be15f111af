"""Kills an engine process whose heartbeat has stopped, because none of its threads runs.

An engine whose step hangs ends by itself (server/engine/watchdog.py). A process that is stopped, or in a call
that holds Python's lock, or in the kernel, sends no heartbeat. It may still recover, so it is killed only
after a silence longer than any request may take: by then every request that it had is over.
"""

import asyncio
import logging

import zmq
import zmq.asyncio

from server.messages import Beat, beat_address, decode_event
from server.supervisor.child import Child

TICK_SECONDS = 1.0

log = logging.getLogger(__name__)


async def kill_silent(engine: Child, address: str, seconds: float) -> None:
    """Until cancelled, kill the engine at `address` after `seconds` without heartbeat (its bound, if longer).

    The watch of a process begins with its first heartbeat: an engine that loads a model sends none. Silence
    is counted in ticks, so time in which this process itself is stopped does not count.
    """
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.connect(beat_address(address))
    socket.subscribe(b"")
    watched_pid, silence, bound = None, 0.0, seconds
    try:
        while True:
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    beat = decode_event(await socket.recv())
            except TimeoutError:
                silence += TICK_SECONDS
            else:
                assert isinstance(beat, Beat), "an engine publishes nothing else there"
                watched_pid, silence, bound = engine.pid, 0.0, max(seconds, beat.bound)
            if watched_pid is not None and watched_pid == engine.pid and silence > bound:
                log.error(
                    "The engine process %d has been silent for %.0f s and is killed", watched_pid, silence
                )
                engine.kill_process()
                watched_pid = None
    finally:
        context.destroy(linger=0)

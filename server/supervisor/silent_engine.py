"""An engine that cannot judge itself: every thread of its process stands still.

An engine whose step hangs ends by itself (server/engine/watchdog.py). One that is stopped, or in a call that
holds Python's lock, or in the kernel, says nothing at all. It may go on yet: it is killed only when it has
been silent for longer than any request may take, so that all it had to do when it fell silent is over.
"""

import asyncio
import logging

import zmq
import zmq.asyncio

from server.messages import Beat, beat_address, decode_event
from server.supervisor.child import Child

TICK_SECONDS = 1.0

log = logging.getLogger(__name__)


async def end_silent(engine: Child, address: str, seconds: float) -> None:
    """For ever: kill the engine at `address` after so many seconds of silence, or its step's bound if longer.

    Its first beat begins it: one that loads a model says nothing. Silence is counted in ticks: time in which
    this process is stopped itself is none.
    """
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.connect(beat_address(address))
    socket.subscribe(b"")
    heard, silence, bound = None, 0.0, seconds
    try:
        while True:
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    beat = decode_event(await socket.recv())
            except TimeoutError:
                silence += TICK_SECONDS
            else:
                assert isinstance(beat, Beat), "an engine publishes nothing else there"
                heard, silence, bound = engine.pid, 0.0, max(seconds, beat.bound)
            if heard is not None and heard == engine.pid and silence > bound:
                log.error("The engine process %d has been silent for %.0f s and is killed", heard, silence)
                engine.kill_process()
                heard = None
    finally:
        context.destroy(linger=0)

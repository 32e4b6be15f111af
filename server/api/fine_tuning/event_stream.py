"""The events of a fine-tuning job as a live stream, until the job has ended."""

import asyncio
from collections.abc import AsyncGenerator

from anyio import WouldBlock

from server.api.fine_tuning.json_objects import event_id, event_object
from server.api.http.streaming import Identified, KeepAlive
from server.api.services import Services
from server.errors import NotFound, Unavailable, shown

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
MAX_EVENTS_PER_POLL = 100


async def follow(deps: Services, job: str, after: int) -> AsyncGenerator[object, None]:
    """The events numbered over `after`, then new ones as they come; KeepAlive while there are none.

    Raises Unavailable when too many streams are open, and when the stream ends before the job: the client may
    reconnect with the last id. Raises NotFound for a job that is deleted.
    """
    token = object()
    try:
        deps.event_streams.acquire_on_behalf_of_nowait(token)
    except WouldBlock:
        limit = deps.event_streams.total_tokens
        raise Unavailable(f"{limit:g} streams of events are open, the most there may be.") from None
    try:
        async for event in _follow(deps, job, after):
            yield event
    finally:
        deps.event_streams.release_on_behalf_of(token)


async def _follow(deps: Services, job: str, after: int) -> AsyncGenerator[object, None]:
    clock = asyncio.get_running_loop()
    until = clock.time() + deps.settings.request_seconds
    last_sent = 0.0
    while True:
        current = await deps.jobs.find(job)  # before its events, so that none follows the last poll
        if current is None:
            raise NotFound(f"There is no fine-tuning job {shown(job)} any more.")
        events = await deps.jobs.events(job, after=after, limit=MAX_EVENTS_PER_POLL)
        for event in events:
            after = event.sequence
            yield Identified(event_id(job, after), event_object(job, event))
        if events:
            last_sent = clock.time()
            continue
        if current.phase == "done":
            return
        if deps.draining or clock.time() > until:
            raise Unavailable("This stream ends before the job; come again with the last event's id.")
        if clock.time() - last_sent > KEEP_ALIVE_SECONDS:
            last_sent = clock.time()
            yield KeepAlive()
        await asyncio.sleep(POLL_SECONDS)

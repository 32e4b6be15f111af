"""The priority class of a request: `priority`, vLLM's or ours, or OpenAI's `service_tier`."""

from server.api.generation.bodies import SamplingBody
from server.messages import PRIORITIES, Priority

TIERS: dict[str, Priority] = {"priority": "interactive", "flex": "batch"}  # the others are standard


def priority_of(body: SamplingBody, ceiling: Priority | None) -> Priority:
    """The class that the body asks for, and no more urgent one than `ceiling`.

    `priority` goes before `service_tier`. A number is vLLM's, of which lower ones come first: below 0 is
    interactive, 0 is standard, above 0 is batch.
    """
    asked: Priority
    if isinstance(body.priority, int):
        asked = "standard" if body.priority == 0 else "interactive" if body.priority < 0 else "batch"
    else:
        asked = body.priority or TIERS.get(body.service_tier or "", "standard")
    return max(asked, ceiling or "interactive", key=PRIORITIES.index)

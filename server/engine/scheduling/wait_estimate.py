"""How long a new row would wait for its first token, by the rates measured so far.

The waiting rows of its tenant, and those of more urgent classes, go before it. They cost what their prompts
and mean answers cost; the engine works them off at the rate that the last steps had, of which a tenant gets
its share while others have rows waiting. A row that cannot end before its deadline, with an answer of mean
length, is refused at once: if it waited, it would only be in the way of those that can.
"""

from server.engine.scheduling.costs import COMPUTED_TOKEN, GENERATED_TOKEN
from server.engine.scheduling.fair_queue import TenantQueue
from server.engine.scheduling.priority_queues import PriorityQueues
from server.errors import DeadlineUnreachable, PolypeftError
from server.messages import PRIORITIES, Generate

AVERAGED_STEPS = 64  # the rate is a moving average over about so many steps
AVERAGED_ROWS = 32  # and the length of answers over so many rows
MIN_STEPS = 64  # no estimate before so many


def late(command: Generate, wait: float, now: float, answer: float = 0.0) -> PolypeftError | None:
    """The error of a row whose deadline is before its end, after so many seconds of waiting and answering."""
    if not wait or command.deadline is None or wait + answer <= command.deadline - now:
        return None
    left = max(0.0, command.deadline - now)
    error = DeadlineUnreachable(
        f"The request would wait about {wait:.1f} s for its first token and take {answer:.1f} s from there, "
        f"and its deadline is in {left:.1f} s; send it later, or with a longer X-Request-Timeout."
    )
    error.wait = wait + answer - left
    return error


class WaitEstimate:
    """Measures the cost of steps, their seconds and the length of answers."""

    def __init__(self) -> None:
        self.steps = 0
        self.answer_tokens = 0.0
        self._charged = 0.0  # by the last step
        self._cost = 0.0  # of a step, moving averages
        self._seconds = 0.0

    def record_step(self, charged: float, seconds: float) -> None:
        """A step has taken `seconds`; all tenants together have been charged `charged` so far."""
        part = 1 / min(self.steps + 1, AVERAGED_STEPS)
        self._cost += part * (charged - self._charged - self._cost)
        self._seconds += part * (seconds - self._seconds)
        self._charged = charged
        self.steps += 1

    def record_answer(self, tokens: int) -> None:
        """A row has ended with so many tokens."""
        self.answer_tokens += (tokens - self.answer_tokens) / AVERAGED_ROWS

    @property
    def rate(self) -> float | None:
        """Cost a second; None while too little has been measured."""
        return (
            self._cost / self._seconds if self.steps >= MIN_STEPS and self._seconds and self._cost else None
        )

    def refusal(self, command: Generate, queues: PriorityQueues, now: float) -> PolypeftError | None:
        """The error of a row that cannot end before its deadline; None if it can."""
        answer = min(self.answer_tokens, command.sampling.max_tokens) * self._seconds
        return late(command, self.seconds(command, queues), now, answer)

    def seconds(self, command: Generate, queues: PriorityQueues) -> float:
        """The wait for the first token, 0 if nobody waits or nothing is known."""
        rate, level = self.rate, PRIORITIES.index(command.priority)
        if rate is None or not any(of_class.waiting for of_class in queues.classes[: level + 1]):
            return 0.0
        before = sum(
            self._queued_cost(q) for of_class in queues.classes[:level] for q in of_class.by_tenant.values()
        )
        tenants = queues.classes[level].by_tenant
        own = tenants.get(command.tenant)
        ahead = COMPUTED_TOKEN * len(command.prompt) + (self._queued_cost(own) if own else 0.0)
        beside = (
            min(self._queued_cost(q), ahead * q.weight / command.weight)
            for q in tenants.values()
            if q is not own
        )
        return (before + ahead + sum(beside)) / rate

    def _queued_cost(self, queue: TenantQueue) -> float:
        """Of a tenant's waiting rows, with answers of mean length."""
        return COMPUTED_TOKEN * queue.prompt_tokens + GENERATED_TOKEN * self.answer_tokens * len(queue.rows)

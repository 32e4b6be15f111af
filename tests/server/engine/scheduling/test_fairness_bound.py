"""The bound of docs/fairness.md against the real scheduler, whatever arrives; and no place left empty.

The service of a tenant is counted here, from what its rows got, and not read from the scheduler.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.engine.scheduling import costs
from server.engine.scheduling.fair_queue import CREDIT, FairQueue
from server.engine.scheduling.prompt_lookup import PromptLookup
from server.engine.scheduling.row import Row
from server.engine.scheduling.step_cost import StepCost
from server.messages import PRIORITIES, Priority
from tests.server.engine.scheduling.test_scheduler import World

TENANTS = "abcd"
STEPS = 120
CONTEXT = 512  # of World
MiB = 1 << 20


@dataclass(frozen=True)
class Arrival:
    """Equal rows that one tenant sends in one step."""

    step: int
    tenant: str
    rows: int
    prompt: int
    output: int
    priority: Priority = "standard"
    adapter: str | None = None
    hang_up: int | None = None  # steps after the arrival


@dataclass(frozen=True)
class Chance:
    """What happens to the rows beside their own requests."""

    load_steps: int  # of a cold adapter
    adapter_bytes: int
    preempted: frozenset[int]  # steps before which the latest row is preempted
    accepted: int  # draft tokens of a row in a step, at most


class Site(World):
    """Runs arrivals, keeps its own ledger of service, and checks each step."""

    def __init__(self, weights: dict[str, float], chance: Chance, *, max_seqs: int, tokens: int) -> None:
        super().__init__(blocks=2000, slots=64, max_seqs=max_seqs, tokens=tokens)
        self.cache.budget = self.cache.index.policy.max_bytes = 1 << 40
        self.scheduler.max_row_draft = chance.accepted
        self.scheduler.step_cost = StepCost({1: 3.0, 64: 3.5})
        self.weights = weights
        self.chance = chance
        self.now = 0
        self.service: defaultdict[tuple[int, str], float] = defaultdict(float)  # by class and tenant
        self.at_entry: dict[tuple[int, str], dict[str, float]] = {}  # service of all, of who is backlogged
        self.outputs: dict[str, int] = {}
        self.hang_ups: dict[str, int] = {}
        self.loads: dict[str, int] = {}  # cold adapters, and when they have loaded
        self.paid: defaultdict[str, int] = defaultdict(int)  # leading tokens of a row's prompt

    def arrive(self, arrival: Arrival) -> None:
        adapter = arrival.adapter and f"{arrival.tenant}-{arrival.adapter}"
        for _ in range(arrival.rows):
            weight, priority = self.weights[arrival.tenant], arrival.priority
            row = self.add(arrival.prompt, arrival.tenant, adapter, weight=weight, priority=priority)
            row.lookup = Lookup()
            self.outputs[row.id] = arrival.output
            if arrival.hang_up is not None:
                self.hang_ups[row.id] = self.now + arrival.hang_up
            if adapter:
                self.loads.setdefault(adapter, self.now + self.chance.load_steps)

    def run_step(self) -> None:
        for row in self.rows():
            if self.hang_ups.get(row.id) == self.now:
                self.scheduler.remove(row)
        for adapter in [name for name, step in self.loads.items() if step == self.now]:
            self.loader.arrive(adapter, nbytes=self.chance.adapter_bytes)
        if self.now in self.chance.preempted and self.scheduler.running:
            self.scheduler._preempt([*self.scheduler.running.values()][-1], self.now)
        self._note_entries()
        fresh = {row.id for row in self.rows() if not row.admitted}
        resident = {digest for digest, found in self.cache.by_digest.items() if found.charged}
        batch = self.scheduler.schedule(self.now)
        self._is_work_conserving(batch)
        for row in batch:
            self._count(row, row.id in fresh)
        for digest, found in self.cache.by_digest.items():
            if found.charged and digest not in resident:
                payer = next(row for row in self.rows() if row.adapter and row.adapter.digest == digest)
                self._serve(payer, costs.load_cost(found.nbytes))
        for row in batch:
            got = [7] * (1 + len(row.draft)) if row.completes else []
            self._serve(row, costs.GENERATED_TOKEN * len(got))
            self.scheduler.commit(row, got)
            if row.output_length >= self.outputs[row.id]:
                self.scheduler.remove(row)
        for level, queues in enumerate(self.scheduler.queues.classes):
            self._is_fair(level, queues)
        self.now += 1

    def rows(self) -> list[Row]:
        return [*self.scheduler.running.values(), *self.scheduler.queues]

    def _serve(self, row: Row, cost: float) -> None:
        self.service[row.level, row.command.tenant] += cost / row.command.weight

    def _count(self, row: Row, first: bool) -> None:
        """The prompt tokens of a scheduled row, cached or computed, each once."""
        if first:
            self._serve(row, costs.CACHED_TOKEN * row.computed)
        end = min(row.computed + row.scheduled, row.prompt_length)
        self._serve(row, costs.COMPUTED_TOKEN * max(0, end - max(row.computed, self.paid[row.id])))
        self.paid[row.id] = max(self.paid[row.id], end)

    def _note_entries(self) -> None:
        """Remember the service of all at the moment at which a tenant became backlogged."""
        for level, queues in enumerate(self.scheduler.queues.classes):
            for tenant in TENANTS:
                queue = queues.by_tenant.get(tenant)
                if queue is None or not queue.backlogged:
                    self.at_entry.pop((level, tenant), None)
                elif (level, tenant) not in self.at_entry:
                    self.at_entry[level, tenant] = {t: self.service[level, t] for t in TENANTS}

    def _is_fair(self, level: int, queues: FairQueue) -> None:
        """Of two tenants that have been backlogged together, since the later one became so."""
        assert queues.gap() <= (bound := self._bound(queues))
        since = {
            tenant: services
            for (its_level, tenant), services in self.at_entry.items()
            if its_level == level and (queue := queues.by_tenant.get(tenant)) and queue.backlogged
        }
        for one, other in combinations(since, 2):
            later = max(since[one], since[other], key=lambda services: sum(services.values()))
            gained = [self.service[level, tenant] - later[tenant] for tenant in (one, other)]
            assert abs(gained[0] - gained[1]) <= 2 * bound

    def _bound(self, queues: FairQueue) -> float:
        """G, for the lowest weight of all tenants of this test."""
        max_tokens, max_seqs = self.scheduler.max_batch_tokens, self.scheduler.max_seqs
        step = 2 * (max_tokens + max_seqs) + CONTEXT / 16
        return CREDIT + (16 + CONTEXT / 16 + step + queues.largest_load) / min(self.weights.values())

    def _is_work_conserving(self, batch: list[Row]) -> None:
        """A row that could run does, unless all places or all tokens of the step are taken."""
        scheduler = self.scheduler
        if sum(row.scheduled for row in batch) >= scheduler.max_batch_tokens:
            return
        assert len(batch) == len(scheduler.running)
        ready = [row for row in scheduler.queues if not row.held]
        assert len(scheduler.running) == scheduler.max_seqs or not ready


class Lookup(PromptLookup):
    """Always has as many tokens to propose as it may."""

    def draft(self, tokens: list[int], limit: int, min_acceptance: float) -> list[int]:
        return [7] * limit


def arrivals(priorities: st.SearchStrategy[Priority]) -> st.SearchStrategy[list[Arrival]]:
    one = st.builds(
        Arrival,
        step=st.integers(0, STEPS // 2),
        tenant=st.sampled_from(TENANTS),
        rows=st.integers(1, 12),
        prompt=st.integers(1, 300),
        output=st.integers(1, 100),
        priority=priorities,
        adapter=st.sampled_from([None, "x", "y", "z"]),
        hang_up=st.none() | st.integers(0, 40),
    )
    return st.lists(one, min_size=2, max_size=16)


CHANCES = st.builds(
    Chance,
    load_steps=st.integers(0, 20),
    adapter_bytes=st.sampled_from([1, MiB, 100 * MiB]),
    preempted=st.frozensets(st.integers(0, STEPS), max_size=20),
    accepted=st.sampled_from([0, 0, 7]),
)
WEIGHTS = st.fixed_dictionaries({tenant: st.sampled_from([0.25, 1.0, 1.0, 3.0]) for tenant in TENANTS})


def run(
    weights: dict[str, float], sent: list[Arrival], chance: Chance, *, max_seqs: int, tokens: int
) -> Site:
    site = Site(weights, chance, max_seqs=max_seqs, tokens=tokens)
    for step in range(STEPS):
        for arrival in sent:
            if arrival.step == step:
                site.arrive(arrival)
        site.run_step()
    return site


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(WEIGHTS, arrivals(st.just("standard")), CHANCES, st.integers(1, 6), st.sampled_from([8, 32, 128]))
def test_backlogged_tenants_are_served_alike_within_the_bound(
    weights: dict[str, float], sent: list[Arrival], chance: Chance, max_seqs: int, tokens: int
) -> None:
    run(weights, sent, chance, max_seqs=max_seqs, tokens=tokens)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(WEIGHTS, arrivals(st.sampled_from(PRIORITIES)), CHANCES, st.integers(1, 6))
def test_so_are_those_of_one_class_beside_others(
    weights: dict[str, float], sent: list[Arrival], chance: Chance, max_seqs: int
) -> None:
    run(weights, sent, chance, max_seqs=max_seqs, tokens=64)


@pytest.mark.parametrize("adapter_bytes", [1, 100 * MiB])
def test_the_bound_is_not_loose(adapter_bytes: int) -> None:
    """A few long rows against many short ones: the gap comes near it, so the test above can fail."""
    sent = [Arrival(0, "a", 12, 4, 1000), Arrival(3, "b", 200, 300, 1, adapter="x")]
    site = Site(dict.fromkeys(TENANTS, 1.0), Chance(0, adapter_bytes, frozenset(), 0), max_seqs=4, tokens=64)
    queues, largest = site.scheduler.queues.classes[1], 0.0
    for step in range(400):
        for arrival in sent:
            if arrival.step == step:
                site.arrive(arrival)
        site.run_step()
        largest = max(largest, queues.gap())
    assert largest > queues.max_gap / 3

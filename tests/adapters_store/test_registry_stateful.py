"""The registry against a model in plain Python, whatever happens in what order. Changes are sent twice."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters_store.alias_target import AliasTarget
from adapters_store.index.index import MAX_ROLLBACKS
from adapters_store.manifest import decode_manifest
from adapters_store.names import deleted_key
from adapters_store.object_store.store import Objects
from adapters_store.registry.registry import Registry
from adapters_store.valkey import connect
from server.errors import Conflict, NotFound, StoreError
from tests.adapters_store.test_registry import manifest, stage

T = TypeVar("T")
NAMES, ALIASES = ["a", "b"], ["prod", "canary"]
Weights = dict[int, float]


@dataclass
class Model:
    """What one name must be."""

    versions: dict[int, bool] = field(default_factory=dict)  # number -> promoted
    gone: dict[int, bool] = field(default_factory=dict)
    aliases: dict[str, AliasTarget] = field(default_factory=dict)  # without latest
    latest: int = 0
    pin: tuple[int, int] = (0, 0)
    undo: dict[str, list[AliasTarget]] = field(default_factory=dict)
    lost: dict[str, AliasTarget] = field(default_factory=dict)
    last: int = 0
    ever: bool = False

    def living(self, points: AliasTarget) -> AliasTarget | None:
        if isinstance(points, int):
            return points if points in self.versions else None
        left = {version: weight for version, weight in points.items() if version in self.versions}
        return left if len(left) > 1 else next(iter(left), None)

    def find_latest(self) -> int:
        pin, ceiling = self.pin
        promoted = [
            version
            for version, yes in self.versions.items()
            if (yes or version == pin) and not pin < version <= ceiling
        ]
        return max(promoted) if promoted else min(self.versions, default=0)

    def settle(self, before: dict[str, AliasTarget], *, undo: bool = True) -> None:
        """Aliases follow their versions; what each was before is remembered."""
        for alias, points in list(self.aliases.items()):
            left = self.living(points)
            if left is None:
                self.lost[alias] = self.aliases.pop(alias)
            else:
                self.aliases[alias] = left
        self.latest = self.find_latest()
        for alias, points in self.all().items():
            if undo and alias in before and before[alias] != points:
                self.undo[alias] = [before[alias], *self.undo.get(alias, [])][:MAX_ROLLBACKS]

    def all(self) -> dict[str, AliasTarget]:
        return self.aliases | ({"latest": self.latest} if self.latest else {})

    def forget(self) -> None:
        self.undo, self.lost, self.pin = {}, {}, (0, 0)


def twice(registry: Registry) -> None:
    """As if the first answer to every change were lost, and the client sent it again."""
    scripts = registry.aliases._index._changes

    def doubled(script: Any) -> Any:
        async def call(**given: Any) -> Any:
            first = await script(**given)
            assert await script(**given) == first
            return first

        return call

    for change, script in scripts.items():
        scripts[change] = doubled(script)


class Machine(RuleBasedStateMachine):
    url = ""
    folder = Path()
    runs = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.redis = connect(self.url)
        self.run(self.redis.flushall())
        self.objects = Objects.open((self.folder / str(next(self.runs))).as_uri())
        self.registry = Registry(self.objects, self.redis, grace_seconds=3600)
        twice(self.registry)
        self.models = {name: Model() for name in NAMES}
        self.staged: list[tuple[list[Any], bool]] = []  # blobs of uploads under way, and whether they expired

    def run(self, work: Awaitable[T]) -> T:
        async def main() -> T:
            return await work

        return self.runner.run(main())

    def teardown(self) -> None:
        self.run(self.redis.aclose())
        self.runner.close()

    def expect(self, fails: type[Exception] | None, work: Callable[[], Awaitable[object]]) -> None:
        if fails is None:
            self.run(work())
            return
        with pytest.raises(fails):
            self.run(work())

    # uploads

    @rule()
    def begin(self) -> None:
        self.staged.append((self.run(stage(self.registry, "t")), False))

    @precondition(lambda self: self.staged)
    @rule()
    def expire(self) -> None:
        for blobs, _ in self.staged:
            self.run(self.redis.zadd("pp:staged", {blob.key: 1 for blob in blobs}, xx=True))
        self.staged = [(blobs, True) for blobs, _ in self.staged]

    @rule(dry=st.booleans())
    def collect(self, dry: bool) -> None:
        """As if the grace period were over for all that is not staged."""
        self.registry.collector._grace = -1
        found = self.run(self.registry.collector.collect(dry_run=dry))
        assert len(found.keys) == sum(len(blobs) for blobs, expired in self.staged if expired)
        if not dry:
            self.staged_gone = [blobs for blobs, expired in self.staged if expired]
            self.staged = [one for one in self.staged if not one[1]]
            for blobs in self.staged_gone[:1]:  # its writer wakes up, too late
                self.publish_blobs("a", blobs, promoted=True, late=True)

    @precondition(lambda self: self.staged)
    @rule(name=st.sampled_from(NAMES), promoted=st.booleans())
    def finish(self, name: str, promoted: bool) -> None:
        """Also one whose time is over, if nobody has collected it."""
        blobs, _ = self.staged.pop(0)
        self.publish_blobs(name, blobs, promoted=promoted)

    @rule(name=st.sampled_from(NAMES), promoted=st.booleans())
    def upload(self, name: str, promoted: bool) -> None:
        self.publish_blobs(name, self.run(stage(self.registry, "t")), promoted=promoted)

    def publish_blobs(self, name: str, blobs: list[Any], *, promoted: bool, late: bool = False) -> None:
        model = self.models[name]
        number = self.run(self.registry.next_version("t", name))
        assert number == model.last + 1
        made = manifest("t", name, number, f"d{number}", blobs, promoted=promoted)
        self.expect(StoreError if late else None, lambda: self.registry.publish(made))
        model.last = number
        if late:
            return
        if not model.versions:
            model.forget()
        before = model.all()
        model.ever, model.versions[number] = True, promoted
        model.settle(before)

    # aliases

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from([*ALIASES, "latest"]), data=st.data())
    def point(self, name: str, alias: str, data: st.DataObject) -> None:
        model = self.models[name]
        some = st.integers(1, model.last + 1)
        several = st.dictionaries(some, st.sampled_from([0.5, 0.9, 1 / 3, 1e-05]), min_size=2, max_size=3)
        points = data.draw(some if alias == "latest" or model.last < 2 else some | several)
        there = bool(model.versions) and model.living(points) == points
        self.expect(
            None if there else NotFound,
            lambda: self.registry.aliases.set("t", name, alias, points),
        )
        if there:
            before = model.all()
            model.lost.pop(alias, None)
            if isinstance(points, int) and alias == "latest":
                model.pin = points, model.last
            else:
                model.aliases[alias] = points
            model.settle(before)

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from([*ALIASES, "latest"]))
    def unset(self, name: str, alias: str) -> None:
        model = self.models[name]
        there = alias in model.all() and (alias != "latest" or model.pin != (0, 0))
        self.expect(None if there else NotFound, lambda: self.registry.aliases.unset("t", name, alias))
        if there:
            before = model.all()
            if alias == "latest":
                model.pin = (0, 0)
            else:
                del model.aliases[alias]
                model.undo.pop(alias, None)
            model.settle(before)

    @rule(name=st.sampled_from(NAMES), alias=st.sampled_from([*ALIASES, "latest"]))
    def roll_back(self, name: str, alias: str) -> None:
        model = self.models[name]
        before, ahead = model.all(), list(model.undo.get(alias, []))
        target: AliasTarget | None = None
        while ahead and target in (None, before.get(alias)):
            target = model.living(ahead.pop(0))
        there = alias in before
        possible = there and target not in (None, before.get(alias))
        fails = None if possible else Conflict if there else NotFound
        self.expect(fails, lambda: self.registry.aliases.rollback("t", name, alias))
        if possible and target is not None:
            model.undo[alias] = ahead
            if isinstance(target, int) and alias == "latest":
                model.pin = target, model.last
            else:
                model.aliases[alias] = target
            model.settle(before, undo=False)

    # deletion

    @rule(name=st.sampled_from(NAMES), all_=st.booleans(), purge=st.booleans(), data=st.data())
    def delete(self, name: str, all_: bool, purge: bool, data: st.DataObject) -> None:
        model = self.models[name]
        version = None if all_ else data.draw(st.integers(1, model.last + 1))
        here = [v for v in model.versions if version in (None, v)]
        away = [v for v in model.gone if version in (None, v)] if purge else []
        self.expect(
            None if here or away else NotFound,
            lambda: self.registry.delete("t", name, version, purge=purge),
        )
        before = model.all()
        for v in here:
            promoted = model.versions.pop(v)
            if not purge:
                model.gone[v] = promoted
        for v in away:
            del model.gone[v]
        if here:
            model.settle(before)
        if purge and not model.versions and not model.gone:
            model.forget()

    @rule(name=st.sampled_from(NAMES), all_=st.booleans(), data=st.data())
    def restore(self, name: str, all_: bool, data: st.DataObject) -> None:
        model = self.models[name]
        version = None if all_ else data.draw(st.integers(1, model.last + 1))
        back = [v for v in model.gone if version in (None, v)]
        self.expect(None if back else NotFound, lambda: self.registry.restore("t", name, version))
        if back:
            before = model.all()
            model.versions |= {v: model.gone.pop(v) for v in back}
            for alias, points in list(model.lost.items()):
                left = model.living(points)
                if left is not None:
                    model.aliases.setdefault(alias, left)
                    del model.lost[alias]
            model.settle(before)

    @rule()
    def rebuild(self) -> None:
        """Changes nothing of a whole index."""
        self.run(self.registry.rebuild_index())

    @rule()
    def rebuild_lost(self) -> None:
        """Of a lost index only what no manifest knows is gone; numbers of purged versions may come again."""
        if all(max([0, *m.versions, *m.gone]) == m.last for m in self.models.values()) and not self.staged:
            self.run(self.redis.flushall())
            self.run(self.registry.rebuild_index())
            for model in self.models.values():
                model.aliases, model.ever = {}, bool(model.versions)
                model.forget()
                model.settle({}, undo=False)

    # what must hold

    @invariant()
    def the_registry_says_what_the_model_says(self) -> None:
        for name, model in self.models.items():
            if not model.versions:
                with pytest.raises(NotFound):
                    self.run(self.registry.get("t", name))
                continue
            adapter = self.run(self.registry.get("t", name))
            assert {v.version: v.promoted for v in adapter.versions} == model.versions
            assert adapter.aliases == model.all()
            assert adapter.pinned == (model.pin != (0, 0))
            for alias, points in model.all().items():
                answered = self.run(self.registry.resolve("t", name, alias, sticky="me")).version
                assert answered in ([points] if isinstance(points, int) else points)
        deleted = {
            d.name: [v.version.version for v in d.versions] for d in self.run(self.registry.deleted("t"))
        }
        assert deleted == {name: sorted(model.gone) for name, model in self.models.items() if model.gone}

    @invariant()
    def no_blob_that_a_manifest_names_is_removed(self) -> None:
        keys = set(self.objects.list_sync("tenants"))
        kept = set()
        for name, model in self.models.items():
            for version in model.versions | model.gone:
                key = f"tenants/t/adapters/{name}/{version:08d}.json"
                kept |= {key, *(blob.key for blob in decode_manifest(self.objects.get_sync(key)).files)}
            kept |= {deleted_key("t", name, version) for version in model.gone}
        kept |= {blob.key for blobs, _ in self.staged for blob in blobs}
        assert keys == kept, "and nothing else is left"

    @invariant()
    def the_history_tells_how_it_came_to_be(self) -> None:
        for name, model in self.models.items():
            if not model.ever:
                continue
            versions: set[int] = set()
            aliases: dict[str, AliasTarget] = {}
            for entry in reversed(self.run(self.registry.history("t", name))):
                assert entry.before == {alias: aliases.get(alias) for alias in entry.before}
                versions = versions.difference(entry.removed).union(entry.added)
                aliases |= {alias: points for alias, points in entry.after.items() if points is not None}
                for alias, points in entry.after.items():
                    if points is None:
                        del aliases[alias]
            assert versions == model.versions.keys()
            assert aliases == model.all()


def test_whatever_happens(valkey_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    Machine.url, Machine.folder = valkey_url, tmp_path
    examples = int(request.config.getoption("--registry-examples"))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

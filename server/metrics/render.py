"""Prometheus families from plain samples, as engine, Valkey and workers have them."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from prometheus_client import Metric

from server.metrics.family import Family

Labels = tuple[str, ...]
Values = dict[str, list[tuple[Labels, float]]]  # key -> (labels, value)
Counts = dict[str, list[tuple[Labels, list[int], float]]]  # key -> (labels, counts by bucket, sum)


def metrics_of(
    families: Mapping[str, Family], base: Labels, values: Values, counts: Counts | None = None
) -> Iterator[Metric]:
    """One Metric for each family. `base`: values of the labels that vLLM's metrics have in common."""
    for key, family in families.items():
        metric = Metric(family.name, family.help, family.kind)
        shared = base if family.name.startswith("vllm:") else ()
        for labels, value in values.get(key, ()):
            metric.add_sample(family.shown, _named(family, shared + tuple(labels)), value)
        for labels, buckets, total in (counts or {}).get(key, ()):
            _add_histogram(metric, family, _named(family, shared + tuple(labels)), buckets, total)
        yield metric


def with_zeros(families: Mapping[str, Family], values: Values, counts: Counts) -> tuple[Values, Counts]:
    """`values` and `counts` with 0 for each missing series of known labels: a rate needs a first value."""
    values = {key: [*found] for key, found in values.items()}
    counts = {key: [*found] for key, found in counts.items()}
    for key, family in families.items():
        known = {tuple(found[0]) for found in (*values.get(key, ()), *counts.get(key, ()))}
        for labels in product(*family.labels.values()):  # empty if a label has no fixed list of values
            if labels in known:
                continue
            if family.kind == "histogram":
                counts.setdefault(key, []).append((labels, [0] * (len(family.buckets) + 1), 0.0))
            else:
                values.setdefault(key, []).append((labels, 0.0))
    return values, counts


def merged(metrics: Iterable[Metric]) -> Iterator[Metric]:
    """`metrics` with those of one name joined."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        first = found.setdefault(metric.name, metric)
        if first is not metric:
            first.samples += metric.samples
    yield from found.values()


def _bound(value: float) -> str:
    """A bucket's upper bound as prometheus_client writes it."""
    return "+Inf" if value == float("inf") else str(float(value))


def _named(family: Family, labels: Labels) -> dict[str, str]:
    return dict(zip(family.all_labels, labels, strict=True))


def _add_histogram(
    metric: Metric, family: Family, labels: dict[str, str], buckets: list[int], total: float
) -> None:
    seen = 0
    for bound, count in zip((*family.buckets, float("inf")), buckets, strict=True):
        seen += count
        metric.add_sample(f"{family.name}_bucket", {**labels, "le": _bound(bound)}, seen)
    metric.add_sample(f"{family.name}_count", labels, seen)
    metric.add_sample(f"{family.name}_sum", labels, total)

"""What a panel is, and the queries most panels have: over the servers chosen in the dashboard."""

from typing import NamedTuple

RATE = "$__rate_interval"
ON = 'instance=~"$instance"'
NO_PROBES = 'route!~"/healthz|/readyz|/metrics"'
OF_TENANT = 'tenant=~"$tenant"'
OF_ADAPTER = f'{OF_TENANT}, adapter=~"$adapter"'


class Panel(NamedTuple):
    title: str
    text: str
    unit: str
    queries: tuple[tuple[str, str], ...]  # (PromQL, legend)
    kind: str = "timeseries"
    limits: tuple[float, float] | None = None  # yellow and red from here
    stacked: bool = False


def rate(name: str, labels: str = "", by: str = "") -> str:
    """Events a second, over the instances chosen."""
    inside = f"{ON}, {labels}" if labels else ON
    total = f"sum by ({by})" if by else "sum"
    return f"{total} (rate({name}{{{inside}}}[{RATE}]))"


def gauge(name: str, labels: str = "", by: str = "", over: str = "sum") -> str:
    inside = f"{ON}, {labels}" if labels else ON
    return f"{over} by ({by}) ({name}{{{inside}}})" if by else f"{over}({name}{{{inside}}})"


def quantile(q: float, name: str, by: str = "", labels: str = "") -> str:
    inside = f"{ON}, {labels}" if labels else ON
    keys = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({keys}) (rate({name}_bucket{{{inside}}}[{RATE}])))"


def mean(name: str, by: str = "") -> str:
    return f"{rate(f'{name}_sum', by=by)} / {rate(f'{name}_count', by=by)}"


def quantiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple((quantile(q, name), f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99))


def stat(title: str, text: str, unit: str, query: str, limits: tuple[float, float] | None = None) -> Panel:
    return Panel(title, text, unit, ((query, title),), "stat", limits)


def top(name: str, by: str, labels: str = OF_TENANT) -> str:
    """The ten busiest."""
    return f"topk(10, {rate(name, labels, by)})"

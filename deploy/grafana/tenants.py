"""Tenants and their adapters: who is slow, who is cold, who is failing?"""

from deploy.grafana.panels import OF_ADAPTER, OF_TENANT, ON, Panel, gauge, rate, top

TENANTS: dict[str, list[Panel]] = {
    "Tenants (the busiest by name, the rest as other)": [
        Panel(
            "Rows a second",
            "Sequences begun. Who uses the server most?",
            "short",
            ((top("polypeft_tenant_requests_total", "tenant"), "{{tenant}}"),),
        ),
        Panel(
            "Tokens generated",
            "A second, by tenant.",
            "short",
            ((top("polypeft_tenant_generation_tokens_total", "tenant"), "{{tenant}}"),),
        ),
        Panel(
            "Prompt tokens",
            "Read a second, by tenant.",
            "short",
            ((top("polypeft_tenant_prompt_tokens_total", "tenant"), "{{tenant}}"),),
        ),
        Panel(
            "Mean wait of a row",
            "Who is slow? Compare with the others: a long wait of one alone is its own queue.",
            "s",
            (
                (
                    f"{rate('polypeft_tenant_wait_seconds_total', OF_TENANT, 'tenant')} / "
                    f"{rate('polypeft_tenant_requests_total', OF_TENANT, 'tenant')}",
                    "{{tenant}}",
                ),
            ),
        ),
        Panel(
            "Failures",
            "Rows that ended in an error, a second.",
            "short",
            ((top("polypeft_tenant_failures_total", "tenant"), "{{tenant}}"),),
        ),
        Panel(
            "Share of tokens",
            "Of all tokens generated since the server started.",
            "percentunit",
            (
                (
                    f"sum by (tenant) (polypeft_tenant_generation_tokens_total{{{ON}, {OF_TENANT}}}) / "
                    f"on() group_left() sum(polypeft_tenant_generation_tokens_total{{{ON}}})",
                    "{{tenant}}",
                ),
            ),
            "bargauge",
        ),
    ],
    "Fairness": [
        Panel(
            "Fairness gap",
            "The largest difference of what two waiting tenants were served, over its bound. Above 1: memory "
            "is short, or the bound is broken.",
            "percentunit",
            ((gauge("polypeft_fairness_gap", by="instance", over="max"), "{{instance}}"),),
            limits=(0.8, 1),
        ),
    ],
    "Adapters (the busiest by name, the rest as other)": [
        Panel(
            "Rows of an adapter",
            "Sequences a second that use it.",
            "short",
            (
                (
                    top("polypeft_adapter_requests_total", "tenant, adapter", OF_ADAPTER),
                    "{{tenant}} {{adapter}}",
                ),
            ),
        ),
        Panel(
            "Tokens of an adapter",
            "Generated a second.",
            "short",
            (
                (
                    top("polypeft_adapter_generation_tokens_total", "tenant, adapter", OF_ADAPTER),
                    "{{tenant}} {{adapter}}",
                ),
            ),
        ),
        Panel(
            "Cold starts",
            "Rows a second that waited for the adapter's load. Who is cold?",
            "short",
            (
                (
                    top("polypeft_adapter_cold_starts_total", "tenant, adapter", OF_ADAPTER),
                    "{{tenant}} {{adapter}}",
                ),
            ),
        ),
        Panel(
            "Mean wait for the load",
            "Of the rows that waited.",
            "s",
            (
                (
                    f"{rate('polypeft_adapter_wait_seconds_total', OF_ADAPTER, 'tenant, adapter')} / "
                    f"{rate('polypeft_adapter_cold_starts_total', OF_ADAPTER, 'tenant, adapter')}",
                    "{{tenant}} {{adapter}}",
                ),
            ),
        ),
        Panel(
            "Failures of an adapter",
            "Rows that ended in an error, a second. Who is failing?",
            "short",
            (
                (
                    top("polypeft_adapter_failures_total", "tenant, adapter", OF_ADAPTER),
                    "{{tenant}} {{adapter}}",
                ),
            ),
        ),
        Panel(
            "Cold share",
            "Rows that waited for the load, of all rows since the server started.",
            "percentunit",
            (
                (
                    f"sum by (tenant, adapter) (polypeft_adapter_cold_starts_total{{{ON}, {OF_ADAPTER}}}) / "
                    f"sum by (tenant, adapter) (polypeft_adapter_requests_total{{{ON}, {OF_ADAPTER}}})",
                    "{{tenant}} {{adapter}}",
                ),
            ),
            "bargauge",
        ),
    ],
}

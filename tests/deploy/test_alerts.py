"""Every alert fires on its fault and is quiet without it, by promtool; each is in the runbook."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus import DEPLOY, load, promtool, rules

ALERTS = {rule["alert"]: rule for rule in rules("alerts")}
FAULTS: dict[str, dict[str, Any]] = load(DEPLOY / "prometheus" / "faults.yaml")
FILES = [str(DEPLOY / "prometheus" / name) for name in ("rules.yaml", "alerts.yaml")]


def case(alert: str, kind: str) -> dict[str, Any]:
    """promtool's test of one alert under one set of series."""
    rule, fault = ALERTS[alert], FAULTS[alert]
    fires = {"exp_labels": rule["labels"] | fault.get("labels", {}), "exp_annotations": rule["annotations"]}
    return {
        "interval": "1m",
        "name": f"{alert}, {kind}",
        "input_series": [{"series": name, "values": str(v)} for name, v in fault[kind].items()],
        "alert_rule_test": [
            {
                "alertname": alert,
                "eval_time": fault["at"],
                "exp_alerts": [fires] if kind == "fault" else [],
            }
        ],
    }


def check(tmp_path: Path, tests: list[dict[str, Any]]) -> None:
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": FILES, "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", str(path))


@pytest.mark.parametrize("alert", ALERTS)
def test_it_fires_on_its_fault_and_not_without(tmp_path: Path, alert: str) -> None:
    assert alert in FAULTS, "deploy/prometheus/faults.yaml must say what raises it"
    check(tmp_path, [case(alert, "fault"), case(alert, "quiet")])


def test_a_wrong_expectation_is_seen(tmp_path: Path) -> None:
    """promtool does look: the quiet series under the name of the fault must fail."""
    alert = "PolypeftEngineRestarts"
    swapped = case(alert, "fault") | {"input_series": case(alert, "quiet")["input_series"]}
    with pytest.raises(AssertionError, match="FAILED"):
        check(tmp_path, [swapped])


def test_no_fault_is_of_an_alert_that_is_gone() -> None:
    assert FAULTS.keys() == ALERTS.keys()


def test_rules_and_scrape_configuration_are_valid(tmp_path: Path) -> None:
    promtool("check", "rules", *FILES)
    config = load(DEPLOY / "prometheus" / "prometheus.yaml")
    config["rule_files"] = FILES
    token = tmp_path / "token"
    token.write_text("token")
    for job in config["scrape_configs"]:
        if "authorization" in job:
            job["authorization"]["credentials_file"] = str(token)
    path = tmp_path / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    promtool("check", "config", str(path))


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_has_its_paragraph(alert: str) -> None:
    """Under the anchor that the alert links to."""
    text = (DEPLOY / "runbook.md").read_text()
    headings = [h.strip().lower() for h in re.findall(r"^### (.+)$", text, re.MULTILINE)]
    assert ALERTS[alert]["annotations"]["runbook"] == f"deploy/runbook.md#{alert.lower()}"
    assert alert.lower() in headings

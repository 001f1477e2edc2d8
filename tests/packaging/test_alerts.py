"""The examples of alerts are about metrics that the server has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from fedtune.deploy.metrics import Metrics
from fedtune.deploy.status import Status

ALERTS = Path(__file__).resolve().parent.parent.parent / "server" / "alerts.yml"


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    assert group["name"] == "fedtune"
    found: list[dict[str, Any]] = group["rules"]
    return found


def served() -> dict[str, set[str]]:
    """Every sample that a scrape has, with its labels."""
    status = Status(["clinic-0"], 3, [], 60.0)
    text = Metrics(lambda: status.snapshot, {"server.crt": 0.0}).text().decode()
    families = text_string_to_metric_families(text)
    return {s.name: set(s.labels) for family in families for s in family.samples}


def test_each_alert_is_of_metrics_that_there_are() -> None:
    samples = served()
    for rule in rules():
        named = set(re.findall(r"fedtune_\w+", rule["expr"]))
        assert named <= set(samples), rule["alert"]
        labels = {label for name in named for label in samples[name]}
        said = f"{rule['annotations']} {rule['expr']}"
        used = set(re.findall(r"\$labels\.(\w+)|by \((\w+)\)", said))
        assert {label for pair in used for label in pair if label} <= labels, rule["alert"]


def test_alerts_are_as_prometheus_takes_them() -> None:
    allowed = {"alert", "expr", "for", "labels", "annotations"}
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 4
    for rule in rules():
        assert set(rule) <= allowed
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "0s"))
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert set(rule["annotations"]) == {"summary", "description"}

"""The Grafana dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from backends import Prefer, serving

from steersman.runtime.deployment.release import release_of

DASHBOARD = Path(__file__).parents[2] / "configs" / "grafana" / "steersman.json"


async def test_every_metric_of_the_dashboard_is_exposed() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {name for p in panels for t in p.get("targets", []) for name in re.findall(r"steersman_\w+", t["expr"])}
    async with serving(Prefer(0, 1)) as s:
        deployment = s.gateway.scheduler.deployment
        assert deployment is not None
        deployment.start_shadow(release_of(Prefer(1, 0)))
        text = s.gateway.metrics.text().decode()
    exposed = set(re.findall(r"^# TYPE (steersman_\w+) (\w+)$", text, re.M))
    names = {name for name, _ in exposed} | {f"{name}_bucket" for name, kind in exposed if kind == "histogram"}
    assert asked
    assert asked - names == set()

"""From what the user asked for to a plan, checked before anything is played."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from steersman.runtime.config import apply_sets, validate
from steersman.runtime.errors import UserError
from steersman.training.benchmark.budget import FULL, QUICK, QUICK_SCENARIOS, Budget
from steersman.training.benchmark.contenders import given
from steersman.training.benchmark.folder import Plan
from steersman.training.benchmark.scenario import Scenario, Setting, load_scenario, shipped


class Asked(NamedTuple):
    """The command's arguments."""

    scenarios: tuple[str, ...] = ()
    workload: str | None = None
    fleet: str | None = None
    policies: tuple[str, ...] = ()
    quick: bool = False
    seeds: int | None = None
    training_seeds: int | None = None

    @property
    def own(self) -> bool:
        """Whether there is a scenario of the user's own files."""
        return self.workload is not None or self.fleet is not None

    @property
    def name(self) -> str:
        """For the folder of results."""
        names = [Path(spec).stem for spec in self.scenarios]
        if self.own:
            names.append(Path(self.workload or self.fleet or "").stem)
        return names[0] if len(names) == 1 else "several" if names else "quick" if self.quick else "all"

    @property
    def budget(self) -> Budget:
        changes = {"seeds": self.seeds, "training_seeds": self.training_seeds}
        return (QUICK if self.quick else FULL).model_copy(
            update={key: value for key, value in changes.items() if value is not None}
        )


def make_plan(asked: Asked, traces: Path | None, sets: Sequence[str], command: str) -> Plan:
    """What is to be played. Without any scenario named, shipped ones whose traces are missing are left out.

    sets: changes to every scenario: key.path=value.

    Raises:
        UserError: a scenario, a file or a policy is wrong.
    """
    everything = not asked.scenarios and not asked.own
    specs = asked.scenarios or (() if asked.own else QUICK_SCENARIOS if asked.quick else tuple(shipped()))
    scenarios = [load_scenario(spec, sets) for spec in specs]
    if asked.own:
        scenarios.append(own_scenario(asked, sets))
    given(asked.policies, [])
    kept, skipped = [], []
    for scenario in scenarios:
        try:
            kept.append(Setting.load(scenario, traces).check().scenario)
        except UserError as error:
            if not everything or "trace file" not in str(error):
                raise
            skipped.append(f"{scenario.name} is left out: {error}")
    if traces is None and os.environ.get("STEERSMAN_TRACES"):
        traces = Path(os.environ["STEERSMAN_TRACES"])
    kept, bases = with_bases(kept, traces)
    return Plan(
        scenarios=kept,
        bases=bases,
        budget=asked.budget,
        policies=list(asked.policies),
        traces=str(traces.resolve()) if traces is not None else None,
        command=command,
        skipped=skipped,
    )


def own_scenario(asked: Asked, sets: Sequence[str]) -> Scenario:
    """A scenario of the user's workload or fleet."""
    data = {
        "name": Path(asked.workload or asked.fleet or "").stem,
        "description": f"{asked.workload or 'default'} on {asked.fleet or 'default'}.",
        "workload": asked.workload or "default",
        "fleet": asked.fleet or "default",
    }
    return validate(Scenario, apply_sets(data, sets), "--set")


def with_bases(scenarios: Sequence[Scenario], traces: Path | None) -> tuple[list[Scenario], list[Scenario]]:
    """The scenarios with `trained_on` as a scenario's name, and those named that are not among them.

    Raises:
        UserError: two scenarios have one name, or one is trained on a scenario that trains nothing itself.
    """
    known = {scenario.name: scenario for scenario in scenarios}
    if len(known) < len(scenarios):
        raise UserError("two scenarios have the same name; give one of them another by the key `name`")
    named, bases = [], {}
    for scenario in scenarios:
        if scenario.trained_on is None:
            named.append(scenario)
            continue
        base = known.get(scenario.trained_on) or load_scenario(scenario.trained_on)
        if base.trained_on is not None or base.name == scenario.name:
            raise UserError(
                f"scenario {scenario.name!r}: trained_on {scenario.trained_on!r} is a scenario that trains no policies "
                "of its own; name one without trained_on"
            )
        if base.name not in known:
            bases[base.name] = Setting.load(base, traces).check().scenario
        named.append(scenario.model_copy(update={"trained_on": base.name}))
    return named, list(bases.values())

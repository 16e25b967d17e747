"""A scenario: who sends, what serves, and whose policies play. Files in configs/benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from steersman.runtime.config import Model, apply_sets, read_yaml, validate
from steersman.runtime.configs import config_files, find_config
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Split, Workload, load_workload
from steersman.training.drawn import Recipe, drawn
from steersman.training.variants import told_alike


class Scenario(Model):
    """A scenario file."""

    name: str = Field(default="", pattern=r"^[\w .-]*$", description="default: the file's name")
    description: str = Field(description="one sentence")
    workload: str = Field(default="default", description="a workload's name or file")
    fleet: str = Field(default="default", description="a fleet's name or file")
    workload_set: list[str] = Field(default=[], description="changes to the workload file: key.path=value")
    fleet_set: list[str] = Field(default=[], description="changes to the fleet file: key.path=value")
    trained_on: str | None = Field(
        default=None, description="the scenario whose tuned and learned policies play; default: tuned and trained here"
    )
    episode_s: float | None = Field(default=None, gt=0, description="length of episodes; default: the workload's")
    headline: float = Field(
        default=1.0,
        gt=0,
        description="load of attainment, latencies, fairness and cost, times the best heuristic's capacity",
    )
    slo_blind: bool = Field(
        default=False, description="policies are told the median SLO for every tenant, and judged by the true ones"
    )


def load_scenario(spec: str, sets: Sequence[str] = ()) -> Scenario:
    """The scenario in a file, or in the shipped one of that name.

    Raises:
        UserError: there is none, or it is wrong.
    """
    path = find_config("benchmarks", spec)
    scenario = validate(Scenario, apply_sets(read_yaml(path), sets), str(path))
    return scenario if scenario.name else scenario.model_copy(update={"name": path.stem})


def shipped() -> list[str]:
    """Names of the shipped scenarios: those that train first, then those that use their policies."""
    found = [load_scenario(str(path)) for path in config_files("benchmarks")]
    return [s.name for s in sorted(found, key=lambda s: (s.trained_on or "", s.name))]


class Setting:
    """A scenario with its files read."""

    def __init__(self, scenario: Scenario, workload: Workload, fleet: Fleet) -> None:
        self.scenario, self.workload, self.fleet = scenario, workload, fleet

    @classmethod
    def load(cls, scenario: Scenario, traces: Path | None) -> Setting:
        """Read the files.

        Raises:
            UserError: with what is wrong, in which key of which file.
        """
        return cls(
            scenario,
            load_workload(find_config("workloads", scenario.workload), scenario.workload_set, traces),
            load_fleet(find_config("fleets", scenario.fleet), scenario.fleet_set),
        )

    def check(self) -> Setting:
        """Draw an episode, to find what is wrong before anything is played.

        Raises:
            UserError: a trace is missing or wrong, or requests fit no replica.
        """
        self.draw(0, 1.0)
        if self.workload.block_tokens % self.fleet.block_tokens:
            raise UserError(
                f"scenario {self.scenario.name!r}: the workload's block_tokens {self.workload.block_tokens} must be a "
                f"multiple of the fleet's {self.fleet.block_tokens}"
            )
        return self

    def draw(self, seed: int, load: float, split: Split = "held-out") -> Requests:
        """An episode, with the SLOs that policies are told."""
        requests = drawn(self.workload, self.fleet, Recipe(seed, load, split, self.scenario.episode_s))
        if self.scenario.slo_blind:
            return replace(requests, tenants=told_alike(requests.tenants), judged=requests.tenants)
        return requests


def raw(scenario: Scenario) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workload file and the fleet file as they are used: with the scenario's changes."""
    return (
        apply_sets(read_yaml(find_config("workloads", scenario.workload)), scenario.workload_set),
        apply_sets(read_yaml(find_config("fleets", scenario.fleet)), scenario.fleet_set),
    )

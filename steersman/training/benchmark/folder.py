"""The folder of a benchmark: what was asked, and a file for every finished part.

benchmarks/<name>-<stamp>/
    benchmark.json          the plan: scenarios, budget, given policies, command
    <scenario>/             workload.yaml and fleet.yaml as used, TensorBoard curves of its searches
        stages/*.json       finished parts: an interrupted benchmark repeats none of them
        checkpoints/        of the searches
    results.json            what --json prints
    report.html
    tensorboard/            the comparison
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from pydantic import Field

from steersman.runtime.config import Model, validate
from steersman.runtime.errors import UserError
from steersman.training.benchmark.budget import Budget
from steersman.training.benchmark.scenario import Scenario, raw
from steersman.training.run import stamped, write_json


class Plan(Model):
    """What a benchmark plays."""

    scenarios: list[Scenario] = Field(min_length=1)
    bases: list[Scenario] = Field(default=[], description="trained for others, but not played themselves")
    budget: Budget = Budget()
    policies: list[str] = Field(default=[], description="given ones, as `resolve` takes them")
    traces: str | None = None
    command: str = "steersman benchmark"
    skipped: list[str] = Field(default=[], description="sentences: which scenarios were left out, and why")


class Folder:
    """An open folder of results."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan

    @classmethod
    def create(cls, root: Path, name: str, plan: Plan) -> Folder:
        """A new folder under `root`, named by `name` and the time, with copies of the files that are used.

        Raises:
            UserError: it cannot be written.
        """
        path = root / stamped(name)
        try:
            path.mkdir(parents=True, exist_ok=False)
            for scenario in [*plan.scenarios, *plan.bases]:
                (path / scenario.name).mkdir()
                for file, data in zip(("workload", "fleet"), raw(scenario), strict=True):
                    text = yaml.safe_dump(data, sort_keys=False)
                    (path / scenario.name / f"{file}.yaml").write_text(text, encoding="utf-8")
            write_json(path / "benchmark.json", plan.model_dump(mode="json"))
        except OSError as error:
            raise UserError(f"{path}: the folder of results cannot be written: {error.strerror}") from error
        return cls(path, plan)

    @classmethod
    def open(cls, path: Path) -> Folder:
        """An existing folder, to go on with.

        Raises:
            UserError: it is none, or its plan is damaged.
        """
        file = path / "benchmark.json"
        if not file.is_file():
            raise UserError(
                f"{path}: not a folder of results (it has no benchmark.json); name one that the benchmark printed"
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{file}: damaged; start the benchmark anew") from None
        return cls(path, validate(Plan, data, str(file)))

    @property
    def traces(self) -> Path | None:
        return Path(self.plan.traces) if self.plan.traces else None

    def copied(self, scenario: Scenario) -> Scenario:
        """The scenario with the copies of its files in place of the originals and of the changes to them."""
        files = {file: str(self.path / scenario.name / f"{file}.yaml") for file in ("workload", "fleet")}
        return scenario.model_copy(update={**files, "workload_set": [], "fleet_set": []})

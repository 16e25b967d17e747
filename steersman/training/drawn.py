"""Episodes that know how they were drawn: another process draws the same bytes, and none need be sent to it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from steersman.runtime.draw import draw
from steersman.runtime.fleet import Fleet
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Split, Workload


class Recipe(NamedTuple):
    """The arguments of `runtime.draw.draw` beside workload and fleet."""

    seed: int
    load: float
    split: Split
    duration_s: float | None

    def draw(self, workload: Workload, fleet: Fleet) -> Requests:
        return draw(workload, fleet, self.seed, load=self.load, split=self.split, duration_s=self.duration_s)


@dataclass(frozen=True)
class Drawn(Requests):
    """An episode with its recipe. A changed copy (`dataclasses.replace`) has none."""

    recipe: Recipe | None = field(default=None, init=False, compare=False)
    workload: Workload | None = field(default=None, init=False, compare=False)


def drawn(workload: Workload, fleet: Fleet, recipe: Recipe) -> Drawn:
    """The episode of a recipe.

    Raises:
        UserError: as `runtime.draw.draw`.
    """
    requests = recipe.draw(workload, fleet)
    made = Drawn(**{column.name: getattr(requests, column.name) for column in fields(Requests)})
    object.__setattr__(made, "recipe", recipe)
    object.__setattr__(made, "workload", workload)
    return made

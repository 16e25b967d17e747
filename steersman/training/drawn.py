"""Episodes that know how they were drawn: another process draws the same bytes, and none need be sent to it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from steersman.runtime.draw import draw
from steersman.runtime.fleet import Fleet
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Split, Workload
from steersman.training.variants import variant


class Recipe(NamedTuple):
    """How an episode of a workload on a fleet is drawn; arguments as those of `runtime.draw.draw`."""

    seed: int
    load: float
    split: Split
    duration_s: float | None
    variant: int | None = None  # of workload and fleet; None: as they are
    guessed: bool = False  # a variant's: policies are told guesses of the SLOs


@dataclass(frozen=True)
class Drawn(Requests):
    """An episode with its recipe, and the fleet that it is to be played on. A changed copy (`replace`) has neither."""

    recipe: Recipe | None = field(default=None, init=False, compare=False)
    workload: Workload | None = field(default=None, init=False, compare=False)
    fleet: Fleet | None = field(default=None, init=False, compare=False)


def drawn(workload: Workload, fleet: Fleet, recipe: Recipe) -> Drawn:
    """The episode of a recipe.

    Raises:
        UserError: as `runtime.draw.draw`.
    """
    played, on, told = workload, fleet, None
    if recipe.variant is not None:
        played, on, told = variant(workload, fleet, recipe.variant, recipe.guessed)
    requests = draw(played, on, recipe.seed, load=recipe.load, split=recipe.split, duration_s=recipe.duration_s)
    columns = {column.name: getattr(requests, column.name) for column in fields(Requests)}
    if told is not None:
        columns |= {"tenants": told, "judged": requests.tenants}
    made = Drawn(**columns)
    for name, value in (("recipe", recipe), ("workload", workload), ("fleet", on)):
        object.__setattr__(made, name, value)
    return made

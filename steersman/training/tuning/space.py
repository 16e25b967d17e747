"""The tuning file: what varies, over which ranges, and with which budget."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steersman.agents.policies import resolve
from steersman.runtime.config import Model, apply_sets, read_yaml, validate
from steersman.runtime.configs import find_config
from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest
from steersman.training.config import TrainingConfig

WEIGHT = "weight."  # of a tenant, in the rewards that it brings
TRIALS = {"trials", "rounds", "episodes", "scheduler", "seed"}  # keys of which the search over a heuristic has none


class Range(Model):
    """One of the four."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(default=None, description="both ends included")
    choice: list[Any] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Range:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError("give one of uniform, loguniform, integer and choice")
        (kind, ends), *_ = given.items()
        if kind != "choice" and not (ends[0] < ends[1] and (kind != "loguniform" or ends[0] > 0)):
            raise ValueError("expected [low, high], low below high, and above 0 for loguniform")
        return self

    def domain(self) -> Any:
        """As Ray Tune takes it."""
        from ray import tune

        if self.choice is not None:
            return tune.choice(self.choice)
        if self.integer is not None:
            return tune.randint(self.integer[0], self.integer[1] + 1)
        if self.loguniform is not None:
            return tune.loguniform(*self.loguniform)
        assert self.uniform is not None
        return tune.uniform(*self.uniform)


class TuningConfig(Model):
    """A tuning file. It tunes a heuristic's numbers where `policy` is given, else a training's."""

    description: str
    policy: str | None = Field(
        default=None,
        description="a heuristic; it is tuned on workload, fleet, loads and seed of `training`, with the budget of its "
        "`search`",
    )
    training: str = Field(default="default", description="a training file, or the name of a shipped one")
    set: list[str] = Field(default=[], description="changes to it: key.path=value")
    space: dict[str, Range] = Field(
        default={},
        description="of a heuristic: its parameters (default: all, over their own ranges); of a training: keys of its "
        "file, and weight.TENANT",
    )
    trials: int = Field(default=16, ge=1)
    rounds: int = Field(default=9, ge=1, description="parts of a trial; it is judged after each")
    episodes: int = Field(default=6, ge=1, description="that judge a trial after a round")
    scheduler: Literal["asha", "pbt"] = Field(
        default="asha", description="asha ends the worse two thirds early; pbt, for ppo, lets the worse copy the better"
    )
    seed: int = 0

    def settings(self) -> TrainingConfig:
        """The training that trials vary.

        Raises:
            UserError: there is none of that name, or a change is wrong.
        """
        path = find_config("training", self.training)
        return validate(TrainingConfig, apply_sets(read_yaml(path), self.set), str(path))

    def numbers(self) -> dict[str, tuple[float, float]]:
        """The ranges of the heuristic's parameters that are searched.

        Raises:
            UserError: there is no such heuristic or parameter, or it has none, or a range is no `uniform` one.
        """
        assert self.policy is not None
        params = resolve(self.policy).params
        if not params:
            raise UserError(f"policy {self.policy!r} has no parameters to tune")
        found = {}
        for key, one in self.space.items():
            if key not in params:
                raise UserError(f"policy {self.policy!r} has no parameter {key!r}; {nearest(key, list(params))}")
            if one.uniform is None:
                raise UserError(f"space.{key}: a heuristic's numbers are searched in ranges; give uniform")
            found[key] = one.uniform
        return found or {name: (param.low, param.high) for name, param in params.items()}


def load_tuning(spec: str, sets: list[str]) -> TuningConfig:
    """The tuning in a file, or in the shipped one of that name, checked.

    Raises:
        UserError: with what is wrong, in which key.
    """
    path = find_config("tuning", spec)
    config = validate(TuningConfig, apply_sets(read_yaml(path), sets), str(path))
    settings = config.settings()
    if config.policy is not None:
        config.numbers()
        if trials := sorted(config.model_fields_set & TRIALS):
            raise UserError(
                f"{path}: {trials[0]!r} is for trainings; a heuristic has the budget of search.generations, in `set`"
            )
        return config
    if not config.space:
        raise UserError(f"{path}: a tuning file needs `space`, or a heuristic in `policy`")
    varied(settings, {key: _inside(one) for key, one in config.space.items()})
    if config.scheduler == "pbt" and settings.algorithms[0] not in ("ppo", "maskable-ppo"):
        raise UserError(f"{path}: 'scheduler': pbt is for ppo and maskable-ppo; give asha")
    return config


def varied(settings: TrainingConfig, point: dict[str, Any]) -> TrainingConfig:
    """The training at a point of the space; weights of tenants stand outside.

    Raises:
        UserError: a key means nothing, or a value is not allowed.
    """
    data = settings.model_dump(mode="json")
    for key, value in point.items():
        if not key.startswith(WEIGHT):
            apply_sets(data, [f"{key}=null"])
            *parents, last = key.split(".")
            node = data
            for parent in parents:
                node = node[parent]
            node[last] = value
    return validate(TrainingConfig, data, "space")


def _inside(one: Range) -> Any:
    """A value of the range."""
    if one.choice is not None:
        return one.choice[0]
    ends = one.integer or one.uniform or one.loguniform
    assert ends is not None
    return ends[0]

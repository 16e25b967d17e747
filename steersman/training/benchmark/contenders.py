"""The policies that compete, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from rich.console import Console

from steersman.agents.policies import heuristics, resolve
from steersman.runtime.network import compiled_policy
from steersman.runtime.policy import CompiledPolicy
from steersman.training.benchmark.folder import Folder
from steersman.training.benchmark.learning import learn, training_config
from steersman.training.benchmark.scenario import Scenario
from steersman.training.benchmark.tuning import tuning_config, write_tuning
from steersman.training.guesses import prepare_guesses
from steersman.training.job import TRAINING, Job
from steersman.training.objective import ArenaMaker
from steersman.training.run import Run
from steersman.training.stages import prepare, size
from steersman.training.tuned import tune_heuristic

LEARNED = "learned"


class Contender(NamedTuple):
    """A policy that competes. A learned one has a member for each training seed, with names of their own."""

    name: str
    kind: Literal["learned", "heuristic"]
    form: Literal["shipped", "tuned", "trained", "given"]
    evaluations: int  # simulated episodes that its numbers cost, teachers included; the mean over members
    members: tuple[CompiledPolicy, ...]


def shipped() -> list[Contender]:
    """Every heuristic with the numbers that it comes with."""
    return [_alone(label(name, policy), policy, "shipped") for name, policy in heuristics().items()]


def label(name: str, policy: CompiledPolicy) -> str:
    """The name in tables of a heuristic as it comes."""
    return f"{name}, as shipped" if policy.params else name


def given(specs: Sequence[str], taken: Sequence[str]) -> list[Contender]:
    """The user's own policies; none has a name that is `taken`.

    Raises:
        UserError: there is no such policy.
    """
    made: list[Contender] = []
    for spec in dict.fromkeys(specs):
        policy = resolve(spec)
        heuristic = ":" in spec or spec.partition("?")[0] in heuristics()
        name = f"{spec if heuristic else policy.name}, given"
        if name in [*taken, *(c.name for c in made)]:
            name = f"{spec}, given"
        kind: Literal["learned", "heuristic"] = "heuristic" if heuristic else "learned"
        made.append(Contender(name, kind, "given", 0, (policy.with_values(policy.values, name),)))
    return made


def sized(scenario: Scenario, folder: Folder, console: Console, arenas: ArenaMaker) -> float:
    """The load, times the workload's rate, that the best heuristic as shipped carries on training episodes.

    Raises:
        UserError: the fleet carries the workload at no load, or at any.
    """
    job = _job(scenario, folder, console, arenas)
    try:
        with console.status(f"{scenario.name}: how much the fleet carries …"):
            return float(job.run.once("sizing", lambda: size(job))["load"])
    finally:
        job.close()


def prepared(scenario: Scenario, folder: Folder, console: Console, arenas: ArenaMaker) -> list[Contender]:
    """Tuned heuristics and learned policies for a scenario.

    Every tunable heuristic has the whole budget. The learned policies' teacher, who sends, holds and sheds, is taken as
    it was after a third of the budget, and they have the rest: nobody had more.
    """
    budget = folder.plan.budget
    job = _job(scenario, folder, console, arenas)
    write_tuning(folder.path / scenario.name, job.config)
    title, searched = f"{scenario.name}: ", []
    try:
        with console.status(f"{title}how much the fleet and its variants carry …"):
            best = resolve(prepare(job)["heuristic"])
            if budget.training_seeds:
                prepare_guesses(job, best)
        pool = job.pool(TRAINING, budget.pool)
        for name, policy in heuristics().items():
            if not policy.params:
                continue
            stored = job.run.once(f"tune-{name}", lambda name=name: tune_heuristic(job, name, pool, title=title))  # type: ignore[misc]
            own = policy.with_values(np.array(stored["values"]), f"{name}, tuned")
            searched.append(_alone(own.name, own, "tuned", stored["episodes"]))
        if not budget.training_seeds:
            return searched
        # The first generations of its tuning once more, from its checkpoint: nothing is played.
        name, first = job.config.imitation.teacher, budget.teacher_generations
        taught = job.run.once(
            "teacher", lambda: tune_heuristic(job, name, pool, generations=first, title=f"{title}the teacher, ")
        )
        teacher = resolve(name).with_values(np.array(taught["values"]))
    finally:
        job.close()
    members, evaluations = [], []
    for seed in range(budget.training_seeds):
        learned, episodes = _learned(scenario, folder, console, arenas, teacher, job, seed)
        members.append(learned)
        evaluations.append(taught["episodes"] + episodes)
    return [*searched, Contender(LEARNED, "learned", "trained", round(float(np.mean(evaluations))), tuple(members))]


def _learned(
    scenario: Scenario,
    folder: Folder,
    console: Console,
    arenas: ArenaMaker,
    teacher: CompiledPolicy,
    sized: Job,
    seed: int,
) -> tuple[CompiledPolicy, int]:
    console.print(f"{scenario.name}: learning from {teacher.name}, training seed {seed}", highlight=False)
    copied = folder.copied(scenario)
    config = training_config(folder.plan.budget, copied.workload, copied.fleet, scenario.episode_s, seed)
    job = Job(Run(folder.path / scenario.name / f"training-{seed}", config), console, folder.traces, arenas)
    try:
        job.load, job.variants, job.guessed = sized.load, sized.variants, sized.guessed
        found = job.run.once("learn", lambda: learn(job, teacher, seed))
    finally:
        job.close()
    weights = np.array(found["weights"])
    return compiled_policy(job.config.architecture, weights, f"{LEARNED} #{seed}"), int(found["episodes"])


def _job(scenario: Scenario, folder: Folder, console: Console, arenas: ArenaMaker) -> Job:
    """What sizing and tuning work with, in the scenario's folder."""
    copied = folder.copied(scenario)
    config = tuning_config(folder.plan.budget, copied.workload, copied.fleet, scenario.episode_s, heuristics())
    return Job(Run(folder.path / scenario.name, config), console, folder.traces, arenas)


def _alone(
    name: str, policy: CompiledPolicy, form: Literal["shipped", "tuned", "given"], evaluations: int = 0
) -> Contender:
    return Contender(name, "heuristic", form, evaluations, (policy.with_values(policy.values, name),))

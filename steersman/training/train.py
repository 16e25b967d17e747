"""The training job, top to bottom: size the load, tune the heuristics, learn, select, compare, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from steersman.agents.policies import resolve, spec_of
from steersman.runtime.errors import UserError
from steersman.runtime.policy import CompiledPolicy
from steersman.training import ppo
from steersman.training.evaluate import Comparison, compare
from steersman.training.export import export_bundle
from steersman.training.guesses import NAME, learn_guesses, prepare_guesses
from steersman.training.job import HELD_OUT, SELECTION, TRAINING, VALIDATION, Job
from steersman.training.objective import ArenaMaker, local_arena
from steersman.training.paired import Paired
from steersman.training.report import comparison_json, comparison_table
from steersman.training.run import Run, write_json
from steersman.training.stages import OPTIMISERS, imitate_policy, prepare, rivals, search_scorer
from steersman.training.tuned import tune_heuristic

Learner = Callable[[Job, str, np.ndarray | None], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    learned: CompiledPolicy
    best_heuristic: str  # as `resolve` takes it
    comparison: Comparison  # on held-out episodes
    paired: Paired  # the learned policy's worth against the best heuristic's
    bundle: Path


def train(
    run: Run,
    console: Console,
    traces: Path | None = None,
    command: str = "steersman train",
    arenas: ArenaMaker = local_arena,
) -> Result:
    """Run, or go on with, the training that `run` describes. What its folder already has is not repeated.

    arenas: where episodes are played; results do not depend on it.

    Raises:
        UserError: workload, fleet or a policy's name is wrong, or the fleet cannot carry the workload at any load.
    """
    torch.set_num_threads(1)
    torch.manual_seed(run.config.seed)
    job = Job(run, console, traces, arenas)
    try:
        return _train(job, command)
    finally:
        job.close()


def _train(job: Job, command: str) -> Result:
    run, config, console, arena, dashboard = job.run, job.config, job.console, job.arena, job.dashboard
    console.print(f"[bold]{config.workload}[/] on [bold]{config.fleet}[/]  →  {run.folder}", highlight=False)
    known = rivals(job)
    with console.status("compiling the simulator (half a minute, once for each version) and sizing the load …"):
        sized = prepare(job)
        prepare_guesses(job, resolve(sized["heuristic"]))
    console.print(
        f"{sized['heuristic']}, the best heuristic as shipped, carries {sized['rps']:.1f} req/s within the SLOs; "
        f"training at {', '.join(f'{x:g}' for x in config.loads)} times that",
        highlight=False,
    )
    pool = job.pool(TRAINING, config.search.pool)

    # 1. Tunable heuristics get the budget that the learned policy gets.
    for name in config.tune:
        stored = run.once(f"tune-{name}", lambda name=name: tune_heuristic(job, name, pool))  # type: ignore[misc]
        known[f"{name}-tuned"] = resolve(name).with_values(np.array(stored["values"]), f"{name}-tuned")
    with console.status("choosing the best heuristic on validation episodes …"):
        values = arena.values(list(known.values()), job.validation, seed=VALIDATION)
    best = list(known.values())[int(values.argmax())]
    dashboard.reference(compare([best], job.validation, arena, VALIDATION).summaries[0], float(values.max()))
    console.print(f"best heuristic on validation: [bold]{best.name}[/], worth {values.max():.4f}", highlight=False)

    # 2. The scorer imitates one that uses all that it may do: send, hold, shed …
    teacher = config.imitation.teacher
    teacher_policy = known.get(f"{teacher}-tuned") or resolve(teacher)
    cloned = run.once("imitation", lambda: imitate_policy(job, teacher_policy))
    start = np.array(cloned["weights"])
    candidates = {"imitation": start}

    # 3. … and improves on it, by search and by PPO.
    for algorithm in config.algorithms:
        if algorithm in OPTIMISERS:
            budget = config.search.population * config.search.generations * config.search.episodes
            dashboard.phase(algorithm, budget)
            found = run.once(algorithm, lambda algorithm=algorithm: search_scorer(job, algorithm, start, pool))  # type: ignore[misc]
        else:
            dashboard.phase(algorithm, config.ppo.steps)
            first = {"best": best_of(job, candidates), "imitation": start, "scratch": None}[config.ppo.start]
            learn = learner(algorithm)
            found = run.once(algorithm, lambda learn=learn, name=algorithm, first=first: learn(job, name, first))  # type: ignore[misc]
        candidates[algorithm] = np.array(found["weights"])
    dashboard.phase("")

    # 4. Validation episodes choose …
    policies = [job.learned(weights, f"learned ({name})") for name, weights in candidates.items()]
    values = arena.values(policies, job.validation, VALIDATION, job.objective)
    for policy, value in zip(policies, values, strict=True):
        console.print(f"  {policy.name:<24} worth less waiting {value:.4f} on validation", highlight=False)
    chosen = int(values.argmax())
    learned = list(candidates)[chosen]

    # 5. All else stays, what to do where SLOs are guesses is learned.
    dashboard.phase(NAME, config.search.population * config.search.guessed * config.search.episodes)
    whole = run.once(NAME, lambda: learn_guesses(job, candidates[learned], TRAINING))
    candidates[learned] = np.array(whole["weights"])
    winner = policies[chosen] = job.learned(candidates[learned], policies[chosen].name)
    dashboard.phase("")
    if whole["worths"]:
        before, after = whole["worths"]
        console.print(f"  where SLOs are guesses: {before:.4f} → {after:.4f} on validation variants", highlight=False)

    # 6. … and held-out ones are touched once, here.
    with console.status("comparing on held-out episodes …"):
        held_out = job.episodes(HELD_OUT, config.held_out_episodes, "held-out")
        comparison = compare([*known.values(), *policies], held_out, arena, HELD_OUT)
    worths = comparison.worths
    paired = Paired.of(winner.name, best.name, "worth", worths[winner.name], worths[best.name], config.seed)
    console.print(comparison_table(comparison.summaries, winner.name, width=console.width))
    console.print(verdict(paired), highlight=False)

    # 7. Export, with the scorecard inside.
    scorecard = comparison_json(comparison.summaries, [paired]) | {
        "learned": winner.name,
        "best_heuristic": best.name,
        "loads_rps": [sized["rps"] * factor for factor in config.loads],
    }
    write_json(run.folder / "comparison.json", scorecard)
    dashboard.final(
        comparison.summaries,
        comparison.episodes,
        {
            "algorithm": learned,
            "seed": config.seed,
            "workload": config.workload,
            "fleet": config.fleet,
            "hidden": str(list(config.architecture.hidden)),
            "population": config.search.population,
            "generations": config.search.generations,
            "ppo_steps": config.ppo.steps,
        },
        winner.name,
    )
    dashboard.save_figures(run.folder / "figures")
    export = partial(
        export_bundle,
        architecture=config.architecture,
        fleet=job.fleet.model_dump(mode="json"),
        workload=job.workload.model_dump(mode="json"),
        command=command,
        seeds={"run": config.seed, "training": TRAINING, "validation": VALIDATION, "held_out": HELD_OUT},
        scorecard=scorecard,
    )
    export(run.bundle, weights=candidates[learned], name=winner.name)
    for name, policy in zip(candidates, policies, strict=True):
        export(run.learned / name, weights=candidates[name], name=policy.name)
    tuned = {f"{name}-tuned": name for name in config.tune}
    best_spec = spec_of(tuned[best.name], best) if best.name in tuned else best.name
    return Result(winner, best_spec, comparison, paired, run.bundle)


def learner(algorithm: str) -> Learner:
    """Who trains by `algorithm`, which is no key of OPTIMISERS.

    Raises:
        UserError: RLlib is not installed.
    """
    if algorithm in ppo.KINDS:
        return ppo.learn
    try:
        from steersman.training import rllib
    except ModuleNotFoundError as error:
        raise UserError(
            f"algorithm {algorithm!r} needs {error.name}, which is not installed; install it with: "
            "pip install 'steersman[train,rllib]'"
        ) from None
    return rllib.learn


def best_of(job: Job, candidates: dict[str, np.ndarray]) -> np.ndarray:
    """The weights that are worth most on the episodes that choose within a stage."""
    policies = [job.learned(weights, name) for name, weights in candidates.items()]
    episodes = job.episodes(SELECTION, 2 * len(job.config.loads))
    return list(candidates.values())[int(job.arena.values(policies, episodes, SELECTION, job.objective).argmax())]


def worth_deploying(paired: Paired) -> bool:
    """Whether the learned policy is better beyond doubt."""
    return paired.low > 1.0


def verdict(paired: Paired) -> str:
    """In words, whether the learned policy is worth deploying."""
    measured = (
        f"worth {paired.ratio:.3f} [{paired.low:.3f}, {paired.high:.3f}] times that of {paired.against} "
        "on held-out episodes"
    )
    if worth_deploying(paired):
        return f"[bold green]Deploy the learned policy[/]: {measured}."
    if paired.high < 1.0:
        return f"[bold yellow]Keep {paired.against}[/]: the learned policy has {measured}."
    return f"[bold yellow]No clear gain[/]: keep {paired.against}; the learned policy has {measured}."

"""The training job, top to bottom: size the load, tune the heuristics, learn, select, compare, export."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from steersman.agents.policies import heuristics, resolve
from steersman.agents.scorer import Scorer
from steersman.runtime.configs import find_config
from steersman.runtime.fleet import Fleet, load_fleet
from steersman.runtime.network import compiled_policy
from steersman.runtime.outcomes import Summary
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.workload import Workload, load_workload
from steersman.training import ppo
from steersman.training.config import TrainingConfig
from steersman.training.dashboard import Dashboard
from steersman.training.evaluate import Comparison, compare
from steersman.training.export import export_bundle
from steersman.training.imitate import imitate, record
from steersman.training.objective import Arena
from steersman.training.progress import stage
from steersman.training.report import comparison_json, comparison_table, paired
from steersman.training.run import Run, write_json
from steersman.training.search import Generation, search, tune
from steersman.training.sizing import capacity

TRAINING, VALIDATION, HELD_OUT = 0, 1_000_000, 2_000_000  # first seeds of the three sets of episodes
SHOW_EVERY = 5  # generations between two evaluations for the dashboard


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    learned: CompiledPolicy
    best_heuristic: str
    comparison: Comparison
    ratio: tuple[float, float, float]  # worth over the best heuristic's, with its 95 % interval
    bundle: Path


class Setting:
    """What a run trains on: workload, fleet, and the episodes of each set."""

    def __init__(self, config: TrainingConfig, traces: Path | None) -> None:
        self.config = config
        self.workload: Workload = load_workload(find_config("workloads", config.workload), traces=traces)
        self.fleet: Fleet = load_fleet(find_config("fleets", config.fleet))
        self.arena = Arena(self.fleet)
        self.load = 1.0

    def sample(self, seed: int, load: float, split: str = "train") -> Requests:
        return self.workload.sample(
            seed,
            load=load,
            split=split,  # type: ignore[arg-type]
            duration_s=self.config.episode_s,
            models=self.fleet.models,
            regions=self.fleet.regions,
        )

    def episodes(self, first: int, count: int, split: str = "train") -> list[Requests]:
        """`count` episodes in order of load, spread evenly over the configured loads."""
        loads = np.repeat(self.config.loads, -(-count // len(self.config.loads)))[:count]
        return [self.sample(first + i, self.load * factor, split) for i, factor in enumerate(loads)]


def train(run: Run, console: Console, traces: Path | None = None, command: str = "steersman train") -> Result:
    """Run, or go on with, the training that `run` describes."""
    config = run.config
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    setting = Setting(config, traces)
    arena = setting.arena
    dashboard = Dashboard(run.folder, list(setting.workload.tenants), setting.fleet.names)
    try:
        return _train(run, console, setting, arena, dashboard, command)
    finally:
        dashboard.close()
        arena.close()


def _train(run: Run, console: Console, setting: Setting, arena: Arena, dashboard: Dashboard, command: str) -> Result:
    config = run.config
    console.print(f"[bold]{config.workload}[/] on [bold]{config.fleet}[/]  →  {run.folder}", highlight=False)
    with console.status("compiling the simulator (once for each version) and sizing the load …"):
        known = heuristics() if not config.compare else {name: resolve(name) for name in config.compare}
        size = run.once("sizing", lambda: _size(setting, known))
    setting.load = size["load"]
    console.print(
        f"{size['heuristic']}, the best heuristic as shipped, carries {size['rps']:.1f} req/s within the SLOs; "
        f"training at {', '.join(f'{x:g}' for x in config.loads)} times that",
        highlight=False,
    )
    pool = setting.episodes(TRAINING, config.search.pool)
    validation = setting.episodes(VALIDATION, config.validation_episodes)

    # 1. Every tunable baseline gets the budget that the learned policy gets.
    for name in config.tune:
        stored = run.once(f"tune-{name}", lambda name=name: _tune(run, console, setting, name, pool, dashboard))
        tuned = known.get(name, resolve(name)).with_values(np.array(stored["values"]), f"{name}-tuned")
        known[tuned.name] = tuned
    with console.status("choosing the best heuristic on validation episodes …"):
        values = arena.values(list(known.values()), validation, seed=VALIDATION)
    best = list(known.values())[int(values.argmax())]
    reference = compare([best], validation, arena, VALIDATION).summaries[0]
    dashboard.reference(reference, float(values.max()))
    console.print(f"best heuristic on validation: [bold]{best.name}[/], worth {values.max():.4f}", highlight=False)

    # 2. The scorer imitates it …
    def learned(weights: np.ndarray, name: str) -> CompiledPolicy:
        return compiled_policy(config.architecture, weights, name, "The learned scorer.")

    cloned = run.once("imitation", lambda: _imitate(console, setting, best, dashboard))
    candidates = {"imitation": np.array(cloned["weights"])}

    # 3. … and improves on it, by search and by PPO.
    def watch(step: int, policy: CompiledPolicy, figures: dict[str, float]) -> Summary:
        summary = compare([policy], validation, arena, VALIDATION).summaries[0]
        dashboard.evaluation(step, summary, figures)
        return summary

    for algorithm in config.algorithms:
        if algorithm == "cma-es":
            found = run.once(
                algorithm,
                lambda: _search(run, console, setting, candidates["imitation"], pool, learned, watch),
            )
        else:
            found = run.once(
                algorithm,
                lambda algorithm=algorithm: ppo.learn(
                    algorithm, run, console, setting, candidates["imitation"], learned, watch, dashboard
                ),
            )
        candidates[algorithm] = np.array(found["weights"])

    # 4. Validation episodes choose; held-out ones are touched once, here.
    policies = [learned(weights, name) for name, weights in candidates.items()]
    values = arena.values(policies, validation, seed=VALIDATION)
    for policy, value in zip(policies, values, strict=True):
        console.print(f"  {policy.name:<14} worth {value:.4f} on validation", highlight=False)
    algorithm = list(candidates)[int(values.argmax())]
    winner = learned(candidates[algorithm], f"learned ({algorithm})")
    held_out = setting.episodes(HELD_OUT, config.held_out_episodes, "held-out")
    with console.status("comparing on held-out episodes …"):
        comparison = compare([*known.values(), winner], held_out, arena, HELD_OUT)
    ratio = paired(comparison.worths[winner.name], comparison.worths[best.name], seed=config.seed)
    console.print(comparison_table(comparison.summaries, winner.name))
    result = Result(winner, best.name, comparison, ratio, run.bundle)
    console.print(verdict(result), highlight=False)

    # 5. Export, with the scorecard inside.
    report = comparison_json(comparison.summaries) | {
        "learned": winner.name,
        "best_heuristic": best.name,
        "worth_ratio": list(ratio),
        "offered_rps": [setting.load * factor for factor in config.loads],
    }
    write_json(run.folder / "comparison.json", report)
    dashboard.final(
        comparison.summaries,
        comparison.episodes,
        {
            "algorithm": algorithm,
            "seed": config.seed,
            "workload": config.workload,
            "fleet": config.fleet,
            "hidden": str(list(config.architecture.hidden)),
            "population": config.search.population,
            "generations": config.search.generations,
        },
    )
    dashboard.save_figures(run.folder / "figures")
    export_bundle(
        run.bundle,
        architecture=config.architecture,
        weights=candidates[algorithm],
        name=winner.name,
        fleet=setting.fleet.model_dump(mode="json"),
        workload=setting.workload.model_dump(mode="json"),
        command=command,
        seeds={"run": config.seed, "training": TRAINING, "validation": VALIDATION, "held_out": HELD_OUT},
        scorecard=report,
    )
    return result


def _size(setting: Setting, known: dict[str, CompiledPolicy]) -> dict[str, Any]:
    """The capacity of the best heuristic as shipped: found among all by one probe, then by bisection."""
    seeds = range(TRAINING, TRAINING + 3)
    probe = [setting.sample(s, 1.0) for s in seeds]
    worths = setting.arena.values(list(known.values()), probe)
    ranked = sorted(zip(worths, known, strict=True), reverse=True)[:3]
    loads = [(capacity(known[name], setting.sample, setting.arena, seeds), name) for _, name in ranked]
    load, name = max(loads)
    rate = float(np.mean([len(e) / e.window_s for e in probe]))
    return {"load": load, "heuristic": name, "rps": load * rate}


def _options(run: Run, setting: Setting, pool: list[Requests], name: str) -> dict[str, Any]:
    search_config = run.config.search
    return {
        "population": search_config.population,
        "generations": search_config.generations,
        "episodes": search_config.episodes,
        "pool": pool,
        "arena": setting.arena,
        "seed": run.config.seed + 1,
        "checkpoint": run.checkpoints / f"{name}.npy",
    }


def _tune(
    run: Run, console: Console, setting: Setting, name: str, pool: list[Requests], dashboard: Dashboard
) -> dict[str, Any]:
    with stage(console, f"tuning {name}", run.config.search.generations) as shown:
        clock = Clock()

        def progress(generation: Generation, policy: CompiledPolicy) -> None:
            shown.advance(generation.number, f"worth {generation.mean:.4f}  {clock.speed(generation.evaluations)}")
            dashboard.scalars(generation.number, {f"tune/{name}/worth": generation.mean})

        found = tune(resolve(name), sigma=0.2, progress=progress, **_options(run, setting, pool, f"tune-{name}"))
    return {"values": found.policy.values.tolist(), "episodes": found.evaluations}


def _imitate(console: Console, setting: Setting, teacher: CompiledPolicy, dashboard: Dashboard) -> dict[str, Any]:
    config = setting.config
    with console.status(f"recording decisions of {teacher.name} …"):
        episodes = setting.episodes(TRAINING, config.imitation.episodes)
        rows, actions = record(teacher, setting.fleet, episodes)
    scorer = Scorer(config.architecture)
    with stage(console, "imitation", config.imitation.epochs) as shown:

        def progress(epoch: int, loss: float, agreement: float) -> None:
            shown.advance(epoch, f"loss {loss:.3f}  agreement {agreement:.1%}")
            dashboard.scalars(epoch, {"train/loss/imitation": loss, "train/imitation_agreement": agreement})

        agreement = imitate(scorer, rows, actions, config.imitation, config.seed, progress)
    return {"weights": scorer.get_weights().tolist(), "teacher": teacher.name, "agreement": agreement}


def _search(
    run: Run,
    console: Console,
    setting: Setting,
    start: np.ndarray,
    pool: list[Requests],
    learned: Callable[[np.ndarray, str], CompiledPolicy],
    watch: Callable[[int, CompiledPolicy, dict[str, float]], Summary],
) -> dict[str, Any]:
    config = run.config.search
    # One unit of the search is the typical size of a weight, so that a single sigma suits them all.
    unit = float(np.sqrt(np.mean(start**2)))
    with stage(console, "CMA-ES", config.generations) as shown:
        clock, attainment = Clock(), [0.0]

        def progress(generation: Generation, policy: CompiledPolicy) -> None:
            if generation.number % SHOW_EVERY == 0 or generation.number == config.generations:
                figures = {"train/reward": generation.mean, "train/sigma": generation.sigma}
                attainment[0] = watch(generation.evaluations, policy, figures).attainment
            shown.advance(
                generation.number,
                f"reward {generation.mean:.4f}  attainment {attainment[0]:.1%}  {clock.speed(generation.evaluations)}",
            )

        found = search(
            lambda x: learned(x * unit, "cma-es"),
            start / unit,
            sigma=config.sigma,
            progress=progress,
            **_options(run, setting, pool, "cma-es"),
        )
    return {"weights": (found.numbers * unit).tolist(), "episodes": found.evaluations}


class Clock:
    """Speed of counted work since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def speed(self, episodes: int) -> str:
        return f"{episodes / max(1e-9, time.monotonic() - self._started):.0f} episodes/s"


def verdict(result: Result) -> str:
    """In words, whether the learned policy is worth deploying."""
    ratio, low, high = result.ratio
    measured = f"worth {ratio:.3f} [{low:.3f}, {high:.3f}] times that of {result.best_heuristic} on held-out episodes"
    if low > 1.0:
        return f"[bold green]Deploy the learned policy[/]: {measured}."
    if high < 1.0:
        return f"[bold yellow]Keep {result.best_heuristic}[/]: the learned policy has {measured}."
    return f"[bold yellow]No clear gain[/]: keep {result.best_heuristic}; the learned policy has {measured}."

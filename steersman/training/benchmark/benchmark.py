"""The benchmark, top to bottom: tune and learn, play held-out episodes, compute the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from steersman.runtime.errors import UserError
from steersman.training.benchmark.capacity import margins, resampled
from steersman.training.benchmark.ceiling import ceiling_tokens_per_s
from steersman.training.benchmark.contenders import Contender, given, prepared, shipped, sized
from steersman.training.benchmark.counts import Load, curve
from steersman.training.benchmark.figures import Figures, Sample, best_capacity, figures, point_capacity, seed_of
from steersman.training.benchmark.folder import Folder
from steersman.training.benchmark.play import play
from steersman.training.benchmark.scenario import Scenario, Setting
from steersman.training.config import TrainingConfig
from steersman.training.objective import Arena, ArenaMaker, local_arena
from steersman.training.progress import stage
from steersman.training.run import Run

SURE = 0.99  # share of the resamples


def benchmark(folder: Folder, console: Console, arenas: ArenaMaker = local_arena) -> list[Figures]:
    """Run, or go on with, what the folder's plan says. arenas: where episodes are played.

    Raises:
        UserError: the fleet of a scenario carries its workload at no load, or a file is damaged.
    """
    torch.set_num_threads(1)
    for sentence in folder.plan.skipped:
        console.print(sentence, highlight=False)
    searched: dict[str, list[Contender]] = {}
    found = []
    for scenario in folder.plan.scenarios:
        base = _named(folder, scenario.trained_on or scenario.name)
        if base.name not in searched:
            searched[base.name] = prepared(base, folder, console, arenas)
        contenders = [*shipped(), *searched[base.name]]
        contenders += given(folder.plan.policies, [c.name for c in contenders])
        found.append(figures(sample(scenario, folder, contenders, console, arenas), contenders))
    return found


def sample(
    scenario: Scenario, folder: Folder, contenders: Sequence[Contender], console: Console, arenas: ArenaMaker
) -> Sample:
    """Play the held-out episodes of a scenario."""
    budget = folder.plan.budget
    anchor = sized(scenario, folder, console, arenas)
    setting = Setting.load(folder.copied(scenario), folder.traces)
    run = Run(folder.path / scenario.name, TrainingConfig(description=scenario.description))
    seeds = range(budget.first_seed, budget.first_seed + budget.seeds)
    factors = sorted({*budget.goodput_loads, scenario.headline})
    weights = resampled(budget.seeds, seed_of(scenario))
    arena = arenas(setting.fleet, setting.workload)
    try:
        with stage(console, f"playing {scenario.name}", len(budget.loads) + 1 + len(factors)) as shown:
            loads: list[Load] = []
            alive = list(contenders)
            for done, factor in enumerate(budget.loads, 1):
                if alive:
                    loads.append(_once(run, f"load-{factor:g}", setting, arena, alive, anchor * factor, seeds))
                    alive = [c for c in alive if not _past(loads, c, weights)]
                rate = f"{anchor * factor * setting.workload.offered_rps:.1f} req/s"
                shown.advance(done, f"{rate}, {len(alive)} of {len(contenders)} policies go on")
            for load, crossing in sorted(between(loads, contenders).items()):
                loads.append(_once(run, f"load-{load / anchor:.4g}", setting, arena, crossing, load, seeds))
            loads.sort(key=lambda played: played.load)
            shown.advance(len(budget.loads) + 1, "between two loads where a policy's capacity lies")
            reference = best_capacity(loads, contenders) or anchor
            goodput = {}
            for done, factor in enumerate(factors, len(budget.loads) + 2):
                load = reference * factor
                goodput[factor] = _once(run, f"goodput-{factor:g}", setting, arena, contenders, load, seeds)
                shown.advance(done, f"{factor:g} times the best heuristic's capacity")
    finally:
        arena.close()
    return Sample(
        scenario,
        list(setting.workload.tenants),
        setting.workload.offered_rps,
        setting.fleet.price_per_hour,
        ceiling_tokens_per_s(setting.fleet),
        loads,
        goodput,
    )


def between(loads: Sequence[Load], contenders: Sequence[Contender]) -> dict[float, list[Contender]]:
    """Loads in the middle of two that were played, with the policies whose capacity lies between these."""
    found: dict[float, list[Contender]] = {}
    for contender in contenders:
        played = curve(loads, contender.members[0].name).loads
        capacity = point_capacity(loads, contender)
        after = int(np.searchsorted(played, capacity))
        if 0 < after < len(played):
            found.setdefault(float(played[after - 1] + played[after]) / 2, []).append(contender)
    return found


def _once(
    run: Run,
    part: str,
    setting: Setting,
    arena: Arena,
    contenders: Sequence[Contender],
    load: float,
    seeds: Sequence[int],
) -> Load:
    """One load, played at most once for the folder."""
    members = [member for c in contenders for member in c.members]
    stored: dict[str, Any] = run.once(part, lambda: play(setting, arena, members, load, seeds).as_json())
    found = Load.of_json(stored)
    if missing := [member.name for member in members if member.name not in found.cells]:
        raise UserError(
            f"{run.stages / part}.json: played by another version, without {missing[0]!r}; start the benchmark anew"
        )
    return found


def _past(loads: Sequence[Load], contender: Contender, weights: np.ndarray) -> bool:
    """Whether all of its members are beyond their capacity, in nearly all resamples too: intervals need both ends."""
    below = [np.any(margins(curve(loads, member.name), weights) < 0, axis=1) for member in contender.members]
    return all(float(member.mean()) >= SURE and bool(member[0]) for member in below)


def _named(folder: Folder, name: str) -> Scenario:
    return next(s for s in [*folder.plan.scenarios, *folder.plan.bases] if s.name == name)

"""Playing the same episodes on real replicas and in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from steersman.agents.policies import resolve
from steersman.runtime.draw import draw
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.outcomes import Episode, State
from steersman.runtime.policy import CompiledPolicy, pick
from steersman.runtime.replica._health import HealthConfig
from steersman.runtime.replica._live import LiveRuntime
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.workload import Workload
from steersman.training.fidelity import Played

CAPACITY_S = 600.0  # simulated seconds that the capacity is taken over


def capacity_rps(fleet: Fleet, workload: Workload, seed: int) -> float:
    """Requests of this mix that the simulated fleet completes per second when more than that come.

    Raises:
        UserError: it completes a thousand times the workload's rate.
    """
    runtime, policy = SimulatedRuntime(fleet), resolve("least-requests")
    load = 1.0
    while load < 1000:
        requests = _without_outputs(draw(workload, fleet, seed, load=load, duration_s=CAPACITY_S))
        runtime.reset(requests)
        runtime.run(policy, seed)
        done = float((requests.table["arrival_s"] + runtime.outcomes().e2e_s <= CAPACITY_S).sum())
        if done < 0.8 * len(requests):
            return done / CAPACITY_S
        load *= 1.5
    raise UserError("the fleet completes a thousand times the workload's rate; raise rate_rps in the workload file")


def validate(
    fleet: Fleet,
    workload: Workload,
    policies: Sequence[CompiledPolicy],
    loads: Sequence[float],
    *,
    seconds: float,
    seed: int,
    told: Callable[[str], None] = lambda _: None,
) -> list[Played]:
    """Every policy plays an episode at each load: on the replicas, then twice in the simulator.

    loads: shares of `capacity_rps`. seconds: of an episode's arrivals, on average; all of its requests are waited for.

    Raises:
        UserError: replicas cannot be started or reached, or most requests fail.
    """
    capacity = capacity_rps(fleet, workload, seed)
    told(f"the simulated fleet completes {capacity:.2f} requests/s of this workload")
    played = []
    with LiveRuntime(fleet) as live:
        for i, load in enumerate(loads):
            factor = load * capacity / workload.offered_rps
            drawn = _without_outputs(draw(workload, fleet, seed + i, load=factor, duration_s=seconds))
            if not len(drawn):
                raise UserError(f"load {load:g} brings no request in {seconds:g} s; make the episode longer")
            requests = at_rate(drawn, load * capacity)
            for policy in policies:
                told(f"load {load:g}, {policy.name}: {len(requests)} requests in {requests.window_s:.0f} s")
                real = play(live, requests, policy, seed)
                failed = int((real.outcomes.state == State.FAILED).sum())
                if failed > len(requests) // 2:
                    raise UserError(f"{failed} of {len(requests)} requests failed on the replicas; see their logs")
                played.append(simulate(fleet, load, policy, real, seed))
    return played


def at_rate(requests: Requests, rate_rps: float) -> Requests:
    """The same requests, whose arrivals are stretched so that the rate is exactly this one: bursts stay bursts."""
    table, seconds = requests.table.copy(), len(requests) / rate_rps
    table["arrival_s"] *= seconds / requests.window_s
    return replace(requests, table=table, duration_s=seconds)


def play(live: LiveRuntime, requests: Requests, policy: CompiledPolicy, seed: int) -> Episode:
    """One episode in real time."""
    bound = policy.bind(seed)
    live.reset(requests)
    due = live.advance()
    while due:
        due = live.step(int(pick(bound.score(live.rows, live.mask), live.mask)))
    return live.episode


def simulate(fleet: Fleet, load: float, policy: CompiledPolicy, real: Episode, seed: int) -> Played:
    """The two simulated versions of a real episode. Gateways read metrics as seldom as the live one does."""
    runtime = SimulatedRuntime(fleet.model_copy(update={"scrape_s": HealthConfig().scrape_s}))
    runtime.reset(real.requests)
    runtime.replay_each(real.outcomes.replica, real.outcomes.holds)
    replayed = runtime.episode
    runtime.reset(real.requests)
    runtime.run(policy, seed)
    return Played(load, policy.name, real, replayed, runtime.episode)


def _without_outputs(requests: Requests) -> Requests:
    """The same requests, whose outputs are in nobody's prompt: real answers are not what prompts are made of."""
    table = requests.table.copy()
    table["block_count"] = table["prompt_blocks"]
    return replace(requests, table=table)

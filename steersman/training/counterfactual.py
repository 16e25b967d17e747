"""What each candidate would have brought: advantages by counterfactual roll-outs, for PPO in place of GAE.

At some decisions of an episode every candidate is tried, and the later requests go where they went: what is left is
the difference that this one decision makes (`runtime/simulator/rollout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steersman.runtime.outcomes import Episode
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator.rollout import Rollout, Rollouts
from steersman.runtime.tenant import tenant_table
from steersman.training.objective import Arena

LIMIT = 5.0  # requests: one decision seldom changes the fate of more, and those that do would outweigh all others


class Situations(NamedTuple):
    """Decisions, and what each candidate would have been worth."""

    rows: np.ndarray  # float32 (D, C, WIDTH)
    tried: np.ndarray  # bool (D, C): the candidates whose advantage is known
    advantages: np.ndarray  # float32 (D, C): `Values` above that of the policy's own choice; 0 where not tried


class Asked(NamedTuple):
    """What `tried_out` is to do in an episode."""

    decisions: int  # at which to try all candidates, drawn at random
    seed: int
    waiting: float  # what a second of waiting costs, as in `worth`


def joined(parts: Sequence[Situations], candidates: int) -> Situations:
    """All of them, padded to so many candidates; the last two, to hold and to shed, stay the last."""

    def padded(values: np.ndarray) -> np.ndarray:
        replicas = values.shape[1] - 2
        made = np.zeros((len(values), candidates, *values.shape[2:]), values.dtype)
        made[:, :replicas], made[:, -2:] = values[:, :replicas], values[:, -2:]
        return made

    return Situations(*(np.concatenate([padded(part[i]) for part in parts]) for i in range(3)))


def tried_out(arena: Arena, policy: CompiledPolicy, requests: Requests, asked: Asked) -> Situations:
    """The situations of one episode; the policy has no memory. A task of `Arena.each`.

    Where the policy would send or shed and may hold, every second time to hold is the baseline whose later routes are
    kept, so that it is tried as well; what comes of it is up to the policy.
    """
    rng = np.random.default_rng(asked.seed)
    runtime = arena.runtime(requests)
    actions = runtime.routes(policy, asked.seed)
    values = Values(runtime.episode, asked.waiting)
    chosen = set(rng.permutation(len(actions))[: asked.decisions].tolist())
    runtime = arena.runtime(requests)
    rollouts, memory = Rollouts(runtime, policy), np.zeros((runtime.fleet.gateways, policy.memory_size))
    rows, tried, advantages = [], [], []
    runtime.advance()
    for number, action in enumerate(actions[: max(chosen, default=-1) + 1].tolist()):
        if number in chosen:
            hold = runtime.mask[runtime.hold] and rng.random() < 0.5
            rolled = rollouts.frozen(runtime.hold if hold else action, memory)
            found = np.full(len(runtime.mask), np.nan)
            found[rolled.actions] = values(rolled)
            rows.append(runtime.rows.copy())
            tried.append(~np.isnan(found))
            advantages.append(np.clip(np.nan_to_num(found - found[action]), -LIMIT, LIMIT))
        runtime.step(action)
    shape = (0, *runtime.rows.shape)
    return Situations(
        np.array(rows, np.float32).reshape(-1, *shape[1:]),
        np.array(tried, np.bool_).reshape(-1, shape[1]),
        np.array(advantages, np.float32).reshape(-1, shape[1]),
    )


class Values:
    """What roll-outs are worth, in requests: `worth` times the episode's requests, about how it went."""

    def __init__(self, episode: Episode, waiting: float) -> None:
        self._targets, self._waiting = tenant_table(episode.requests.tenants)["ttft_slo_s"], waiting
        tenant = episode.requests.table["tenant"]
        count = np.bincount(tenant, minlength=len(self._targets))
        share = np.bincount(tenant, weights=episode.outcomes.attained, minlength=len(self._targets))
        share = np.where(count > 0, share / np.maximum(1, count), np.inf)
        self._weights = np.full(len(count), 0.5)
        self._weights[share.argmin()] += 0.5 * len(tenant) / max(1, count[share.argmin()])

    def __call__(self, rolled: Rollout) -> np.ndarray:
        """float64 (A,)"""
        tenant = rolled.table["tenant"]
        waits = np.fmin(self._targets[tenant], rolled.outcomes["ttft_s"])
        each = self._weights[tenant] * rolled.outcomes["attained"] - self._waiting * waits
        return np.asarray(each.sum(axis=1))

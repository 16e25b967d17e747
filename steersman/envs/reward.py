"""The reward contract: what one request is worth when it is over.

A reward is a compiled function with the signature `REWARD`, so that the batched environment calls it inside its
compiled step, and the single environment calls the same one:

    worth(attained, shed, ttft_s, tpot_s, ttft_slo_s, tpot_slo_s, weight) -> float

    attained                1 if the request met both SLOs, else 0
    shed                    1 if it was turned away, else 0
    ttft_s, tpot_s          as measured, seconds; NaN if it was shed, failed, or its client left before a token came
    ttft_slo_s, tpot_slo_s  its tenant's promise, seconds
    weight                  worth of one good request of its tenant

The reward of a step is the sum over the requests that ended since the step before, the one shed in it included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numba import types

from steersman.runtime import plugins
from steersman.runtime.errors import UserError

REWARD = types.float64(*[types.float64] * 7)
KIND = plugins.Kind("reward", "steersman.envs.rewards", "REWARD", "steersman.rewards")


@dataclass(frozen=True)
class Reward:
    """A reward: its name, one sentence, and its function compiled with REWARD."""

    name: str
    summary: str
    worth: Any


def find_reward(reward: str | Reward) -> Reward:
    """A reward by name, or as `package.module:attribute`.

    Raises:
        UserError: there is none of that name, or it is no `Reward`.
    """
    found = plugins.find(KIND, reward) if isinstance(reward, str) else reward
    if not isinstance(found, Reward):
        raise UserError(f"reward {reward!r} is a {type(found).__name__}, not a steersman.envs.reward.Reward")
    return found

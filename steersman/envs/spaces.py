"""The spaces of the environments, for C candidates."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from steersman.runtime.observation import HIGH, LOW


def observation_space(candidates: int) -> spaces.Box:
    """Float32 (C · WIDTH,): the rows of all candidates, one after the other, within the ranges of the schema."""
    return spaces.Box(np.tile(LOW, candidates), np.tile(HIGH, candidates), dtype=np.float32)


def action_space(candidates: int) -> spaces.Discrete:
    """A candidate: a replica, padding (masked), or one of the last two, which hold and shed."""
    return spaces.Discrete(candidates)

"""Observations by hand: rows with a few columns set by name, for tests of policies."""

from __future__ import annotations

import numpy as np

from steersman.runtime.observation import CANDIDATE, COLUMN, WIDTH
from steersman.runtime.policy import CompiledPolicy, pick

_CANDIDATE = {feature.name for feature in CANDIDATE}


def situation(
    replicas: int, masked: tuple[int, ...] = (), padding: int = 0, patience: float | None = 1.0, **columns: object
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (C, WIDTH) and mask (C,) of `replicas`, `padding` rows, hold and shed.

    A candidate's column takes one value a replica, or one for all; a column of the request takes one value. Without
    other values the request has 1,000 prompt tokens, 100 expected output tokens and a tenant that fares well.
    patience: that of the hold row; None: it has waited too long.
    """
    rows = np.zeros((replicas + padding + 2, WIDTH), np.float32)
    request = {"prompt_tokens": 1000, "expected_output": 100, "tpot_slo": 0.1, "ttft_slo": 1.0}
    request |= {"tenant_attainment": 1.0, "worst_attainment": 1.0}
    values = {"is_replica": 1, "kv_tokens": 100_000, "max_num_seqs": 64, **request, **columns}
    for name, value in values.items():
        rows[:replicas, COLUMN[name]] = value
        if name not in _CANDIDATE:
            rows[-2:, COLUMN[name]] = value
    mask = np.zeros(len(rows), np.bool_)
    mask[:replicas] = True
    mask[list(masked)] = False
    if patience is not None:
        rows[-2, [COLUMN["is_hold"], COLUMN["patience"]]] = 1.0, patience
        mask[-2] = mask[:replicas].any()
    mask[-1] = True
    return rows, mask


def choice(policy: CompiledPolicy, observation: tuple[np.ndarray, np.ndarray], seed: int = 0) -> int:
    """What a fresh copy of `policy` chooses."""
    rows, mask = observation
    return int(pick(policy.bind(seed).score(rows, mask), mask))


def choices(policy: CompiledPolicy, observation: tuple[np.ndarray, np.ndarray], count: int, seed: int = 0) -> list[int]:
    """What one copy of `policy` chooses, `count` times in a row."""
    rows, mask = observation
    bound = policy.bind(seed)
    return [int(pick(bound.score(rows, mask), mask)) for _ in range(count)]

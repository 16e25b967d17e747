"""How often a canary is taken back by chance, and how soon when it is worse: `steersman bench canary`.

Requests of either arm meet their SLOs independently, each with its arm's chance, and end as they arrive.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.runtime.deployment import CanaryBounds, Release
from steersman.runtime.deployment.arm import Arm
from steersman.runtime.deployment.canary import Canary
from steersman.runtime.policy import Policy

CASES = ((0.95, 0.95, 0.1), (0.8, 0.8, 0.5), (0.95, 0.93, 0.1), (0.95, 0.9, 0.1), (0.95, 0.9, 0.5), (0.95, 0.85, 0.1))


def taken_back_after(current: float, canary: float, share: float, requests: int, seed: int) -> int | None:
    """Requests until a canary of attainment `canary` beside one of `current` is taken back; None if it is not."""
    release = Release(_Never(), "canary")
    arm, baseline = Arm("canary", release), Arm("current", release)
    it = Canary(release, arm, baseline, share, CanaryBounds())
    for number, luck in enumerate(np.random.default_rng(seed).random(requests), 1):
        if not it.takes_next():
            baseline.over(bool(luck < current), failed=False)
            continue
        arm.over(bool(luck < canary), failed=False)
        if it.after_end() is not None:
            return number
    return None


class _Never(Policy):
    """Is not asked."""

    name = "never"

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.zeros(len(rows))


def bench(canaries: int, requests: int) -> dict[str, Any]:
    """`rows`, one for each of `CASES`; `after` is the median of requests, None where no canary was taken back."""
    rows = []
    for current, canary, share in CASES:
        seen = [taken_back_after(current, canary, share, requests, seed) for seed in range(canaries)]
        after = [number for number in seen if number is not None]
        rows.append(
            {
                "current": current,
                "canary": canary,
                "share": share,
                "taken_back": len(after) / canaries,
                "after": float(np.median(after)) if after else None,
            }
        )
    return {"canaries": canaries, "requests": requests, "rows": rows}

"""How often a canary is taken back by chance, and how soon when it is worse.

Requests of either arm meet their SLOs independently, each with its arm's chance, and end as they arrive. Prints one row
for each pair of chances: the share of canaries that were taken back, and after how many requests in the median.

    python -m steersman.training.bench.canary
"""

from __future__ import annotations

import argparse

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
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m steersman.training.bench.canary", description=__doc__)
    parser.add_argument("--canaries", type=int, default=150, help="of each row")
    parser.add_argument("--requests", type=int, default=20_000, help="of each canary")
    options = parser.parse_args()
    print("| attainment, current and canary | share | taken back | after, median |\n|---|---:|---:|---:|")
    for current, canary, share in CASES:
        seen = [taken_back_after(current, canary, share, options.requests, seed) for seed in range(options.canaries)]
        after = [requests for requests in seen if requests is not None]
        median = f"{np.median(after):,.0f} requests" if after else ""
        print(f"| {current:.0%}, {canary:.0%} | {share:g} | {len(after) / len(seen):.1%} | {median} |", flush=True)


if __name__ == "__main__":
    main()

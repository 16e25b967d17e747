"""Behaviour cloning: fit the scorer to the choices of a policy, as a warm start for search and PPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from steersman.agents.scorer import Scorer, candidates
from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import WIDTH
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.training.config import ImitationConfig


def record(policy: CompiledPolicy, fleet: Fleet, episodes: Sequence[Requests]) -> tuple[np.ndarray, np.ndarray]:
    """Observations (D, C, WIDTH) and the choices (D,) of `policy` over `episodes`."""
    runtime = SimulatedRuntime(fleet)
    rows, actions = [], []
    for seed, requests in enumerate(episodes):
        runtime.reset(requests)
        seen, chosen = runtime.record(policy, seed)
        rows.append(seen)
        actions.append(chosen)
    return np.concatenate(rows), np.concatenate(actions)


def thinned(
    rows: np.ndarray, actions: np.ndarray, holds: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The decisions with fewer of those that hold: at most `holds` for each other one, drawn at random."""
    held = actions == rows.shape[1] - 2
    other = np.flatnonzero(~held)
    kept = rng.permutation(np.flatnonzero(held))[: int(holds * len(other))]
    chosen = np.sort(np.concatenate([other, kept]))
    return rows[chosen], actions[chosen]


def imitate(
    scorer: Scorer,
    rows: np.ndarray,
    actions: np.ndarray,
    config: ImitationConfig,
    seed: int,
    progress: Callable[[int, float, float], None],
) -> float:
    """Fit `scorer` in place by cross-entropy. progress(epoch, loss, agreement). Returns the last agreement."""
    rng = np.random.default_rng(seed)
    assert rows.shape[-1] == WIDTH
    inputs, targets = torch.from_numpy(rows), torch.from_numpy(actions).long()
    real = candidates(inputs)
    steps = max(1, len(rows) // config.batch)
    optimiser = torch.optim.Adam(scorer.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=config.learning_rate * 3, total_steps=steps * config.epochs
    )
    agreement = 0.0
    for epoch in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(rows)))
        losses, hits = 0.0, 0.0
        for k in range(steps):
            batch = order[k * config.batch : (k + 1) * config.batch]
            logits = scorer(inputs[batch]).masked_fill(~real[batch], -1e8)
            loss = torch.nn.functional.cross_entropy(logits, targets[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses += float(loss.detach())
            hits += float((logits.argmax(-1) == targets[batch]).float().mean())
        agreement = hits / steps
        progress(epoch + 1, losses / steps, agreement)
    return agreement

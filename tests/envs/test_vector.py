"""The batched environment is the single one, many times over."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from sb3_contrib import MaskablePPO
from simulated import fleet
from stable_baselines3 import PPO

import steersman.envs  # noqa: F401 (registers the environment)
from steersman.agents.sb3 import MaskableScorerPolicy, ScorerPolicy
from steersman.envs.dispatch import DispatchEnv
from steersman.envs.sb3 import SB3VecEnv
from steersman.envs.vector import DispatchVectorEnv
from steersman.runtime.errors import UserError
from steersman.runtime.observation import WIDTH

FLEET = fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"})
SIZE = 3


def make(**options: object) -> DispatchVectorEnv:
    return DispatchVectorEnv(SIZE, "smoke", FLEET, **options)  # type: ignore[arg-type]


def test_it_is_a_gymnasium_vector_environment_with_a_declared_autoreset_mode() -> None:
    envs = gym.make_vec("Steersman/Dispatch-v0", num_envs=SIZE, workload="smoke", fleet=FLEET)
    assert isinstance(envs, VectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert envs.single_observation_space == DispatchEnv("smoke", FLEET).observation_space
    observations, _ = envs.reset(seed=0)
    assert observations in envs.observation_space
    step = envs.step(envs.action_space.sample())
    assert step[0] in envs.observation_space
    assert [part.shape for part in step[1:4]] == [(SIZE,)] * 3


@pytest.mark.parametrize("reward", ["slo", "missed", "latency"])
def test_every_step_is_that_of_single_environments(reward: str) -> None:
    """Over several episodes of each: observations, rewards, ends, masks and metrics are equal."""
    envs, singles = make(reward=reward, load=(0.5, 6.0)), []
    for i in range(SIZE):
        single = DispatchEnv("smoke", FLEET, reward=reward, load=(0.5, 6.0))
        singles.append(single)
        first = single.reset(seed=10 + i)[0]
        assert i or (envs.reset(seed=10)[0][0] == first).all()
    rng, ended = np.random.default_rng(0), 0
    while ended < 2 * SIZE + 2:
        actions = rng.integers(0, 4, SIZE)
        observations, rewards, terminated, truncated, info = envs.step(actions)
        assert not truncated.any()
        for i, single in enumerate(singles):
            expected, reward_, over, _, single_info = single.step(actions[i])
            assert rewards[i] == pytest.approx(reward_, rel=1e-12)
            assert terminated[i] == over
            if over:
                ended += 1
                assert (info["final_obs"][i] == expected).all()
                metrics = info["final_info"]["metrics"]
                assert {k: v[i] for k, v in metrics.items() if not k.startswith("_")} == single_info["metrics"]
                expected, single_info = single.reset()
            assert (observations[i] == expected).all()
            assert (info["action_mask"][i] == single_info["action_mask"]).all()


def test_a_list_of_seeds_seeds_each() -> None:
    envs = make()
    first = envs.reset(seed=[5, 6, 5])[0]
    assert (first[0] == first[2]).all()
    assert (first[0] != first[1]).any()


def test_returned_arrays_are_not_reused() -> None:
    envs = make()
    before = envs.reset(seed=0)[0]
    copy = before.copy()
    envs.step(np.zeros(SIZE, int))
    assert (before == copy).all()


@pytest.mark.parametrize(("options", "message"), [({"render_mode": "ansi"}, "single"), ({"candidates": 2}, "not fit")])
def test_wrong_arguments_are_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_step_needs_a_reset() -> None:
    with pytest.raises(gym.error.ResetNeeded):
        make().step(np.zeros(SIZE, int))


@pytest.mark.parametrize(
    ("kind", "policy"), [(PPO, ScorerPolicy), (MaskablePPO, MaskableScorerPolicy)], ids=["ppo", "maskable-ppo"]
)
def test_stable_baselines_learns_on_it(kind: type[PPO], policy: type[ScorerPolicy]) -> None:
    env = SB3VecEnv(make(candidates=6))
    env.seed(0)
    model = kind(policy, env, n_steps=64, batch_size=64, n_epochs=2, device="cpu", seed=0)
    before = model.policy.scorer.get_weights()  # type: ignore[operator,union-attr]
    model.learn(2 * 64 * SIZE)
    assert (model.policy.scorer.get_weights() != before).any()  # type: ignore[operator,union-attr]
    assert model.ep_info_buffer is not None
    assert all(info["l"] > 0 for info in model.ep_info_buffer)
    assert len(model.ep_info_buffer) > 0


def test_the_adapter_tells_the_end_of_an_episode() -> None:
    env = SB3VecEnv(make())
    env.seed(3)
    env.reset()
    assert np.shape(env.env_method("action_masks")) == (SIZE, 4)
    total = np.zeros(SIZE)
    while True:
        _, rewards, dones, infos = env.step(np.zeros(SIZE, int))
        total += rewards
        if dones.any():
            break
    i = int(np.argmax(dones))
    assert infos[i]["episode"]["r"] == pytest.approx(total[i], rel=1e-6)
    assert infos[i]["metrics"]["attainment"] <= 1
    assert infos[i]["terminal_observation"].shape == (4 * WIDTH,)
    assert env.get_attr("num_envs") == [SIZE] * SIZE

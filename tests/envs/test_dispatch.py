"""The single environment: Gymnasium's contract, the reward, masks, pictures."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from simulated import TENANTS, episode, fleet
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import steersman.envs  # registers the environment
from steersman.envs.dispatch import DispatchEnv
from steersman.runtime.errors import UserError
from steersman.runtime.observation import COLUMN, WIDTH

FLEET = fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"})


def small(**options: Any) -> DispatchEnv:
    """The smoke workload on two replicas."""
    env = gym.make("Steersman/Dispatch-v0", workload="smoke", fleet=FLEET, **options).unwrapped
    assert isinstance(env, DispatchEnv)
    return env


def play(env: DispatchEnv, action: int) -> tuple[float, dict[str, Any]]:
    """The return and the last info of an episode with one action throughout."""
    total, over = 0.0, False
    info: dict[str, Any] = {}
    while not over:
        _, reward, over, _, info = env.step(action)
        total += reward
    return total, info


@pytest.mark.parametrize("candidates", [None, 5])
def test_both_checkers_find_nothing(candidates: int | None) -> None:
    # Warnings are errors here.
    check_env(small(render_mode="ansi", candidates=candidates))
    sb3_check_env(small(render_mode="rgb_array", candidates=candidates), skip_render_check=False)


def test_the_default_is_the_shipped_workload_on_the_shipped_fleet() -> None:
    env = gym.make("Steersman/Dispatch-v0", duration_s=1.0)
    observation, info = env.reset(seed=0)
    assert observation.shape == (10 * WIDTH,)
    assert info["action_mask"].all()


def test_the_observation_is_the_table_of_candidates() -> None:
    env = small(candidates=5)
    observation, info = env.reset(seed=3)
    rows = observation.reshape(-1, WIDTH)
    assert rows[:, COLUMN["is_replica"]].tolist() == [1, 1, 0, 0, 0]
    assert rows[:, COLUMN["is_hold"]].tolist() == [0, 0, 0, 1, 0]
    assert info["action_mask"].tolist() == env.action_masks().tolist() == [True, True, False, True, True]
    assert rows[-1, COLUMN["prompt_tokens"]] > 0


def test_the_return_of_the_slo_reward_is_the_weight_of_the_good_requests() -> None:
    env = DispatchEnv("smoke", FLEET)
    requests = episode([0.0, 0.0, 1.0], [100, 100, 100], [1, 5, 3], tenant=[0, 1, 1])
    env.reset(options={"requests": requests})
    total, info = play(env, 0)
    assert info["metrics"]["attainment"] == 1.0
    assert total == TENANTS["strict"].weight + 2 * TENANTS["loose"].weight
    env.reset(options={"requests": requests})
    total, info = play(env, 3)
    assert (total, info["metrics"]["shed"]) == (0.0, 1.0)


def test_the_latency_reward_charges_a_shed_request_as_much_as_one_that_takes_twice_its_promise() -> None:
    env = DispatchEnv("smoke", FLEET, reward="latency")
    env.reset(options={"requests": episode([0.0, 1.0], 100, 5, tenant=[0, 1])})
    assert env.step(3)[1] == -2 * TENANTS["strict"].weight
    _, reward, over, _, info = env.step(0)
    assert over
    # A single request on an idle replica is far within its promise.
    assert -TENANTS["loose"].weight < reward < 0
    assert info["metrics"]["attainment/loose"] == 1.0


def test_a_masked_action_sheds() -> None:
    env = DispatchEnv("smoke", FLEET, candidates=5)
    env.reset(options={"requests": episode([0.0, 1.0], 100, 5)})
    assert not env.action_masks()[2]
    assert play(env, 2)[1]["metrics"]["shed"] == 1.0


def test_holding_costs_nothing_until_the_promise_is_broken() -> None:
    env = DispatchEnv("smoke", FLEET)
    env.reset(options={"requests": episode([1.0], 100, 5)})
    _, reward, over, _, info = env.step(2)
    assert (reward, over, info["time_s"]) == (0.0, False, 1.05)
    assert env.step(0)[1] == TENANTS["strict"].weight
    env.reset(options={"requests": episode([1.0], 100, 5)})
    total, info = play(env, 2)  # held as long as it may be, then masked
    assert (total, info["metrics"]["shed"]) == (0.0, 1.0)


def test_equal_seeds_give_equal_episodes_and_others_do_not() -> None:
    env = small()
    first = env.reset(seed=7)[0]
    assert (env.reset(seed=7)[0] == first).all()
    assert not np.array_equal(env.reset(seed=8)[0], first)
    assert not np.array_equal(env.reset()[0], first)


def test_the_load_of_an_episode_can_be_set() -> None:
    env = small()
    env.reset(seed=0, options={"load": 4.0})
    high = play(env, 0)[1]["metrics"]["offered_rps"]
    env.reset(seed=0, options={"load": 0.5})
    assert play(env, 0)[1]["metrics"]["offered_rps"] < high / 4


def test_pictures_show_every_replica() -> None:
    env = small(render_mode="ansi")
    env.reset(seed=0)
    text = env.render()
    assert isinstance(text, str)
    assert all(name in text for name in FLEET.names)
    assert len(text.splitlines()) == 1 + len(FLEET.names)
    env = small(render_mode="rgb_array")
    env.reset(seed=0, options={"load": 40.0})
    before = env.render()
    for _ in range(60):
        env.step(0)
    after = env.render()
    assert isinstance(before, np.ndarray)
    assert before.shape == np.shape(after)
    assert before.dtype == np.uint8
    assert (before != after).any()


def test_steps_need_an_episode() -> None:
    env = small()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    play(env, 0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workload": "defualt"}, "did you mean 'default'"),
        ({"fleet": "locla"}, "did you mean 'local'"),
        ({"reward": "sol"}, "did you mean 'slo'"),
        ({"reward": "builtins:len"}, "is a builtin_function_or_method"),
        ({"runtime": "real"}, "expected simulated or live"),
        ({"load": 0.0}, "load 0.0: expected a positive number"),
        ({"load": (2.0, 1.0)}, "a pair of them that rises"),
        ({"render_mode": "human"}, "expected ansi or rgb_array"),
        ({"fleet": FLEET, "candidates": 2}, "2 replicas, hold and shed do not fit into 2 candidates"),
    ],
)
def test_wrong_arguments_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DispatchEnv(**options)


def test_registration_names_both_forms() -> None:
    assert steersman.envs.__doc__ is not None
    assert gym.spec("Steersman/Dispatch-v0").vector_entry_point is not None

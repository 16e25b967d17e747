"""What each candidate would have brought, and PPO's draws from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from simulated import FASTEST, TENANTS, episode, fleet

from steersman.agents.scorer import Scorer
from steersman.runtime.network import parameters
from steersman.runtime.observation import COLUMN, WIDTH
from steersman.runtime.requests import Requests
from steersman.runtime.simulator.rollout import Rollout
from steersman.runtime.simulator.simulator import new_outcomes, outcome_columns
from steersman.training import ppo
from steersman.training.config import PpoConfig, SearchConfig, TrainingConfig, VariantsConfig
from steersman.training.counterfactual import Asked, Situations, Values, joined, tried_out
from steersman.training.directions import covariance
from steersman.training.job import Job
from steersman.training.objective import Arena, worth
from steersman.training.run import Run
from steersman.training.situations import SituationsEnv

SLOW = {"profile": "llama-3.1-8b-l40s-bf16", "token_budget": 64}


def trace(count: int = 150) -> Requests:
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(0.02, count))
    return episode(arrivals, rng.integers(1, 1500, count), rng.integers(1, 300, count), rng.integers(0, 2, count))


@pytest.fixture(scope="module")
def tried() -> tuple[Situations, np.ndarray]:
    """All decisions of an episode, and what the policy chose."""
    arena, requests = Arena(fleet({}, SLOW), threads=1), trace()
    found = tried_out(arena, FASTEST, requests, Asked(10_000, 0, 0.02))
    return found, arena.runtime(requests).routes(FASTEST)


def test_all_that_is_allowed_is_tried_and_the_own_choice_is_the_measure(tried: tuple[Situations, np.ndarray]) -> None:
    found, chosen = tried
    assert len(found.rows) == len(chosen) == len(trace())
    assert found.tried[:, [0, 1, -1]].all()
    assert (found.advantages[np.arange(len(chosen)), chosen] == 0).all()
    assert not found.advantages[~found.tried].any()


def test_to_hold_is_tried_every_second_time(tried: tuple[Situations, np.ndarray]) -> None:
    found, _ = tried
    assert 0.35 < found.tried[:, -2].mean() < 0.65


def test_what_harms_is_worse_than_the_own_choice() -> None:
    alone = episode(np.arange(20) * 2.0, 3000, 10, 0)  # one after the other: the slow replica is too late
    found = tried_out(Arena(fleet({}, SLOW), threads=1), FASTEST, alone, Asked(10_000, 0, 0.02))
    wait = 0.02 * TENANTS["strict"].slo.ttft_s
    assert found.advantages[:, [1, -1]] == pytest.approx(np.full((20, 2), -1.0 - wait), abs=wait)


def test_few_decisions_are_those_that_were_asked_for(tried: tuple[Situations, np.ndarray]) -> None:
    every, chosen = tried
    few = tried_out(Arena(fleet({}, SLOW), threads=1), FASTEST, trace(), Asked(20, 0, 0.02))
    assert len(few.rows) == 20
    at = [int(np.flatnonzero((every.rows == row).all(axis=(1, 2)))[0]) for row in few.rows]
    assert at == sorted(at)
    assert (few.advantages[np.arange(20), chosen[at]] == 0).all()


def test_a_value_is_what_worth_gains() -> None:
    """For a change too small to make another tenant the worst."""
    requests = trace()
    played = Arena(fleet(SLOW), threads=1).episode(FASTEST, requests, seed=0)
    attained, tenant = played.outcomes.attained, requests.table["tenant"]
    worst = int(np.argmin([attained[tenant == t].mean() for t in range(len(TENANTS))]))
    value = Values(played, waiting=0.02)
    before = new_outcomes(len(requests))
    before["attained"], before["ttft_s"] = attained, played.outcomes.ttft_s
    for own in (tenant == worst, tenant != worst):
        after = before.copy()
        row = np.flatnonzero(own & ~attained)[0]
        after["attained"][row], after["ttft_s"][row] = True, 0.1
        gained = value(Rollout(np.arange(2), requests.table, np.stack([before, after]), 0))
        better = replace(played, outcomes=outcome_columns(after))
        assert gained[1] - gained[0] == pytest.approx(len(requests) * (worth(better, 0.02) - worth(played, 0.02)))


def test_hold_and_shed_stay_the_last_where_fleets_differ_in_size() -> None:
    def of(candidates: int) -> Situations:
        values = np.arange(candidates, dtype=np.float32)[None]
        rows = np.repeat(values[..., None], WIDTH, axis=-1)
        return Situations(rows, np.ones((1, candidates), np.bool_), values)

    both = joined([of(3), of(5)], 6)
    assert both.advantages.tolist() == [[0, 0, 0, 0, 1, 2], [0, 1, 2, 0, 3, 4]]
    assert both.tried.tolist() == [[True, False, False, False, True, True], [True, True, True, False, True, True]]
    assert (both.rows[..., 0] == both.advantages).all()


@pytest.fixture
def job(tmp_path: object) -> Job:
    config = TrainingConfig(
        description="Small.",
        workload="smoke",
        episode_s=10,
        variants=VariantsConfig(share=0),
        search=SearchConfig(pool=3),
        ppo=PpoConfig(rollout=32, tried_episodes=2, tried_decisions=20),
    )
    return Job(Run(tmp_path, config), Console(quiet=True), None)  # type: ignore[arg-type]


def test_a_step_is_worth_the_advantage_of_the_candidate_that_was_drawn(job: Job) -> None:
    env = SituationsEnv(job)
    weights = Scorer(job.config.architecture).get_weights()
    env.refresh(weights, 0)
    seen, masks = env.reset(), env.env_method("action_masks")
    assert seen.shape == (32, env.observation_space.shape[0])  # type: ignore[index]
    assert np.all(seen.reshape(32, -1, WIDTH)[:, -1, COLUMN["is_replica"]] == 0)
    actions = np.array([np.flatnonzero(mask)[-1] for mask in masks])
    expected = env._seen.advantages[env._drawn, actions]
    first = env._seen
    env.refresh(weights, 1)
    assert env._seen is first  # what was seen is judged by what it was drawn from
    _, rewards, ended, _ = env.step(actions)
    assert rewards.tolist() == expected.tolist()
    assert ended.all()
    assert env._seen is not first
    assert not np.array_equal(env._seen.rows, first.rows)
    job.close()


def test_ppo_steps_along_directions_that_change_what_it_collected_alike(job: Job) -> None:
    config, architecture = job.config.ppo, job.config.architecture
    model = ppo.make("maskable-ppo", SituationsEnv(job), config, architecture, 0)
    weights = np.random.default_rng(0).normal(size=parameters(architecture))
    ppo.collect(model, weights)
    scorer: Scorer = model.policy.scorer
    assert scorer.get_weights() == pytest.approx(weights, abs=1e-4)
    spread = covariance(model.get_env().reset().reshape(config.rollout, -1, WIDTH), architecture)
    basis = scorer.basis.double().numpy()
    plain, along = (np.linalg.eigvalsh(b.T @ spread @ b) for b in (np.eye(len(basis)), basis))
    assert (along > 0.1 * along[-1]).sum() > 2 * (plain > 0.1 * plain[-1]).sum()
    model.learn(config.rollout)
    assert scorer.get_weights() != pytest.approx(weights, abs=1e-3)
    job.close()

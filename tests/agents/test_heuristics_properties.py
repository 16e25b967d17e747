"""What holds for every heuristic on any observation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.agents.policies import heuristics
from steersman.runtime.observation import CANDIDATE_FEATURES, COLUMN, FEATURES, WIDTH
from steersman.runtime.policy import CompiledPolicy, Param, pick

HEURISTICS = heuristics()
DRAWS = {"random", "power-of-two", "round-robin", "llmd-latency"}  # their choice depends on the order of the candidates
HOLDS = {"push-hold-shed"}
every = pytest.mark.parametrize("policy", HEURISTICS.values(), ids=HEURISTICS.keys())

# Upper ends at which random observations are plausible; where the schema's own end is small, that.
PLAUSIBLE = {"unit": 1.0, "requests": 100.0, "tokens": 30_000.0, "tokens/s": 50_000.0, "s": 5.0}


def random_observation(seed: int, replicas: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and mask drawn from `seed`; about a third of the replicas are masked, and half of the time hold."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((replicas + padding + 2, WIDTH), np.float32)
    for i, feature in enumerate(FEATURES):
        high = min(feature.high, PLAUSIBLE.get(feature.unit, 3.0))
        low = max(feature.low, -3.0)
        drawn = rng.uniform(low, high, replicas)
        rows[:replicas, i] = np.round(drawn) if feature.unit in ("requests", "tokens") else drawn
    rows[:replicas, CANDIDATE_FEATURES:] = rows[0, CANDIDATE_FEATURES:]
    rows[-2:, CANDIDATE_FEATURES:] = rows[0, CANDIDATE_FEATURES:]
    rows[:replicas, [COLUMN["is_hold"], COLUMN["patience"]]] = 0.0
    rows[-2, [COLUMN["is_hold"], COLUMN["patience"]]] = 1.0, rng.random()
    prompt = rows[0, COLUMN["prompt_tokens"]]
    rows[:replicas, COLUMN["matched_tokens"]] %= prompt + 1
    rows[:replicas, COLUMN["uncached_tokens"]] = prompt - rows[:replicas, COLUMN["matched_tokens"]]
    mask = np.zeros(len(rows), np.bool_)
    mask[:replicas] = rng.random(replicas) < 0.67
    mask[-2] = mask[:replicas].any() and rng.random() < 0.5
    mask[-1] = True
    return rows, mask


observations = st.builds(random_observation, st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 3))


@every
@given(observation=observations, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_scores_are_finite_and_never_choose_what_the_guard_forbids(
    policy: CompiledPolicy, observation: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    rows, mask = observation
    scores = policy.bind(seed).score(rows, mask)
    assert np.isfinite(scores).all()
    assert mask[pick(scores, mask)]


@every
@given(observation=observations, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_forbidden_candidates_do_not_sway_the_choice(
    policy: CompiledPolicy, observation: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    rows, mask = observation
    other = rows.copy()
    forbidden = ~mask
    noise = np.random.default_rng(seed).uniform(0, 1000, (int(forbidden.sum()), CANDIDATE_FEATURES))
    other[forbidden, :CANDIDATE_FEATURES] = noise
    assert pick(policy.bind(1).score(rows, mask), mask) == pick(policy.bind(1).score(other, mask), mask)


@every
@given(observation=observations)
@settings(max_examples=60, deadline=None)
def test_the_input_is_left_as_it_was(policy: CompiledPolicy, observation: tuple[np.ndarray, np.ndarray]) -> None:
    rows, mask = observation
    before = rows.copy(), mask.copy(), policy.values.copy()
    policy.bind().score(rows, mask)
    assert np.array_equal(rows, before[0])
    assert np.array_equal(mask, before[1])
    assert np.array_equal(policy.values, before[2])


@pytest.mark.parametrize("name", sorted(set(HEURISTICS) - DRAWS))
@given(observation=observations, seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_order_of_replicas_does_not_matter(
    name: str, observation: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    rows, mask = observation
    scores = HEURISTICS[name].bind().score(rows, mask)
    if np.sum(scores[mask] >= scores[mask].max() - 1e-9) > 1:
        return  # a tie is decided by order or by chance
    last = len(rows) - 2
    order = np.concatenate([np.random.default_rng(seed).permutation(last), [last, last + 1]])
    permuted, allowed = np.ascontiguousarray(rows[order]), mask[order]
    assert order[pick(HEURISTICS[name].bind().score(permuted, allowed), allowed)] == pick(scores, mask)


@every
def test_without_an_allowed_replica_shed_is_chosen(policy: CompiledPolicy) -> None:
    rows, mask = random_observation(0, 5, 1)
    mask[:-1] = False
    scores = policy.bind().score(rows, mask)
    assert np.isfinite(scores).all()
    assert pick(scores, mask) == len(rows) - 1


@pytest.mark.parametrize("name", sorted(set(HEURISTICS) - HOLDS))
@given(observation=observations, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_heuristics_never_hold(name: str, observation: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    rows, mask = observation
    assert pick(HEURISTICS[name].bind(seed).score(rows, mask), mask) != len(rows) - 2


@every
def test_the_summary_is_one_sentence(policy: CompiledPolicy) -> None:
    assert policy.summary.endswith(".")
    assert policy.summary.count(". ") == 0
    assert policy.summary[0].isupper()


@every
def test_parameters_have_ranges_that_hold_their_defaults(policy: CompiledPolicy) -> None:
    assert len(policy.params) == len(policy.values)
    for param in policy.params.values():
        assert isinstance(param, Param)
        assert param.low <= param.default <= param.high
        assert param.low < param.high


def test_each_heuristic_bears_the_name_of_its_module() -> None:
    assert all(policy.name == name for name, policy in HEURISTICS.items())

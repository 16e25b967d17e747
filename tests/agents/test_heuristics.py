"""Each heuristic decides as its formula says, in situations computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from situations import choice, choices, situation

from steersman.agents.policies import resolve


def test_round_robin_takes_turns() -> None:
    assert choices(resolve("round-robin"), situation(3), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_round_robin_passes_over_what_the_guard_forbids() -> None:
    assert choices(resolve("round-robin"), situation(4, masked=(1,), padding=2), 5) == [0, 2, 3, 0, 2]


@pytest.mark.parametrize("name", ["random", "power-of-two"])
def test_random_choices_repeat_for_a_seed_and_differ_between_seeds(name: str) -> None:
    policy, observation = resolve(name), situation(8)
    assert choices(policy, observation, 40, seed=3) == choices(policy, observation, 40, seed=3)
    assert choices(policy, observation, 40, seed=3) != choices(policy, observation, 40, seed=4)


@pytest.mark.parametrize("name", ["random", "power-of-two"])
def test_random_choices_cover_the_allowed_replicas_evenly(name: str) -> None:
    counts = np.bincount(choices(resolve(name), situation(5, masked=(2,), padding=1), 4000), minlength=7)
    assert counts[[2, 5, 6]].sum() == 0
    assert counts[[0, 1, 3, 4]].min() > 900  # of 1,000 expected: less than four standard deviations


def test_power_of_two_takes_the_less_loaded_of_a_pair() -> None:
    drawn = choices(resolve("power-of-two"), situation(3, inflight=[9, 5, 1]), 3000)
    counts = np.bincount(drawn, minlength=3) / 3000
    # Of three equally likely pairs, replica 2 wins two, replica 1 one, and replica 0 none.
    assert counts == pytest.approx([0, 1 / 3, 2 / 3], abs=0.03)


def test_power_of_two_with_one_replica_allowed_takes_it() -> None:
    assert choice(resolve("power-of-two"), situation(3, masked=(0, 2), inflight=[0, 9, 0])) == 1


def test_least_requests_counts_requests_in_flight() -> None:
    assert choice(resolve("least-requests"), situation(3, inflight=[4, 2, 3], prefill_ahead=[0, 9000, 0])) == 1


def test_least_tokens_adds_the_uncached_tokens_of_the_request() -> None:
    # 3000 + 200, 2500 + 1000, 2900 + 800
    observation = situation(3, prefill_ahead=[3000, 2500, 2900], uncached_tokens=[200, 1000, 800])
    assert choice(resolve("least-tokens"), observation) == 0


def test_vllm_counts_a_waiting_request_four_times() -> None:
    observation = situation(3, waiting=[3, 2, 0], running=[1, 4, 12.5])  # 13, 12, 12.5
    assert choice(resolve("vllm-data-parallel"), observation) == 1
    assert choice(resolve("vllm-data-parallel?waiting_weight=1"), observation) == 0  # 4, 6, 12.5


def test_sglang_follows_the_best_match_while_balanced() -> None:
    balanced = situation(3, inflight=[60, 64, 1], matched_tokens=[200, 400, 0])  # apart by 63
    assert choice(resolve("sglang-cache-aware"), balanced) == 1


def test_sglang_sends_to_the_fewest_when_unbalanced() -> None:
    unbalanced = situation(3, inflight=[60, 66, 1], matched_tokens=[200, 400, 0])  # apart by 65, ratio 66
    assert choice(resolve("sglang-cache-aware"), unbalanced) == 2
    same_ratio = situation(3, inflight=[200, 266, 201], matched_tokens=[200, 400, 0])  # apart by 66, ratio 1.33
    assert choice(resolve("sglang-cache-aware"), same_ratio) == 1


def test_sglang_ignores_a_match_at_its_threshold() -> None:
    assert choice(resolve("sglang-cache-aware"), situation(2, inflight=[5, 2], matched_tokens=[300, 0])) == 1
    assert choice(resolve("sglang-cache-aware"), situation(2, inflight=[5, 2], matched_tokens=[301, 0])) == 0


def test_llmd_weighted_adds_queue_memory_and_prefix() -> None:
    # 2·(1, 0, .5) + 2·(.1, 1, .5) + 3·(0, .6, .5) = 2.2, 3.8, 3.5
    observation = situation(3, waiting=[0, 4, 2], kv_use=[0.9, 0.0, 0.5], matched_tokens=[0, 600, 500])
    assert choice(resolve("llmd-weighted"), observation) == 1
    assert choice(resolve("llmd-weighted?prefix_weight=0&queue_weight=4"), observation) == 0  # 4.2, 2, 3


def test_llmd_weighted_ignores_the_queues_of_forbidden_replicas() -> None:
    # Without replica 2 the queues differ by all of the scale; with it, by a hundredth of it.
    observation = situation(3, masked=(2,), waiting=[0, 1, 100], matched_tokens=[0, 500, 0])
    assert choice(resolve("llmd-weighted"), observation) == 0  # 2 + 2, 2 + 1.5


def test_llmd_weighted_breaks_ties_at_random() -> None:
    counts = np.bincount(choices(resolve("llmd-weighted"), situation(3), 3000), minlength=3) / 3000
    assert counts == pytest.approx([1 / 3] * 3, abs=0.03)


def test_llmd_sticky_keeps_to_warm_replicas_up_to_the_penalty() -> None:
    columns = {"matched_tokens": [900, 850, 0], "uncached_tokens": [100, 150, 1000]}
    policy = resolve("llmd-sticky?max_ttft_penalty_s=2&peak_prefill_tokens_per_s=1000")
    assert choice(policy, situation(3, prefill_ahead=[2500, 3000, 500], **columns)) == 0  # 2.5 s against 0.5 s
    assert choice(policy, situation(3, prefill_ahead=[2501, 3000, 500], **columns)) == 2


def test_llmd_sticky_chooses_among_warm_replicas_by_load() -> None:
    observation = situation(
        3,
        matched_tokens=[900, 800, 799],
        uncached_tokens=[100, 200, 201],
        prefill_ahead=[500, 300, 0],
        inflight=[1, 2, 0],
    )
    assert choice(resolve("llmd-sticky"), observation) == 1  # 600, 500
    assert choice(resolve("llmd-sticky?decode_bound=1"), observation) == 0


def test_dynamo_weighs_prefill_less_overlap_against_memory() -> None:
    # P − O + D with D in use by others plus this prompt: 2000 + 10000, 100 + 11500, 1000 + 13000
    observation = situation(
        3,
        prefill_ahead=[1000, 0, 0],
        matched_tokens=[0, 900, 0],
        kv_headroom=1 - (np.array([10_000, 11_500, 13_000]) + 100) / 100_000,
    )
    assert choice(resolve("dynamo-kv"), observation) == 1
    assert choice(resolve("dynamo-kv?overlap_weight=0"), observation) == 0


def test_dynamo_never_credits_more_than_the_prefill() -> None:
    observation = situation(2, prefill_ahead=[0, 0], matched_tokens=[999, 600], kv_headroom=[0.5, 0.5001])
    assert choice(resolve("dynamo-kv?overlap_weight=4"), observation) == 1  # both prefill terms are 0


def test_aibrix_takes_the_best_match_of_ordinary_load() -> None:
    # Mean 5, deviation 2.94: replica 0 with 9 in flight is beyond the limit.
    observation = situation(3, inflight=[9, 4, 2], matched_tokens=[900, 500, 300])
    assert choice(resolve("aibrix-prefix"), observation) == 1
    assert choice(resolve("aibrix-prefix?deviations=2"), observation) == 0


def test_aibrix_takes_the_fewest_requests_when_unbalanced_or_without_a_match() -> None:
    assert choice(resolve("aibrix-prefix"), situation(3, inflight=[5, 10, 1], matched_tokens=[900, 0, 0])) == 2
    assert choice(resolve("aibrix-prefix"), situation(3, inflight=[5, 4, 3])) == 2


def test_aibrix_counts_only_allowed_replicas() -> None:
    observation = situation(3, masked=(1,), inflight=[5, 90, 4], matched_tokens=[900, 0, 0])
    assert choice(resolve("aibrix-prefix?deviations=2"), observation) == 0


def test_jsed_adds_the_expected_output() -> None:
    observation = situation(2, predicted_ttft=[0.2, 1.0], predicted_tpot=[0.05, 0.03])  # 5.2, 4.0
    assert choice(resolve("jsed"), observation) == 1
    assert choice(resolve("jsed?decode_weight=0"), observation) == 0


@pytest.mark.parametrize(
    "name", ["jsed", "least-requests", "least-tokens", "llmd-weighted", "sglang-cache-aware", "round-robin"]
)
def test_heuristics_without_shedding_shed_only_what_may_go_nowhere(name: str) -> None:
    assert choice(resolve(name), situation(2, masked=(0,), ttft_slack=-100)) == 1
    assert choice(resolve(name), situation(2, masked=(0, 1))) == 3

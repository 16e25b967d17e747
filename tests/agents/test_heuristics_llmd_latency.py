"""llmd-latency: what it predicts, whom the gate keeps, and how it draws."""

from __future__ import annotations

import numpy as np
import pytest

from steersman.agents.heuristics.llmd_latency import POLICY, TERMS, latency
from steersman.runtime.observation import COLUMN, WIDTH
from steersman.runtime.policy import CompiledPolicy

# TTFT is the queue and TPOT the batch, so that a test sets both by hand.
PLAIN = POLICY.with_params(
    **{f"{name}_{term}": 0.0 for name in ("ttft", "tpot") for term in TERMS}
    | {"ttft_waiting": 1.0, "tpot_running": 1.0}
)
SPREAD, PACK = PLAIN.with_params(pack=0.0), PLAIN.with_params(pack=1.0)


def rows_of(ttft: list[float], tpot: list[float], matched: list[float] | None = None, **request: float) -> np.ndarray:
    """Replicas of these predicted latencies, hold and shed, for a request of 1,000 tokens due within 10 s and 10 s."""
    rows = np.zeros((len(ttft) + 2, WIDTH), np.float32)
    for name, value in ({"prompt_tokens": 1000, "ttft_slo": 10, "tpot_slo": 10} | request).items():
        rows[:, COLUMN[name]] = value
    replicas = rows[: len(ttft)]
    replicas[:, COLUMN["waiting"]], replicas[:, COLUMN["running"]] = ttft, tpot
    replicas[:, COLUMN["matched_tokens"]] = matched or [0.0] * len(ttft)
    return rows


def shares(policy: CompiledPolicy, rows: np.ndarray, masked: tuple[int, ...] = ()) -> list[float]:
    """How often each replica is drawn."""
    mask = np.ones(len(rows), np.bool_)
    mask[list(masked)] = False
    bound, counts = policy.bind(1), np.zeros(len(rows))
    for _ in range(4000):
        counts[np.where(mask, bound.score(rows, mask), -np.inf).argmax()] += 1
    return (counts / 4000).tolist()


def test_a_latency_is_the_line_through_its_terms() -> None:
    row = np.zeros(WIDTH, np.float32)
    columns = {"kv_use": 0.5, "prompt_tokens": 2000, "waiting": 3, "running": 20, "matched_tokens": 500}
    for name, value in columns.items():
        row[COLUMN[name]] = value
    b = np.array([0.1, 1.0, 0.001, 0.2, 0.01, -0.4, 0.0001])
    expected = 0.1 + 0.5 + 2.0 + 0.6 + 0.2 - 0.4 * 0.25 + 0.0001 * 7000
    assert latency(row, b, 7000.0) == pytest.approx(expected)
    assert latency(row, -b, 7000.0) == 0.0


def test_the_two_latencies_count_different_tokens_in_flight() -> None:
    policy = SPREAD.with_params(ttft_waiting=0.0, tpot_running=0.0, ttft_tokens=1.0, tpot_tokens=1.0)
    rows = rows_of([0, 0, 0], [0, 0, 0])
    rows[:3, COLUMN["prefill_ahead"]] = [0, 11, 0]
    assert shares(policy, rows)[1] == 0.0  # its TTFT would be 11 s
    rows[:3, COLUMN["prefill_ahead"]], rows[:3, COLUMN["context_tokens"]] = 0, [0, 0, 11]
    assert shares(policy, rows)[2] == 0.0


@pytest.mark.parametrize(("policy", "first"), [(SPREAD, 0), (PACK, 2)])
def test_it_draws_by_headroom_the_least_first_or_the_most(policy: CompiledPolicy, first: int) -> None:
    # Headrooms 9, 5, 1 scale to 1, 0.5, 0; both kinds alike.
    weights = np.array([1.01, 0.51, 0.01])
    expected = weights / weights.sum()
    drawn = shares(policy, rows_of([1, 5, 9], [1, 5, 9]))
    assert drawn[:3] == pytest.approx((expected if first == 0 else expected[::-1]).tolist(), abs=0.03)


def test_ttft_counts_four_times_as_much_as_tpot() -> None:
    drawn = shares(SPREAD, rows_of([1, 9], [9, 1]))
    assert drawn[0] / drawn[1] == pytest.approx(0.81 / 0.21, rel=0.15)


def test_what_is_equal_on_all_does_not_count() -> None:
    assert shares(SPREAD, rows_of([5, 5], [1, 9]))[0] > 0.95
    assert shares(SPREAD, rows_of([5, 5], [5, 5]))[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("policy", [SPREAD, PACK])
def test_while_one_is_in_time_those_that_are_late_are_never_drawn(policy: CompiledPolicy) -> None:
    assert shares(policy, rows_of([11, 9, 1], [1, 1, 11]))[1] == 1.0
    # The wait so far counts.
    assert shares(policy, rows_of([9, 6, 1], [1, 1, 11], waited=2))[1] == 1.0


@pytest.mark.parametrize("policy", [SPREAD, PACK])
def test_where_none_is_in_time_the_least_late_is_the_likeliest(policy: CompiledPolicy) -> None:
    assert shares(policy, rows_of([12, 20], [12, 20]))[0] > 0.95


def test_it_keeps_to_the_cached_prompt_up_to_a_penalty() -> None:
    matched = [0.0, 800.0, 799.0]
    assert shares(SPREAD, rows_of([1, 6, 1], [1, 1, 1], matched))[1] == 1.0  # 5 s later
    assert shares(SPREAD, rows_of([1, 6.1, 1], [1, 1, 1], matched))[1] < 0.1


def test_forbidden_replicas_neither_open_nor_break_the_gate() -> None:
    matched = [0.0, 800.0, 0.0]
    assert shares(SPREAD, rows_of([1, 6.1, 6.1], [1, 1, 1], matched), masked=(0,))[1] == 1.0
    assert shares(SPREAD, rows_of([1, 1, 1], [1, 1, 1], matched), masked=(1,))[0] == pytest.approx(0.5, abs=0.03)


def test_it_neither_holds_nor_sheds() -> None:
    assert sum(shares(POLICY, rows_of([1e4, 1e4], [1e4, 1e4]))[2:]) == 0.0

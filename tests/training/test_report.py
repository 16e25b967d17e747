import json
import re

import comparisons
import numpy as np
import pytest
from rich.console import Console

from steersman.training.report import (
    Paired,
    comparison_json,
    comparison_markdown,
    comparison_table,
    paired,
)

POLICIES = {
    "round-robin": 2.2,
    "random": 2.4,
    "least-requests": 1.8,
    "sglang-cache-aware": 1.7,
    "vllm-data-parallel": 1.6,
    "jsed": 1.3,
    "push-shed-tuned": 1.1,
    "learned (cma-es)": 0.7,
}


@pytest.fixture(scope="module")
def summaries():
    return comparisons.field(POLICIES)[0]


def rendered(summaries, best, width, color=False):
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as capture:
        console.print(comparison_table(summaries, best, width))
    return capture.get()


@pytest.mark.parametrize("width", [80, 120, 160])
def test_table_shows_every_policy_and_tenant_without_a_cut(summaries, width):
    text = rendered(summaries, "learned (cma-es)", width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    lines = [line.strip() for line in text.splitlines()]
    assert all(any(line.startswith(policy) for line in lines) for policy in POLICIES)
    headers = " ".join(lines[:3])
    for word in ("chat", "code-", "completion", "all", "TTFT", "TPOT", "P50 / P99"):
        assert word in headers


def test_table_shows_every_column_at_120(summaries):
    headers = " ".join(rendered(summaries, None, 120).splitlines()[:3])
    for word in ("good", "SLO", "busy", "occ", "prefix", "shed", "$ / 1k"):
        assert word in headers


def test_a_narrow_terminal_keeps_latencies_and_loses_utilisation_first(summaries):
    headers = " ".join(rendered(summaries, None, 88).splitlines()[:3])
    assert "TTFT" in headers
    assert "busy" not in headers


def test_policies_stand_in_order_of_goodput(summaries):
    text = rendered(summaries, None, 120)
    best = sorted(summaries, key=lambda s: -s.goodput_rps)
    assert [text.index(s.policy) for s in best] == sorted(text.index(s.policy) for s in best)


def test_the_best_of_a_column_is_bold(summaries):
    text = rendered(summaries, None, 120, color=True)
    best = max(s.goodput_rps for s in summaries)
    assert re.search(rf"\x1b\[[0-9;]*1m{best:.2f}\x1b", text)


def test_nothing_completed_reads_as_missing_not_as_fast(summaries):
    dead = comparisons.summary("dead", [comparisons.episode(0, 1.0, shed=1.0)])
    row = next(line for line in rendered([*summaries, dead], None, 120).splitlines() if line.startswith("dead"))
    assert row.count("–") == 5  # TTFT and TPOT, P50 and P99, and the cost of nothing


def test_many_tenants_are_summed_up_by_the_worst(summaries):
    first = summaries[0]
    crowd = first.model_copy(update={"tenants": {f"tenant-{i}": first.tenants["chat"] for i in range(7)}})
    headers = " ".join(rendered([crowd], None, 120).splitlines()[:3])
    assert "worst" in headers
    assert "tenant-3" not in headers


def test_markdown_has_a_line_a_policy_and_equal_cells(summaries):
    table = comparison_markdown(summaries, "learned (cma-es)").split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(POLICIES)
    assert len({line.count("|") for line in table}) == 1
    assert any(line.startswith("| **learned (cma-es)** |") for line in table)


def test_json_is_plain_and_keeps_what_a_summary_holds(summaries):
    pair = Paired.of("learned (cma-es)", "jsed", "goodput_rps", [2.0, 4.0], [1.0, 2.0], seed=0)
    data = json.loads(json.dumps(comparison_json(summaries, [pair]), allow_nan=False))
    assert [p["policy"] for p in data["policies"]] == list(POLICIES)
    assert data["policies"][0]["tenants"]["chat"]["ttft_s"]["p99"] == summaries[0].tenants["chat"].ttft_s.p99
    assert data["paired"] == [
        {
            "name": "learned (cma-es)",
            "against": "jsed",
            "metric": "goodput_rps",
            "difference": 1.5,
            "ratio": 2.0,
            "low": 2.0,
            "high": 2.0,
        }
    ]


def test_json_has_null_for_an_infinite_ratio():
    pair = Paired.of("a", "b", "goodput_rps", [1.0, 1.0], [0.0, 0.0], seed=0)
    (data,) = comparison_json([], [pair])["paired"]
    assert (data["difference"], data["ratio"]) == (1.0, None)


def test_paired_ratio_of_a_constant_factor_has_no_uncertainty():
    hard = np.random.default_rng(0).uniform(0.1, 10, 20)  # seeds differ a hundredfold
    assert paired(list(1.1 * hard), list(hard), seed=3) == pytest.approx((1.1, 1.1, 1.1))


def test_paired_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(1)
    b = np.ones(200)
    a = 1.05 + 0.1 * rng.standard_normal(200)
    ratio, low, high = paired(list(a), list(b), seed=0)
    error = a.std(ddof=1) / np.sqrt(200)
    assert ratio == pytest.approx(a.mean())
    assert low == pytest.approx(a.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(a.mean() + 1.96 * error, abs=0.2 * error)


def test_paired_is_the_same_for_the_same_seed():
    a, b = [1.0, 2.0, 4.0, 3.0], [1.5, 1.0, 3.0, 3.5]
    assert paired(a, b, seed=5) == paired(a, b, seed=5)


def test_paired_of_two_policies_without_worth_is_a_tie():
    assert paired([0.0, 0.0], [0.0, 0.0], seed=0) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_paired_refuses_what_is_no_pair(a, b):
    with pytest.raises(ValueError, match="equally many episodes"):
        paired(a, b, seed=0)

"""The synthetic source: rates, bursts, lengths, and shared prefixes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.runtime.workload import Files, Stream
from steersman.runtime.workload._arrivals import Arrivals
from steersman.runtime.workload._blocks import chained, separate
from steersman.runtime.workload._fit import fit_quantiles
from steersman.runtime.workload._lengths import Lengths
from steersman.runtime.workload.synthetic import Synthetic

LENGTHS = {"lognormal": {"median": 100, "sigma": 0.7, "max": 2000}}
BURSTS = {"factor": [4, 6], "duration_s": [10, 15], "every_s": 60}


def stream(seed: int = 0, duration_s: float = 200.0, load: float = 1.0, **options: object) -> Stream:
    base = {"rate_rps": 5.0, "prompt_tokens": LENGTHS, "output_tokens": LENGTHS}
    return Synthetic.model_validate({**base, **options}).stream(
        np.random.default_rng(seed),
        duration_s=duration_s,
        load=load,
        split="train",
        block_tokens=64,
        files=Files(None),
    )


def chains(s: Stream) -> list[list[int]]:
    return [list(part) for part in np.split(s.blocks, np.cumsum(s.block_count)[:-1])]


@pytest.mark.parametrize("arrivals", [{}, {"cv": 0.5}, {"cv": 4}, {"bursts": BURSTS}, {"cv": 2, "bursts": BURSTS}])
def test_the_mean_rate_is_the_one_asked_for(arrivals):
    times = Arrivals.model_validate(arrivals)
    counts = [len(times.sample(np.random.default_rng(s), 10.0, 0.0, 100.0)) for s in range(300)]
    error = np.std(counts) / len(counts) ** 0.5
    assert np.mean(counts) == pytest.approx(1000, abs=4 * error)


@pytest.mark.parametrize("cv", [0.5, 1, 3])
def test_gaps_vary_as_much_as_asked_for(cv):
    gaps = np.diff(Arrivals(cv=cv).sample(np.random.default_rng(0), 10.0, 0.0, 10_000.0))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_bursts_hold_their_share_of_the_arrivals_at_any_phase():
    times = Arrivals.model_validate({"bursts": {"factor": [5, 5], "duration_s": [10, 10], "every_s": 50}})
    first_second = [len(times.sample(np.random.default_rng(s), 20.0, 0.0, 1.0)) > 33 for s in range(2000)]
    # Rates are 20 / 1.8 = 11 a second outside and 56 inside; a fifth of the time is inside.
    assert np.mean(first_second) == pytest.approx(0.2, abs=0.04)


def test_a_session_tenant_has_its_request_rate_from_the_start_on():
    prefix = {"kind": "session", "turns": [2, 9], "think_s": 5}
    early, late = [], []
    for seed in range(150):
        times = stream(seed, duration_s=100, prefix=prefix).arrival_s
        early.append((times < 50).sum() / 50)
        late.append((times >= 50).sum() / 50)
    assert np.mean(early) == pytest.approx(5, rel=0.05)
    assert np.mean(late) == pytest.approx(5, rel=0.05)


def test_a_turns_prompt_continues_the_turn_before_and_its_answer():
    s = stream(prefix={"kind": "session", "system_tokens": 640, "turns": [4, 4], "think_s": 2})
    sessions: dict[int, list[int]] = {}
    for i, chain in enumerate(chains(s)):
        sessions.setdefault(chain[10], []).append(i)  # the first block after the system prompt's ten
    assert max(map(len, sessions.values())) == 4
    for turns in sessions.values():
        for a, b in pairwise(turns):
            known = s.prompt_tokens[a] + s.output_tokens[a]
            assert s.prompt_tokens[b] > known
            assert s.block_count[a] == known // 64
            assert chains_of(s, b)[: s.block_count[a]] == chains_of(s, a)


def chains_of(s: Stream, i: int) -> list[int]:
    start = int(s.block_count[:i].sum())
    return list(s.blocks[start : start + s.block_count[i]])


def test_all_sessions_share_the_system_prompt_and_nothing_else():
    s = stream(prefix={"kind": "session", "system_tokens": 640, "turns": [1, 1], "think_s": 2})
    starts = {tuple(chain[:10]) for chain in chains(s)}
    rest = [block for chain in chains(s) for block in chain[10:]]
    assert len(starts) == 1
    assert len(set(rest)) == len(rest)


def test_a_system_prompt_is_shared_up_to_its_last_full_block():
    s = stream(prefix={"kind": "system", "tokens": 200})
    assert s.prompt_tokens.min() > 200
    assert {tuple(chain[:3]) for chain in chains(s)} == {tuple(chains(s)[0][:3])}
    fourth = [chain[3] for chain in chains(s) if len(chain) > 3]
    assert len(set(fourth)) == len(fourth)


def test_documents_are_asked_about_in_proportion_to_their_rank():
    s = stream(duration_s=4000, prefix={"kind": "documents", "count": 4, "exponent": 1.0, "tokens": 640})
    _, counts = np.unique([chain[0] for chain in chains(s)], return_counts=True)
    assert sorted(counts / counts.sum(), reverse=True) == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.015)
    assert len({tuple(chain[:10]) for chain in chains(s)}) == 4


def test_prompts_without_a_prefix_share_nothing():
    blocks = stream().blocks
    assert len(np.unique(blocks)) == len(blocks)


def test_outputs_are_cut_off_at_max_tokens():
    s = stream(max_tokens=50)
    assert s.output_tokens.max() == 50
    assert set(s.max_tokens) == {50}


def test_a_table_of_quantiles_reproduces_them():
    table = {0: 1, 0.25: 40, 0.5: 100, 0.9: 2000, 1: 9000}
    lengths = Lengths(quantiles=table)
    drawn = lengths.sample(np.random.default_rng(0), 200_000)
    assert np.quantile(drawn, list(table)) == pytest.approx(list(table.values()), rel=0.02, abs=1)
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.01)


def test_a_fitted_table_has_the_distribution_of_the_values():
    values = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 1
    drawn = Lengths(quantiles=fit_quantiles(values)).sample(np.random.default_rng(1), 20_000)
    for p in (0.07, 0.33, 0.5, 0.85, 0.97):
        assert np.quantile(drawn, p) == pytest.approx(np.quantile(values, p), rel=0.12)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**63 - 1), min_size=2, unique=True))
def test_separating_keeps_different_blocks_different(seed, blocks):
    moved = separate(np.array(blocks), seed)
    assert len(set(moved.tolist())) == len(blocks)
    assert moved.min() >= 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)), min_size=1))
def test_chained_blocks_are_equal_exactly_where_prefixes_are(rows):
    count, shared, chain = (np.array(column) for column in zip(*rows, strict=True))
    joined = chained(count, shared, chain, 3 + np.arange(len(rows)))
    parts = np.split(joined, np.cumsum(count)[:-1])
    for i, (a, n, c) in enumerate(zip(parts, shared, chain, strict=True)):
        assert len(a) == count[i]
        for j, b in enumerate(parts):
            common = min(n, shared[j], len(a), len(b)) if c == chain[j] else 0
            expected = len(a) if i == j else common
            assert len(np.intersect1d(a, b)) == expected


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rate=st.floats(0.01, 50),
    duration=st.floats(0.01, 60),
    load=st.floats(0.01, 3),
    arrivals=st.sampled_from([{}, {"cv": 0.3}, {"cv": 5}, {"bursts": BURSTS}]),
    prefix=st.sampled_from(
        [
            {"kind": "none"},
            {"kind": "system", "tokens": 100},
            {"kind": "documents", "count": 3, "tokens": 300},
            {"kind": "session", "turns": [1, 5], "think_s": 1, "system_tokens": 70},
        ]
    ),
)
def test_every_stream_is_sorted_in_range_and_consistent(seed, rate, duration, load, arrivals, prefix):
    s = stream(seed, duration, load, rate_rps=rate, arrivals=arrivals, prefix=prefix)
    assert np.all(np.diff(s.arrival_s) >= 0)
    assert np.all((s.arrival_s >= 0) & (s.arrival_s < duration))
    assert np.all(s.prompt_tokens >= 1)
    assert np.all((s.output_tokens >= 1) & (s.output_tokens <= s.max_tokens))
    assert np.all(s.prompt_blocks == s.prompt_tokens // 64)
    assert np.all(s.block_count >= s.prompt_blocks)
    assert len(s.blocks) == s.block_count.sum()
    assert np.all((s.blocks >= 0) & (s.blocks < 2**48))

"""The compiled simulator equals its reference, on random small clusters under random episodes and actions."""

from __future__ import annotations

import numpy as np
from clusters import Situation, situations
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference, plain

from steersman.runtime.observation import COLUMN
from steersman.runtime.simulator import SimulatedRuntime

PROFILE = "llama-3.1-8b-l40s-bf16"


def assert_equal(runtime: SimulatedRuntime, reference: Reference) -> None:
    """Outcomes and usage are the same; seconds but for rounding."""
    fast, slow = runtime.records, reference.outcomes
    for name in ("state", "replica", "cached_tokens", "attained", "holds"):
        assert fast[name].tolist() == [getattr(outcome, name) for outcome in slow], name
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        seconds = [getattr(outcome, name) for outcome in slow]
        np.testing.assert_allclose(fast[name], seconds, rtol=1e-9, atol=1e-12, err_msg=name)
    for row, engine in zip(runtime.usage(), reference.engines, strict=True):
        for name in ("output_tokens", "iterations", "preemptions"):
            assert row[name] == getattr(engine.usage, name), name
        for name in ("busy_s", "sequence_s"):
            np.testing.assert_allclose(row[name], getattr(engine.usage, name), rtol=1e-9, atol=1e-12, err_msg=name)


@settings(deadline=None, max_examples=1500, derandomize=True)
@given(situations())
def test_replaying_gives_what_the_reference_gives(situation):
    runtime, reference = situation.runtime(), situation.reference()
    assert runtime.replay(situation.actions) == reference.play(situation.actions)
    assert_equal(runtime, reference)


@st.composite
def changes(draw: st.DrawFn, situation: Situation, runtime: SimulatedRuntime) -> tuple[int, dict[str, int]]:
    """A replica, and what is set there: limits, or KV tokens under another profile."""
    replica = draw(st.integers(0, len(situation.groups) - 1))
    if draw(st.booleans()):
        most = int(runtime.replicas["kv_tokens"][replica])
        return replica, {"kv_tokens": draw(st.integers(situation.block_tokens, most))}
    seqs = draw(st.integers(1, int(runtime.replicas["max_num_seqs"].max())))
    return replica, {"max_num_seqs": seqs, "token_budget": draw(st.integers(seqs, 40))}


@settings(deadline=None, max_examples=500, derandomize=True)
@given(situations(), st.data())
def test_replicas_may_change_between_decisions(situation, data):
    """Decision by decision, engines have the same batch and queue, and gateways hold as many, while limits change."""
    runtime, reference = situation.runtime(), situation.reference()
    actions = iter(situation.actions)
    more = runtime.advance()
    while more:
        assert reference.advance()
        np.testing.assert_allclose(runtime.now, reference.now_s, rtol=1e-12)
        assert runtime.view("cluster")["pending"] == reference.pending
        for row, engine in zip(runtime.view("engines"), reference.engines, strict=True):
            assert row["n_waiting"] == len(engine.waiting)
            assert row["n_decode"] == len(engine.decoding)
            assert row["n_finishing"] == len(engine.finishing)
            assert (row["partial"] >= 0) == (engine.partial is not None)
        assert reference.pending is not None
        held = [0] * situation.gateways
        for _, number in reference.held:
            held[reference.gateway(number)] += 1
        assert runtime.view("fleets")["held"].ravel().tolist() == held
        assert runtime.rows[-1, COLUMN["held"]] == held[reference.gateway(reference.pending)]
        assert runtime.mask[runtime.hold] == reference.may_hold(reference.pending)
        if data.draw(st.integers(0, 3)) == 0:
            replica, settings = data.draw(changes(situation, runtime))
            if "kv_tokens" in settings:
                runtime.set_precision(replica, PROFILE, **settings)
            else:
                runtime.set_limits(replica, **settings)
            reference.change(replica, **vars(plain(runtime.view("replicas")[replica])))
        action = next(actions)
        reference.apply(action)
        more = runtime.step(action)
    assert not reference.advance()
    assert_equal(runtime, reference)

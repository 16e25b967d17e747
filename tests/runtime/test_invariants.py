"""What holds at every decision of every episode, and what is the same wherever it is played."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
from clusters import COSTS, Situation, situations
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import FASTEST, episode, fleet

from steersman.runtime.outcomes import State
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.simulator.faults import Kind

UNENDING_S = 1e6  # a window that holds all that happens
few = settings(deadline=None, max_examples=120, derandomize=True)


def calm(situation: Situation) -> Situation:
    """The same without crashes and clients that leave."""
    table = situation.requests.table.copy()
    table["cancel_s"] = 0.0
    faults = situation.faults[situation.faults["kind"] != Kind.CRASH]
    return replace(situation, requests=replace(situation.requests, table=table, duration_s=UNENDING_S), faults=faults)


def with_groups(situation: Situation, **changes: object) -> Situation:
    return replace(situation, groups=[{**group, **changes} for group in situation.groups])


def decisions(runtime: SimulatedRuntime, actions: list[int]):
    """Play with given actions, stopping at each decision."""
    more, remaining = runtime.advance(), iter(actions)
    while more:
        yield
        more = runtime.step(next(remaining))
    yield


def batch(runtime: SimulatedRuntime, replica: int) -> list[tuple[np.void, int]]:
    """The running sequences of a replica and the tokens whose KV they hold."""
    engine, sequences = runtime.view("engines")[replica], runtime.view("sequences")
    decoding = sequences[runtime.view("decoding")[replica, : engine["n_decode"]]]
    prefilled = sequences[runtime.view("finishing")[replica, : engine["n_finishing"]]]
    if engine["partial"] >= 0:
        prefilled = np.append(prefilled, sequences[engine["partial"]])
    # In a jump, the blocks are those before its first iteration.
    tokens = [*(decoding["base"] + engine["counter"] + engine["mixed"]), *prefilled["computed"]]
    return list(zip([*decoding, *prefilled], map(int, tokens), strict=True))


@few
@given(situations())
def test_every_request_ends_exactly_once(situation):
    runtime, ended = situation.runtime(), []
    for _ in decisions(runtime, situation.actions):
        ended += runtime.ended.tolist()
    assert sorted(ended) == list(range(len(situation.requests)))
    assert (runtime.outcomes().state != State.PENDING).all()


@few
@given(situations())
def test_tokens_are_conserved(situation):
    runtime = calm(situation).runtime()
    runtime.replay(situation.actions)
    done = runtime.outcomes().state == State.DONE
    assert runtime.usage()["output_tokens"].sum() == situation.requests.table["output_tokens"][done].sum()


@few
@given(situations())
def test_kv_blocks_are_conserved(situation):
    """They are free, a running sequence's own, or a cached prefix block's; the cache knows which of its are held."""
    runtime, requests = situation.runtime(), situation.requests
    per_prefix = requests.block_tokens // situation.block_tokens
    for _ in decisions(runtime, situation.actions):
        for r, engine in enumerate(runtime.view("engines")):
            cache, own, held = runtime.view("sets")[0, r], 0, set()
            for sequence, tokens in batch(runtime, r):
                own += -(-tokens // situation.block_tokens) - sequence["held"] * per_prefix
                start = requests.table["block_start"][sequence["request"]]
                held |= set(requests.blocks[start : start + sequence["held"]].tolist())
            assert engine["free_blocks"] >= 0
            assert engine["free_blocks"] + own + cache["size"] * per_prefix == engine["total_blocks"]
            assert len(held) == cache["size"] - cache["idle"]


@few
@given(situations())
def test_the_batch_keeps_its_limits(situation):
    """With seconds that only count tokens, an iteration's seconds tell how many it computes."""
    unit_s = 1 / 1024
    costs = dict.fromkeys(COSTS, 0.0) | {
        "decode_a_s": 1.0,
        "prefill_a_s": 1.0,
        "decode_b_s": unit_s,
        "prefill_b_s": unit_s,
    }
    situation = with_groups(replace(situation, costs=[costs] * len(situation.groups)), swap_s_per_token=0.0)
    situation = replace(situation, faults=situation.faults[situation.faults["kind"] != Kind.SLOW])
    runtime = situation.runtime()
    for _ in decisions(runtime, situation.actions):
        for r, (replica, engine) in enumerate(zip(runtime.view("replicas"), runtime.view("engines"), strict=True)):
            assert len(batch(runtime, r)) <= replica["max_num_seqs"]
            if engine["steps"]:
                assert (engine["alpha"] - 1.0) / unit_s <= replica["token_budget"]


@few
@given(situations())
def test_time_never_runs_back(situation):
    runtime, last = situation.runtime(), 0.0
    for _ in decisions(runtime, situation.actions):
        assert runtime.now >= last
        assert (runtime.view("due") >= runtime.now).all()
        last = runtime.now


@few
@given(situations())
def test_who_is_held_comes_again_in_time(situation):
    """While its promise can still be kept; and held requests are counted until the last one is decided."""
    runtime, table = situation.runtime(), situation.requests.table
    for _ in decisions(runtime, situation.actions):
        cluster = runtime.view("cluster")[0]
        assert runtime.view("fleets")["held"].sum() == cluster["n_held"]
        if cluster["retried"] == 2 and cluster["pending"] >= 0:
            request = table[cluster["pending"]]
            waited_s, promise = runtime.now - request["arrival_s"], runtime.view("tenants")[request["tenant"]]
            assert waited_s < promise["ttft_slo_s"]
            assert not 0 < request["cancel_s"] <= waited_s
    assert cluster["n_held"] == cluster["inflight"] == 0


@few
@given(situations())
def test_first_come_is_first_served(situation):
    """Under `fcfs`, without preemption and holding, first tokens come in the order of arrival."""
    situation = with_groups(calm(situation), queue="fcfs", kv_tokens=4096)
    runtime = situation.runtime()
    runtime.replay([action for action in situation.actions if action != situation.hold])
    assert not runtime.usage()["preemptions"].any()
    outcomes = runtime.outcomes()
    first_token_s = situation.requests.table["arrival_s"] + outcomes.ttft_s
    for replica in range(len(situation.groups)):
        done = (outcomes.state == State.DONE) & (outcomes.replica == replica)
        assert (np.diff(first_token_s[done]) >= -1e-9).all()


@few
@given(situations(), st.integers(0, 20))
def test_a_clone_has_the_same_bytes_and_the_same_future(situation, steps):
    runtime = situation.runtime()
    stop = runtime.replay(situation.actions[:steps])
    clone = runtime.clone()
    futures = []
    for _ in range(2):
        runtime.replay(situation.actions[stop:])
        futures.append((runtime.records.tobytes(), runtime.usage().tobytes(), runtime.clone().tobytes()))
        runtime.restore(clone)
        assert runtime.clone().tobytes() == clone.tobytes()
    assert futures[0] == futures[1]


def digest() -> str:
    """Of all that came out of an episode with crashes, preemptions and cached prefixes."""
    rng, count = np.random.default_rng(7), 400
    requests = episode(
        np.cumsum(rng.exponential(1 / 60, count)),
        rng.integers(1, 1500, count),
        rng.integers(1, 400, count),
        rng.integers(0, 2, count),
        rng.integers(0, 6, count),
    )
    requests.table["cancel_s"] = rng.choice([0.0, 3.0], count)
    runtime = SimulatedRuntime(fleet({"kv_tokens": 4096, "queue": "vtc"}, {"queue": "sjf"}))
    runtime.reset(requests)
    runtime.run(FASTEST)
    assert runtime.usage()["preemptions"].any()
    return hashlib.sha256(runtime.records.tobytes() + runtime.usage().tobytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_every_process():
    environment = os.environ | {"PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


if __name__ == "__main__":
    print(digest())

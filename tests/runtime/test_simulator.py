"""Facts about the simulated engine, by hand and by property."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import FASTEST, PATIENT, episode, fleet

from steersman.runtime.compiled import njit
from steersman.runtime.cost import load_profile
from steersman.runtime.guard import Reason
from steersman.runtime.observation import COLUMN
from steersman.runtime.outcomes import State, summarise
from steersman.runtime.policy import SCORE, CompiledPolicy
from steersman.runtime.simulator import SimulatedRuntime
from steersman.runtime.tenant import Tenant

H100 = load_profile("llama-3.1-8b-h100-bf16")


def prefill_s(tokens: int, before: int = 0, decodes: int = 0, context: int = 0) -> float:
    """An iteration with one prefill chunk."""
    chunk = tokens * (H100.prefill_b_s_per_token + H100.prefill_c_s_per_token2 * (before + tokens / 2))
    base = max(H100.prefill_a_s + chunk, H100.decode_a_s if decodes else 0.0)
    return H100.overhead_s + base + H100.decode_b_s_per_sequence * decodes + H100.decode_c_s_per_token * context


def decode_s(contexts: list[int]) -> float:
    """An iteration with decodes only."""
    return (
        H100.overhead_s
        + H100.decode_a_s
        + H100.decode_b_s_per_sequence * len(contexts)
        + H100.decode_c_s_per_token * sum(contexts)
    )


@njit(SCORE)
def _wait(rows, mask, params, memory, scores):
    scores[:] = 0.0
    scores[-2] = 1.0


def play(requests, *groups, **options):
    runtime = SimulatedRuntime(fleet(*(groups or ({},))), **options)
    runtime.reset(requests)
    runtime.run(FASTEST)
    return runtime


def test_a_lone_request_prefills_in_chunks_then_decodes():
    outcomes = play(episode(0.0, 700, 3)).outcomes()
    first = prefill_s(512) + prefill_s(188, before=512)
    assert outcomes.ttft_s[0] == pytest.approx(first)
    assert outcomes.e2e_s[0] == pytest.approx(first + decode_s([700]) + decode_s([701]))
    assert outcomes.tpot_s[0] == pytest.approx((decode_s([700]) + decode_s([701])) / 2)


def test_prefill_shares_iterations_with_decodes():
    outcomes = play(episode([0.0, 0.0], [100, 600], [4, 1])).outcomes()
    first = prefill_s(100)
    second = prefill_s(511, decodes=1, context=100)
    third = prefill_s(89, before=511, decodes=1, context=101)
    assert outcomes.ttft_s[1] == pytest.approx(first + second + third)
    assert outcomes.e2e_s[0] == pytest.approx(first + second + third + decode_s([102]))


def test_an_arrival_joins_after_the_iteration_that_runs():
    arrival = prefill_s(100) + decode_s([100]) * 1.5
    outcomes = play(episode([0.0, arrival], [100, 10], [50, 1])).outcomes()
    boundary = prefill_s(100) + decode_s([100]) + decode_s([101])
    assert outcomes.ttft_s[1] == pytest.approx(boundary + prefill_s(10, decodes=1, context=102) - arrival)


def test_a_cached_prefix_is_not_computed_again():
    requests = episode([0.0, 10.0], [640, 640], [1, 1], prefixes=[0, 0])
    outcomes = play(requests).outcomes()
    assert outcomes.cached_tokens.tolist() == [0, 576]  # the last token, hence its block, is always computed
    assert outcomes.ttft_s[1] == pytest.approx(prefill_s(64, before=576))


def test_the_cache_is_bounded_by_the_kv_memory_and_loses_the_ends_of_prompts_first():
    requests = episode([0.0, 10.0, 20.0], [640, 640, 640], [1, 1, 1], prefixes=[0, 1, 0])
    small = play(requests, {"kv_tokens": 704}).outcomes()
    assert small.cached_tokens[2] == 64  # 11 blocks hold the second prompt's 10 and one of the first's


def test_a_small_batch_limit_queues():
    outcomes = play(episode([0.0, 0.0], [10, 10], [20, 1]), {"max_num_seqs": 1}).outcomes()
    assert outcomes.ttft_s[1] > outcomes.e2e_s[0]


def test_preemption_recomputes_and_keeps_the_first_token():
    requests = episode([0.0, 0.0], [300, 300], [200, 200])
    runtime = play(requests, {"kv_tokens": 800})
    outcomes = runtime.outcomes()
    assert runtime.usage()["preemptions"][0] >= 1
    assert (outcomes.state == State.DONE).all()
    assert outcomes.e2e_s[1] > outcomes.e2e_s[0]
    free = play(requests, {"kv_tokens": 8000}).outcomes()
    assert outcomes.ttft_s[1] == pytest.approx(free.ttft_s[1])
    assert outcomes.e2e_s[1] > free.e2e_s[1]


def test_a_request_that_fits_nowhere_is_shed():
    outcomes = play(episode(0.0, 30000, 10), {"kv_tokens": 20000}).outcomes()
    assert outcomes.state[0] == State.SHED


def test_a_masked_action_sheds():
    runtime = SimulatedRuntime(fleet({}), candidates=4)
    runtime.reset(episode([0.0, 1.0], [10, 10], [1, 1]))
    assert runtime.advance()
    assert runtime.mask.tolist() == [True, False, True, True]
    assert runtime.step(1)
    assert runtime.ended.tolist() == [0]
    assert runtime.outcomes().state[0] == State.SHED


def test_a_held_request_comes_back_after_every_pause_until_it_has_waited_too_long():
    tenants = {"one": Tenant(slo={"ttft_s": 0.3125, "tpot_s": 0.1})}  # a pause is exactly 1/32 s
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(replace(episode([1.0], [10], [1]), tenants=tenants))
    assert runtime.advance()
    times, patience = [], []
    while runtime.mask[runtime.hold]:
        assert runtime.rows[runtime.hold, COLUMN["is_hold"]] == 1
        times.append(runtime.now)
        patience.append(float(runtime.rows[runtime.hold, COLUMN["patience"]]))
        assert runtime.step(runtime.hold)
        assert not len(runtime.ended)
    assert times == (1 + np.arange(9) / 32).tolist()
    assert patience == pytest.approx(1.0 - np.arange(9) / 10)
    assert runtime.now == 1 + 9 / 32
    assert runtime.reasons[runtime.hold] == Reason.WAITED
    assert not runtime.rows[runtime.hold, : COLUMN["prompt_tokens"]].any()
    assert runtime.rows[runtime.shed, COLUMN["waited"]] == 9 / 32
    assert not runtime.step(0)
    assert runtime.outcomes().ttft_s[0] == pytest.approx(9 / 32 + prefill_s(10))
    assert runtime.records["holds"].tolist() == [9]


@pytest.mark.parametrize(("ttft_s", "pause_s"), [(0.05, 0.01), (4.0, 0.4), (60.0, 1.0)])
def test_a_pause_is_a_tenth_of_the_promise_within_bounds(ttft_s: float, pause_s: float):
    tenants = {"one": Tenant(slo={"ttft_s": ttft_s, "tpot_s": 0.1})}
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(replace(episode([0.0], [10], [1]), tenants=tenants))
    assert runtime.advance()
    assert runtime.step(runtime.hold)
    assert runtime.now == pytest.approx(pause_s)


def test_a_promise_shorter_than_a_pause_allows_no_hold():
    tenants = {"one": Tenant(slo={"ttft_s": 0.01, "tpot_s": 0.1})}
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(replace(episode([0.0], [10], [1]), tenants=tenants))
    assert runtime.advance()
    assert runtime.mask.tolist() == [True, False, True]


def test_a_request_that_no_replica_may_take_is_not_held():
    runtime = SimulatedRuntime(fleet({"kv_tokens": 20000}))
    runtime.reset(episode([0.0], [30000], [10]))
    assert runtime.advance()
    assert runtime.mask.tolist() == [False, False, True]
    assert runtime.reasons.tolist() == [Reason.CONTEXT, Reason.WAITED, Reason.ALLOWED]


def test_arrivals_come_before_held_requests_that_are_due_then_which_keep_their_order():
    requests = episode([0.0, 0.0, 0.5, 1.0], 10, 1, tenant=1)  # a pause is 0.5 s
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(requests)
    assert runtime.advance()
    seen = []
    for action in (runtime.hold, runtime.hold, runtime.hold, runtime.hold, 0, 0, 0):
        seen.append((runtime.now, int(runtime.view("cluster")["pending"][0]), int(runtime.rows[0, COLUMN["held"]])))
        runtime.step(action)
    assert seen == [(0, 0, 0), (0, 1, 1), (0.5, 2, 2), (0.5, 0, 2), (0.5, 1, 2), (1.0, 3, 2), (1.0, 0, 1)]


def test_a_client_that_leaves_while_held_is_counted_when_its_request_is_due():
    requests = episode([0.0, 0.0], 10, 1, tenant=1)
    requests.table["cancel_s"] = [0.51, 0.0]
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(requests)
    assert runtime.advance()
    for action in (runtime.hold, 0, runtime.hold):
        more = runtime.step(action)
    assert not more
    assert runtime.now == 1.0
    assert runtime.ended.tolist() == [0]
    assert runtime.outcomes().state.tolist() == [State.CANCELLED, State.DONE]
    assert runtime.outcomes().attained.all()
    assert not runtime.advance()


def test_stepping_and_running_are_the_same():
    requests = random_episode(np.random.default_rng(3), 300, 30.0)
    ran = play(requests, {}, {"profile": "llama-3.1-8b-l40s-bf16"})
    stepped = SimulatedRuntime(ran.fleet)
    stepped.reset(requests)
    policy = FASTEST.bind()
    more = stepped.advance()
    while more:
        scores = np.where(stepped.mask, policy.score(stepped.rows, stepped.mask), -np.inf)
        more = stepped.step(int(scores.argmax()))
    assert np.array_equal(ran.outcomes().e2e_s, stepped.outcomes().e2e_s, equal_nan=True)


@pytest.mark.parametrize("policy", [FASTEST, PATIENT], ids=lambda policy: policy.name)
def test_a_restored_clone_repeats_the_future(policy):
    runtime = SimulatedRuntime(fleet({}, {}))
    runtime.reset(random_episode(np.random.default_rng(4), 100, 30.0))
    runtime.advance()
    for k in range(50):
        runtime.step(runtime.hold if k % 2 == 0 else 0)
    assert runtime.view("cluster")["n_held"] > 1
    clone = runtime.clone()
    runtime.run(policy)
    first = runtime.records.copy()
    runtime.restore(clone)
    runtime.run(policy)
    assert first.tobytes() == runtime.records.tobytes()


def test_all_decisions_are_recorded_however_many_they_are():
    requests = episode(np.arange(200) * 0.02, 10, 5)
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(requests)
    policy = CompiledPolicy("waits", "Holds as long as it may.", _wait)
    actions = runtime.routes(policy)
    assert len(actions) >= 10 * len(requests) > 2 * len(requests) + 1024
    ran = runtime.records.copy()
    runtime.reset(requests)
    rows, again = runtime.record(policy)
    assert (again == actions).all()
    assert rows.shape[:2] == (len(actions), 3)
    runtime.reset(requests)
    assert len(runtime.record(policy, limit=7)[0]) == 7
    runtime.reset(requests)
    assert runtime.replay(actions) == len(actions)
    assert runtime.records.tobytes() == ran.tobytes()
    runtime.reset(requests)
    runtime.replay_each(ran["replica"], ran["holds"])
    assert runtime.records.tobytes() == ran.tobytes()


def test_hidden_output_lengths_do_not_reach_the_observation():
    def observed(lengths: list[int]) -> bytes:
        runtime = SimulatedRuntime(fleet({}, {}))
        runtime.reset(episode(np.arange(20) * 0.01, 200, lengths, max_tokens=500))
        return runtime.record(FASTEST)[0].tobytes()

    # All outlive the last arrival, so none has ended at any decision.
    lengths = list(range(100, 120))
    assert observed(lengths) == observed(lengths[::-1])


def test_signals_never_come_from_the_future():
    """A first token that comes after the arrival is not counted yet."""
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(episode([0.0, prefill_s(100) * 0.99], [100, 10], [5, 1]))
    runtime.advance()
    runtime.step(0)
    assert runtime.rows[0, COLUMN["prefilling"]] == 1
    runtime.reset(episode([0.0, prefill_s(100) * 1.01], [100, 10], [5, 1]))
    runtime.advance()
    runtime.step(0)
    assert runtime.rows[0, COLUMN["prefilling"]] == 0
    assert runtime.rows[0, COLUMN["context_tokens"]] == 101


def random_episode(rng: np.random.Generator, count: int, rate: float):
    return episode(
        np.cumsum(rng.exponential(1 / rate, count)),
        rng.integers(1, 1500, count),
        rng.integers(1, 400, count),
        rng.integers(0, 2, count),
        rng.integers(0, 6, count),
    )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv=st.sampled_from([2048, 3000, 6000, 20000]),
    slots=st.sampled_from([1, 3, 32]),
    budget=st.sampled_from([32, 100, 512]),
    rate=st.sampled_from([5.0, 40.0, 400.0]),
)
def test_conservation(seed, kv, slots, budget, rate):
    """Every request ends exactly once, and at the end every count, block and reference has come back."""
    requests = random_episode(np.random.default_rng(seed), 120, rate)
    runtime = SimulatedRuntime(
        fleet({"kv_tokens": kv, "max_num_seqs": slots, "token_budget": budget}, {"kv_tokens": 4096})
    )
    runtime.reset(requests)
    ended: list[int] = []
    policy = FASTEST.bind()
    last, more = 0.0, runtime.advance()
    while more:
        assert runtime.now >= last
        last = runtime.now
        engines = runtime.view("engines")
        running = engines["n_decode"] + engines["n_finishing"] + (engines["partial"] >= 0)
        assert (running <= runtime.replicas["max_num_seqs"]).all()
        assert (engines["free_blocks"] >= 0).all()
        assert np.isfinite(runtime.rows).all()
        action = int(np.where(runtime.mask, policy.score(runtime.rows, runtime.mask), -np.inf).argmax())
        more = runtime.step(action)
        ended += runtime.ended.tolist()
    assert sorted(ended) == list(range(len(requests)))
    engines, outcomes = runtime.view("engines"), runtime.outcomes()
    assert (outcomes.state != State.PENDING).all()
    heads = runtime.view("sets")[0]
    blocks_of_entry = requests.block_tokens // runtime.fleet.block_tokens
    assert (engines["free_blocks"] + heads["idle"] * blocks_of_entry == engines["total_blocks"]).all()
    assert (heads["idle"] == heads["size"]).all()
    assert not runtime.view("phase").any()
    assert not engines["context"].any()
    for name in ("inflight", "prefilling", "prefill_tokens", "context_tokens"):
        assert np.abs(runtime.view("views")[name]).max() < 1e-6
    assert not runtime.view("tenant_inflight").any()
    done = outcomes.state == State.DONE
    produced = requests.table["output_tokens"][done].sum()
    assert done.any()
    assert (outcomes.ttft_s[done] > 0).all()
    assert (outcomes.e2e_s[done] >= outcomes.ttft_s[done]).all()
    assert runtime.usage()["output_tokens"].sum() <= produced


def test_the_same_seed_gives_the_same_bytes():
    requests = random_episode(np.random.default_rng(1), 200, 40.0)
    runs = [play(requests, {}, {"kv_tokens": 4096}).outcomes().e2e_s.tobytes() for _ in range(2)]
    assert runs[0] == runs[1]


def test_md1_waiting_time():
    """One slot, one-token outputs: an M/D/1 queue, whose mean wait is ρ·s / (2·(1 − ρ)) (Pollaczek, Khinchine)."""
    service = prefill_s(100)
    rho, count = 0.7, 60_000
    arrivals = np.cumsum(np.random.default_rng(5).exponential(service / rho, count))
    ttft = play(episode(arrivals, 100, 1), {"max_num_seqs": 1}).outcomes().ttft_s
    assert ttft.mean() == pytest.approx(service + rho * service / (2 * (1 - rho)), rel=0.03)


def test_summary_adds_up():
    requests = random_episode(np.random.default_rng(6), 200, 20.0)
    played = play(requests, {}, {})
    limits = played.replicas["max_num_seqs"]
    summary = summarise("fastest", [played.episode] * 2, played.fleet.names, limits, played.fleet.price_per_hour)
    assert summary.arrived == 400
    assert sum(t.arrived for t in summary.tenants.values()) == 400
    assert sum(r.share for r in summary.replicas) == pytest.approx(1.0)
    assert summary.goodput_rps == pytest.approx(summary.attainment * summary.offered_rps)
    assert 0 < summary.busy <= 1


def test_what_was_served_before_is_cached():
    requests = episode([-2.0, -1.0, 0.0], [640, 640, 640], [1, 1, 1], prefixes=[0, 1, 1])
    warm = replace(requests, table=requests.table[2:], before=requests.table[:2])
    runtime = SimulatedRuntime(fleet({}, {}))
    runtime.reset(warm)
    assert runtime.advance()
    assert runtime.rows[:2, COLUMN["matched_tokens"]].tolist() == [0, 640 - 1]  # in turn: the second replica had it
    runtime.step(1)
    assert runtime.outcomes().cached_tokens.tolist() == [576]
    cold = play(replace(warm, before=warm.before[:0]), {}, {}).outcomes()
    assert cold.cached_tokens.tolist() == [0]


def test_memory_that_is_less_for_a_while_loses_prefixes_also_where_a_batch_waits_for_its_time():
    group = {"kv_tokens": 1024, "max_num_seqs": 4, "batching": "dynamic", "batch_wait_s": 1.0}
    runtime = SimulatedRuntime(fleet(group))
    requests = episode([0.0, 0.1, 0.2], [100, 100, 800], 2, prefixes=[1, 2, 3])
    runtime.reset(replace(requests, before=requests.table[2:]))
    assert runtime.view("sets")["size"][0, 0] == 800 // 64
    runtime.advance()
    runtime.set_precision(0, "llama-3.1-8b-h100-bf16", kv_tokens=256)
    runtime.step(0)  # it waits for others
    runtime.set_precision(0, "llama-3.1-8b-h100-bf16", kv_tokens=1024)
    assert runtime.view("sets")["size"][0, 0] <= 256 / 64

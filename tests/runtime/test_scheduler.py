"""The live scheduler: decisions, fallbacks, and counts that never drift."""

from __future__ import annotations

import math

import numpy as np
import pytest
from simulated import TENANTS, episode, fleet

from steersman.runtime.guard import Reason
from steersman.runtime.observation import COLUMN
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.simulator.simulator import SimulatedRuntime
from steersman.runtime.tenant import Tenant
from steersman.runtime.ticket import Fallback, Kind, LiveRequest

REQUEST = LiveRequest(tenant=0, prompt_tokens=1000, max_tokens=100)


class Clock:
    """Time by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Fixed:
    """A policy that gives the same scores, or raises them."""

    def __init__(self, *scores: object, name: str = "fixed") -> None:
        self.name = name
        self.scores = scores

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if isinstance(self.scores[0], Exception):
            raise self.scores[0]
        return np.array(self.scores, float)


FALLBACK = Fixed(0.0, 1.0, -1.0, -1.0, name="fallback")


def scheduler(
    policy: object = None, fallback: object = FALLBACK, clock: Clock | None = None, **options: object
) -> Scheduler:
    options = {"policy_limit_s": math.inf, **options}
    return Scheduler(fleet({}, {}), TENANTS, policy, fallback, clock=clock or Clock(), **options)  # type: ignore[arg-type]


def counts(s: Scheduler) -> list[tuple[float, ...]]:
    names = ["inflight", "prefilling", "prefill_tokens", "prompt_tokens", "context_tokens"]
    return [tuple(float(v[n]) for n in names) for v in s.book.views]


def test_dispatches_to_the_best_score_of_the_policy() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    decision = s.decide(s.arrive(REQUEST))
    assert (decision.kind, decision.replica, decision.policy) == (Kind.DISPATCH, 0, "fixed")
    assert decision.fallback is None


def test_sheds_where_the_policy_prefers_it_and_says_when_to_retry() -> None:
    s = scheduler(Fixed(0.0, 0.0, 0.0, 1.0))
    decision = s.decide(s.arrive(REQUEST))
    assert decision.kind is Kind.SHED
    assert decision.replica == -1
    assert decision.retry_after_s >= 1.0


def test_the_guard_overrides_the_policy() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    s.set_up(0, False)
    assert s.decide(s.arrive(REQUEST)).replica == 1


def test_without_an_allowed_replica_it_refuses_with_the_reasons_counted() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    s.set_up(0, False)
    decision = s.decide(s.arrive(LiveRequest(tenant=0, prompt_tokens=10**6, max_tokens=1)))
    assert decision.kind is Kind.REFUSED
    assert decision.reasons == {Reason.DOWN: 1, Reason.CONTEXT: 1}


def test_an_excluded_replica_is_not_chosen_again() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    ticket = s.arrive(REQUEST)
    assert s.decide(ticket, exclude=[0]).replica == 1
    assert s.decide(ticket, exclude=[0, 1]).kind is Kind.REFUSED


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Fixed(RuntimeError("broken")), Fallback.ERROR),
        (Fixed(1.0, 2.0), Fallback.SHAPE),
        (Fixed(math.nan, 1.0, 0.0, 0.0), Fallback.NOT_FINITE),
        (Fixed(math.inf, 1.0, 0.0, 0.0), Fallback.NOT_FINITE),
    ],
)
def test_a_broken_policy_never_decides(policy: Fixed, reason: Fallback) -> None:
    s = scheduler(policy)
    decision = s.decide(s.arrive(REQUEST))
    assert (decision.replica, decision.policy, decision.fallback) == (1, "fallback", reason)
    assert s.fallbacks == {reason: 1}


def test_a_bad_score_of_a_masked_candidate_does_not_matter() -> None:
    s = scheduler(Fixed(math.nan, 1.0, 0.0, 0.0))
    s.set_up(0, False)
    assert s.decide(s.arrive(REQUEST)).fallback is None


def test_a_slow_policy_does_not_decide() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0), policy_limit_s=-1.0)
    assert s.decide(s.arrive(REQUEST)).fallback is Fallback.SLOW


def test_if_the_fallback_fails_too_the_emptiest_replica_gets_the_request() -> None:
    s = scheduler(Fixed(RuntimeError()), Fixed(RuntimeError()))
    first = s.arrive(REQUEST)
    s.decide(first)
    s.dispatched(first, 0)
    decision = s.decide(s.arrive(REQUEST))
    assert (decision.replica, decision.policy) == (1, "least-inflight")


def test_counts_follow_a_request_and_return_to_zero() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    ticket = s.arrive(REQUEST)
    s.decide(ticket)
    s.dispatched(ticket, 0)
    assert counts(s)[0] == (1, 1, 1000, 1000, 0)
    s.first_token(ticket)
    s.streamed(ticket, 4)
    assert counts(s)[0] == (1, 0, 0, 0, 1005)
    s.ended(ticket, ok=True)
    assert counts(s) == [(0, 0, 0, 0, 0)] * 2


def test_events_that_come_twice_or_too_late_change_nothing() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    other, ticket = s.arrive(REQUEST), s.arrive(REQUEST)
    for t in (other, ticket):
        s.decide(t)
        s.dispatched(t, 0)
        s.dispatched(t, 1)
        s.first_token(t)
        s.first_token(t)
    before = counts(s)
    s.ended(ticket, ok=True)
    assert s.ended(ticket, ok=True) is None
    s.streamed(ticket, 5)
    s.withdrawn(ticket)
    s.shed(ticket)
    assert counts(s)[0] == tuple(x / 2 for x in before[0])
    assert s.book.tenant_views["ended"][0] == 1


def test_a_withdrawn_request_leaves_no_trace_and_may_go_elsewhere() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    ticket = s.arrive(REQUEST)
    s.decide(ticket)
    s.dispatched(ticket, 0)
    s.first_token(ticket, assumed=True)
    s.withdrawn(ticket)
    assert counts(s)[0] == (0, 0, 0, 0, 0)
    assert s.book.tenant_views["ended"][0] == 0
    s.decide(ticket, exclude=[0])
    s.dispatched(ticket, 1)
    assert counts(s)[1][:2] == (1, 1)


def test_a_stream_is_judged_by_its_first_token_and_pace() -> None:
    clock = Clock()
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0), clock=clock)
    ticket = s.arrive(REQUEST)
    s.decide(ticket)
    s.dispatched(ticket, 0)
    clock.now += 0.4
    s.first_token(ticket)
    clock.now += 0.2
    s.streamed(ticket, 10)
    clock.now += 5.0  # what comes after the last token does not count
    served = s.ended(ticket, ok=True)
    assert served is not None
    assert (served.ttft_s, served.tpot_s) == (pytest.approx(0.4), pytest.approx(0.02))
    assert served.attained


def test_a_whole_answer_is_judged_by_its_end_and_length() -> None:
    clock = Clock()
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0), clock=clock)
    fared = []
    for tokens in (200, 20):
        ticket = s.arrive(REQUEST)
        s.decide(ticket)
        s.dispatched(ticket, 0)
        s.first_token(ticket, assumed=True)
        clock.now += 5.0  # the promise is 0.5 s and 0.03 s a token
        fared.append(s.ended(ticket, ok=True, tokens=tokens))
    assert [f.attained for f in fared if f] == [True, False]
    assert all(math.isnan(f.ttft_s) and f.tokens for f in fared if f)
    assert counts(s)[0] == (0, 0, 0, 0, 0)


def test_output_lengths_are_learnt_from_good_ends_only() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    before = float(s.book.tenant_views["output_tokens"][0])
    for ok in (False, True):
        ticket = s.arrive(REQUEST)
        s.decide(ticket)
        s.dispatched(ticket, 0)
        s.first_token(ticket)
        s.ended(ticket, ok=ok, tokens=2 if ok else None)
        assert (float(s.book.tenant_views["output_tokens"][0]) < before) == ok


def test_an_unstated_limit_counts_as_the_expected_output() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    ticket = s.arrive(LiveRequest(tenant=0, prompt_tokens=10))
    assert ticket.request.max_tokens == TENANTS["strict"].expected_output_tokens


def test_a_prompt_seen_before_is_believed_to_be_cached_where_it_went() -> None:
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0))
    request = LiveRequest(tenant=0, prompt_tokens=1000, max_tokens=10, keys=np.arange(10), block_tokens=64)
    for cached in (0, 640):
        ticket = s.arrive(request)
        s.decide(ticket)
        assert s.rows[:2, COLUMN["matched_tokens"]].tolist() == [cached, 0]
        s.dispatched(ticket, 0)


def test_scraped_metrics_and_their_age_reach_the_observation() -> None:
    clock = Clock()
    s = scheduler(Fixed(2.0, 1.0, 0.0, 0.0), clock=clock)
    s.scraped(1, running=3, waiting=2, kv_use=0.25)
    clock.now += 0.5
    s.observe(s.arrive(REQUEST))
    names = ["running", "waiting", "kv_use", "metrics_age"]
    assert s.rows[1, [COLUMN[n] for n in names]].tolist() == [3, 2, 0.25, 0.5]


def test_a_guess_of_the_slos_is_told_on_every_row() -> None:
    promised = next(iter(TENANTS.values()))
    guess = Tenant.model_validate({"slo": {"ttft_s": 2, "tpot_s": 0.1, "guessed": True}})
    s = Scheduler(fleet({}, {}), {"promised": promised, "guess": guess}, None, FALLBACK, clock=Clock())
    for tenant in (0, 1):
        s.observe(s.arrive(LiveRequest(tenant=tenant, prompt_tokens=1000, max_tokens=100)))
        assert s.rows[[0, 1, -2, -1], COLUMN["slo_guessed"]].tolist() == [tenant] * 4


HOLDS = Fixed(0.0, -1.0, 1.0, -2.0)


def held(s: Scheduler) -> float:
    return float(s.book.fleet["held"][0])


def test_holds_where_the_policy_prefers_it_until_it_has_waited_too_long() -> None:
    clock = Clock()
    s = scheduler(HOLDS, clock=clock)
    ticket = s.arrive(REQUEST)
    holds = 0
    while (decision := s.decide(ticket)).kind is Kind.HOLD:
        assert (decision.replica, decision.policy) == (-1, "fixed")
        pause_s = s.held(ticket)
        assert pause_s == 0.05  # of 0.5 s
        clock.now += pause_s + 1e-3
        s.resumed(ticket)
        holds += 1
    assert holds == 9
    assert ticket.holds == holds
    assert (decision.kind, decision.replica) == (Kind.DISPATCH, 0)
    assert s.reasons[-2] == Reason.WAITED
    assert s.rows[-1, COLUMN["waited"]] == pytest.approx(holds * 0.051)
    s.dispatched(ticket, 0)
    assert counts(s)[0][:2] == (1, 1)


def test_held_requests_are_seen_by_others_until_they_resume() -> None:
    s = scheduler(HOLDS)
    tickets = [s.arrive(REQUEST) for _ in range(3)]
    for number, ticket in enumerate(tickets):
        s.decide(ticket)
        assert s.rows[[0, 1, -2, -1], COLUMN["held"]].tolist() == [number] * 4
        s.held(ticket)
    s.resumed(tickets[0])
    s.resumed(tickets[0])
    assert held(s) == 2
    assert s.held(tickets[1]) == 0.0  # it is held already
    assert held(s) == 2


@pytest.mark.parametrize(("after_s", "attained"), [(0.4, True), (0.6, False)])
@pytest.mark.parametrize("told", [True, False])
def test_a_client_that_leaves_while_held_attained_if_nothing_was_broken(
    after_s: float, attained: bool, told: bool
) -> None:
    clock = Clock()
    s = scheduler(HOLDS, clock=clock)
    ticket = s.arrive(REQUEST)
    s.decide(ticket)
    s.held(ticket)
    clock.now += 0.2 if told else after_s
    assert s.given_up(ticket, after_s if told else None) is attained
    assert held(s) == 0
    view = s.book.tenant_views[0]
    assert (view["ended"], view["attainment"] == 1.0) == (1, attained)
    s.given_up(ticket)
    s.resumed(ticket)
    s.shed(ticket)
    assert (held(s), view["ended"]) == (0, 1)


def test_one_whose_deadline_comes_while_it_is_held_missed_its_promise() -> None:
    s = scheduler(HOLDS)
    ticket = s.arrive(REQUEST)
    s.decide(ticket)
    s.held(ticket)
    ticket.late = True
    assert not s.given_up(ticket)
    assert s.book.tenant_views["attainment"][0] < 1.0
    assert s.deployment is not None
    assert (s.deployment.current_arm.attained, s.deployment.current_arm.errors) == (0, 1)


def test_a_request_that_is_held_cannot_be_dispatched() -> None:
    s = scheduler(HOLDS)
    ticket = s.arrive(REQUEST)
    s.decide(ticket)
    s.held(ticket)
    s.dispatched(ticket, 0)
    s.shed(ticket)
    assert counts(s)[0] == (0, 0, 0, 0, 0)
    assert s.book.tenant_views["ended"][0] == 0


def test_where_every_allowed_replica_is_excluded_nothing_is_held() -> None:
    s = scheduler(HOLDS)
    ticket = s.arrive(REQUEST)
    assert s.decide(ticket, exclude=[0]).kind is Kind.HOLD
    assert s.decide(ticket, exclude=[0, 1]).kind is Kind.REFUSED
    assert s.mask.tolist() == [False, False, False, True]


def test_the_same_situation_gives_the_same_bytes_as_in_the_simulator() -> None:
    """Also to a request that was held: the second one comes back after a pause of 0.5 s."""
    played = episode([0.0, 0.1, 0.2, 0.3], [1000, 3000, 500, 700], 50, [0, 1, 0, 1], prefixes=[0, 1, 0, 1])
    simulated = SimulatedRuntime(fleet({}, {}))
    simulated.reset(played)
    clock = Clock(0.0)
    live = scheduler(clock=clock, prefix_block_tokens=played.block_tokens)
    more, tickets, order = simulated.advance(), {}, []
    for action in (0, simulated.hold, 0, 1, 1):
        assert more
        number = int(simulated.view("cluster")["pending"][0])
        order.append(number)
        clock.now, q = simulated.now, played.table[number]
        keys = played.blocks[q["block_start"] : q["block_start"] + q["prompt_blocks"]]
        if number in tickets:
            live.resumed(tickets[number])
        else:
            tickets[number] = live.arrive(
                LiveRequest(int(q["tenant"]), int(q["prompt_tokens"]), int(q["max_tokens"]), keys, played.block_tokens)
            )
        ticket = tickets[number]
        # What the engines did since is the simulator's; arrivals, prefixes and the rest are the live ones.
        live.book.views[:] = simulated.view("views")[0]
        live.book.tenant_inflight[:] = simulated.view("tenant_inflight")[0]
        live.observe(ticket)
        assert live.rows.tobytes() == simulated.rows.tobytes()
        assert live.mask.tobytes() == simulated.mask.tobytes()
        assert live.reasons.tobytes() == simulated.reasons.tobytes()
        more = simulated.step(action)
        if action == simulated.hold:
            assert live.held(ticket) == 0.5
        else:
            live.dispatched(ticket, action)
    assert order == [0, 1, 2, 3, 1]

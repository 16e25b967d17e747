"""Which policy decides: fallbacks, canaries and shadows, and what is counted of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from encoded import situations
from simulated import TENANTS, fleet

from steersman.runtime.deployment import CanaryBounds, Deployment, Release
from steersman.runtime.deployment.deployment import ARMS
from steersman.runtime.deployment.judge import in_range
from steersman.runtime.deployment.metrics import metrics
from steersman.runtime.deployment.release import BrokenPolicy
from steersman.runtime.deployment.scalars import Scalars
from steersman.runtime.deployment.stats import stats
from steersman.runtime.errors import UserError
from steersman.runtime.observation import COLUMN, FEATURES, HIGH, LOW
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.tenant import Slo
from steersman.runtime.ticket import Decision, Fallback, Kind, LiveRequest, Ticket

REQUEST = LiveRequest(tenant=0, prompt_tokens=1000, max_tokens=100)
FIRST, SECOND, HOLD, SHED = [3.0, 2, 1, 0], [2.0, 3, 1, 0], [2.0, 1, 3, 0], [2.0, 1, 0, 3]


class Timer:
    """Time by hand, for what decisions take."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fixed:
    """A policy that gives the same scores, or raises them, and takes `takes_s` for it."""

    def __init__(self, scores: object, name: str = "fixed", takes_s: float = 0.0, timer: Timer | None = None) -> None:
        self.name, self.scores, self.takes_s, self.timer, self.asked = name, scores, takes_s, timer, 0

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        self.asked += 1
        if self.timer is not None:
            self.timer.now += self.takes_s
        if isinstance(self.scores, Exception):
            raise self.scores
        return np.array(self.scores, float)


def scheduler(policy: object = None, **options: object) -> Scheduler:
    """Two replicas; times of decisions are zero unless a policy says otherwise."""
    s = Scheduler(fleet({}, {}), TENANTS, Fixed(FIRST, "now"), Fixed(SECOND, "fallback"), policy_limit_s=math.inf)
    timer = policy.timer if isinstance(policy, Fixed) and policy.timer else Timer()
    now = policy or Fixed(FIRST, "now")
    s.deployment = Deployment(now, Fixed(SECOND, "fallback"), s.rows, s.mask, clock=timer, **options)  # type: ignore[arg-type]
    return s


def deployed(s: Scheduler) -> Deployment:
    assert s.deployment is not None
    return s.deployment


def decide(s: Scheduler, ticket: Ticket | None = None) -> Decision:
    return s.decide(ticket or s.arrive(REQUEST))


def serve(s: Scheduler, ok: Callable[[Decision], bool], count: int, attained: bool = True) -> list[Decision]:
    """Play `count` requests to their end; `ok` says whether a replica answered each in time, or else failed."""
    decisions = []
    for _ in range(count):
        ticket = s.arrive(REQUEST)
        decision = s.decide(ticket)
        s.dispatched(ticket, decision.replica)
        s.first_token(ticket)
        s.ended(ticket, ok(decision), tokens=2)
        decisions.append(decision)
    return decisions


# Decisions and fallbacks


def test_a_decision_names_the_version_and_gives_the_scores() -> None:
    s = scheduler(Release(Fixed(FIRST), "fixed-12345678"))  # type: ignore[arg-type]
    decision = decide(s)
    assert (decision.policy, decision.version, decision.arm) == ("fixed", "fixed-12345678", "current")
    assert decision.scores is not None
    assert decision.scores.tolist() == FIRST


def test_the_fallback_gives_its_own_version_and_scores() -> None:
    decision = decide(scheduler(Fixed(RuntimeError("broken"))))
    assert (decision.version, decision.arm, decision.fallback) == ("fallback", "current", Fallback.ERROR)
    assert decision.scores is not None
    assert decision.scores.tolist() == SECOND


def test_the_last_failure_is_kept_as_it_was_said() -> None:
    s = scheduler(Fixed(RuntimeError("broken")))
    decide(s)
    assert deployed(s).current_arm.last_failure == "RuntimeError: broken"


def test_a_slow_policy_is_counted_with_its_time() -> None:
    s = scheduler(Fixed(FIRST, takes_s=0.002, timer=Timer()), limit_s=1e-3)
    decision = decide(s)
    assert (decision.fallback, decision.decision_s) == (Fallback.SLOW, 0.002)
    assert stats(deployed(s)).arms[0].decision_s.p50_s == pytest.approx(0.0015, abs=6e-4)


@pytest.mark.parametrize(("column", "value"), [("kv_use", 1.5), ("waiting", math.nan), ("priority", 1e9)])
def test_inputs_out_of_the_schemas_range_are_the_fallbacks(column: str, value: float) -> None:
    s = scheduler()
    ticket = s.arrive(REQUEST)
    s.observe(ticket)
    s.rows[[0, 1, -2, -1], COLUMN[column]] = value
    assert deployed(s).decide(ticket).fallback is Fallback.RANGE


def test_a_masked_replica_may_be_out_of_range() -> None:
    s = scheduler()
    ticket = s.arrive(REQUEST)
    s.set_up(1, False)
    s.observe(ticket)
    s.rows[1, COLUMN["waiting"]] = math.nan
    assert deployed(s).decide(ticket).fallback is None


def test_what_the_encoder_writes_is_in_range_also_after_a_year_without_metrics() -> None:
    now = [0.0]
    s = Scheduler(fleet({}, {}), TENANTS, Fixed(FIRST), Fixed(SECOND), policy_limit_s=9.0, clock=lambda: now[0])
    now[0] = 400 * 86400.0
    assert decide(s).fallback is None


def test_a_promise_of_a_day_is_in_range() -> None:
    tenants = {"batch": TENANTS["loose"].model_copy(update={"slo": Slo(ttft_s=86400.0, tpot_s=1.0)})}
    s = Scheduler(fleet({}, {}), tenants, Fixed(FIRST), Fixed(SECOND), policy_limit_s=9.0)
    assert decide(s).fallback is None


def test_a_policy_of_an_unknown_schema_is_the_fallbacks() -> None:
    s = scheduler(BrokenPolicy("old", Fallback.SCHEMA, "trained on another observation"))
    assert decide(s).fallback is Fallback.SCHEMA
    assert stats(deployed(s)).fallbacks == {"schema": 1}
    assert deployed(s).current_arm.last_failure == "trained on another observation"


# Changes of the current policy


def test_the_next_decision_is_the_new_policys() -> None:
    s = scheduler()
    deployed(s).activate(Release(Fixed(SECOND, "next"), "next-1"))  # type: ignore[arg-type]
    assert (decide(s).version, decide(s).replica) == ("next-1", 1)


def test_rollbacks_go_back_one_by_one() -> None:
    s = scheduler()
    d = deployed(s)
    for version in ("a", "b"):
        d.activate(Release(Fixed(SECOND), version))  # type: ignore[arg-type]
    assert [d.rollback().version, d.rollback().version] == ["a", "now"]
    with pytest.raises(UserError, match="nothing to roll back to: now has no predecessor"):
        d.rollback()


def test_every_change_is_one_sentence() -> None:
    told: list[tuple[str, str]] = []
    s = scheduler(told=lambda *event: told.append(event))
    deployed(s).activate(Release(Fixed(SECOND), "next"))  # type: ignore[arg-type]
    assert told == [("activated", "next decides, in place of now")]
    assert stats(deployed(s)).changes == {"activated": 1}


def test_nobody_to_tell_is_no_reason_to_fail() -> None:
    def closed(event: str, sentence: str) -> None:
        raise BrokenPipeError

    s = scheduler(told=closed)
    deployed(s).activate(Release(Fixed(SECOND), "next"))  # type: ignore[arg-type]
    assert decide(s).version == "next"


# Canary


def canary(s: Scheduler, policy: object = None, share: float = 0.5, **bounds: object) -> Deployment:
    d = deployed(s)
    d.start_canary(Release(policy or Fixed(SECOND), "new"), share, CanaryBounds.model_validate(bounds))  # type: ignore[arg-type]
    return d


def test_a_canary_has_its_share_of_any_stretch() -> None:
    s = scheduler()
    canary(s, share=0.25)
    arms = [decide(s).arm == "canary" for _ in range(1000)]
    totals = np.cumsum([0, *arms])
    assert all(abs(sum(arms[i : i + 100]) - 25) <= 2 for i in range(0, 900, 7))
    assert totals[-1] == 250
    # In no step with every second request, whoever sends those.
    assert abs(sum(arms[::2]) - 125) <= 3


def test_a_held_request_stays_with_its_arm() -> None:
    s = scheduler()
    d = canary(s, share=0.5)
    tickets = [s.arrive(REQUEST) for _ in range(20)]
    first = [decide(s, ticket).arm for ticket in tickets]
    assert set(first) == {"current", "canary"}
    assert [decide(s, ticket).arm for ticket in tickets] == first
    d.activate(Release(Fixed(FIRST), "other"))  # type: ignore[arg-type]
    assert [decide(s, ticket).arm for ticket in tickets] == first
    d.stop_canary()
    assert {decide(s, ticket).arm for ticket in tickets} == {"current"}


def test_a_canary_that_does_as_well_stays() -> None:
    s = scheduler()
    d = canary(s)
    serve(s, lambda _: True, 3000)
    assert d.canary is not None
    assert d.canary.arm.ended == d.canary.arm.attained == 1500


def test_a_canary_that_attains_less_is_rolled_back() -> None:
    s = scheduler()
    d = canary(s, max_error_rise=1.0)
    serve(s, lambda decision: decision.arm == "current", 1000)
    assert d.canary is None
    assert "the canary new was rolled back: it attained 0.0% of its last 250 requests, but now 100.0% of" in (
        d.events[-1].sentence
    )
    assert {decide(s).version for _ in range(20)} == {"now"}


def test_a_canary_whose_requests_fail_is_rolled_back() -> None:
    s = scheduler()
    d = canary(s, max_attainment_loss=1.0)
    serve(s, lambda decision: decision.arm == "current", 1000)
    assert d.canary is None
    assert "100.0% of its last 250 requests failed" in d.events[-1].sentence


def test_a_canary_that_gets_worse_late_is_rolled_back_soon() -> None:
    s = scheduler()
    d = canary(s, memory_requests=400)
    serve(s, lambda _: True, 10_000)
    assert d.canary is not None
    serve(s, lambda decision: decision.arm == "current" or bool(s.book.views["inflight"][0] % 2), 300)
    assert d.canary is None


def test_a_small_loss_is_allowed() -> None:
    s = scheduler()
    d = canary(s, max_attainment_loss=0.3, max_error_rise=0.3)
    number = iter(range(10**6))
    serve(s, lambda decision: decision.arm == "current" or next(number) % 5 > 0, 3000)
    assert d.canary is not None
    assert d.canary.arm.attained == pytest.approx(0.8 * d.canary.arm.ended, abs=1)


def test_a_canary_that_raises_is_rolled_back_at_once() -> None:
    s = scheduler()
    d = canary(s, Fixed(ValueError("bad")), share=1.0)
    assert [decide(s).fallback for _ in range(21)] == [Fallback.ERROR] * 20 + [None]
    assert d.events[-1].sentence == (
        "the canary new was rolled back: 20 decisions in a row failed, at last: ValueError: bad"
    )


def test_a_canary_that_fails_now_and_then_is_rolled_back() -> None:
    class Sometimes(Fixed):
        def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
            self.scores = [math.nan, 0, 0, 0] if self.asked % 10 == 0 else SECOND
            return super().score(rows, mask)

    s = scheduler()
    d = canary(s, Sometimes(SECOND), share=1.0)
    serve(s, lambda _: True, 300)
    assert d.canary is None
    assert (
        "10.0% of 200 decisions failed, but of now 0.0%: more than 1.0% worse, at last: not-finite"
        in d.events[-1].sentence
    )


def test_what_fails_for_both_policies_is_not_the_canarys_fault() -> None:
    class Sometimes(Fixed):
        def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
            self.scores = [math.nan, 0, 0, 0] if self.asked % 10 == 0 else SECOND
            return super().score(rows, mask)

    s = scheduler(Sometimes(FIRST))
    d = canary(s, Sometimes(SECOND))
    serve(s, lambda _: True, 1000)
    assert d.canary is not None


def test_a_canary_that_takes_too_long_is_rolled_back() -> None:
    timer = Timer()
    s = scheduler(Fixed(FIRST, "now", timer=timer))
    d = canary(s, Fixed(SECOND, takes_s=8e-4, timer=timer))
    serve(s, lambda _: True, 500)
    assert d.canary is None
    assert "its median decision takes 750 µs, more than 500" in d.events[-1].sentence


def test_inputs_out_of_range_are_not_the_canarys_fault() -> None:
    s = scheduler()
    d = canary(s, share=1.0)
    for _ in range(300):
        ticket = s.arrive(REQUEST)
        s.observe(ticket)
        s.rows[0, COLUMN["kv_use"]] = 2.0
        d.decide(ticket)
    assert d.canary is not None
    assert d.canary.arm.fallbacks == {Fallback.RANGE: 300}


def test_shed_and_given_up_requests_count_as_they_fared() -> None:
    s = scheduler()
    d = canary(s, Fixed(SHED), share=1.0)
    ticket = s.arrive(REQUEST)
    assert decide(s, ticket).kind is Kind.SHED
    s.shed(ticket)
    d.activate(Release(Fixed(HOLD), "holds"))  # type: ignore[arg-type]
    d.stop_canary()
    ticket = s.arrive(REQUEST)
    assert decide(s, ticket).kind is Kind.HOLD
    s.held(ticket)
    s.given_up(ticket)
    assert [(arm.ended, arm.attained, arm.errors) for arm in d.arms if arm.ended] == [(1, 0, 0), (1, 1, 0)]


def test_a_request_that_every_replica_failed_is_an_error() -> None:
    s = scheduler()
    ticket = s.arrive(REQUEST)
    s.dispatched(ticket, decide(s, ticket).replica)
    s.withdrawn(ticket)
    s.shed(ticket)
    assert (deployed(s).current_arm.ended, deployed(s).current_arm.errors) == (1, 1)


def test_a_refused_request_belongs_to_no_policy() -> None:
    s = scheduler()
    ticket = s.arrive(LiveRequest(tenant=0, prompt_tokens=10**6, max_tokens=1))
    decision = decide(s, ticket)
    s.shed(ticket)
    assert (decision.kind, decision.version, decision.arm) == (Kind.REFUSED, "guard", "")
    assert deployed(s).current_arm.ended == 0


def test_a_promoted_canary_decides_all_and_can_be_rolled_back() -> None:
    s = scheduler()
    d = canary(s)
    assert d.promote().version == "new"
    assert {decide(s).version for _ in range(20)} == {"new"}
    assert d.canary is None
    assert d.rollback().version == "now"
    with pytest.raises(UserError, match="no canary to promote"):
        d.promote()


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="share must be above 0 and at most 1"):
        canary(scheduler(), share=share)


def test_both_arms_are_counted_from_the_start_of_the_canary() -> None:
    s = scheduler()
    late = s.arrive(REQUEST)
    s.dispatched(late, decide(s, late).replica)
    d = canary(s)
    s.ended(late, ok=True)
    assert d.canary is not None
    assert d.canary.baseline.ended == 0
    seen = stats(d)
    assert sum(arm.ended for arm in seen.arms if arm.version == "now") == 1


def test_totals_of_a_policy_do_not_fall_however_often_policies_change() -> None:
    s = scheduler()
    d, totals = deployed(s), []
    for _ in range(3 * ARMS):
        decide(s, s.arrive(REQUEST))
        canary(s)
        seen = next(arm for arm in stats(d).arms if (arm.version, arm.role) == ("now", "current"))
        totals.append((seen.decisions, seen.decision_s.count))
    current = [decisions for decisions, _ in totals]
    assert current == sorted(current)
    assert totals[-1] == (current[-1], current[-1])
    assert len(d.arms) == ARMS


# Shadow


def shadow(s: Scheduler, policy: object) -> Deployment:
    d = deployed(s)
    d.start_shadow(Release(policy, "dark"))  # type: ignore[arg-type]
    return d


def test_a_shadow_decides_nothing_and_its_disagreements_are_counted() -> None:
    s = scheduler()
    d = shadow(s, Fixed(SECOND))
    assert [decide(s).replica for _ in range(5)] == [0] * 5
    seen = stats(d).shadow
    assert seen is not None
    assert (seen.decisions, seen.disagreements, seen.compared, seen.failures) == (5, 5, 5, {})


def test_predicted_gain_is_the_difference_of_predicted_attainment() -> None:
    s = scheduler()
    d = shadow(s, Fixed(SECOND))
    ticket = s.arrive(REQUEST)
    s.observe(ticket)
    s.rows[:2, COLUMN["ttft_chance"]] = 0.5, 1.0
    s.rows[:2, COLUMN["tpot_chance"]] = 0.5, 0.75
    d.decide(ticket)
    assert d.shadow is not None
    assert d.shadow.gain == 0.5
    d.shadow.release.policy.scores = SHED  # type: ignore[attr-defined]
    d.decide(ticket)
    assert d.shadow.gain == 0.25
    d.shadow.release.policy.scores = HOLD  # type: ignore[attr-defined]
    d.decide(ticket)
    assert (d.shadow.gain, d.shadow.compared, d.shadow.disagreements) == (0.25, 2, 3)


class Unspeakable(Exception):
    """Cannot even be said."""

    def __str__(self) -> str:
        raise RuntimeError


class Vandal(Fixed):
    """Writes over what it is shown."""

    def score(self, rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows[:], mask[:] = math.nan, False
        return np.array(SECOND)


@pytest.mark.parametrize(
    ("policy", "failures"),
    [
        (Fixed(RuntimeError("no")), {"error": 3}),
        (Fixed(Unspeakable()), {"error": 3}),
        (Fixed([1.0]), {"shape": 3}),
        (Fixed([math.nan, 1, 1, 1]), {"not-finite": 3}),
        (Vandal(SECOND), {}),
    ],
)
def test_whatever_a_shadow_does_changes_no_decision(policy: Fixed, failures: dict[str, int]) -> None:
    s, alone = scheduler(), scheduler()
    d = shadow(s, policy)
    for _ in range(3):
        mine, expected = decide(s), decide(alone)
        assert (mine.replica, mine.version, mine.fallback) == (expected.replica, expected.version, None)
        assert np.isfinite(s.rows).all()
        assert s.mask.all()
    seen = stats(d).shadow
    assert seen is not None
    assert seen.failures == failures


@pytest.mark.parametrize("slow", [True, False])
def test_a_shadow_that_fails_20_times_in_a_row_is_switched_off(slow: bool) -> None:
    timer = Timer()
    s = scheduler(Fixed(FIRST, "now", timer=timer))
    policy = Fixed(SECOND if slow else ValueError("no"), takes_s=0.1 if slow else 0.0, timer=timer)
    d = shadow(s, policy)
    assert [decide(s).fallback for _ in range(30)] == [None] * 30
    assert policy.asked == 1 + 20  # once to warm up
    why = "slow (1e+02 ms)" if slow else "ValueError: no"
    assert d.events[-1].sentence == (f"the shadow dark was switched off: 20 decisions in a row failed, at last: {why}")
    assert d.changes["shadow_switched_off"] == 1


def test_a_shadow_scores_what_was_decided_on_after_the_decision_went_out() -> None:
    waiting: list[Callable[[], None]] = []
    s = scheduler()
    d = shadow(s, Fixed(FIRST))
    d.later = waiting.append
    seen = []
    d.shadow.release.policy.score = lambda rows, mask: seen.append(rows[-1, COLUMN["prompt_tokens"]]) or FIRST  # type: ignore[union-attr,method-assign,attr-defined,func-returns-value]
    for tokens in (100, 200, 300):
        decide(s, s.arrive(LiveRequest(tenant=0, prompt_tokens=tokens, max_tokens=1)))
    assert not seen
    while waiting:
        waiting.pop(0)()
    assert seen == [100, 200, 300]


def test_what_a_shadow_cannot_keep_up_with_is_skipped() -> None:
    waiting: list[Callable[[], None]] = []
    s = scheduler()
    d = shadow(s, Fixed(FIRST))
    d.later = waiting.append
    for _ in range(70):
        decide(s)
    assert d.shadow is not None
    assert (len(waiting), d.shadow.skipped) == (1, 6)


def test_a_shadow_that_was_stopped_is_not_asked() -> None:
    s = scheduler()
    policy = Fixed(FIRST)
    d = shadow(s, policy)
    d.stop_shadow()
    decide(s)
    assert policy.asked == 1  # to warm up
    with pytest.raises(UserError, match="there is no shadow"):
        d.stop_shadow()


# Times


def test_percentiles_of_decision_times_lie_in_their_bucket() -> None:
    s = scheduler()
    times = deployed(s).current_arm.times
    for us in range(1, 101):
        times.add(us * 1e-6)
    assert times.count == 100
    assert times.percentile(0.5) == pytest.approx(50e-6, rel=0.05)
    assert times.percentile(0.99) == pytest.approx(99e-6, rel=0.05)
    assert all(a <= b for a, b in pairwise(times.percentile(share) for share in np.linspace(0, 1, 21)))


# Metrics


def test_what_is_counted_can_be_scraped() -> None:
    s = scheduler()
    d = canary(s, Fixed(RuntimeError("no")), share=0.5)
    shadow(s, Fixed(SECOND))
    serve(s, lambda _: True, 10)
    seen = {(s.name, *sorted(s.labels.values())): s.value for family in metrics(d) for s in family.samples}

    def value(name: str, **labels: str) -> float:
        return seen[(f"steersman_{name}", *sorted(labels.values()))]

    assert value("policy_deployed", version="new", place="canary") == 1
    assert value("policy_decisions_total", version="now", arm="current") == 5
    assert value("policy_attained_total", version="new", arm="canary") == 5
    assert value("policy_fallbacks_total", version="new", arm="canary", reason="error") == 5
    assert value("policy_decision_seconds_count", version="now", arm="current") == 5
    assert value("policy_decision_seconds_bucket", version="now", arm="current", le="1e-06") == 5
    assert value("shadow_disagreements_total", version="dark") == 5
    assert value("shadow_enabled", version="dark") == 1
    assert value("canary_share") == 0.5
    assert value("policy_changes_total", kind="canary_started") == 1


def test_curves_are_of_the_window() -> None:
    s = scheduler()
    d = canary(s, share=0.5, max_attainment_loss=1.0, max_error_rise=1.0)
    shadow(s, Fixed(SECOND))
    scalars = Scalars(d)
    serve(s, lambda _: True, 10)
    first = scalars.take()
    assert (first["canary/attainment"], first["canary/errors"], first["policy/fallbacks"]) == (1.0, 0.0, 0.0)
    # The canary chooses as the shadow does, the current policy otherwise.
    assert first["shadow/disagreement"] == 0.5
    serve(s, lambda decision: decision.arm == "current", 10)
    second = scalars.take()
    assert (second["canary/attainment"], second["canary/current/attainment"]) == (0.0, 1.0)
    assert second["canary/errors"] == 1.0
    d.start_shadow(Release(Fixed(FIRST), "dark"))  # type: ignore[arg-type]
    arms = [decision.arm for decision in serve(s, lambda _: True, 10)]
    assert scalars.take()["shadow/disagreement"] == arms.count("canary") / 10
    assert not {"canary/attainment", "shadow/disagreement"} & set(scalars.take())


def test_what_the_encoder_writes_is_in_range() -> None:
    for rows, mask in situations(1000):
        assert in_range(rows, mask), [
            (FEATURES[k].name, float(rows[c, k]))
            for c, k in np.argwhere(~((rows >= LOW) & (rows <= HIGH)) & mask[:, None])
        ]

"""What a policy does and why: the reasons add up, the words fit them, and the comparison counts right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from simulated import episode, fleet

from steersman import cli
from steersman.agents.policies import resolve
from steersman.runtime.compiled import njit
from steersman.runtime.errors import UserError
from steersman.runtime.network import Architecture, compiled_policy, parameters
from steersman.runtime.observation import COLUMN, FEATURES
from steersman.runtime.policy import NEVER, SCORE, CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator import SimulatedRuntime
from steersman.training.explain.contributions import Contribution, contributions, typical_row
from steersman.training.explain.dependence import dependence, importance
from steersman.training.explain.difference import attainments, gains, parting, partings
from steersman.training.explain.explain import as_json, explain
from steersman.training.explain.sentences import PHRASES, effect_text, sentence, value_text
from steersman.training.explain.show import page, rendered
from steersman.training.explain.situations import Kind, Situation, close, of_kind, play, shares_of
from steersman.training.objective import Arena

FLEET = fleet({}, {"profile": "llama-3.1-8b-l40s-bf16"}, {"profile": "llama-3.1-8b-a100-bf16"})
INFLIGHT, TTFT = COLUMN["inflight"], COLUMN["predicted_ttft"]
WAITED, TTFT_SLO = COLUMN["waited"], COLUMN["ttft_slo"]


@njit(SCORE)
def _emptiest(rows, mask, params, memory, scores):
    scores[:] = NEVER
    for c in range(len(scores) - 2):
        scores[c] = -params[0] * rows[c, INFLIGHT]


@njit(SCORE)
def _fastest(rows, mask, params, memory, scores):
    scores[:] = NEVER
    for c in range(len(scores) - 2):
        scores[c] = -rows[c, TTFT]


@njit(SCORE)
def _holds_once(rows, mask, params, memory, scores):
    scores[:] = NEVER
    for c in range(len(scores) - 2):
        scores[c] = -rows[c, TTFT]
    if rows[-1, WAITED] == 0.0 and rows[-1, TTFT_SLO] > 1.0:
        scores[-2] = 1.0


EMPTIEST = CompiledPolicy("emptiest", "Sends to the fewest requests.", _emptiest, values=np.array([2.0]))
FASTEST = CompiledPolicy("fastest", "Sends to the lowest predicted TTFT.", _fastest)
HOLDS_ONCE = CompiledPolicy("holds-once", "Holds who is not in a hurry, once.", _holds_once)


def busy(seed: int = 0, count: int = 300) -> Requests:
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(0.03, count))
    return episode(arrivals, rng.integers(100, 3000, count), rng.integers(5, 200, count), rng.integers(0, 2, count))


def watched(policy: CompiledPolicy = EMPTIEST, other: CompiledPolicy = FASTEST) -> list[Situation]:
    return play(policy, other, SimulatedRuntime(FLEET), [busy(0), busy(1)], 0)


def scorer(architecture: Architecture) -> CompiledPolicy:
    weights = np.random.default_rng(1).normal(size=parameters(architecture))
    return compiled_policy(architecture, weights, "learned")


@pytest.mark.parametrize("architecture", [Architecture(), Architecture(gates=()), Architecture(hidden=(6,))], ids=str)
def test_the_reasons_of_the_scorer_add_up_to_its_lead(architecture: Architecture) -> None:
    policy = scorer(architecture)
    situations = play(policy, FASTEST, SimulatedRuntime(FLEET), [busy()], 0)
    typical = typical_row(situations)
    for s in situations[::17]:
        for c in np.flatnonzero(s.mask):
            reasons = contributions(policy, s, s.action, int(c), typical)
            lead = s.scores[s.action] - s.scores[c]
            assert sum(r.effect for r in reasons) == pytest.approx(lead, abs=1e-5 * (1 + abs(s.scores).max()))
            assert [abs(r.effect) for r in reasons] == sorted((abs(r.effect) for r in reasons), reverse=True)


def test_ablation_finds_the_only_feature_that_a_policy_uses() -> None:
    situations = watched()
    s = next(s for s in situations if len(set(s.rows[:3, INFLIGHT])) == 3)
    second = s.runner_up
    (reason,) = contributions(EMPTIEST, s, s.action, second, typical_row(situations))
    assert reason.feature == "inflight"
    assert reason.effect == pytest.approx(2.0 * (s.rows[second, INFLIGHT] - s.rows[s.action, INFLIGHT]))
    assert (reason.value, reason.against) == (s.rows[s.action, INFLIGHT], s.rows[second, INFLIGHT])


def test_the_features_that_a_policy_does_not_use_have_no_importance() -> None:
    shares = importance(EMPTIEST, watched())
    assert next(iter(shares)) == "inflight"
    assert shares["inflight"] > 0
    assert {name for name, share in shares.items() if share} == {"inflight"}
    assert set(shares) == {f.name for f in FEATURES} - {"is_replica", "is_hold"}


def test_the_dependence_is_that_of_the_formula() -> None:
    situations = watched()
    found = dependence(EMPTIEST, situations, "inflight")
    assert found is not None
    # A lead of 2·(the least of the others − what the chosen one is given).
    rivals = [np.delete(s.rows[:3, INFLIGHT], s.action).min() for s in situations]
    expected = 2.0 * (np.quantile(rivals, 0.5, method="lower") - found.values)
    assert found.median == pytest.approx(expected)
    assert found.kept == pytest.approx([(np.array(rivals) >= value).mean() for value in found.values])
    assert dependence(EMPTIEST, situations, "price") is None  # never varies


def test_shares_count_requests_and_not_decisions() -> None:
    situations = watched(HOLDS_ONCE)
    shares = shares_of(situations)
    loose = sum(int((busy(seed).table["tenant"] == 1).sum()) for seed in (0, 1))
    assert shares.requests == 600
    assert len(situations) == 600 + loose
    assert shares.held == pytest.approx(loose / 600)
    assert shares.held_s == pytest.approx(0.5, abs=1e-6)  # a tenth of 5 s
    assert (shares.sent, shares.shed) == (1.0, 0.0)


def test_examples_of_a_kind_are_of_different_requests() -> None:
    found = of_kind(watched(HOLDS_ONCE), Kind.HELD, 5)
    assert len({(s.episode, s.request) for s in found}) == len(found) == 5
    assert of_kind(watched(HOLDS_ONCE), Kind.SHED, 5) == []


def test_close_decisions_have_the_least_lead_and_are_no_ties() -> None:
    found = close(watched(FASTEST, EMPTIEST))
    leads = [s.lead for s in found]
    assert 0 < leads[0] <= np.median([s.lead for s in watched(FASTEST, EMPTIEST)])
    assert leads == sorted(leads)


def test_every_feature_has_words() -> None:
    assert list(PHRASES) == [f.name for f in FEATURES]
    assert all(value_text(f.name, 0.5) for f in FEATURES)


def test_a_sentence_gives_reasons_and_objections_by_size() -> None:
    reasons = [
        Contribution("ttft_slack", 1.8, 0.9, 0.4),
        Contribution("inflight", -0.4, 9.0, 3.0),
        Contribution("price", 0.3, 1.0, 3.0),
        Contribution("running", -0.001, 2.0, 1.0),
    ]
    assert sentence("sends to h100-0 rather than to a100-2", reasons, True) == (
        "sends to h100-0 rather than to a100-2 because its predicted TTFT slack is higher (+1.8) and "
        "its price is lower (+0.3), although it is busier (−0.4)."
    )


def test_a_sentence_on_shedding_states_the_replicas_values() -> None:
    reasons = [Contribution("ttft_slack", 2.0, 0.0, -0.8), Contribution("waited", -0.5, 1.5, 1.5)]
    assert sentence("sheds rather than send to r0", reasons, False) == (
        "sheds rather than send to r0 because its predicted TTFT slack is −0.80 (+2), although "
        "the wait so far is 1.5 s (−0.5)."
    )


def test_a_policy_that_looks_at_nothing_is_said_to() -> None:
    turns = resolve("round-robin")
    situations = play(turns, FASTEST, SimulatedRuntime(FLEET), [busy()], 0)
    s = situations[1]
    assert contributions(turns, s, s.action, s.runner_up, typical_row(situations)) == []
    assert set(importance(turns, situations).values()) == {0.0}
    assert sentence("sends to r1", [], True).startswith("sends to r1, for no feature")


def test_ranks_are_no_amounts() -> None:
    assert [effect_text(e) for e in (1e7, -1e6, 0.25)] == ["decisive", "ruled out", "+0.25"]


def test_partings_are_told_by_kind_and_once_a_request() -> None:
    situations = watched(HOLDS_ONCE, EMPTIEST)
    parted = partings(situations)
    loose = [s for s in situations if s.kind is Kind.HELD]
    assert [parting(s) for s in loose] == ["held"] * len(loose)
    assert parted["held"] == loose
    sent = {(s.episode, s.request) for s in parted["other replica"]}
    assert not sent & {(s.episode, s.request) for s in loose}
    looking_on = watched(EMPTIEST, HOLDS_ONCE)
    assert len(partings(looking_on)["served"]) == len(loose)
    assert partings(watched(EMPTIEST, EMPTIEST)) == {}


def test_a_gain_is_what_the_roll_outs_differ_by() -> None:
    situations = watched()
    parted = partings(situations)
    found = gains(EMPTIEST, Arena(FLEET, 1), [busy(0), busy(1)], situations, parted, 8)["other replica"]
    assert found.rolled == 8
    assert found.attained.low <= found.attained.mean <= found.attained.high
    assert -1.0 <= found.own <= 1.0
    # Against itself nothing is gained.
    same = {"other replica": [s._replace(other=s.action) for s in parted["other replica"]]}
    again = [s._replace(other=s.action) for s in situations]
    none = gains(EMPTIEST, Arena(FLEET, 1), [busy(0), busy(1)], again, same, 8)["other replica"]
    assert (none.attained.mean, none.own) == (0.0, 0.0)


def test_attainments_are_paired_by_tenant() -> None:
    arena, requests = Arena(FLEET, 1), [busy(0), busy(1)]
    ours, theirs = (arena.episodes(p, requests) for p in (FASTEST, EMPTIEST))
    figures = attainments(ours, theirs)
    assert list(figures) == ["strict", "loose", "all requests"]
    for index, name in enumerate(("strict", "loose")):
        of = [
            np.concatenate([e.outcomes.attained[e.requests.table["tenant"] == index] for e in p])
            for p in (ours, theirs)
        ]
        assert figures[name].policy == pytest.approx(of[0].mean())
        assert figures[name].difference.mean == pytest.approx(of[0].mean() - of[1].mean())
    assert attainments(ours, ours)["all requests"].difference == (0.0, 0.0, 0.0)


class _Workload:
    """What `explain` needs of a workload."""

    tenants = busy().tenants

    def __init__(self, count: int = 300) -> None:
        self._count = count

    def sample(self, seed: int, **_: Any) -> Requests:
        return busy(seed, self._count)


def test_an_explanation_is_whole_in_all_its_forms() -> None:
    options: Any = {"load": 1.0, "split": "train", "seed": 0, "episodes": 2, "examples": 2, "rolled": 2}
    found = explain(HOLDS_ONCE, resolve("push-shed"), _Workload(), Arena(FLEET, 1), **options)  # type: ignore[arg-type]
    data = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert data["against"] == "push-shed"
    assert {e["kind"] for e in data["examples"]} == {"contested", "held"}
    assert [d["feature"] for d in data["dependence"]] == [f for f, share in data["importance"].items() if share][:6]
    console = Console(width=200, record=True, quiet=True)
    console.print(rendered(found))
    text = page(found)
    for example in found.examples:
        assert "because" in example.sentence
    assert "<img" in text
    assert "holds rather than" in text


def test_an_episode_without_requests_is_refused() -> None:
    options: Any = {"load": 0.01, "split": "train", "seed": 0, "episodes": 2, "examples": 2, "rolled": 2}
    with pytest.raises(UserError, match=r"load 0\.01 brings an episode without requests"):
        explain(FASTEST, EMPTIEST, _Workload(0), Arena(FLEET, 1), **options)  # type: ignore[arg-type]


def test_the_command_says_which_file_name_it_cannot_draw(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["steersman", "explain", "--policy", "jsed", "--plot", "curves.txt"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "--plot curves.txt: the file's name must end in .png, .svg or .pdf" in capsys.readouterr().err

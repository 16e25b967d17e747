"""What a policy is worth: by the definition, request by request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import FASTEST, TENANTS, episode, fleet

from steersman.runtime.outcomes import Episode, State
from steersman.runtime.tenant import Tenant
from steersman.training.objective import Arena, worth


def played() -> Episode:
    """Attained, late and shed requests of both tenants."""
    lengths = [400, 400, 30_000, 6000, 6000, 6000, 400, 400]
    requests = episode(np.arange(8) * 0.01, lengths, 5, [0, 1, 0, 1, 0, 0, 0, 1])
    return Arena(fleet({}), threads=1).episode(FASTEST, requests, seed=0)


def wait(episode: Episode, tenants: dict[str, Tenant]) -> float:
    targets = [tenant.slo.ttft_s for tenant in tenants.values()]
    waits = []
    for ttft_s, tenant in zip(episode.outcomes.ttft_s, episode.requests.table["tenant"], strict=True):
        waits.append(targets[tenant] if np.isnan(ttft_s) else min(targets[tenant], ttft_s))
    return sum(waits) / len(waits)


def test_half_is_of_all_requests_and_half_of_the_worst_tenant():
    one = played()
    attained, tenant = one.outcomes.attained, one.requests.table["tenant"]
    assert State.SHED in one.outcomes.state
    assert 0 < attained[tenant == 0].mean() < attained[tenant == 1].mean()
    assert worth(one) == pytest.approx(0.5 * attained.mean() + 0.5 * attained[tenant == 0].mean())


def test_waiting_costs_by_the_second_and_for_the_whole_target_where_no_token_came():
    one = played()
    assert np.isnan(one.outcomes.ttft_s).any()
    assert wait(one, TENANTS) > 0
    assert worth(one, 0.02) == pytest.approx(worth(one) - 0.02 * wait(one, TENANTS))


def test_waiting_is_measured_by_the_promises_that_count():
    one = played()
    true = {name: tenant.model_copy(update={"slo": TENANTS["loose"].slo}) for name, tenant in TENANTS.items()}
    blind = replace(one, requests=replace(one.requests, judged=true))
    assert wait(one, true) > wait(one, TENANTS)
    assert worth(blind, 0.02) == pytest.approx(worth(one) - 0.02 * wait(one, true))


def test_an_episode_without_requests_misses_nothing():
    one = played()
    nothing = replace(one, requests=replace(one.requests, table=one.requests.table[:0]))
    nothing = replace(nothing, outcomes=replace(one.outcomes, attained=np.zeros(0, np.bool_)))
    assert worth(nothing, 0.02) == 1.0

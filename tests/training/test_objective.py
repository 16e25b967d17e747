"""What a policy is worth: by the definition, request by request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import FASTEST, PATIENT, episode, fleet

from steersman.runtime.holding import held_share
from steersman.runtime.outcomes import Episode, State
from steersman.runtime.simulator import SimulatedRuntime
from steersman.training.objective import Arena, worth


def played() -> Episode:
    """Attained, late and shed requests of both tenants."""
    lengths = [400, 400, 30_000, 6000, 6000, 6000, 400, 400]
    requests = episode(np.arange(8) * 0.01, lengths, 5, [0, 1, 0, 1, 0, 0, 0, 1])
    return Arena(fleet({}), threads=1).episode(FASTEST, requests, seed=0)


def test_half_is_of_all_requests_and_half_of_the_worst_tenant():
    one = played()
    attained, tenant = one.outcomes.attained, one.requests.table["tenant"]
    assert State.SHED in one.outcomes.state
    assert 0 < attained[tenant == 0].mean() < attained[tenant == 1].mean()
    assert worth(one) == pytest.approx(0.5 * attained.mean() + 0.5 * attained[tenant == 0].mean())


def test_holding_costs_the_share_of_the_target_that_it_took():
    """The first is held four times, for 0.05 s of its 0.5 s each."""
    runtime = SimulatedRuntime(fleet({}))
    runtime.reset(episode([0.0, 0.1, 0.2, 0.3], [300, 100, 301, 301], 5, [0, 0, 1, 1]))
    runtime.run(PATIENT)
    one = runtime.episode
    assert one.outcomes.holds.tolist() == [4, 0, 0, 0]
    assert one.outcomes.ttft_s[0] > 0.2
    assert worth(one) == 1.0
    assert worth(one, 0.2) == pytest.approx(1.0 - 0.2 * 0.4 / 4)


def test_a_long_target_is_held_for_in_short_pauses():
    assert held_share(np.array([3, 3, 3]), np.array([0.05, 4.0, 60.0])) == pytest.approx([0.6, 0.3, 0.025])


def test_an_episode_without_requests_misses_nothing():
    one = played()
    nothing = replace(one, requests=replace(one.requests, table=one.requests.table[:0]))
    nothing = replace(nothing, outcomes=replace(one.outcomes, attained=np.zeros(0, np.bool_)))
    assert worth(nothing, 0.2) == 1.0

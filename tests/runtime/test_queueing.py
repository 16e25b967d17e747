"""Where the simulated engine is a queue that theory has solved, its mean waiting time is the theory's.

Every iteration takes the same time here, so that a request of n output tokens is served for n of them.
"""

from __future__ import annotations

import math

import numpy as np
from simulated import episode, fleet

from steersman.runtime.simulator import SimulatedRuntime

ITERATION_S = 0.01
BATCHES = 50  # of consecutive requests; the first is left out, while the queue fills
T = 4.24  # Student's t: two-sided 1e-4 with 48 degrees of freedom


def waiting_s(arrival_s: np.ndarray, iterations: np.ndarray, replicas: int = 1, slots: int = 1) -> np.ndarray:
    """Of requests that go to equal replicas in turn, each of which serves `slots` at once: seconds before service."""
    runtime = SimulatedRuntime(fleet(*[{"max_num_seqs": slots}] * replicas))
    for name in ("overhead_s", "decode_b_s", "decode_c_s", "prefill_b_s", "prefill_c_s"):
        runtime.replicas[name] = 0.0
    runtime.replicas["decode_a_s"] = runtime.replicas["prefill_a_s"] = ITERATION_S
    runtime.reset(episode(arrival_s, 1, iterations))
    runtime.replay(np.arange(len(arrival_s)) % replicas)
    return runtime.outcomes().ttft_s - ITERATION_S


def poisson(rate: float, count: int, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def mean_and_bound(waiting_s: np.ndarray) -> tuple[float, float]:
    """The mean and how far off it may be, from the means of batches, which are nearly independent."""
    means = waiting_s.reshape(BATCHES, -1).mean(axis=1)[1:]
    bound = T * means.std(ddof=1) / math.sqrt(len(means))
    assert bound < 0.05 * means.mean()  # the run is long enough to tell something
    return float(means.mean()), float(bound)


def mdc_waiting(servers: int, load: float) -> float:
    """Mean waiting time of M/D/c, in service times (Crommelin 1932); for one server, load / (2 (1 − load))."""
    total = 0.0
    for j in range(1, 10_000):
        events, mean = j * servers, j * servers * load
        chance = exactly = math.exp(events * math.log(mean) - mean - math.lgamma(events + 1))
        or_more, n = 0.0, events
        while chance > 1e-18:
            or_more, n = or_more + chance, n + 1
            chance *= mean / n
        total += or_more - (or_more - exactly) / load
        if or_more < 1e-12:
            break
    return total


def test_one_slot_obeys_lindleys_recursion():
    """Each waits for what the one before it waited and was served, less the time between them."""
    rng, count = np.random.default_rng(1), 20_000
    iterations = rng.geometric(0.02, count)
    gaps_s = rng.exponential(0.6, count)
    expected = np.zeros(count)
    for i in range(1, count):
        expected[i] = max(0.0, expected[i - 1] + iterations[i - 1] * ITERATION_S - gaps_s[i])
    np.testing.assert_allclose(waiting_s(np.cumsum(gaps_s), iterations), expected, atol=1e-6)


def test_exponential_service_gives_mm1():
    """Lengths are geometric, so that W = ρ / (μ − λ) · (1 − p/2): the last factor is that of whole iterations."""
    chance, load, count = 0.01, 0.7, 1_000_000
    service_s = ITERATION_S / chance
    arrival_s = poisson(load / service_s, count, seed=2)
    iterations = np.random.default_rng(3).geometric(chance, count)
    mean, bound = mean_and_bound(waiting_s(arrival_s, iterations))
    expected = load / (1 / service_s - load / service_s) * (1 - chance / 2)
    assert abs(mean - expected) < bound


def test_equal_service_gives_md1():
    load, iterations, count = 0.8, 10, 1_000_000
    service_s = iterations * ITERATION_S
    mean, bound = mean_and_bound(waiting_s(poisson(load / service_s, count, seed=4), np.full(count, iterations)))
    assert abs(mean - load * service_s / (2 * (1 - load))) < bound


def test_equal_replicas_in_turn_give_mdc():
    """Of equal services, who came first is done first: c servers with one queue serve what c queues get in turn."""
    load, iterations, servers, count = 0.8, 10, 4, 1_000_000
    service_s = iterations * ITERATION_S
    arrival_s = poisson(servers * load / service_s, count, seed=5)
    mean, bound = mean_and_bound(waiting_s(arrival_s, np.full(count, iterations), replicas=servers))
    assert abs(mean - mdc_waiting(servers, load) * service_s) < bound


def test_slots_of_one_engine_give_mdc_but_for_the_iteration_that_runs():
    """Who comes during an iteration waits for its end. Start times are monotone in arrivals: all start ≤ 1 later."""
    load, iterations, servers, count = 0.8, 40, 8, 1_000_000
    service_s = iterations * ITERATION_S
    arrival_s = poisson(servers * load / service_s, count, seed=6)
    mean, bound = mean_and_bound(waiting_s(arrival_s, np.full(count, iterations), slots=servers))
    expected = mdc_waiting(servers, load) * service_s
    assert expected - bound < mean < expected + ITERATION_S + bound

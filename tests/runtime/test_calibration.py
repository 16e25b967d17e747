"""Calibration: iterations out of token times, coefficients out of iterations, and what is said of bad input."""

from __future__ import annotations

import random
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from steersman.runtime.calibration import fleet_of_url, write
from steersman.runtime.calibration.fit import error, fit, non_negative, terms
from steersman.runtime.calibration.load import Stream, concurrencies, drive, stream
from steersman.runtime.calibration.steps import STEP, steps
from steersman.runtime.configs import find_config
from steersman.runtime.cost import CostProfile, load_profile
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import load_fleet
from steersman.runtime.replica._pool import open_replica

TRUE = {
    "decode_a_s": 0.004,
    "decode_many_s": 0.012,
    "decode_b_s_per_sequence": 0.007,
    "decode_c_s_per_token": 1e-5,
    "prefill_a_s": 0.02,
    "prefill_b_s_per_token": 0.003,
    "prefill_c_s_per_token2": 1e-6,
    "prefill_d_s_per_chunk": 0.015,
    "latency_s": 0.006,
}
BUDGET, SLOTS = 64, 4


def seconds_of(row: np.ndarray) -> float:
    return float(sum(column[0] * TRUE[name] for name, column in terms(row).items()))


def engine(seed: int, requests: int) -> tuple[list[Stream], int]:
    """The streams of an engine with the coefficients `TRUE`, and its number of iterations."""
    rng = random.Random(seed)
    arrivals, time = [], 0.0
    for _ in range(requests):
        time += rng.choice([0.01, 0.1, 0.6, 2.0])
        arrivals.append((time, rng.randrange(4, 300), rng.randrange(1, 30)))
    waiting, partial, decoding, done = list(arrivals), None, [], []
    now, iterations = 0.0, 0
    while waiting or partial or decoding:
        row = np.zeros(1, STEP)
        row["iterations"] = 1
        if not decoding and not partial and waiting[0][0] > now:
            now = waiting[0][0]
            row["idle"] = 1
            now += TRUE["latency_s"]
        begun = now - (TRUE["latency_s"] if row["idle"][0] else 0.0)
        row["decoding"], row["context_tokens"] = len(decoding), sum(s["context"] for s in decoding)
        budget, first = BUDGET - len(decoding), []
        while budget > 0 and (partial or (waiting and waiting[0][0] <= begun and len(decoding) + len(first) < SLOTS)):
            if partial is None:
                sent, prompt, output = waiting.pop(0)
                partial = {"sent": sent, "prompt": prompt, "output": output, "done": 0, "times": []}
            chunk = min(budget, partial["prompt"] - partial["done"])
            row["chunks"] += 1
            row["prefill_tokens"] += chunk
            row["prefill_tokens2"] += chunk * (partial["done"] + chunk / 2)
            partial["done"] += chunk
            budget -= chunk
            if partial["done"] < partial["prompt"]:
                break
            partial["context"] = partial["prompt"]
            first.append(partial)
            partial = None
        row["idle"] = 0
        now += seconds_of(row)
        iterations += 1
        for s in [*decoding, *first]:
            s["times"].append(now)
            s["context"] += 1
        decoding += first
        ended = [s for s in decoding if len(s["times"]) == s["output"]]
        decoding = [s for s in decoding if len(s["times"]) < s["output"]]
        done += [Stream(s["sent"], s["times"], now, s["prompt"], 0) for s in ended]
    return sorted(done), iterations


def test_the_iterations_are_found_again() -> None:
    streams, iterations = engine(1, 200)
    found = steps(streams, BUDGET)
    assert 0.9 * iterations <= found["iterations"].sum() <= iterations
    assert (found["prefill_tokens"] <= BUDGET * found["iterations"]).mean() > 0.95
    expected = np.array([seconds_of(found[k : k + 1]) for k in range(len(found))])
    assert np.median(np.abs(expected / found["seconds"] - 1)) < 1e-6


def test_the_fit_finds_the_coefficients_that_made_the_streams() -> None:
    found = fit(steps(engine(2, 600)[0], BUDGET))
    for name in ("decode_a_s", "decode_many_s", "decode_b_s_per_sequence", "decode_c_s_per_token"):
        assert found[name] == pytest.approx(TRUE[name], rel=0.1), name
    assert found["prefill_b_s_per_token"] == pytest.approx(TRUE["prefill_b_s_per_token"], rel=0.05)
    assert found["prefill_a_s"] + found["prefill_d_s_per_chunk"] == pytest.approx(0.035, rel=0.25)
    off = error(found, steps(engine(3, 200)[0], BUDGET))
    assert off.median < 0.01
    assert abs(off.total) < 0.02


def test_steps_that_another_program_delayed_count_little() -> None:
    clean = steps(engine(4, 300)[0], BUDGET)
    table, late = clean.copy(), np.random.default_rng(0).random(len(clean)) < 0.05
    table["seconds"][late] *= 4
    off = error(fit(table), clean)
    assert off.median < 0.05
    assert abs(off.total) < 0.05


def test_tokens_that_were_read_together_do_not_spoil_the_fit() -> None:
    """A client or server that is late for several iterations, as vLLM's is at times, gets the tokens of all at once."""
    streams, _ = engine(2, 600)
    rng = random.Random(0)
    stalls = [(at, at + 0.1) for at in (rng.uniform(0, streams[-1].ended_s) for _ in range(200))]

    def read(time: float) -> float:
        return max([end for start, end in stalls if start <= time < end], default=time)

    late = [s._replace(token_s=[read(t) + 1e-5 * (i % 100) for t in s.token_s]) for i, s in enumerate(streams)]
    off = error(fit(steps(late, BUDGET)), steps(engine(3, 200)[0], BUDGET))
    assert off.median < 0.05
    assert abs(off.total) < 0.05


def test_tokens_that_some_streams_get_late_do_not_spoil_the_fit() -> None:
    streams, _ = engine(2, 600)
    rng = random.Random(0)
    late = [
        s._replace(token_s=sorted(t + (rng.uniform(0.005, 0.02) if rng.random() < 0.3 else 0) for t in s.token_s))
        for s in streams
    ]
    off = error(fit(steps(late, BUDGET)), steps(engine(3, 200)[0], BUDGET))
    assert off.median < 0.03
    assert abs(off.total) < 0.03


def test_no_coefficient_is_negative() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    assert non_negative(matrix, np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 0.0]


def test_streams_without_decodes_and_no_streams_give_what_there_is() -> None:
    assert len(steps([], BUDGET)) == 0
    alone = steps([Stream(1.0, [1.5], 1.6, 100, 20)], BUDGET)
    assert alone["seconds"].tolist() == [0.5]
    assert alone["prefill_tokens"].tolist() == [80.0]
    assert alone["iterations"].tolist() == [2]
    assert alone["idle"].tolist() == [1]


def test_phases_go_past_the_batch_limit() -> None:
    assert concurrencies(8) == [1, 2, 4, 6, 8, 12]
    assert concurrencies(6) == [1, 2, 4, 6, 9]
    assert concurrencies(1) == [1, 2]


def test_old_profiles_have_none_of_the_new_terms() -> None:
    profile = load_profile("llama-3.1-8b-h100-bf16")
    assert (profile.decode_many_s, profile.prefill_d_s_per_chunk, profile.latency_s) == (0.0, 0.0, 0.0)


def test_a_written_profile_is_read_again(tmp_path: Path) -> None:
    profile = load_profile("smollm2-q8_0")
    write(profile, tmp_path / "new" / "x.yaml")
    assert load_profile(str(tmp_path / "new" / "x.yaml")) == profile
    assert isinstance(profile, CostProfile)


def test_a_wrong_limit_is_one_sentence() -> None:
    limits = {"kv_tokens": 1000, "max_model_len": 100, "max_num_seqs": 64, "token_budget": 8}
    with pytest.raises(UserError, match="token_budget 8 must be at least max_num_seqs 64"):
        fleet_of_url("http://127.0.0.1:1", model="m", **limits)


async def test_a_real_engine_can_be_driven_and_its_iterations_told_apart() -> None:
    fleet = load_fleet(find_config("fleets", "local"))
    replica, group = open_replica("slow", fleet.groups[1]), fleet.groups[1]
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        try:
            await replica.start(session, lambda _: None)
            streams = await drive(session, replica, group, clients=2, seconds=1.0, seed="test")
        finally:
            await replica.stop()
    assert len(streams) >= 2
    assert all(s.sent_s < s.token_s[0] <= s.token_s[-1] <= s.ended_s for s in streams)
    found = steps(streams, group.token_budget)
    assert found["prefill_tokens"].sum() > 0
    assert (found["seconds"] > 0).all()


async def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    fleet = fleet_of_url(
        "http://127.0.0.1:1", model="m", kv_tokens=1000, max_model_len=100, max_num_seqs=2, token_budget=8
    )
    replica = open_replica("m", fleet.groups[0])
    async with aiohttp.ClientSession() as session:
        with pytest.raises(UserError, match="v1/completions cannot be measured"):
            await stream(session, replica, "m", "x", 1)

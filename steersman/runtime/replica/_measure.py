"""Measure a live replica and print its cost profile.

    python -m steersman.runtime.replica._measure FLEET REPLICA > profile.yaml

Starts (or reaches) one replica of a fleet file, sends it prompts of growing length one at a time, then
growing batches of streams at two context lengths, and fits the coefficients of `steersman.runtime.cost` to
what a client sees. Takes some minutes; nothing else should run on the machine. Needs a server that honours
`ignore_eos` and `stream_options.include_usage` (vLLM, SGLang, llama.cpp).
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import aiohttp
import numpy as np
import yaml

from steersman.runtime.configs import find_config
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import ReplicaGroup, load_fleet
from steersman.runtime.replica import Replica
from steersman.runtime.replica._pool import open_replica
from steersman.runtime.replica._stream import EventCounter
from steersman.runtime.replica._text import words

REPEATS = 3
STEPS = 24  # decode iterations of one sample


class Stream(NamedTuple):
    """What a client saw of one stream."""

    prompt_tokens: int
    token_s: list[float]  # when each token came, seconds since `started`
    started: float


class Sample(NamedTuple):
    """One decode measurement: `step_s` for `decoding` sequences with `context_tokens` in all."""

    decoding: int
    context_tokens: float
    step_s: float


@asynccontextmanager
async def running(replica: Replica) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        try:
            await replica.start(session, lambda text: print(text, file=sys.stderr))
            yield session
        finally:
            await replica.stop()


async def stream(session: aiohttp.ClientSession, replica: Replica, model: str, prompt: str, tokens: int) -> Stream:
    """Generate exactly `tokens` tokens."""
    body = {
        "model": replica.served_model or model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    counter, token_s = EventCounter(), []
    started = time.perf_counter()
    url = replica.base_url + "/v1/completions"
    async with session.post(url, json=body, headers=dict(replica.headers)) as response:
        if response.status != 200:
            raise UserError(f"{url} gave status {response.status}: {(await response.text())[:200]}")
        async for chunk in response.content.iter_any():
            token_s += [time.perf_counter()] * counter.feed(chunk)
    if counter.usage is None or not token_s:
        raise UserError(f"{url} reported no usage; the replica cannot be measured")
    return Stream(counter.usage.prompt_tokens, token_s, started)


def prompt_of(tokens: int, rng: random.Random) -> str:
    return words(str(rng.random()), tokens)


async def measure_prefill(
    session: aiohttp.ClientSession, replica: Replica, group: ReplicaGroup, rng: random.Random
) -> list[tuple[int, float]]:
    """(prompt tokens, TTFT) of prompts alone on the replica; the median of `REPEATS`."""
    longest = min(group.max_model_len, group.kv_tokens) * 3 // 4
    lengths = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768) if n <= longest]
    samples = []
    for length in lengths:
        seen = []
        for _ in range(REPEATS):
            one = await stream(session, replica, group.model, prompt_of(length, rng), 1)
            seen.append((one.token_s[0] - one.started, one.prompt_tokens))
        ttft, tokens = sorted(seen)[REPEATS // 2]
        samples.append((tokens, ttft))
        print(f"prefill {tokens} tokens: {1e3 * ttft:.1f} ms", file=sys.stderr)
    return samples


async def measure_decode(
    session: aiohttp.ClientSession, replica: Replica, group: ReplicaGroup, rng: random.Random
) -> list[Sample]:
    """Decode steps at growing batches, while all sequences decode; at two context lengths."""
    per_sequence = min(group.max_model_len, group.kv_tokens // group.max_num_seqs)
    batches = [b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) if b <= group.max_num_seqs]
    samples = []
    for batch in batches:
        for context in (32, min(1024, per_sequence // 2)):
            # Prompts are prefilled one after another: the first must still decode when the last one starts.
            tokens = min(per_sequence - context - 8, STEPS + batch * (2 + context // max(1, group.token_budget)))
            prompts = [prompt_of(context, rng) for _ in range(batch)]
            streams = await asyncio.gather(*(stream(session, replica, group.model, p, tokens) for p in prompts))
            begin, end = max(s.token_s[0] for s in streams), min(s.token_s[-1] for s in streams)
            together = [sum(begin < t <= end for t in s.token_s) for s in streams]
            if max(together) < STEPS // 2:
                continue
            held = [
                s.prompt_tokens + sum(t <= begin for t in s.token_s) + n / 2
                for s, n in zip(streams, together, strict=True)
            ]
            samples.append(Sample(batch, sum(held), (end - begin) / max(together)))
            print(
                f"decode {batch} x {sum(held) / batch:.0f} tokens: {1e3 * samples[-1].step_s:.2f} ms",
                file=sys.stderr,
            )
    return samples


def non_negative_fit(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Relative least squares with coefficients ≥ 0: terms that come out negative are dropped, worst first."""
    weighted, kept = terms / values[:, None], list(range(terms.shape[1]))
    while True:
        found = np.linalg.lstsq(weighted[:, kept], np.ones(len(values)), rcond=None)[0]
        if found.min() >= 0:
            result = np.zeros(terms.shape[1])
            result[kept] = found
            return result
        del kept[int(np.argmin(found))]


def fit_prefill(samples: list[tuple[int, float]], budget: int) -> tuple[np.ndarray, float, float]:
    """(a, b, c) of `Σ over iterations a + b·n + c·n·(p + n/2)`, and the mean and worst relative error."""
    n, ttft = np.array(samples, float).T
    terms = np.stack([np.ceil(n / budget), n, n * n / 2], axis=1)
    found = non_negative_fit(terms, ttft)
    error = np.abs(terms @ found / ttft - 1)
    return found, float(error.mean()), float(error.max())


def fit_decode(samples: list[Sample]) -> tuple[np.ndarray, float, float]:
    """(a, b, c) of `a + b·sequences + c·context tokens`, and the mean and worst relative error."""
    decoding, context, step = np.array(samples, float).T
    terms = np.stack([np.ones_like(decoding), decoding, context], axis=1)
    found = non_negative_fit(terms, step)
    error = np.abs(terms @ found / step - 1)
    return found, float(error.mean()), float(error.max())


async def measure(replica: Replica, group: ReplicaGroup) -> dict[str, object]:
    """The measured part of a cost profile."""
    rng = random.Random(0)
    async with running(replica) as session:
        await stream(session, replica, group.model, prompt_of(64, rng), 8)  # warm
        prefill = await measure_prefill(session, replica, group, rng)
        decode = await measure_decode(session, replica, group, rng)
    p, p_mean, p_worst = fit_prefill(prefill, group.token_budget)
    d, d_mean, d_worst = fit_decode(decode)
    floor = 1e-6  # a profile's intercepts are positive
    return {
        "error": f"decode {100 * d_mean:.0f} % mean ({100 * d_worst:.0f} % worst), "
        f"prefill {100 * p_mean:.0f} % mean ({100 * p_worst:.0f} % worst), on the samples of the fit",
        "overhead_s": 0.0,
        "decode_a_s": float(f"{max(floor, d[0]):.4g}"),
        "decode_b_s_per_sequence": float(f"{d[1]:.4g}"),
        "decode_c_s_per_token": float(f"{d[2]:.4g}"),
        "prefill_a_s": float(f"{max(floor, p[0]):.4g}"),
        "prefill_b_s_per_token": float(f"{max(1e-9, p[1]):.4g}"),
        "prefill_c_s_per_token2": float(f"{p[2]:.4g}"),
    }


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("usage: python -m steersman.runtime.replica._measure FLEET REPLICA")
    path, name = find_config("fleets", arguments[0]), arguments[1]
    fleet = load_fleet(path)
    if name not in fleet.names:
        raise UserError(f"{path}: there is no replica {name!r}; known: {', '.join(fleet.names)}")
    group = fleet.groups[fleet.names.index(name)]
    figures = asyncio.run(measure(open_replica(name, group), group))
    profile = {
        "description": f"Replica {name} of {path.name}, measured.",
        "version": 1,
        "model": group.model,
        "hardware": "as measured",
        "precision": "as measured",
        "source": f"measured by a client: python -m steersman.runtime.replica._measure {path.stem} {name}",
        **figures,
    }
    print(yaml.safe_dump(profile, sort_keys=False, width=200, allow_unicode=True), end="")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"steersman: {error}", file=sys.stderr)
        sys.exit(2)

"""The designed load: closed loops of clients at growing concurrency, with prompts and outputs of mixed lengths."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import aiohttp

from steersman.runtime.errors import UserError
from steersman.runtime.fleet import ReplicaGroup
from steersman.runtime.replica import Replica
from steersman.runtime.replica._stream import EventCounter
from steersman.runtime.replica._text import words

PROMPT = (8, 768)  # tokens, log-uniform
OUTPUT = (2, 96)
THINK_S = 0.1  # mean pause of a client between two requests, so that some find the engine idle


class Stream(NamedTuple):
    """What a client saw of one request; times are of `time.perf_counter`."""

    sent_s: float
    token_s: list[float]  # when each token came
    ended_s: float
    prompt_tokens: int
    cached_tokens: int


async def stream(session: aiohttp.ClientSession, replica: Replica, model: str, prompt: str, tokens: int) -> Stream:
    """Generate exactly `tokens` tokens.

    Raises:
        UserError: the server answers otherwise than with a stream that ends with its usage.
    """
    body = {
        "model": replica.served_model or model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    counter, token_s = EventCounter(), []
    url = replica.base_url + "/v1/completions"
    sent = time.perf_counter()
    try:
        async with session.post(url, json=body, headers=dict(replica.headers)) as response:
            if response.status != 200:
                raise UserError(f"{url} gave status {response.status}: {(await response.text())[:200]}")
            async for chunk in response.content.iter_any():
                token_s += [time.perf_counter()] * counter.feed(chunk)
    except (aiohttp.ClientError, OSError) as error:
        raise UserError(f"{url} cannot be measured: {error or type(error).__name__}") from None
    if counter.usage is None or not token_s:
        raise UserError(f"{url} reported no usage; the server must know stream_options.include_usage")
    usage = counter.usage
    return Stream(sent, token_s, time.perf_counter(), usage.prompt_tokens, usage.cached_tokens or 0)


def concurrencies(max_num_seqs: int) -> list[int]:
    """Clients of each phase: 1, 2, 4, … up to the batch limit with three quarters of it, then more, so that some wait.

    Engines with fixed slots are slower at three quarters than when full: the slots in use are not neighbours.
    """
    levels = {max_num_seqs, max(1, max_num_seqs * 3 // 4), max(2, max_num_seqs + max_num_seqs // 2)}
    clients = 1
    while clients < max_num_seqs:
        levels.add(clients)
        clients *= 2
    return sorted(levels)


async def drive(
    session: aiohttp.ClientSession, replica: Replica, group: ReplicaGroup, clients: int, seconds: float, seed: str
) -> list[Stream]:
    """One phase: `clients` in closed loops for `seconds`, then until their last requests end."""
    longest = min(group.max_model_len, group.kv_tokens // group.max_num_seqs)
    streams: list[Stream] = []
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.perf_counter() < until:
            await asyncio.sleep(rng.expovariate(1 / THINK_S))
            output = _log_uniform(rng, OUTPUT, longest // 4)
            prompt = _log_uniform(rng, PROMPT, longest // 2)
            text = words(str(rng.random()), prompt)
            streams.append(await stream(session, replica, group.model, text, output))

    await asyncio.gather(*(client(i) for i in range(clients)))
    return sorted(streams)


def _log_uniform(rng: random.Random, bounds: tuple[int, int], most: int) -> int:
    low, high = bounds
    high = max(low + 1, min(high, most))
    return round(low * (high / low) ** rng.random())


async def drive_all(
    session: aiohttp.ClientSession,
    replicas: list[tuple[Replica, ReplicaGroup]],
    seconds: float,
    seed: str,
    told: Callable[[str], None],
) -> list[list[list[Stream]]]:
    """Every phase on every replica at once; returns the streams by replica and phase.

    Replicas of one machine slow each other down; driven together, they are measured as they will be used.
    """
    levels = [concurrencies(group.max_num_seqs) for _, group in replicas]
    phases = max(map(len, levels))
    seen: list[list[list[Stream]]] = [[] for _ in replicas]
    for phase in range(phases):
        now = [level[min(phase, len(level) - 1)] for level in levels]
        told(f"{seed}: {' and '.join(map(str, sorted(set(now))))} clients, {seconds:.0f} s")
        jobs = (
            drive(session, replica, group, clients, seconds, f"{seed} {r} {phase}")
            for r, ((replica, group), clients) in enumerate(zip(replicas, now, strict=True))
        )
        for r, streams in enumerate(await asyncio.gather(*jobs)):
            seen[r].append(streams)
    return seen

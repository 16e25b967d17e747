"""Reading an engine's own metrics: Prometheus text of vLLM, SGLang and llama.cpp, and llama.cpp's slots."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import aiohttp

from steersman.runtime.replica import Scraped

# running, waiting, KV use; summed over label sets (one engine may report several data-parallel ranks)
_NAMES = (
    ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
    ("llamacpp:requests_processing", "llamacpp:requests_deferred", "llamacpp:kv_cache_usage_ratio"),
)
# Hits and queries in tokens, or the ratio of them.
_HITS, _QUERIES, _HIT_RATE = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "sglang:cache_hit_rate"
TIMEOUT = aiohttp.ClientTimeout(total=1.0)  # later figures are no use; whether it lives at all is asked for then
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


def parse(text: str) -> Scraped | None:
    """The figures in a Prometheus text, or None if it is of no known engine."""
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    wanted = {name for names in _NAMES for name in names} | {_HITS, _QUERIES, _HIT_RATE}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in wanted:
            try:
                value = float(line.rpartition("}")[2].split()[0 if "}" in line else 1])
            except (ValueError, IndexError):
                continue
            if 0.0 <= value < math.inf:
                sums[name] += value
                counts[name] += 1
    for running, waiting, use in _NAMES:
        if running in sums:
            return Scraped(sums[running], sums[waiting], sums[use] / max(1, counts[use]), _hit_rate(sums, counts))
    return None


def _hit_rate(sums: dict[str, float], counts: dict[str, int]) -> float:
    if counts[_HIT_RATE]:
        return sums[_HIT_RATE] / counts[_HIT_RATE]
    return sums[_HITS] / sums[_QUERIES] if sums[_QUERIES] else math.nan


def slots_use(text: str) -> float:
    """The share of KV memory that llama.cpp's slots hold for running requests, from its `/slots`.

    Raises:
        ValueError: it is not that.
    """
    slots = json.loads(text)
    try:
        used = sum(
            slot["n_prompt_tokens"] + sum(token["n_decoded"] for token in slot.get("next_token") or [])
            for slot in slots
            if slot["is_processing"]
        )
        return used / max(1, sum(slot["n_ctx"] for slot in slots))
    except (KeyError, TypeError) as error:
        raise ValueError(f"unknown slots: {error}") from None


async def get(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> str | None:
    """The text at `url`, or None without a good answer."""
    try:
        async with session.get(url, headers=headers, timeout=TIMEOUT) as response:
            return await response.text() if response.status == 200 else None
    except _FAILURES:
        return None


async def scrape(
    session: aiohttp.ClientSession, metrics_url: str, slots_url: str | None, headers: dict[str, str]
) -> Scraped | None:
    """An engine's figures now, or None."""
    text = await get(session, metrics_url, headers)
    figures = parse(text) if text else None
    if figures is None or slots_url is None:
        return figures
    slots = await get(session, slots_url, headers)
    try:
        return figures._replace(kv_use=slots_use(slots)) if slots else figures
    except ValueError:
        return figures

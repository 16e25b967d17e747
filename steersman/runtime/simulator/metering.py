"""What is counted of an engine while it runs: tokens for the gateways, metrics that they scrape, usage."""

from __future__ import annotations

from steersman.runtime import bookkeeping
from steersman.runtime.compiled import inner
from steersman.runtime.simulator import queue
from steersman.runtime.simulator.jump import steps_within
from steersman.runtime.simulator.memory import kv_blocks
from steersman.runtime.simulator.state import open_book


@inner(inline=True)
def running(e):
    """Sequences in the batch."""
    return e.n_decode + e.n_finishing + (e.partial >= 0)


@inner(inline=True)
def stream_to(s, a, r, now):
    """Let the gateways count the tokens that have come out of the running jump by `now`."""
    e = s.engines[r]
    if e.mixed == 0 and e.n_decode > 0 and e.steps > 0:
        n = steps_within(e, now - e.start)
        if n > e.streamed:
            stream(s, a, r, n - e.streamed)
            e.streamed = n


@inner(inline=True)
def stream(s, a, r, steps):
    """Let the gateways count the tokens of `steps` iterations."""
    for g in range(s.streams.shape[1]):
        if s.streams[r, g] > 0:
            bookkeeping.stream(open_book(a, g), r, steps * s.streams[r, g])


@inner(inline=True)
def count_served(s, r, steps):
    """Let the virtual token counters count the first `steps` iterations of the running jump."""
    e = s.engines[r]
    for k in range(e.n_decode):
        queue.serve(s, r, s.decoding[r, k], queue.OUTPUT_TOKEN * (steps - e.served))
    e.served = steps


@inner(inline=True)
def scrape(s, a, g, r, now):
    """Gateway `g` reads the metrics of replica `r`."""
    e, v = s.engines[r], open_book(a, g).views[r]
    v.running = running(e)
    v.waiting = e.n_waiting
    grown = e.streamed * e.n_decode / s.cluster[0].block_tokens
    v.kv_use = min(1.0, (kv_blocks(s, a, r) + grown) / e.total_blocks)
    v.scraped_at_s = now


@inner(inline=True)
def use(s, a, r, now, need):
    """Count the time from the start of the running iteration or jump, which takes `need` KV blocks, to `now`."""
    c, e, u = s.cluster[0], s.engines[r], s.usage[r]
    if e.start < c.horizon:
        seconds = min(now, c.horizon) - e.start
        u.busy_s += seconds
        u.sequence_s += seconds * running(e)
        u.kv_s += seconds * (kv_blocks(s, a, r) + 0.5 * need) / e.total_blocks

"""The live runtime: plays episodes of requests in real time on real replicas, decision by decision.

It has the face of `SimulatedRuntime`, so that the same environment runs on either. Requests become streams of
`/v1/completions` with synthetic prompts of about the right length, in which equal prefix blocks are equal
text, and exactly as many output tokens as the episode says (`ignore_eos`, which vLLM, SGLang and llama.cpp
know).
"""

from __future__ import annotations

import asyncio
import heapq
import math
import secrets
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp
import numpy as np

from steersman.runtime.fleet import Fleet
from steersman.runtime.observation import WIDTH, candidates_for
from steersman.runtime.outcomes import USAGE, Episode, Outcomes, State
from steersman.runtime.replica._pool import Pool
from steersman.runtime.replica._stream import EventCounter
from steersman.runtime.replica._text import prompt_text
from steersman.runtime.requests import Requests
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import LiveRequest, Ticket

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=3.0, sock_read=120.0)
T = TypeVar("T")


class LiveRuntime:
    """The live replicas of a fleet, as a runtime for episodes.

    `reset` starts the replicas if they do not run yet; `advance()` waits until the first request arrives and
    fills `rows` (C, WIDTH), `mask` (C,) and `reasons` (C,); `step(action)` sends it and waits for the next one.
    `close()` stops the replicas. The HTTP side runs in a thread of its own; calls come from one other thread.

    candidates: C, at least replicas + 2 (the default); more leaves room for padding.

    Raises:
        UserError: a replica has no backend, or its options are wrong.
    """

    def __init__(self, fleet: Fleet, candidates: int | None = None) -> None:
        self.fleet = fleet
        self.replicas = fleet.table()
        self.candidates = candidates_for(len(self.replicas), candidates)
        self.rows = np.zeros((self.candidates, WIDTH), np.float32)
        self.mask = np.zeros(self.candidates, np.bool_)
        self.reasons = np.zeros(self.candidates, np.int8)
        self._pool = Pool(fleet)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._episode: _Episode | None = None

    @property
    def hold(self) -> int:
        """The action that holds."""
        return self.candidates - 2

    @property
    def shed(self) -> int:
        """The action that sheds."""
        return self.candidates - 1

    def reset(self, requests: Requests) -> None:
        """Start an episode; what is left of the last one is cancelled. Its prompts are new to the caches.

        Raises:
            UserError: a replica cannot be started or reached.
        """
        if self._loop is None:
            self._start()
        self._run(self._reset(requests))

    async def _reset(self, requests: Requests) -> None:
        if self._episode is not None:
            await self._episode.cancel()
        self._episode = _Episode(self.fleet, self._pool, requests, self.candidates)

    def advance(self) -> bool:
        """Wait for the next decision. Returns whether there is one; False: every request has ended."""
        episode = self._current
        due = self._run(episode.advance())
        if due:
            self.rows[:], self.mask[:] = episode.scheduler.rows, episode.scheduler.mask
            self.reasons[:] = episode.scheduler.reasons
        return due

    def step(self, action: int) -> bool:
        """Carry out the decision that is due, then `advance`. A masked action sheds."""
        self._run(self._current.apply(action))
        return self.advance()

    @property
    def now(self) -> float:
        """Seconds since the start of the episode."""
        return self._current.scheduler.now

    @property
    def ended(self) -> np.ndarray:
        """Rows of the requests that ended (or were shed) since the decision before this one, int32."""
        return np.array(self._current.reported, np.int32)

    @property
    def episode(self) -> Episode:
        """What happened so far."""
        requests = self._current.requests
        return Episode(requests, self.outcomes(), self.usage(), requests.window_s)

    def outcomes(self) -> Outcomes:
        """What became of every request so far."""
        return self._current.outcomes

    def usage(self) -> np.ndarray:
        """USAGE (R,) over the arrival window so far, by the scheduler's own counts.

        Iterations and preemptions are not seen from outside.
        """
        return self._run(self._current.usage_now())

    def close(self) -> None:
        """Cancel what runs, stop the replicas. Safe more than once."""
        loop, thread, self._loop = self._loop, self._thread, None
        if loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _shut_down(self) -> None:
        if self._episode is not None:
            await self._episode.cancel()
            self._episode = None
        await self._pool.stop()

    def __enter__(self) -> LiveRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _current(self) -> _Episode:
        if self._episode is None:
            raise RuntimeError("call reset() first")
        return self._episode

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="steersman-live", daemon=True)
        self._thread.start()
        try:
            self._run(self._pool.start())
        except BaseException:
            self.close()
            raise

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # an interrupt of the calling thread must not leave the coroutine running
            future.cancel()
            raise


class _Episode:
    """One episode, inside the event loop's thread."""

    def __init__(self, fleet: Fleet, pool: Pool, requests: Requests, candidates: int) -> None:
        self.requests = requests
        self.pool = pool
        n = len(requests)
        self.outcomes = Outcomes(
            state=np.zeros(n, np.int8),
            replica=np.full(n, -1, np.int32),
            ttft_s=np.full(n, np.nan),
            tpot_s=np.full(n, np.nan),
            e2e_s=np.full(n, np.nan),
            attained=np.zeros(n, np.bool_),
            cached_tokens=np.zeros(n, np.int32),
            holds=np.zeros(n, np.int32),
        )
        self.reported: list[int] = []
        self._salt = secrets.token_hex(8)  # caches know nothing of the last episode's prompts
        self._usage = np.zeros(len(pool.replicas), USAGE)
        self._usage_at = 0.0
        self._ended: list[int] = []
        self._next = 0
        self._pending: tuple[int, Ticket] | None = None
        self._held: list[tuple[float, int, Ticket]] = []  # a heap by when each is decided anew
        self._tasks: set[asyncio.Task[None]] = set()
        self.scheduler = Scheduler(
            fleet, requests.tenants, prefix_block_tokens=requests.block_tokens, candidates=candidates
        )
        pool.watch(self.scheduler)

    async def advance(self) -> bool:
        while (due := await self._next_due()) is not None:
            index, ticket = due
            leaves_s = float(self.requests.table["cancel_s"][index])
            if ticket.holds and leaves_s and self.scheduler.now >= ticket.arrived_s + leaves_s:
                self.outcomes.state[index] = State.CANCELLED
                self.outcomes.attained[index] = self.scheduler.given_up(ticket, leaves_s)
                self._ended.append(index)
                continue
            self.scheduler.resumed(ticket)
            self.scheduler.observe(ticket)
            self._pending = due
            break
        else:
            if self._tasks:
                await asyncio.wait(self._tasks)
        self.reported, self._ended = self._ended, []
        return due is not None

    async def _next_due(self) -> tuple[int, Ticket] | None:
        """Wait until a request arrives, or a held one is due."""
        more = self._next < len(self.requests)
        arrival_s = float(self.requests.table["arrival_s"][self._next]) if more else math.inf
        if self._held and self._held[0][0] < arrival_s:
            await asyncio.sleep(max(0.0, self._held[0][0] - self.scheduler.now))
            self._count_usage()
            _, index, ticket = heapq.heappop(self._held)
            return index, ticket
        if not more:
            return None
        await asyncio.sleep(max(0.0, arrival_s - self.scheduler.now))
        index, q = self._next, self.requests.table[self._next]
        self._next += 1
        self._count_usage()
        return index, self.scheduler.arrive(
            LiveRequest(
                tenant=int(q["tenant"]),
                prompt_tokens=int(q["prompt_tokens"]),
                max_tokens=int(q["max_tokens"]),
                keys=self._keys(index),
                block_tokens=self.requests.block_tokens,
                priority=int(q["priority"]),
                model=int(q["model"]),
                regions=int(q["regions"]),
            )
        )

    def _keys(self, index: int) -> np.ndarray:
        q = self.requests.table[index]
        return self.requests.blocks[q["block_start"] : q["block_start"] + q["prompt_blocks"]]

    async def apply(self, action: int) -> None:
        if self._pending is None:
            raise RuntimeError("no decision is due: call advance() first")
        (index, ticket), self._pending = self._pending, None
        self._count_usage()
        if 0 <= action < len(self.pool.replicas) and self.scheduler.mask[action]:
            self.outcomes.replica[index] = action
            self.scheduler.dispatched(ticket, action)
            task = asyncio.create_task(self._play(index, ticket))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif action == len(self.scheduler.mask) - 2 and self.scheduler.mask[action]:
            pause_s = self.scheduler.held(ticket)
            self.outcomes.holds[index] = ticket.holds
            heapq.heappush(self._held, (self.scheduler.now + pause_s, index, ticket))
        else:
            self.scheduler.shed(ticket)
            self.outcomes.state[index] = State.SHED
            self._ended.append(index)

    async def _play(self, index: int, ticket: Ticket) -> None:
        """Send one request and follow its stream to the end."""
        replica, sent_s = ticket.replica, self.scheduler.now
        counter, ok = EventCounter(), False
        leaves_s = float(self.requests.table["cancel_s"][index])
        patience = asyncio.timeout(ticket.arrived_s + leaves_s - self.scheduler.now if leaves_s else None)
        try:
            async with patience:
                ok = await self._stream(index, ticket, counter)
            if ok:
                self.pool.answered(replica, sent_s)
        except (aiohttp.ClientError, OSError, TimeoutError):
            if not patience.expired():
                self.pool.failed(replica, sent_s)
        finally:
            self._count_usage()
            tokens, left = counter.usage.completion_tokens if counter.usage else None, patience.expired()
            served = self.scheduler.ended(ticket, ok, tokens, left)
            o = self.outcomes
            o.state[index] = State.DONE if ok else State.CANCELLED if left else State.FAILED
            if served is not None and (ok or left):
                o.ttft_s[index], o.tpot_s[index] = served.ttft_s, served.tpot_s
                o.e2e_s[index] = served.e2e_s if ok else np.nan
                o.attained[index] = served.attained
                self._usage[replica]["output_tokens"] += served.tokens
            if counter.usage is not None and counter.usage.cached_tokens is not None:
                o.cached_tokens[index] = counter.usage.cached_tokens
            self._ended.append(index)

    async def _stream(self, index: int, ticket: Ticket, counter: EventCounter) -> bool:
        q, upstream = self.requests.table[index], self.pool.replicas[ticket.replica]
        group = self.scheduler.fleet.groups[ticket.replica]
        body = {
            "model": upstream.served_model or group.model,
            "prompt": prompt_text(
                self._keys(index), self.requests.block_tokens, int(q["prompt_tokens"]), index, self._salt
            ),
            "max_tokens": int(q["output_tokens"]),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self.pool.session.post(
            upstream.base_url + "/v1/completions", json=body, headers=dict(upstream.headers), timeout=TIMEOUT
        ) as answer:
            if answer.status != 200:
                return False
            async for chunk in answer.content.iter_any():
                tokens = counter.feed(chunk)
                if tokens:
                    self._count_usage()
                if tokens and not ticket.streamed:
                    self.scheduler.first_token(ticket)
                    tokens -= 1
                self.scheduler.streamed(ticket, tokens)
        return counter.done and counter.tokens > 0

    def _count_usage(self) -> None:
        """Integrate up to now, at most to the end of the arrival window."""
        now = min(self.scheduler.now, self.requests.window_s)
        seconds, self._usage_at = now - self._usage_at, now
        if seconds <= 0:
            return
        views, replicas = self.scheduler.book.views, self.scheduler.replicas
        self._usage["busy_s"] += seconds * (views["inflight"] > 0)
        self._usage["sequence_s"] += seconds * np.minimum(views["inflight"], replicas["max_num_seqs"])
        held = (views["context_tokens"] + views["prompt_tokens"]) / replicas["kv_tokens"]
        self._usage["kv_s"] += seconds * np.clip(held, 0.0, 1.0)

    async def usage_now(self) -> np.ndarray:
        self._count_usage()
        return self._usage.copy()

    async def cancel(self) -> None:
        """Give up what is in flight, and wait until it is."""
        await self.pool.unwatch()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

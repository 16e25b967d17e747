"""The test that a policy passes before it may take a request: it scores situations of this very fleet."""

from __future__ import annotations

import time

import numpy as np

from steersman.runtime.deployment.deployment import LIMIT_S
from steersman.runtime.deployment.judge import choose
from steersman.runtime.deployment.release import told_by
from steersman.runtime.errors import UserError
from steersman.runtime.policy import Policy
from steersman.runtime.scheduler import Scheduler
from steersman.runtime.ticket import LiveRequest, Ticket

SITUATIONS = 48
BLOCKS = 16  # of a prompt that has any


class SelfTest:
    """Situations of a scheduler's fleet and tenants, from idle to overloaded: pairs of rows (C, WIDTH) and mask (C,).

    They are made by a second scheduler that plays random requests, so that they are what the gateway would encode.
    """

    def __init__(self, scheduler: Scheduler, seed: int = 0) -> None:
        self.limit_s = LIMIT_S if scheduler.deployment is None else scheduler.deployment.limit_s
        self.situations = list(_play(scheduler, np.random.default_rng(seed)))

    def check(self, policy: Policy, where: str) -> None:
        """Let `policy` score every situation; `where` names it.

        Raises:
            UserError: it fails, gives no finite score for each allowed candidate, or takes longer than the limit.
        """
        times = []
        for rows, mask in self.situations:
            started = time.perf_counter()
            try:
                scores = np.ascontiguousarray(policy.score(rows.copy(), mask.copy()), np.float64)
            except Exception as error:  # whatever it throws
                raise UserError(
                    f"{where}: fails its self-test on this fleet ({told_by(error)}); not deployed"
                ) from None
            times.append(time.perf_counter() - started)
            if scores.shape != mask.shape:
                raise UserError(
                    f"{where}: fails its self-test on this fleet: scores of shape {scores.shape} for "
                    f"{len(mask)} candidates; not deployed"
                )
            if choose(scores, mask) < 0:
                raise UserError(
                    f"{where}: fails its self-test on this fleet: a score of {len(mask)} candidates is not "
                    "finite; not deployed"
                )
        # A fast one, not the median: in a busy gateway most of them wait for other threads.
        usual_s = sorted(times)[len(times) // 10]
        if usual_s > self.limit_s:
            raise UserError(
                f"{where}: takes {1e3 * usual_s:.2g} ms for a decision of {len(self.situations[0][1])} candidates, "
                f"but the limit is {1e3 * self.limit_s:g} ms; not deployed"
            )


class _Clock:
    """Time by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _play(scheduler: Scheduler, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    clock, made = _Clock(), []
    scratch = Scheduler(
        scheduler.fleet,
        scheduler.tenants,
        prefix_block_tokens=scheduler.prefix_block_tokens,
        candidates=scheduler.candidates,
        clock=clock,
    )
    table, tenants = scratch.replicas, len(scratch.tenants)
    context = int(np.minimum(table["max_model_len"], table["kv_tokens"]).max())
    inflight: list[Ticket] = []
    for number in range(SITUATIONS):
        came = int(rng.integers(0, 3 * len(table) + 1)) if number else 0
        for _ in range(came):
            clock.now += float(rng.exponential(0.05))
            ticket = scratch.arrive(_request(rng, scratch, tenants, context))
            if scratch.observe(ticket):
                scratch.dispatched(ticket, int(rng.choice(np.flatnonzero(scratch.mask[: len(table)]))))
                inflight.append(ticket)
            else:
                scratch.shed(ticket)
        for ticket in inflight:
            if rng.random() < 0.5:
                scratch.first_token(ticket)
                scratch.streamed(ticket, int(rng.integers(1, 100)))
        while len(inflight) > 64 * len(table) or (inflight and rng.random() < 0.5):
            scratch.ended(inflight.pop(int(rng.integers(len(inflight)))), ok=True)
        if number % 4 == 3 and len(table) > 1:  # one is down until the next round
            scratch.set_up(int(rng.integers(len(table))), False)
        for r in range(len(table)):
            scratch.scraped(r, scratch.inflight(r), float(rng.integers(0, 9)), float(rng.random()))
        scratch.observe(scratch.arrive(_request(rng, scratch, tenants, context)))
        made.append((scratch.rows.copy(), scratch.mask.copy()))
        for r in range(len(table)):
            scratch.set_up(r, True)
    return made


def _request(rng: np.random.Generator, scratch: Scheduler, tenants: int, context: int) -> LiveRequest:
    keys = 1000 * rng.integers(0, 8) + np.arange(BLOCKS) if rng.random() < 0.5 else np.zeros(0)
    least = len(keys) * scratch.prefix_block_tokens + 1
    prompt = int(np.clip(rng.lognormal(6.5, 1.2), 1, max(1, context // 2)))
    return LiveRequest(
        tenant=int(rng.integers(tenants)),
        prompt_tokens=max(prompt, least) if len(keys) else prompt,
        max_tokens=int(rng.integers(1, 500)),
        keys=keys.astype(np.int64),
        block_tokens=scratch.prefix_block_tokens,
    )

"""A trace of any length: requests come in parts, those that have ended leave, and memory holds what is in flight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.outcomes import Outcomes
from steersman.runtime.policy import CompiledPolicy
from steersman.runtime.requests import Requests
from steersman.runtime.simulator.simulator import SimulatedRuntime


class Ended(NamedTuple):
    """Requests that are over, by arrival, and what became of them."""

    table: np.ndarray  # REQUEST (n,)
    outcomes: Outcomes


def play(
    runtime: SimulatedRuntime, policy: CompiledPolicy, parts: Iterable[Requests], seed: int = 0
) -> Iterator[Ended]:
    """Play `parts` as one episode, which equals that of all of them at once.

    The arrivals of a part, seconds from the start of the first, are none earlier than those of the part before; all
    parts have the same tenants and `block_tokens`. Usage is taken up to the end. Yields what has ended while a part
    arrived, and at last the rest.

    Raises:
        UserError: a part does not follow the one before, or the fleet has random faults, or several gateways (which are
            drawn by a request's number in its episode).
    """
    if runtime.fleet.gateways > 1:
        raise UserError(f"a streamed trace is played with one gateway, not {runtime.fleet.gateways}")
    if runtime.fleet.random_faults is not None:
        raise UserError("a streamed trace is played without random faults; list them in the fleet's `faults`")
    memory, last = policy.memory(seed)[None], None
    for part in parts:
        if not len(part):
            continue
        if last is None:
            runtime.reset(part, more=True)
        else:
            _check(last, part)
            yield Ended(*runtime.follow(part))
        runtime.run(policy, memory=memory)
        last = part
    if last is not None:
        runtime.finish()
        runtime.run(policy, memory=memory)
        yield Ended(*runtime.over())


def _check(last: Requests, part: Requests) -> None:
    if part.block_tokens != last.block_tokens or list(part.tenants) != list(last.tenants):
        raise UserError("the parts of a streamed trace must have the same tenants and block_tokens")
    if part.table["arrival_s"][0] < last.table["arrival_s"][-1]:
        raise UserError(
            f"a part of the trace starts at {part.table['arrival_s'][0]} s, before the last arrival of the part "
            f"before, {last.table['arrival_s'][-1]} s"
        )

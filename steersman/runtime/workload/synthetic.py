"""Synthetic requests: arrivals, lengths and shared prefixes from distributions."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from steersman.runtime.workload._arrivals import Arrivals
from steersman.runtime.workload._blocks import chained
from steersman.runtime.workload._lengths import MAX_TOKENS, Lengths
from steersman.runtime.workload._prefix import Documents, NoPrefix, Session, System
from steersman.runtime.workload._source import Files, Source, Split, Stream


class Synthetic(Source):
    """Requests from distributions. Both splits draw from the same ones."""

    rate_rps: float = Field(gt=0, le=1e5, description="mean requests per second; for sessions, turns of all sessions")
    arrivals: Arrivals = Arrivals()
    prompt_tokens: Lengths = Field(description="the new text of a request, after its shared prefix or history")
    output_tokens: Lengths
    max_tokens: int = Field(default=2048, ge=1, le=MAX_TOKENS, description="the client's limit, which cuts outputs off")
    prefix: Annotated[NoPrefix | System | Documents | Session, Field(discriminator="kind")] = NoPrefix()

    @model_validator(mode="after")
    def _session_turns(self) -> Synthetic:
        if isinstance(self.prefix, Session):
            low, high = self.prefix.turns
            if not 1 <= low <= high <= 1000:
                raise ValueError(f"prefix.turns [{low}, {high}] must be [low, high] with 1 <= low <= high <= 1000")
        return self

    def offered_rps(self, files: Files) -> float:
        return self.rate_rps

    def stream(
        self,
        rng: np.random.Generator,
        *,
        duration_s: float,
        load: float,
        split: Split,
        block_tokens: int,
        files: Files,
    ) -> Stream:
        if isinstance(self.prefix, Session):
            return self._sessions(self.prefix, rng, duration_s, load, block_tokens)
        arrival_s = self.arrivals.sample(rng, self.rate_rps * load, 0.0, duration_s)
        n = len(arrival_s)
        prefixes = self.prefix.sample(rng, n)
        prompt = prefixes.tokens + self.prompt_tokens.sample(rng, n)
        output = np.minimum(self.output_tokens.sample(rng, n), self.max_tokens)
        count = prompt // block_tokens
        blocks = chained(count, prefixes.tokens // block_tokens, prefixes.chain, prefixes.chains + np.arange(n))
        return Stream(arrival_s, prompt, output, np.full(n, self.max_tokens), count, count, blocks)

    def _sessions(
        self, session: Session, rng: np.random.Generator, duration_s: float, load: float, block_tokens: int
    ) -> Stream:
        low, high = session.turns
        # Sessions start early enough that those which would still run at time 0 are there: the stream starts
        # in its steady state, and what is before 0 is cut off.
        turn_s = session.assumed_ttft_s + session.assumed_tpot_s * self.output_tokens.mean + session.think_s
        rate = self.rate_rps * load / ((low + high) / 2)
        start_s = self.arrivals.sample(rng, rate, -2 * high * turn_s, duration_s)
        turns = rng.integers(low, high + 1, len(start_s))
        first = np.repeat(np.cumsum(turns) - turns, turns)  # each turn's index of its session's first turn
        n = len(first)
        new = self.prompt_tokens.sample(rng, n)
        output = np.minimum(self.output_tokens.sample(rng, n), self.max_tokens)
        pause_s = session.assumed_ttft_s + session.assumed_tpot_s * output + rng.exponential(session.think_s, n)
        arrival_s = np.repeat(start_s, turns) + _before(pause_s, first)
        prompt = session.system_tokens + _before(new, first) + new + _before(output, first)
        kept = np.flatnonzero((arrival_s >= 0) & (arrival_s < duration_s))
        kept = kept[np.argsort(arrival_s[kept], kind="stable")]
        prompt, output = prompt[kept], output[kept]
        # The next turn's prompt continues with this turn's output, so the blocks of both are known.
        count = (prompt + output) // block_tokens
        blocks = chained(count, session.system_tokens // block_tokens, 0, 1 + first[kept])
        limit = np.full(len(kept), self.max_tokens)
        return Stream(arrival_s[kept], prompt, output, limit, prompt // block_tokens, count, blocks)


def _before(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """For each turn, the sum of `values` over the earlier turns of its session."""
    total = np.cumsum(values) - values
    return total - total[first]


SOURCE = Synthetic

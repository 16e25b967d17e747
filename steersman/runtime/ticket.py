"""A request on its way through the live scheduler: what is known of it, what was decided, how it fared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from steersman.runtime.guard import Reason

if TYPE_CHECKING:
    from steersman.runtime.deployment.arm import Arm

NO_KEYS = np.zeros(0, np.int64)
NO_REASONS: Mapping[Reason, int] = MappingProxyType({})


class Fallback(StrEnum):
    """Why the fallback heuristic decided in place of the policy."""

    ERROR = "error"  # the policy raised
    SHAPE = "shape"  # it gave something else than one score a candidate
    NOT_FINITE = "not-finite"  # NaN or infinite for an allowed candidate
    SLOW = "slow"  # it took longer than its limit
    RANGE = "out-of-range"  # a feature is NaN or outside the range that the schema declares
    SCHEMA = "schema"  # the policy was trained on an observation that this version does not know


class Kind(StrEnum):
    """What was decided."""

    DISPATCH = "dispatch"
    HOLD = "hold"
    SHED = "shed"
    REFUSED = "refused"  # the guard allows no replica


# Without the class before them: looking a member up in it is not free, and a request is asked for it often.
DISPATCH, HOLD, SHED, REFUSED = Kind


class LiveRequest(NamedTuple):
    """What a scheduler may know of a request when it arrives."""

    tenant: int  # index into the tenants
    prompt_tokens: int  # exact or estimated
    max_tokens: int = 0  # the client's limit on the output; 0: none stated
    keys: np.ndarray = NO_KEYS  # int64: identities of its full prefix blocks
    block_tokens: int = 64  # tokens that one key stands for
    priority: int = 0
    model: int = -1  # index into the fleet's models; −1: any
    regions: int = 0  # bit mask over the fleet's zones; 0: any


class Decision(NamedTuple):
    """What to do with a request."""

    kind: Kind
    replica: int  # −1 unless dispatched
    policy: str  # the one that decided
    decision_s: float
    fallback: Fallback | None = None
    reasons: Mapping[Reason, int] = NO_REASONS  # if refused: why, with counts
    retry_after_s: float = 1.0  # until the best replica may meet the tenant's TTFT again
    scores: np.ndarray | None = None  # float64 (C,) of the one that decided, to read before the next decision
    version: str = ""  # of the one that decided
    arm: str = ""  # whose request it is: "current" or "canary", also where the fallback decided; "" if refused


class Served(NamedTuple):
    """How a request fared. TTFT and TPOT are NaN where they do not show (not streamed, no first token)."""

    ttft_s: float
    tpot_s: float
    e2e_s: float
    tokens: int
    attained: bool


class Stage(StrEnum):
    """Where a request is."""

    WAITING = "waiting"
    HELD = "held"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    OVER = "over"


WAITING, HELD, PREFILLING, DECODING, OVER = Stage  # as those of Kind


class Ticket:
    """One request on its way. Its numbers are those that were added to the counts, so that none drifts."""

    __slots__ = (
        "arm",
        "arrived_s",
        "attempts",
        "first_token_s",
        "holds",
        "last_token_s",
        "late",
        "matched_tokens",
        "outcome",
        "predicted_ttft_s",
        "replica",
        "request",
        "reserved",
        "seen",
        "served",
        "stage",
        "streamed",
        "uncached_tokens",
        "used",
    )

    def __init__(self, request: LiveRequest, arrived_s: float) -> None:
        self.request = request
        self.arrived_s = arrived_s
        self.stage: Stage = WAITING
        self.arm: Arm | None = None  # the deployed policy that it is decided by, once it was decided
        self.holds = 0  # how often it was held
        self.attempts = 0  # replicas that it was sent to
        self.replica = -1
        self.matched_tokens = 0
        self.uncached_tokens = 0
        self.predicted_ttft_s = 0.0
        self.streamed = 0
        self.seen = False  # its first token was observed, not assumed
        self.reserved = 0  # tokens that count against its tenant's limits until it is over
        self.used: int | None = None  # tokens that its answer told of
        self.late = False  # its deadline came before its answer
        self.outcome = ""  # once it is over: what became of it, and how it fared on its replica
        self.served: Served | None = None
        self.first_token_s = math.nan
        self.last_token_s = math.nan

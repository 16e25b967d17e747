"""What a client is answered whose request is not served."""

from __future__ import annotations

from steersman.runtime.gateway.attempt import AttemptFailed
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.retry_after import retry_after
from steersman.runtime.guard import Reason
from steersman.runtime.ticket import Decision, Kind, LiveRequest

_WHY = {
    Reason.DOWN: "down",
    Reason.MODEL: "serving another model",
    Reason.REGION: "where its data may not go",
    Reason.CONTEXT: "too small for the prompt and max_tokens",
    Reason.RAMP: "starting slowly",
    Reason.BACKUP: "a backup",
}


def turned_away(decision: Decision, live: LiveRequest, tenant: str) -> ApiError:
    """It is shed, or no replica may take it."""
    if decision.kind is Kind.SHED:
        return ApiError(
            503,
            f"the fleet cannot keep its promise to tenant {tenant!r} now; try again",
            code="shed",
            headers=retry_after(decision.retry_after_s),
        )
    if set(decision.reasons) <= {Reason.CONTEXT, Reason.MODEL} and Reason.CONTEXT in decision.reasons:
        return ApiError(
            400,
            f"about {live.prompt_tokens} prompt tokens and {live.max_tokens} for the answer exceed "
            "the context of every replica; shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param="messages",
        )
    why = ", ".join(f"{count} {_WHY[reason]}" for reason, count in decision.reasons.items())
    return ApiError(503, f"no replica may take this request: {why}", code="no_replica", headers={"Retry-After": "5"})


def all_failed(failure: AttemptFailed) -> ApiError:
    """No replica is left to try; `failure` is the last one's."""
    if failure.busy_s is not None:
        return ApiError(
            429, f"every replica tried is busy, at last {failure}", code="busy", headers=retry_after(failure.busy_s)
        )
    return ApiError(502, f"every replica tried failed, at last {failure}", code="replica_failed")


def too_late(deadline_s: float | None) -> ApiError:
    """The deadline has come before the answer."""
    return ApiError(504, f"no answer began within {deadline_s:g} s, the request's deadline", code="deadline_exceeded")


def not_allowed(path: bytes, methods: str) -> ApiError:
    """A path takes other methods, those of a header Allow."""
    takes = methods.partition(",")[0]
    return ApiError(405, f"{path.decode()} takes {takes}", code="method_not_allowed", headers={"Allow": methods})

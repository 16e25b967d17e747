"""Hard rules. They mask candidates with a reason, and no policy can override them."""

from __future__ import annotations

from enum import IntEnum

from steersman.runtime.compiled import njit
from steersman.runtime.holding import may_hold


class Reason(IntEnum):
    """Why a candidate is masked."""

    ALLOWED = 0
    PADDING = 1
    DOWN = 2  # not healthy, or draining
    MODEL = 3  # serves another model
    REGION = 4  # the request's data may not go there
    CONTEXT = 5  # prompt and max_tokens exceed its context or its whole KV cache
    WAITED = 6  # hold: it has waited as long as its promise allows, or no replica may have it
    RAMP = 7  # it starts slowly after it was away, and has as many as it may have now
    BACKUP = 8  # a backup, and a replica that it stands in for may take the request


_ALLOWED, _PADDING, _DOWN, _MODEL, _REGION, _CONTEXT, _WAITED, _RAMP, _BACKUP = (int(reason) for reason in Reason)


@njit(forceinline=True)
def guard(replicas, prompt_tokens, max_tokens, model, regions, ttft_slo_s, waited_s, mask, reasons):
    """Fill `mask` (C,) bool and `reasons` (C,) int8 for one request over REPLICA (R,). Shed is always allowed.

    Returns how many replicas are allowed.
    """
    allowed, tier = 0, 100
    hold, last = len(mask) - 2, len(mask) - 1
    for c in range(hold):
        reason = _ALLOWED
        if c >= len(replicas):
            reason = _PADDING
        else:
            rep = replicas[c]
            if rep.up != 1:
                reason = _DOWN if rep.up == 0 else _RAMP
            elif model >= 0 and rep.model != model:
                reason = _MODEL
            elif regions != 0 and (regions >> rep.zone) & 1 == 0:
                reason = _REGION
            elif prompt_tokens + max_tokens > min(rep.max_model_len, rep.kv_tokens):
                reason = _CONTEXT
            if reason == _ALLOWED:
                tier = min(tier, rep.tier)
        mask[c] = reason == _ALLOWED
        reasons[c] = reason
        allowed += reason == _ALLOWED
    for c in range(len(replicas)):
        if mask[c] and replicas[c].tier > tier:
            mask[c], reasons[c] = False, _BACKUP
            allowed -= 1
    mask[hold] = allowed > 0 and may_hold(ttft_slo_s, waited_s)
    reasons[hold] = _ALLOWED if mask[hold] else _WAITED
    mask[last] = True
    reasons[last] = _ALLOWED
    return allowed

"""What a tenant may take: requests and tokens a minute, requests at once, and a fair share when all slots are taken."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from steersman.runtime.config import Model


class Limits(Model):
    """Bounds of one tenant; none by default."""

    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(
        default=None, gt=0, description="prompt and max_tokens at first, what was really used at the end"
    )
    concurrent: int | None = Field(default=None, ge=1, description="requests in flight or held")


class FairShares(Model):
    """When the fleet is full, nobody may have more than a share of it."""

    full_at: float = Field(default=1.0, gt=0, description="requests in flight over the fleet's max_num_seqs")


class OverLimit(Exception):
    """A tenant is over one of its limits: which one, and the seconds after which to try again."""

    def __init__(self, limit: str, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.message = message
        self.retry_after_s = retry_after_s


class Bucket:
    """A token bucket that holds a minute's worth: bursts of up to a minute pass, the mean does not exceed the rate.

    It may go below zero, when more was used than had been reserved; that is then paid back first.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._at = per_minute, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; 0: now. More than a minute's worth counts as that."""
        if now > self._at:  # a clock that jumps back gives nothing
            self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60.0)
        self._at = now
        short = min(amount, self.per_minute) - self._level
        return 0.0 if short <= 1e-9 else short * 60.0 / self.per_minute

    def take(self, amount: float) -> None:
        self._level -= amount


class Limiter:
    """Counts what tenants take. `names` and `weights` are the tenants', in one order; numbers are their places."""

    def __init__(
        self,
        names: list[str],
        weights: list[float],
        limits: Mapping[str, Limits],
        fair: FairShares | None = None,
        now: float = 0.0,
    ) -> None:
        self._names, self._weights, self._fair = names, weights, fair
        self._limits = [limits.get(name, Limits()) for name in names]
        self._requests = [Bucket(k.requests_per_minute, now) if k.requests_per_minute else None for k in self._limits]
        self._tokens = [Bucket(k.tokens_per_minute, now) if k.tokens_per_minute else None for k in self._limits]
        self.open = [0] * len(names)  # requests that were admitted and are not over
        self.total = 0

    def admit(self, tenant: int, tokens: float, slots: float, now: float) -> None:
        """Count a request of `tenant` that may take `tokens`, on a fleet with `slots`; `ended` is its counterpart.

        Raises:
            OverLimit: it may not come in now; nothing was counted.
        """
        limits, name = self._limits[tenant], self._names[tenant]
        if limits.concurrent is not None and self.open[tenant] >= limits.concurrent:
            raise OverLimit("concurrent", f"tenant {name!r} has {limits.concurrent} requests open, its limit", 1.0)
        # A fleet of which nothing is up is not full: that is said by who looks for a replica.
        if self._fair is not None and slots and self.total >= self._fair.full_at * slots:
            share = self._share(tenant) * slots * self._fair.full_at
            if self.open[tenant] >= max(1.0, share):
                raise OverLimit(
                    "share", f"the fleet is full, and tenant {name!r} has its share of it, {share:.0f} requests", 1.0
                )
        requests, budget = self._requests[tenant], self._tokens[tenant]
        if requests is not None and (wait := requests.wait_s(1.0, now)):
            message = f"tenant {name!r} is over its {requests.per_minute:g} requests per minute"
            raise OverLimit("requests", message, wait)
        if budget is not None:
            if wait := budget.wait_s(tokens, now):
                message = f"tenant {name!r} is over its {budget.per_minute:g} tokens per minute"
                raise OverLimit("tokens", message, wait)
            budget.take(tokens)
        if requests is not None:
            requests.take(1.0)
        self.open[tenant] += 1
        self.total += 1

    def ended(self, tenant: int, reserved: float, used: float | None) -> None:
        """A request is over. `used` tokens count in place of those reserved; None: it is not known, they stay."""
        self.open[tenant] -= 1
        self.total -= 1
        budget = self._tokens[tenant]
        if budget is not None and used is not None:
            budget.take(used - reserved)

    def _share(self, tenant: int) -> float:
        """By weight, among those that have requests open, and itself."""
        others = sum(w for i, w in enumerate(self._weights) if self.open[i] and i != tenant)
        return self._weights[tenant] / (others + self._weights[tenant])

"""Who asks, and what it may: from headers to a tenant, its promise and priority, and where its data may go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import Field

from steersman.runtime.fleet import Fleet
from steersman.runtime.gateway.errors import ApiError
from steersman.runtime.gateway.keys import Keys
from steersman.runtime.gateway.limits import Limits
from steersman.runtime.plugins import nearest
from steersman.runtime.tenant import Slo, Tenant

_HEADERS = (
    b"authorization",
    b"x-steersman-tenant",
    b"x-steersman-slo",
    b"x-steersman-priority",
    b"x-steersman-deadline-ms",
    b"x-steersman-regions",
    b"x-steersman-data-class",
)
_REMEMBERED = 4096  # callers, so that one who comes again costs one look
_REMEMBERED_BYTES = 1024  # of a caller's headers; who sends more is read anew each time


class GatewayTenant(Tenant):
    """A tenant of the gateway."""

    limits: Limits = Limits()
    priority: int = Field(default=0, description="where a request states none")
    regions: list[str] = Field(default=[], description="that may hold its data; default: any")
    data_class: str | None = Field(default=None, description="of its data: only replicas that list it may see them")
    slos: dict[str, Slo] = Field(default={}, description="further promises, by the name that a request may give")


class Caller(NamedTuple):
    """What the headers of a request say."""

    row: int  # of the scheduler's tenants: a tenant, or one of its further promises
    tenant: int  # of `Access.names`
    priority: int
    regions: int  # bit mask over the fleet's zones; 0: any
    deadline_s: float | None  # by which the answer must have begun
    data_class: str | None


class Access:
    """Tenants and their promises as the scheduler's rows, and the headers that choose among them."""

    def __init__(self, fleet: Fleet, tenants: Mapping[str, GatewayTenant], keys: Keys | None = None) -> None:
        self.tenants = dict(tenants)
        self.names = list(tenants)
        self.keys = keys
        self._fleet = fleet
        self.rows: dict[str, Tenant] = {}
        for name, tenant in tenants.items():
            self.rows[name] = tenant
            for slo_name, slo in tenant.slos.items():
                self.rows[f"{name}/{slo_name}"] = tenant.model_copy(update={"slo": slo})
        self._places = {name: i for i, name in enumerate(self.rows)}
        self._known: dict[tuple[bytes | None, ...], Caller] = {}
        self._known_by = None if keys is None else keys.table
        for tenant in tenants.values():  # what is wrong in the file is said at the start
            fleet.zone_mask(tenant.regions, tenant.data_class)

    def refresh(self) -> str | None:
        """Read changed keys; fit for another thread. Returns what is wrong with them."""
        if self.keys is None:
            return None
        return self.keys.refresh()

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who sends a request with `headers`.

        Raises:
            ApiError: 401 without a known key, 400 with what is wrong in which header.
        """
        if self.keys is not None and self.keys.table is not self._known_by:
            self._known, self._known_by = {}, self.keys.table
        get = headers.get
        given = tuple(map(get, _HEADERS))
        known = self._known.get(given)
        if known is None:
            named = zip(_HEADERS, given, strict=True)
            known = self._read({name: value.decode("latin-1") for name, value in named if value is not None})
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            if sum(len(value) for value in given if value is not None) <= _REMEMBERED_BYTES:
                self._known[given] = known
        return known

    def _read(self, given: Mapping[bytes, str]) -> Caller:
        name = self._name(given)
        tenant = self.tenants[name]
        row = name
        if (slo := given.get(b"x-steersman-slo")) is not None:
            row = f"{name}/{slo}"
            if row not in self._places:
                hint = nearest(slo, list(tenant.slos)) if tenant.slos else "it has none"
                raise _wrong("X-Steersman-SLO", f"tenant {name!r} has no promise named {slo!r}; {hint}")
        priority = tenant.priority
        if (text := given.get(b"x-steersman-priority")) is not None:
            priority = int(_number("X-Steersman-Priority", text, -100, 100))
        deadline = None
        if (text := given.get(b"x-steersman-deadline-ms")) is not None:
            deadline = _number("X-Steersman-Deadline-Ms", text, 1, 86_400_000) / 1000.0
        data_class = given.get(b"x-steersman-data-class", tenant.data_class)
        mask = self._fleet.zone_mask(tenant.regions, tenant.data_class)
        try:
            if (text := given.get(b"x-steersman-regions")) is not None:
                mask = _both(mask, self._fleet.zone_mask([r.strip() for r in text.split(",")], None))
            mask = _both(mask, self._fleet.zone_mask([], data_class))
        except ValueError as error:
            raise _wrong("X-Steersman-Regions and X-Steersman-Data-Class", str(error)) from None
        return Caller(self._places[row], self.names.index(name), priority, mask, deadline, data_class)

    def _name(self, given: Mapping[bytes, str]) -> str:
        stated = given.get(b"x-steersman-tenant")
        if self.keys is not None:
            owner = self.keys.tenant(given.get(b"authorization", "").encode("latin-1"))
            if owner is None:
                raise ApiError(
                    401,
                    "the API key is missing or not known; send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if stated is not None and stated != owner:
                raise ApiError(403, "the API key is of another tenant", code="wrong_tenant", param="X-Steersman-Tenant")
            return owner
        if stated is None:
            return self.names[0]
        if stated not in self.tenants:
            raise ApiError(
                400,
                f"there is no tenant {stated!r}; {nearest(stated, self.names)}",
                code="unknown_tenant",
                param="X-Steersman-Tenant",
            )
        return stated


def _both(a: int, b: int) -> int:
    """The zones that both masks allow.

    Raises:
        ValueError: there are none.
    """
    if a and b and not a & b:
        raise ValueError("no replica is where this request's data may go")
    return a & b if a and b else a or b


def _wrong(header: str, message: str) -> ApiError:
    return ApiError(400, message, param=header)


def _number(header: str, text: str, low: int, high: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise _wrong(header, f"{header} must be a number from {low} to {high}, not {text!r}")
    return value

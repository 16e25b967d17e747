"""The fleet: which replicas there are, what each can do, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator

from steersman.runtime.config import Model, apply_sets, read_yaml, validate
from steersman.runtime.cost import CostProfile, load_profile
from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest

# What a scheduler and the simulator know of a replica. The simulator reads it anew at every iteration, so that
# limits and precision (hence coefficients) may change while it runs.
REPLICA = np.dtype(
    [
        ("overhead_s", "f8"),
        ("decode_a_s", "f8"),
        ("decode_b_s", "f8"),
        ("decode_c_s", "f8"),
        ("prefill_a_s", "f8"),
        ("prefill_b_s", "f8"),
        ("prefill_c_s", "f8"),
        ("decode_many_s", "f8"),
        ("prefill_d_s", "f8"),
        ("latency_s", "f8"),  # of the way to the engine and back, for its clients
        ("price_per_hour", "f8"),
        ("quality", "f8"),  # of its answers at its precision, 1: as the reference
        ("batch_wait_s", "f8"),
        ("swap_s_per_token", "f8"),  # moving KV to host memory or back; 0: recompute instead
        ("host_tokens", "i8"),  # KV that host memory holds
        ("kv_tokens", "i8"),
        ("max_model_len", "i8"),
        ("max_num_seqs", "i4"),
        ("token_budget", "i4"),  # tokens of one iteration, decodes and prefill together
        ("model", "i4"),
        ("zone", "i4"),  # place in `Fleet.zones`: where it is, and which data it may see
        ("tier", "i4"),  # a replica is a backup for those of lower tiers
        ("queue", "i4"),  # Queue
        ("batching", "i4"),  # Batching
        ("up", "i4"),  # 1: may take requests, 0: may not, 2: has as many as it may while it starts slowly
    ],
    align=True,
)


_COPIED: tuple[str, ...] = (
    "price_per_hour",
    "quality",
    "swap_s_per_token",
    "host_tokens",
    "kv_tokens",
    "max_model_len",
)
_COPIED += ("max_num_seqs", "token_budget")


class Queue(IntEnum):
    """Which waiting request a replica admits next."""

    FCFS = 0
    PRIORITY = 1
    EDF = 2  # earliest deadline first: arrival + TTFT target
    SJF = 3  # shortest expected output first
    VTC = 4  # the tenant served least so far (virtual token counter, Sheng et al., OSDI '24)


class Batching(IntEnum):
    """When a replica admits requests."""

    CONTINUOUS = 0  # whenever the batch has room
    STATIC = 1  # when the last batch is empty, up to a full one


class Backend(Model):
    """Where a live replica is. The simulator ignores it."""

    kind: str = Field(description="a module of steersman.runtime.replica: `openai` or `embedded`")
    options: dict[str, Any] = Field(default_factory=dict, description="keys of that backend's own model")


class Zone(NamedTuple):
    """Where data may be: a region, and the classes of data that may be seen there."""

    region: str
    data_classes: frozenset[str]


class ReplicaGroup(Model):
    """`count` equal replicas."""

    name: str
    count: int = Field(default=1, ge=1, le=1024)
    profile: str | CostProfile = Field(description="cost profile: a shipped name, a .yaml file, or its numbers")
    kv_tokens: int = Field(gt=0, description="tokens that the KV cache holds")
    max_model_len: int = Field(default=131072, gt=0)
    max_num_seqs: int = Field(default=256, ge=1)
    token_budget: int = Field(default=2048, ge=1)
    price_per_hour: float = Field(default=0.0, ge=0)
    lease: Literal["reserved", "on-demand", "spot"] = "on-demand"
    model: str = "default"
    region: str = "default"
    data_classes: list[str] = Field(default=[], description="classes of data that it may see; others never reach it")
    backup: int = Field(
        default=0, ge=0, le=99, description="takes requests only while no replica with a lower number may take them"
    )
    quality: float = Field(default=1.0, ge=0, description="of its answers, 1: as the reference precision")
    queue: Literal["fcfs", "priority", "edf", "sjf", "vtc"] = Field(
        default="fcfs", description="order of the engine's queue; simulated only"
    )
    batching: Literal["continuous", "static", "dynamic"] = Field(
        default="continuous", description="static and dynamic form a batch when the last one is done; simulated only"
    )
    batch_wait_s: float = Field(default=0.05, ge=0, description="dynamic: longest wait for a full batch")
    swap_s_per_token: float = Field(
        default=0.0, ge=0, description="preemption by swapping KV to host memory at this price; 0: by recomputing"
    )
    host_tokens: int = Field(default=0, ge=0, description="KV tokens that host memory holds for swapping")
    backend: Backend | None = None

    @model_validator(mode="after")
    def _budget_covers_batch(self) -> ReplicaGroup:
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"token_budget {self.token_budget} must be at least max_num_seqs {self.max_num_seqs}: "
                "every running sequence decodes one token per iteration"
            )
        return self

    @property
    def cost(self) -> CostProfile:
        """The cost profile. Raises UserError: there is no such profile."""
        return load_profile(self.profile) if isinstance(self.profile, str) else self.profile


class Fault(Model):
    """What happens to one replica, and when."""

    at_s: float = Field(ge=0, description="seconds after the start of an episode")
    replica: str
    kind: Literal["crash", "start", "slow", "drain", "resume"]
    factor: float = Field(default=2.0, gt=0, description="slow: so many times as long does an iteration take")


class RandomFaults(Model):
    """Every replica is well and unwell for exponentially distributed times."""

    mean_up_s: float = Field(gt=0)
    mean_down_s: float = Field(gt=0)
    slow: float = Field(default=1.0, ge=1, description="above 1: it does not crash, but is so many times slower")


class Fleet(Model):
    """A fleet file."""

    description: str
    block_tokens: int = Field(
        default=16, ge=1, le=1024, description="tokens of one block of the paged KV cache, a power of two"
    )
    replicas: list[ReplicaGroup] = Field(min_length=1)
    gateways: int = Field(
        default=1, ge=1, le=64, description="that share the fleet, but not what they know; simulated only"
    )
    scrape_s: float = Field(
        default=0.0, ge=0, description="seconds between two readings of a replica's metrics, 0: always fresh; simulated"
    )
    faults: list[Fault] = Field(default=[], description="simulated only")
    random_faults: RandomFaults | None = Field(default=None, description="besides; simulated only")

    @model_validator(mode="after")
    def _faults_name_replicas(self) -> Fleet:
        for i, fault in enumerate(self.faults):
            if fault.replica not in self.names:
                hint = nearest(fault.replica, self.names)
                raise ValueError(f"faults.{i}: there is no replica {fault.replica!r}; {hint}")
        return self

    @model_validator(mode="after")
    def _zones_fit_a_mask(self) -> Fleet:
        if len(self.zones) > 62:
            raise ValueError(
                f"there are {len(self.zones)} combinations of region and data_classes; at most 62 are possible"
            )
        return self

    @field_validator("block_tokens")
    @classmethod
    def _power_of_two(cls, tokens: int) -> int:
        if tokens & (tokens - 1):
            raise ValueError(f"must be a power of two, such as 16, got {tokens}")
        return tokens

    @property
    def groups(self) -> list[ReplicaGroup]:
        """The group of each replica, in order: one entry a replica."""
        return [group for group in self.replicas for _ in range(group.count)]

    @property
    def names(self) -> list[str]:
        """A name for each replica: the group's, numbered where it has several."""
        return [f"{g.name}-{i}" if g.count > 1 else g.name for g in self.replicas for i in range(g.count)]

    @property
    def models(self) -> list[str]:
        return sorted({group.model for group in self.replicas})

    @property
    def zones(self) -> list[Zone]:
        """What differs in where data may go, in a fixed order; at most 62 of them."""
        zones = {Zone(group.region, frozenset(group.data_classes)) for group in self.replicas}
        return sorted(zones, key=lambda zone: (zone.region, sorted(zone.data_classes)))

    def zone_mask(self, regions: Sequence[str], data_class: str | None) -> int:
        """The zones in `regions` (none named: any) that may see data of `data_class`, as a bit mask; 0: all of them.

        Raises:
            ValueError: there is no such region or class in the fleet, or no replica where both are.
        """
        zones = self.zones
        known = sorted({zone.region for zone in zones})
        for region in regions:
            if region not in known:
                raise ValueError(f"the fleet has no region {region!r}; {nearest(region, known)}")
        classes = sorted({c for zone in zones for c in zone.data_classes})
        if data_class is not None and data_class not in classes:
            raise ValueError(f"no replica may see data of class {data_class!r}; {nearest(data_class, classes)}")
        mask = sum(
            1 << i
            for i, zone in enumerate(zones)
            if (not regions or zone.region in regions) and (data_class is None or data_class in zone.data_classes)
        )
        if not mask:
            raise ValueError(f"no replica in {', '.join(regions)} may see data of class {data_class!r}")
        return 0 if not regions and data_class is None else mask

    @property
    def price_per_hour(self) -> float:
        return sum(group.price_per_hour for group in self.groups)

    def table(self) -> np.ndarray:
        """The fleet as a REPLICA array, (replicas,)."""
        table, zones = np.zeros(len(self.groups), REPLICA), self.zones
        for row, group in zip(table, self.groups, strict=True):
            set_profile(row, group.cost)
            for name in _COPIED:
                row[name] = getattr(group, name)
            row["queue"] = Queue[group.queue.upper()]
            row["batching"] = Batching.CONTINUOUS if group.batching == "continuous" else Batching.STATIC
            row["batch_wait_s"] = group.batch_wait_s if group.batching == "dynamic" else 0.0
            row["kv_tokens"] -= row["kv_tokens"] % self.block_tokens
            row["model"] = self.models.index(group.model)
            row["zone"] = zones.index(Zone(group.region, frozenset(group.data_classes)))
            row["tier"], row["up"] = group.backup, 1
        return table


def with_profiles(fleet: Fleet, profiles: Sequence[str]) -> Fleet:
    """The fleet with other cost profiles: `PROFILE` for all groups, or `GROUP=PROFILE` for one.

    Raises:
        UserError: there is no such group or profile.
    """
    chosen: dict[str, str | CostProfile] = {group.name: group.profile for group in fleet.replicas}
    for text in profiles:
        name, equals, profile = text.rpartition("=")
        if equals and name not in chosen:
            raise UserError(f"--profile {text}: the fleet has no group {name!r}; {nearest(name, list(chosen))}")
        load_profile(profile)
        chosen.update({name: profile} if equals else dict.fromkeys(chosen, profile))
    groups = [group.model_copy(update={"profile": chosen[group.name]}) for group in fleet.replicas]
    return fleet.model_copy(update={"replicas": groups})


def set_profile(row: np.void, profile: CostProfile) -> None:
    """Write a cost profile into one row of a REPLICA array."""
    row["overhead_s"] = profile.overhead_s
    row["decode_a_s"], row["decode_b_s"] = profile.decode_a_s, profile.decode_b_s_per_sequence
    row["decode_c_s"] = profile.decode_c_s_per_token
    row["prefill_a_s"], row["prefill_b_s"] = profile.prefill_a_s, profile.prefill_b_s_per_token
    row["prefill_c_s"], row["prefill_d_s"] = profile.prefill_c_s_per_token2, profile.prefill_d_s_per_chunk
    row["decode_many_s"], row["latency_s"] = profile.decode_many_s, profile.latency_s


def read_fleet(path: str | Path, sets: list[str] | None = None) -> Fleet:
    """As `load_fleet`, but the profiles need not exist yet."""
    path = Path(path)
    fleet = validate(Fleet, apply_sets(_recorded(path) if path.is_dir() else read_yaml(path), sets or []), str(path))
    duplicates = {name for name in fleet.names if fleet.names.count(name) > 1}
    if duplicates:
        raise UserError(f"{path}: replica names must differ; {sorted(duplicates)[0]!r} stands twice")
    return fleet


def _recorded(folder: Path) -> dict[str, Any]:
    from steersman.runtime.journal.reader import read_journal  # its files hold fleets

    return read_journal(folder).fleet.model_dump(mode="json", exclude_defaults=True)


def load_fleet(path: str | Path, sets: list[str] | None = None) -> Fleet:
    """The fleet in a YAML file, or the one that a journal's folder was recorded on.

    Raises:
        UserError: with what is wrong, in which key of which file.
    """
    fleet = read_fleet(path, sets)
    try:
        fleet.table()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return fleet

"""The workload file: tenants, each with a promise and a source, and the episodes drawn from them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr, field_validator, model_validator

from steersman.runtime.config import Model, apply_sets, read_yaml, validate
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Zone
from steersman.runtime.plugins import nearest
from steersman.runtime.requests import REQUEST, Requests
from steersman.runtime.tenant import Tenant
from steersman.runtime.workload._blocks import separate
from steersman.runtime.workload._source import Files, Source, Split, Stream, Tags, make_source


class Leaving(Model):
    """Clients that give up before their answer is complete."""

    share: float = Field(gt=0, le=1, description="share of the clients that would")
    mean_s: float = Field(gt=0, description="mean of the exponentially distributed time after which they leave")


class WorkloadTenant(Tenant):
    """A tenant, and where its requests come from."""

    source: dict[str, Any] = Field(
        description="kind: synthetic, azure, mooncake, journal or pkg.module:attribute, with its options"
    )
    model: str | None = Field(default=None, description="the model that it asks for; default: any")
    regions: list[str] = Field(default=[], description="regions that may hold its data; default: any")
    priority: int = Field(default=0, description="higher is more urgent")
    leaving: Leaving | None = Field(default=None, description="clients that cancel; default: none")

    @field_validator("source")
    @classmethod
    def _source_is_valid(cls, options: dict[str, Any]) -> dict[str, Any]:
        make_source(options)
        return options

    @cached_property
    def made_source(self) -> Source:
        return make_source(self.source)


class Workload(Model):
    """A workload file."""

    description: str = Field(description="one sentence")
    duration_s: float = Field(default=120.0, gt=0, le=1e6, description="length of an episode's arrival window")
    warm_s: float = Field(
        default=0.0, ge=0, le=1e6, description="caches start as so many seconds of requests before would have left them"
    )
    block_tokens: int = Field(default=64, ge=16, multiple_of=16, description="tokens of a prefix block")
    tenants: dict[str, WorkloadTenant] = Field(min_length=1, max_length=1024)
    _files: Files = PrivateAttr(default=Files(None))

    @model_validator(mode="after")
    def _block_tokens_suit_sources(self) -> Workload:
        for name, tenant in self.tenants.items():
            try:
                tenant.made_source.check(self.block_tokens)
            except ValueError as error:
                raise ValueError(f"tenants.{name}.source: {error}") from None
        return self

    @property
    def offered_rps(self) -> float:
        """Mean requests per second at load 1, all tenants together. Raises as `tenants_rps`."""
        return sum(self.tenants_rps.values())

    @property
    def tenants_rps(self) -> dict[str, float]:
        """Mean requests per second at load 1, by tenant.

        Raises:
            UserError: a trace cannot be read.
        """
        return {name: tenant.made_source.offered_rps(self._files) for name, tenant in self.tenants.items()}

    def sample(
        self,
        seed: int,
        *,
        load: float = 1.0,
        split: Split = "train",
        duration_s: float | None = None,
        models: Sequence[str] = (),
        regions: Sequence[str] = (),
        zones: Sequence[Zone] = (),
    ) -> Requests:
        """One episode; the same arguments give the same bytes.

        seed: at least 0. A tenant's stream depends on it and on the tenant's name, not on the other tenants.
        load: multiplies every tenant's rate.
        models, regions: the fleet's, which the tenants' names are looked up in.
        zones: the fleet's, for recorded requests; none: they may go anywhere.

        Raises:
            UserError: a trace cannot be read, the load is not positive, or a tenant's model or all of its
                regions are not in the fleet.
        """
        duration_s = self.duration_s if duration_s is None else duration_s
        for name, value in (("load", load), ("duration_s", duration_s)):
            if not 0 < value < float("inf"):
                raise UserError(f"{name} {value} must be a positive number")
        tables, blocks, first = [], [], 0
        for index, (name, tenant) in enumerate(self.tenants.items()):
            stream = tenant.made_source.stream(
                np.random.default_rng(tenant.made_source.seeds(seed, name)),
                duration_s=self.warm_s + duration_s,
                load=load,
                split=split,
                block_tokens=self.block_tokens,
                files=self._files,
            )
            table = _table(stream, first)
            table["tenant"], table["priority"] = index, tenant.priority
            table["model"] = _model_index(name, tenant.model, models)
            table["regions"] = _region_mask(name, tenant.regions, regions)
            if stream.tags is not None:
                _tag(table, name, stream.tags, models, zones)
            if tenant.leaving is not None:
                table["cancel_s"] = _patience(tenant.leaving, len(table), seed, name)
            tables.append(table)
            blocks.append(stream.blocks + (index << 48))
            first += len(stream.blocks)
        merged = np.concatenate(tables)
        merged = merged[np.argsort(merged["arrival_s"], kind="stable")]
        merged["arrival_s"] -= self.warm_s
        first = int(np.searchsorted(merged["arrival_s"], 0.0))
        joined = separate(np.concatenate(blocks), seed)
        return Requests(merged[first:], joined, self.block_tokens, self.tenants, duration_s, merged[:first])


def _table(stream: Stream, first: int) -> np.ndarray:
    """`stream` as a REQUEST array; its blocks will stand from index `first`."""
    table = np.zeros(len(stream.arrival_s), REQUEST)
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "max_tokens", "prompt_blocks", "block_count"):
        table[name] = getattr(stream, name)
    table["block_start"] = first + np.cumsum(stream.block_count) - stream.block_count
    return table


def _patience(leaving: Leaving, count: int, seed: int, tenant: str) -> np.ndarray:
    """Seconds after which each client leaves, (count,); 0: never."""
    rng = np.random.default_rng([seed, zlib.crc32(tenant.encode()), 1])  # not the stream's: it stays what it was
    leaves, after = rng.random(count) < leaving.share, rng.exponential(leaving.mean_s, count)
    return np.where(leaves, np.maximum(after, 1e-3), 0.0)


def _model_index(tenant: str, model: str | None, models: Sequence[str]) -> int:
    if model is None:
        return -1
    if model not in models:
        raise UserError(
            f"tenant {tenant!r} asks for model {model!r}, which no replica of the fleet serves; "
            f"{nearest(model, list(models))}"
        )
    return list(models).index(model)


def _region_mask(tenant: str, wanted: Sequence[str], regions: Sequence[str]) -> int:
    mask = sum(1 << i for i, region in enumerate(regions) if region in wanted)
    if wanted and not mask:
        raise UserError(
            f"tenant {tenant!r} keeps its data in {', '.join(wanted)}, but the fleet has no replica there; "
            f"{nearest(wanted[0], list(regions))}"
        )
    return mask


def _tag(table: np.ndarray, tenant: str, tags: Tags, models: Sequence[str], zones: Sequence[Zone]) -> None:
    """Write what requests ask for themselves into their `table`; names are the fleet's, if one is given."""
    table["priority"] = np.where(tags.priority != 0, tags.priority, table["priority"])
    table["cancel_s"] = tags.cancel_s
    for i, model in enumerate(tags.models if models else ()):
        if (asked := tags.model == i).any():
            table["model"][asked] = _model_index(tenant, model, models)
    for mask in np.unique(tags.regions[tags.regions != 0]) if zones else ():
        wanted = [zone for i, zone in enumerate(tags.zones) if mask >> i & 1]
        table["regions"][tags.regions == mask] = _zone_mask(tenant, wanted, zones)


def _zone_mask(tenant: str, wanted: Sequence[Zone], zones: Sequence[Zone]) -> int:
    """Where among `zones` data may be that was free to go to the `wanted` ones, and to no other zone there was.

    In one of their regions, where all classes of data may be seen that may be in every one of them.
    """
    regions = {zone.region for zone in wanted}
    classes = frozenset.intersection(*(zone.data_classes for zone in wanted))
    mask = sum(1 << i for i, zone in enumerate(zones) if zone.region in regions and zone.data_classes >= classes)
    if not mask:
        of = f" that may see {', '.join(sorted(classes))}" if classes else ""
        raise UserError(
            f"tenant {tenant!r} keeps its data in {', '.join(sorted(regions))}, but the fleet has no replica there{of}"
        )
    return mask


def load_workload(path: str | Path, sets: Sequence[str] | None = None, traces: Path | None = None) -> Workload:
    """The workload in a YAML file, or the one that a journal's folder recorded.

    sets: `key.path=value` changes. traces: the folder of trace files; by default STEERSMAN_TRACES of the
    environment. Traces are read by the first `sample`.

    Raises:
        UserError: with what is wrong, in which key of which file.
    """
    if traces is None and os.environ.get("STEERSMAN_TRACES"):
        traces = Path(os.environ["STEERSMAN_TRACES"])
    workload = validate(Workload, apply_sets(_read(Path(path)), sets or []), str(path))
    workload._files = Files(traces)
    return workload


def _read(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return read_yaml(path)
    from steersman.runtime.workload.journal import workload_of  # a source imports this package

    return workload_of(path)

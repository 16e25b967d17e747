"""The contract of a workload source: options in, columns of requests out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from steersman.runtime.config import Model, validate
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Zone
from steersman.runtime.plugins import Kind, find, names

SOURCES = Kind("workload source", "steersman.runtime.workload", "SOURCE", "steersman.sources")

Split = Literal["train", "held-out"]

ELSEWHERE = "pass --traces DIR or set STEERSMAN_TRACES to the folder that holds it"


class Tags(NamedTuple):
    """What recorded requests ask for, each for itself, where its tenant does not: columns for n requests."""

    priority: np.ndarray  # (n,) int64
    model: np.ndarray  # (n,) int64: index into `models`; −1: any
    regions: np.ndarray  # (n,) int64: bit mask over `zones`; 0: any
    cancel_s: np.ndarray  # (n,) float64: its client leaves so long after it arrived; 0: never
    models: Sequence[str]
    zones: Sequence[Zone]


class Stream(NamedTuple):
    """One tenant's requests in order of arrival: columns of `Requests` for n requests."""

    arrival_s: np.ndarray  # (n,) float64, from 0, below the duration, never falling
    prompt_tokens: np.ndarray  # (n,) int64, at least 1
    output_tokens: np.ndarray  # (n,) int64, at least 1, at most max_tokens
    max_tokens: np.ndarray  # (n,) int64
    prompt_blocks: np.ndarray  # (n,) int64, full blocks of the prompt
    block_count: np.ndarray  # (n,) int64, at least prompt_blocks
    blocks: np.ndarray  # (sum of block_count,) int64 in [0, 2**48): equal means an equal prefix in this stream
    tags: Tags | None = None


class Files(NamedTuple):
    """Where trace files are."""

    folder: Path | None

    def find(self, file: str) -> Path:
        """The path of `file`, taken relative to the folder of traces.

        Raises:
            UserError: no folder was named, or the file is not in it.
        """
        path = Path(file)
        if not path.is_absolute():
            if self.folder is None:
                raise UserError(f"the trace file {file} is needed: {ELSEWHERE}")
            path = self.folder / path
        if not path.exists():
            raise UserError(f"{path}: no such trace file; {ELSEWHERE}")
        return path


class Source(Model):
    """Where one tenant's requests come from. Its options are its fields."""

    def check(self, block_tokens: int) -> None:
        """Whether the source works with prefix blocks of `block_tokens` tokens. Raises ValueError if not."""

    def offered_rps(self, files: Files) -> float:
        """Mean requests per second at load 1."""
        raise NotImplementedError

    def seeds(self, seed: int, tenant: str) -> list[int]:
        """What the random numbers of `tenant`'s stream come from: by default, no two tenants have the same."""
        return [seed, zlib.crc32(tenant.encode())]

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
        """Requests that arrive in [0, duration_s), their rate multiplied by `load`.

        split: which part of recorded data to use; episodes of the two parts share no recorded request.
        """
        raise NotImplementedError


def make_source(options: dict[str, Any]) -> Source:
    """The source that `options` describe: its `kind`, and the options of that kind.

    Raises:
        UserError: there is no such kind, or it has no such options.
    """
    kind = options.get("kind")
    if not isinstance(kind, str):
        raise UserError(f"'kind' is required and must be one of: {', '.join(names(SOURCES))}")
    model = find(SOURCES, kind)
    if not (isinstance(model, type) and issubclass(model, Source)):
        raise UserError(f"workload source {kind!r} is not a subclass of Source")
    return validate(model, {k: v for k, v in options.items() if k != "kind"}, f"the {kind} source")

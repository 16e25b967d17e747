"""`policy.json` of a bundle: what the policy is, sees and was trained on, and how well it did."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import Field, JsonValue

from steersman.runtime import observation
from steersman.runtime.config import Model, validate
from steersman.runtime.errors import UserError
from steersman.runtime.network import Architecture, split

FORMAT = 2  # of the bundle: of this model, the network's formula and its normaliser


Weight = Annotated[float, Field(allow_inf_nan=False, ge=-3.4e38, le=3.4e38)]  # fits float32


class SchemaError(UserError):
    """A policy was trained on an observation that this version does not know."""


class Schema(Model):
    """The observation that the policy was trained on."""

    version: int
    hash: str
    features: tuple[str, ...]


class Graph(Model):
    """The policy.onnx that belongs to the manifest."""

    sha256: str
    bytes: int


class Manifest(Model):
    """A `policy.json`."""

    format: int
    steersman: str = Field(description="version that wrote the bundle")
    created: str = Field(description="UTC, ISO 8601")
    name: str
    summary: str
    observation: Schema
    graph: Graph
    architecture: Architecture
    fleet: dict[str, JsonValue] = Field(description="the fleet file that it was trained on")
    workload: dict[str, JsonValue] = Field(description="the workload file that it was trained on")
    command: str = Field(description="what trained it")
    seeds: dict[str, int]
    scorecard: dict[str, JsonValue] = Field(description="held-out figures, baselines included")
    weights: tuple[Weight, ...] = Field(description="as in the graph, for the compiled form")
    sha256: str = Field(default="", description="of the other keys, as `digest` computes it")

    @property
    def version(self) -> str:
        """Names this very policy, also as a file: its name and the start of its digest."""
        return f"{re.sub(r'[^A-Za-z0-9._]+', '-', self.name).strip('.-')[:60] or 'policy'}-{self.sha256[:8]}"

    @property
    def vector(self) -> np.ndarray:
        """The trainable weights, float64 (P,), with the float32 values that the graph holds."""
        return np.array(self.weights, np.float32).astype(np.float64)


def current_schema() -> Schema:
    """The observation of this version."""
    names = tuple(feature.name for feature in observation.FEATURES)
    return Schema(version=observation.VERSION, hash=observation.SCHEMA_HASH, features=names)


def checked_weights(architecture: Architecture, weights: np.ndarray) -> tuple[float, ...]:
    """Weights as the shortest decimals that give the same float32.

    Raises:
        UserError: their number does not fit the architecture, or one is not finite as float32.
    """
    with np.errstate(over="ignore"):
        single = np.asarray(weights).astype(np.float32)
    split(architecture, single)
    return tuple(float(str(value)) for value in single)


def finite(value: Any) -> Any:
    """`value` for JSON, which knows no NaN and no infinity: these become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as a file, sealed with its digest."""
    data = manifest.model_dump(mode="json")
    data["sha256"] = digest(data)
    weights = data.pop("weights")
    # The long list stays on one line, so that people can read the rest.
    text = json.dumps(data | {"weights": None}, indent=1, allow_nan=False)
    head, _, tail = text.rpartition('"weights": null')
    return f'{head}"weights": {json.dumps(weights, allow_nan=False)}{tail}\n'.encode()


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content but for the key `sha256`: of JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(data: bytes, where: str) -> Manifest:
    """The manifest in a file's bytes. `where` names the file.

    Raises:
        UserError: it is no manifest, of another format or observation schema, or was altered.
    """
    try:
        raw = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{where}: not valid JSON ({error}); {REMEDY}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a mapping of keys to values, got {type(raw).__name__}; {REMEDY}")
    if raw.get("format") != FORMAT:
        raise UserError(
            f"{where}: bundle format {raw.get('format')!r}, but this version reads format {FORMAT}; "
            "export the policy again with this version, or use the version that wrote it "
            f"({raw.get('steersman', 'unknown')})"
        )
    # First of all: of a damaged file, no other complaint would be to the point.
    if raw.get("sha256") != digest(raw):
        raise UserError(f"{where}: altered since it was written (its sha256 does not match); {REMEDY}")
    _check_schema(validate(Schema, raw.get("observation"), f"{where}: observation"), where)
    return validate(Manifest, raw, where)


REMEDY = "copy the bundle anew or export the policy again"


def _check_schema(schema: Schema, where: str) -> None:
    ours = current_schema()
    if schema == ours:
        return
    missing = [name for name in schema.features if name not in ours.features]
    added = [name for name in ours.features if name not in schema.features]
    differences = [
        *([f"this version no longer has {', '.join(missing)}"] if missing else []),
        *([f"it does not know {', '.join(added)}"] if added else []),
    ] or ["the features have the same names, but another order, unit, range or meaning"]
    raise SchemaError(
        f"{where}: the policy was trained on observation schema {schema.version} ({schema.hash}), but this "
        f"version has {ours.version} ({ours.hash}): {'; '.join(differences)}; train it again"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

"""Policies by name: a heuristic, with parameters if wanted, or a trained policy in a run folder or bundle."""

from __future__ import annotations

import math
from pathlib import Path

from steersman.runtime import plugins
from steersman.runtime.errors import UserError
from steersman.runtime.policy import CompiledPolicy, Policy

KIND = plugins.Kind("policy", "steersman.agents.heuristics", "POLICY", "steersman.policies")


def heuristics() -> dict[str, CompiledPolicy]:
    """Every heuristic, by name, sorted."""
    return {name: plugins.find(KIND, name) for name in plugins.names(KIND)}


def resolve(spec: str) -> CompiledPolicy:
    """The policy that `spec` means.

    spec: `jsed` or `package.module:attribute`, either with parameters as in `jsed?decode_weight=0`; or the
    path of a run folder or bundle (a folder or zip with policy.json).

    Raises:
        UserError: there is no such policy, parameter or file, or a value is no number; names the nearest.
    """
    if is_path(spec):
        from steersman.runtime.bundle import load_bundle  # loads ONNX Runtime, which heuristics do not need

        return load_bundle(Path(spec))
    return heuristic(spec)


def heuristic(spec: str) -> CompiledPolicy:
    """The heuristic that `spec` means, as in `resolve`; never a file."""
    name, question, query = spec.partition("?")
    policy = plugins.find(KIND, name)
    if not isinstance(policy, CompiledPolicy):
        raise UserError(f"policy {name!r} is a {type(policy).__name__}, not a CompiledPolicy")
    return policy.with_params(**_parameters(spec, query)) if question else policy


def spec_of(name: str, policy: CompiledPolicy) -> str:
    """What `resolve` makes `policy`, the heuristic `name` with other numbers, from; they keep 6 digits."""
    values = zip(policy.params, policy.values, strict=True)
    return name + "?" + "&".join(f"{key}={value:.6g}" for key, value in values)


def serving(spec: str) -> Policy:
    """The policy that `spec` means, in the form that decides fastest. Errors as `resolve`."""
    if not is_path(spec):
        return resolve(spec).bind()
    from steersman.runtime.bundle import load_serving

    return load_serving(Path(spec))


def is_path(spec: str) -> bool:
    """Whether `spec` is meant as a path: it exists or looks like one, and is not the name of a heuristic."""
    if spec.partition("?")[0] in plugins.names(KIND):
        return False
    return "/" in spec or spec.endswith(".zip") or Path(spec).exists()


def _parameters(spec: str, query: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for item in query.split("&"):
        key, equals, text = item.partition("=")
        try:
            values[key] = float(text)
        except ValueError:
            equals = ""
        if not key or not equals or not math.isfinite(values[key]):
            raise UserError(f"policy {spec!r}: {item!r} must be key=number, as in 'jsed?decode_weight=0'")
    return values

"""YAML into pydantic models: unknown keys are refused, and every error names file, key, value and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest


class Model(BaseModel):
    """Base of every configuration model: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


M = TypeVar("M", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return data


def apply_sets(data: dict[str, Any], sets: Sequence[str], where: str = "--set") -> dict[str, Any]:
    """`data` with each `key.path=value` applied; values are parsed as YAML.

    Raises:
        UserError: an item has no `=`, or its path runs through something that is not a mapping or list.
    """
    for item in sets:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise UserError(f"{where} {item!r}: expected key.path=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{where} {item!r}: {text!r} is not valid YAML") from None
        node: Any = data
        *parents, last = path.split(".")
        try:
            for key in parents:
                node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
            node[int(last) if isinstance(node, list) else last] = value
        except (TypeError, ValueError, IndexError, AttributeError):
            raise UserError(f"{where} {item!r}: {path!r} is not a path into the configuration") from None
    return data


def validate(model: type[M], data: Any, where: str) -> M:
    """`data` as `model`.

    Raises:
        UserError: with one clause for each problem: `where`, key, value, and the nearest valid key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        clauses = [_clause(model, data, problem) for problem in error.errors()]
        raise UserError(f"{where}: " + "; ".join(clauses)) from None


def _clause(model: type[BaseModel], data: Any, problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "(top level)"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(location[-1], _keys_at(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{key!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    # What stands by mistake where the hash of a key should is the key itself.
    hidden = isinstance(value, (dict, list)) or (location and location[-1].endswith("sha256"))
    shown = "" if hidden else f" (got {value!r})"
    return f"{key!r}: {message[0].lower()}{message[1:]}{shown}"


def _keys_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """The field names of the model that stands at `location` inside `model`, best effort."""
    current: Any = model
    for part in location:
        candidates = (
            _models_in(current.model_fields[part].annotation)
            if part in getattr(current, "model_fields", {})
            else [current]
        )
        if not candidates:
            return []
        named = [c for c in candidates if c.__name__.lower() == part.lower()]
        current = (named or candidates)[0]
    return sorted(current.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in getattr(annotation, "__args__", ()) for m in _models_in(argument)]

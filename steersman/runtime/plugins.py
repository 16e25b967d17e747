"""Finding extensions by name: one new file in a folder, an installed entry point, or `package.module:attribute`.

A kind of extension (heuristics, workload sources, rewards, backends) is a package whose modules each define one
attribute, named by the kind; `round-robin` is the module `round_robin`. Other distributions add theirs under
the entry-point group of the kind.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import pkgutil
from typing import Any, NamedTuple

from steersman.runtime.errors import UserError


class Kind(NamedTuple):
    """A kind of extension: what users call it, where built-in ones live, and which attribute holds one."""

    noun: str  # "policy"
    package: str  # "steersman.agents.heuristics"
    attribute: str  # "POLICY"
    group: str  # entry-point group, "steersman.policies"


@functools.cache
def _installed(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of a group, the first of each name. To look through all distributions takes milliseconds: once."""
    return {entry.name: entry for entry in reversed(tuple(importlib.metadata.entry_points(group=group)))}


def names(kind: Kind) -> list[str]:
    """Every name that `find` knows, sorted."""
    package = importlib.import_module(kind.package)
    built_in = [m.name.replace("_", "-") for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return sorted({*built_in, *_installed(kind.group)})


def find(kind: Kind, name: str) -> Any:
    """The extension called `name`.

    Raises:
        UserError: nothing has that name; the sentence names the nearest that exists.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{kind.noun} {name!r} cannot be imported: {error}") from error
    if entry := _installed(kind.group).get(name):
        return entry.load()
    if name in names(kind):
        module = importlib.import_module(f"{kind.package}.{name.replace('-', '_')}")
        return getattr(module, kind.attribute)
    raise UserError(f"there is no {kind.noun} {name!r}; {nearest(name, names(kind))}")


def nearest(name: str, known: list[str]) -> str:
    """A hint for a wrong name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"

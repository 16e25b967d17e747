"""The decision journal: the same bytes come back, files rotate, and nothing that happens to a disk reaches serving."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from journals import FLEET, Asked, mixed, play, prompt, record
from simulated import PATIENT, TENANTS, fleet

from steersman import __version__
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import Fleet
from steersman.runtime.journal import Ending, Journal, JournalConfig, columns, segment, store
from steersman.runtime.journal.reader import read_journal, recorded_decisions
from steersman.runtime.journal.segment import CODES, Batch, Header, pack, unpack
from steersman.runtime.observation import CANDIDATE_FEATURES, SCHEMA_HASH, WIDTH
from steersman.runtime.policy import pick
from steersman.runtime.tenant import Tenant
from steersman.runtime.ticket import Fallback, LiveRequest

BITS = st.integers(0, 2**32 - 1)


def header(candidates: int, on: Fleet = FLEET) -> Header:
    return Header(
        steersman=__version__,
        run="r",
        sequence=1,
        started_s=0.0,
        lost_decisions=0,
        candidates=candidates,
        fleet=on,
        tenants=TENANTS,
        policies=[("p", "1")],
        fallbacks=list(Fallback),
        endings=list(Ending),
    )


def journal(folder: Path, **options: object) -> Journal:
    return Journal(JournalConfig.model_validate({"folder": folder, **options}), FLEET, TENANTS)


def files(folder: Path) -> list[Path]:
    return store.segment_paths(folder)


# The bytes


@given(some.arrays(np.uint32, some.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=20), elements=BITS))
@settings(max_examples=50, deadline=None)
def test_columns_come_back_to_the_bit(numbers: np.ndarray) -> None:
    for item, array in ((4, numbers.view(np.float32)), (1, numbers.view(np.uint8))):
        back = columns.rows(columns.planes(array, item), array.dtype, array.shape[1:])
        assert back.tobytes() == array.tobytes()


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=200))
@settings(max_examples=50, deadline=None)
def test_keys_are_numbered_by_their_first_appearance(numbers: list[int]) -> None:
    unique, places = columns.distinct(np.array(numbers, np.int64))
    assert unique.tolist() == list(dict.fromkeys(numbers))
    assert unique[places].tolist() == numbers


@given(st.integers(1, 12), st.integers(0, 3), st.data())
@settings(max_examples=40, deadline=None)
def test_any_observation_of_the_encoder_s_form_comes_back_to_the_bit(n: int, padding: int, data: st.DataObject) -> None:
    replicas, k = len(FLEET.names), CANDIDATE_FEATURES
    candidates = replicas + 2 + padding
    floats = some.arrays(np.uint32, (n, candidates * WIDTH), elements=BITS).map(lambda a: a.view(np.float32))
    rows = data.draw(floats).reshape(n, candidates, WIDTH).copy()
    rows[:, -2:, : k - segment.HOLD_FEATURES] = 0
    rows[:, -1, :k] = 0
    rows[:, :, k:] = rows[:, -1:, k:]
    rows[:, replicas:-2] = 0
    mask = data.draw(some.arrays(np.bool_, (n, candidates)))
    reasons = data.draw(some.arrays(np.int8, (n, candidates)))
    batch = Batch()
    for i in range(n):
        decision = segment.PACK_DECISION.pack(i, i, 1000 * i, 1e-5, i % candidates, 0, -1)
        scores = np.full(candidates, float(i))
        seen = rows[i].tobytes() + mask[i].tobytes() + reasons[i].tobytes()
        batch.decisions.append(decision + seen + scores.tobytes())
        batch.keys.append(np.arange(i, dtype=np.int64).tobytes())
        batch.requests.append(
            segment.PACK_REQUEST.pack(i, i, 0, 0, 9, 9, 64, i, 0, -1, 0, 5, -1, 0, 1, 0, 0.1, 0.1, 0.3, 1, 1)
        )
    back = unpack(pack(batch, header(candidates)), "f")
    assert back.rows.tobytes() == rows.tobytes()
    assert back.mask.tobytes() == mask.tobytes()
    assert back.reasons.tobytes() == reasons.tobytes()
    assert back.scores[:, 0].tolist() == list(range(n))
    assert back.decisions["order"].tolist() == list(range(n))
    assert back.requests["keys"].tolist() == list(range(n))
    assert back.keys.tolist() == [key for i in range(n) for key in range(i)]


@pytest.mark.parametrize("candidates", [None, 7])
def test_replayed_observations_are_those_that_were_seen_and_give_the_same_choices(
    tmp_path: Path, candidates: int | None
) -> None:
    """Held requests and padding included."""
    seen = record(tmp_path, mixed(), policy=PATIENT, candidates=candidates, segment_decisions=16)
    recording = read_journal(tmp_path)
    assert len(recording.paths) > 3
    recorded = recorded_decisions(recording, np.ones(len(recording.table), np.bool_), 10**6)
    assert len(recorded.choice) == len(seen.decisions) > 60
    assert recorded.rows.tobytes() == b"".join(seen.rows)
    assert recorded.mask.tobytes() == b"".join(seen.masks)
    policy = PATIENT.bind()
    again = [pick(policy.score(rows, mask), mask) for rows, mask in zip(recorded.rows, recorded.mask, strict=True)]
    assert again == recorded.choice.tolist()
    assert (recorded.choice == recorded.mask.shape[1] - 2).any()


def test_a_held_request_keeps_all_its_decisions(tmp_path: Path) -> None:
    record(tmp_path, [Asked(i / 10, prompt(1, 300 * (i + 1))) for i in range(9)], policy=PATIENT)
    (path,) = files(tmp_path)
    held = unpack(path.read_bytes(), "f")
    several = held.requests[held.requests["holds"] > 0]
    assert len(several)
    assert (several["decisions"] == several["holds"] + 1).all()
    assert held.decisions["number"].tolist() == np.repeat(held.requests["number"], held.requests["decisions"]).tolist()


def test_what_a_request_asked_for_and_how_it_ended_come_back(tmp_path: Path) -> None:
    asked = [
        Asked(0.0, prompt(1, 640, 2, priority=5, model=0, regions=1), 30),
        Asked(0.1, prompt(0, 1000), 40, Ending.CANCELLED),
        Asked(0.2, prompt(0, 1000), 40, Ending.FAILED),
        Asked(0.3, prompt(0, 10**6)),
        Asked(0.4, prompt(0, 640), 40, Ending.UNENDED),
        Asked(0.5, prompt(0, 640), down=(0, 1)),
    ]
    record(tmp_path, asked)
    recording = read_journal(tmp_path)
    table = recording.table
    endings = [Ending.DONE, Ending.CANCELLED, Ending.FAILED, Ending.REFUSED, Ending.UNENDED, Ending.REFUSED]
    assert table["ending"].tolist() == [CODES[ending] for ending in endings]
    first = table[0]
    names = ("tenant", "prompt_tokens", "priority", "model", "regions", "max_tokens", "output_tokens", "block_tokens")
    assert [int(first[name]) for name in names] == [1, 640, 5, 0, 1, 100, 30, 64]
    assert first["tpot_s"] == pytest.approx(0.02, rel=0.1)
    assert first["attained"]
    assert recording.time_s == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert recording.down.tolist() == [False] * 5 + [True]
    start = recording.key_start
    for i, one in enumerate(asked):
        assert recording.keys[start[i] : start[i + 1]].tolist() == one.request.keys.tolist()


def test_who_decided_is_known_with_its_version_and_the_fallback(tmp_path: Path) -> None:
    record(tmp_path, mixed(5))
    (path,) = files(tmp_path)
    one = unpack(path.read_bytes(), "f")
    assert one.header.policies == [("fastest", "fastest")]
    assert one.decisions["policy"].tolist() == [0] * 5
    assert one.decisions["fallback"].tolist() == [-1] * 5
    assert np.isfinite(one.scores[:, :2]).all()
    assert one.header.schema_hash == SCHEMA_HASH


def test_nothing_of_a_tenant_but_its_promise_and_no_host_of_a_replica_is_in_a_file(tmp_path: Path) -> None:
    class Rich(Tenant):
        secret: str

    tenants = {name: Rich(slo=t.slo, weight=t.weight, secret="sk-do-not-tell") for name, t in TENANTS.items()}
    on = fleet({"backend": {"kind": "openai", "options": {"url": "http://inside.example"}}}, {})
    written = Journal(JournalConfig(folder=tmp_path), on, tenants)
    play(written, mixed(5), on=on)
    written.close()
    (path,) = files(tmp_path)
    told = bytes(unpack(path.read_bytes(), "f")._stored["header"])
    assert b"sk-do-not-tell" not in told
    assert b"inside.example" not in told


def test_only_numbers_are_stored_of_a_request(tmp_path: Path) -> None:
    """Every member but the header is an array of numbers, so that no prompt can be in it."""
    record(tmp_path, mixed(5))
    (path,) = files(tmp_path)
    stored = unpack(path.read_bytes(), "f")._stored
    assert {name: array.dtype.kind for name, array in stored.items() if array.dtype.kind not in "ui"} == {}
    assert {field: segment.REQUEST[field].kind for field in segment.REQUEST.names or ()}.keys().isdisjoint(
        {"prompt", "text", "messages", "body"}
    )


# The folder


def test_files_rotate_within_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    written = store.write_synced

    def measured(path: Path, data: bytes) -> None:
        nonlocal most
        written(path, data)
        most = max(most, sum(p.stat().st_size for p in tmp_path.iterdir()))

    monkeypatch.setattr(store, "write_synced", measured)
    kept = store.Store(tmp_path, 1000)
    for i in range(30):
        kept.put(bytes([i]) * 90)
    assert [path.read_bytes()[0] for path in files(tmp_path)] == list(range(19, 30))
    assert kept.bytes == 990
    assert most <= 1000


def test_the_number_of_files_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_FILES", 4)
    kept = store.Store(tmp_path, 1000)
    for i in range(9):
        kept.put(bytes([i]))
    assert [path.read_bytes()[0] for path in files(tmp_path)] == [5, 6, 7, 8]


def test_a_restart_goes_on_with_the_numbers_and_the_bound(tmp_path: Path) -> None:
    for _ in range(2):
        kept = store.Store(tmp_path, 1000)
        for _ in range(8):
            kept.put(bytes(100))
    assert kept.sequence == 17
    assert (kept.bytes, kept.files) == (1000, 10)
    smaller = store.Store(tmp_path, 250)
    assert len(files(tmp_path)) == smaller.files == 2


def test_files_stay_in_order_when_the_clock_jumps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Jumping(store.datetime):
        year_now = 2030

        @classmethod
        def now(cls, tz: object = None) -> store.datetime:
            cls.year_now -= 1
            return store.datetime(cls.year_now, 1, 1, tzinfo=store.UTC)

    monkeypatch.setattr(store, "datetime", Jumping)
    kept = store.Store(tmp_path, 1000)
    for i in range(3):
        kept.put(bytes([i]))
    assert [path.read_bytes()[0] for path in files(tmp_path)] == [0, 1, 2]


def test_half_a_file_of_a_killed_gateway_is_removed(tmp_path: Path) -> None:
    half = tmp_path / ".journal-00000001-20260101T000000Z.npz.zst.tmp"
    half.write_bytes(b"half")
    store.Store(tmp_path, 1000)
    assert not half.exists()


def test_a_full_disk_costs_its_decisions_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = store.write_synced

    def full(path: Path, data: bytes) -> None:
        written(path, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store, "write_synced", full)
    kept = journal(tmp_path, segment_decisions=10)
    play(kept, mixed(10))
    kept.close()
    assert not list(tmp_path.iterdir())
    assert (kept.dropped, kept.written, kept.failures) == (10, 0, 1)
    assert "No space left on device" in kept.last_error


def test_it_goes_on_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, calls = store.write_synced, 0

    def once(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(path, data)

    monkeypatch.setattr(store, "write_synced", once)
    kept = journal(tmp_path, segment_decisions=10)
    play(kept, mixed(20))
    kept.close()
    assert (kept.failures, kept.dropped, kept.written) == (1, 10, 10)
    (path,) = files(tmp_path)
    assert unpack(path.read_bytes(), "f").header.lost_decisions == 10


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    kept = journal(folder)
    folder.rmdir()
    play(kept, mixed(5))
    kept.close()
    assert len(files(folder)) == 1


def test_a_writer_that_cannot_keep_up_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, written = threading.Event(), store.write_synced

    def slow(path: Path, data: bytes) -> None:
        go.wait()
        written(path, data)

    monkeypatch.setattr(store, "write_synced", slow)
    kept = journal(tmp_path, segment_decisions=5, memory_mib=1)
    play(kept, mixed(1500, gap_s=0.5))
    assert kept.dropped > 0
    assert kept._open_bytes + kept._waiting_bytes < 1.1 * (1 << 20)
    go.set()
    kept.close()
    assert kept.written + kept.dropped == 1500
    assert (kept.failures, kept._open_bytes, kept._waiting_bytes) == (0, 0, 0)


def test_memory_for_requests_that_do_not_end_is_bounded(tmp_path: Path) -> None:
    kept = journal(tmp_path, memory_mib=1)
    play(kept, [Asked(i / 1000, prompt(), ending=Ending.UNENDED) for i in range(1500)])
    assert kept.dropped == 1500 - len(kept._open) > 0
    kept.close()
    assert kept.written == 1500 - kept.dropped


def test_a_number_that_no_column_holds_is_dropped_not_raised(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    play(kept, [Asked(0.0, LiveRequest(0, 100, 10, priority=1 << 40))])
    kept.close()
    assert (kept.written, kept.dropped) == (0, 1)


def test_small_files_are_written_without_another_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, written = threading.Event(), store.write_synced

    def told(path: Path, data: bytes) -> None:
        written(path, data)
        done.set()

    monkeypatch.setattr(store, "write_synced", told)
    kept = journal(tmp_path, segment_s=0.01)
    play(kept, mixed(5))
    assert done.wait(60)
    kept.close()
    assert kept.written == 5


def test_after_close_nothing_is_kept(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    kept.close()
    play(kept, mixed(5))
    assert not kept._open
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_sentence_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder"):
        journal(tmp_path / "file" / "journal")


# Reading


def test_damaged_files_are_skipped_with_a_sentence(tmp_path: Path) -> None:
    record(tmp_path, mixed(40), segment_decisions=10)
    first, second, third, *_ = files(tmp_path)
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(b"no journal")
    data = bytearray(third.read_bytes())
    data[len(data) // 2] ^= 255
    third.write_bytes(data)
    recording = read_journal(tmp_path)
    assert len(recording.paths) == 1
    assert len(recording.problems) == 3
    assert all(str(path) in problem for path, problem in zip((first, second, third), recording.problems, strict=True))


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_no_bytes_break_the_reader(data: bytes) -> None:
    with pytest.raises(UserError, match="damaged"):
        unpack(data, "f")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("file")
    record(folder, mixed(5))
    (path,) = files(folder)
    return path.read_bytes()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_changes_nothing_that_is_read(file: bytes, data: st.DataObject) -> None:
    flipped = bytearray(file)
    flipped[data.draw(st.integers(0, len(file) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        back = unpack(bytes(flipped), "f")
    except UserError:
        return
    whole = unpack(file, "f")  # it was a bit of zstd's own
    assert back.header == whole.header
    assert all(array.tobytes() == whole._stored[name].tobytes() for name, array in back._stored.items())


def test_a_journal_without_a_readable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file of a journal"):
        read_journal(tmp_path)
    (tmp_path / "journal-00000001-20260101T000000Z.npz.zst").write_bytes(b"x")
    with pytest.raises(UserError, match="no file of the journal"):
        read_journal(tmp_path)


def test_a_file_of_a_newer_format_names_the_version_to_read_it_with(tmp_path: Path) -> None:
    newer = header(4).model_copy(update={"format": 99, "steersman": "9.9"})
    with pytest.raises(UserError, match=r"steersman 9\.9"):
        unpack(pack(batch_of_one(), newer), "f")


def batch_of_one() -> Batch:
    zeros = np.zeros((4, WIDTH), np.float32).tobytes()
    decision = segment.PACK_DECISION.pack(0, 0, 0, 0.0, 0, 0, -1)
    batch = Batch(decisions=[decision + zeros + bytes(4 + 4 + 32)])
    batch.requests = [segment.PACK_REQUEST.pack(0, 0, 0, 0, 9, 9, 64, 0, 0, -1, 0, 5, -1, 0, 1, 0, 0.1, 0.1, 0.3, 1, 1)]
    batch.keys = [b""]
    return batch


def test_runs_of_a_gateway_follow_each_other_without_the_pause_between(tmp_path: Path) -> None:
    record(tmp_path, mixed(10, gap_s=0.5))
    record(tmp_path, [Asked(1000 + one.at_s, one.request) for one in mixed(10, gap_s=0.5)])
    recording = read_journal(tmp_path)
    assert len(recording.runs) == 2
    assert np.diff(recording.time_s) == pytest.approx(np.full(19, 0.5))
    decisions = recorded_decisions(recording, recording.run == 1, 4)
    assert (len(decisions.choice), decisions.left_out) == (4, 6)

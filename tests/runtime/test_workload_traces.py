"""Trace sources: what they read, what they refuse, and the windows that episodes are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steersman.runtime.errors import UserError
from steersman.runtime.workload import Files, Stream, Workload
from steersman.runtime.workload._trace import Trace
from steersman.runtime.workload.azure import Azure, parse_azure
from steersman.runtime.workload.mooncake import Mooncake, parse_mooncake

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TIMES = ("2023-11-16 18:15:46.6805900", "2023-11-16 18:15:50.9951690", "2023-11-16 18:16:50")


def line(timestamp: object = 0, prompt: object = 600, output: object = 5, ids: object = (1, 2)) -> str:
    return json.dumps({"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}) + "\n"


def azure_file(folder: Path, n: int = 1000, gap_s: float = 0.5) -> Path:
    """`n` requests, `gap_s` apart; request i has i + 1 prompt tokens."""
    rows = [f"2023-11-16 18:{int(i * gap_s) // 60:02}:{i * gap_s % 60:010.7f},{i + 1},7" for i in range(n)]
    path = folder / "trace.csv"
    path.write_text(HEADER + "\n".join(rows))
    return path


def stream(source: Azure | Mooncake, folder: Path, seed: int = 0, **arguments: object) -> Stream:
    merged = {"duration_s": 10.0, "load": 1.0, "split": "train", "block_tokens": 512, **arguments}
    return source.stream(np.random.default_rng(seed), files=Files(folder), **merged)


def test_azure_reads_times_to_the_microsecond_and_lengths_in_any_column_order():
    trace = parse_azure(
        f"GeneratedTokens,TIMESTAMP,ContextTokens\r\n44,{TIMES[0]},374\r\n109,{TIMES[1]},396\r\n".encode(),
        "f",
    )
    assert trace.time_s == pytest.approx([0, 4.314579])
    assert list(trace.prompt_tokens) == [374, 396]
    assert list(trace.output_tokens) == [44, 109]


def test_equal_times_and_a_byte_order_mark_are_fine():
    trace = parse_azure(b"\xef\xbb\xbf" + (HEADER + f"{TIMES[0]},1,1\n{TIMES[0]},2,2\n{TIMES[1]},3,3").encode(), "f")
    assert trace.time_s[:2].tolist() == [0, 0]


AZURE_ERRORS = {
    "empty": ("", "f: the file is empty"),
    "blank": ("\n \n", "f: the file is empty"),
    "missing column": ("TIMESTAMP,ContextTokens,Generated\n", "f:1: there is no column 'GeneratedTokens'"),
    "no header": (f"{TIMES[0]},1,2\n", "f:1: there is no column 'TIMESTAMP'"),
    "no rows": (HEADER, "a trace must span at least one second"),
    "one time": (HEADER + f"{TIMES[0]},1,1\n" * 3, "f: 3 requests within a second"),
    "short line": (HEADER + f"{TIMES[0]},1\n", "f:2: 2 fields, but the header has 3"),
    "negative": (HEADER + f"{TIMES[0]},-5,1\n", "f:2: ContextTokens is -5, but must be a whole"),
    "zero": (HEADER + f"{TIMES[0]},5,0\n", "f:2: GeneratedTokens is 0,"),
    "absurd": (HEADER + f"{TIMES[0]},10000001,1\n", "f:2: ContextTokens is 10000001,"),
    "very long number": (HEADER + f"{TIMES[0]},{'9' * 5000},1\n", "f:2: ContextTokens is '999"),
    "fraction": (HEADER + f"{TIMES[0]},1.5,1\n", "f:2: ContextTokens is '1.5',"),
    "NaN": (HEADER + f"{TIMES[0]},1,NaN\n", "f:2: GeneratedTokens is 'NaN',"),
    "no time": (HEADER + "yesterday,1,1\n", "f:2: TIMESTAMP 'yesterday' is not a time"),
    "unsorted": (HEADER + f"{TIMES[0]},1,1\n\n{TIMES[2]},1,1\n{TIMES[1]},1,1\n", "f:5: the time is before"),
}  # fmt: skip


@pytest.mark.parametrize("case", AZURE_ERRORS)
def test_azure_names_the_line_and_what_is_wrong(case):
    text, message = AZURE_ERRORS[case]
    refused(parse_azure, text.encode(), message)


MOONCAKE_ERRORS = {
    "empty": ("", "f: the file is empty"),
    "broken": (line() + '{"timestamp": 1,\n', "f:2: not valid JSON"),
    "nested": ("[" * 100_000 + "\n", "f:1: not valid JSON"),
    "list": ("[1]\n", "f:1: not a JSON object, but a list"),
    "missing": ('{"timestamp": 1, "input_len": 2}\n', "f:1: 'input_length' is missing; did you mean"),
    "negative": (line(prompt=-1), "f:1: input_length is -1,"),
    "zero": (line(output=0), "f:1: output_length is 0,"),
    "absurd": (line(prompt=10**30), "f:1: input_length is 1000"),
    "truth": (line(prompt=True), "f:1: input_length is True,"),
    "fraction": (line(prompt=600.0), "f:1: input_length is 600.0,"),
    "NaN": (line(timestamp=float("nan")), "f:1: timestamp is 'nan', but must be milliseconds"),
    "infinite": (line(timestamp=float("inf")), "f:1: timestamp is 'inf'"),
    "huge time": (line(timestamp=10**400), "f:1: timestamp is '1000"),
    "text time": (line(timestamp="0"), "f:1: timestamp is '0'"),
    "ids": (line(ids=[1, "2"]), "f:1: hash_ids must be a list of whole numbers"),
    "too few ids": (line(ids=[1]), "f:1: 1 hash_ids, but input_length 600 makes 2 blocks of 512 tokens"),
    "unsorted": (line(5000) + line(9000) + line(8999), "f:3: the time is before that of the request above"),
    "one time": (line() + line(), "f: 2 requests within a second"),
}  # fmt: skip


@pytest.mark.parametrize("case", MOONCAKE_ERRORS)
def test_mooncake_names_the_line_and_what_is_wrong(case):
    text, message = MOONCAKE_ERRORS[case]
    refused(parse_mooncake, text.encode(), message)


@pytest.mark.parametrize("parse", [parse_azure, parse_mooncake])
@pytest.mark.parametrize("data", [HEADER.encode("utf-16"), b"\n\xff\xfe", b"\x1f\x8b\x08"])
def test_other_encodings_are_refused(parse, data):
    refused(parse, data, "not UTF-8 text")


def refused(parse: Callable[[bytes, str], Trace], data: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(data, "f")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


FIELDS = st.one_of(
    st.sampled_from([*TIMES, "", "1", "-1", "NaN", "1e3", "٣", "0x1", "2023-11-16T18:16:50+01:00"]),
    st.text(max_size=8),
)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.lists(FIELDS, min_size=3, max_size=3)).map(
            lambda r: (HEADER + "\n".join(map(",".join, r))).encode("utf-8", "surrogatepass")
        ),
    )
)
@example(b"\x00" * 10)
def test_arbitrary_bytes_are_an_azure_trace_or_a_user_error(data):
    parses_or_refuses(parse_azure, data)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.builds(line, VALUES, VALUES, VALUES, VALUES), max_size=4).map(lambda x: "".join(x).encode()),
    )
)
@example(b'{"timestamp": 1e999, "input_length": 1, "output_length": 1, "hash_ids": [1]}')
def test_arbitrary_bytes_are_a_mooncake_trace_or_a_user_error(data):
    parses_or_refuses(parse_mooncake, data)


def parses_or_refuses(parse: Callable[[bytes, str], Trace], data: bytes) -> None:
    try:
        trace = parse(data, "f")
    except UserError:
        return
    assert trace.time_s[0] == 0
    assert np.all(np.diff(trace.time_s) >= 0)
    assert trace.prompt_tokens.min() >= 1


def test_mooncake_counts_full_blocks_only_and_shares_equal_prefixes():
    text = line(0, 1100, ids=[7, 8, 9]) + line(1000, 1024, ids=[7, 8]) + line(2000, 1536, ids=[7, 3, 8])
    trace = parse_mooncake(text.encode(), "f")
    first, second, third = (
        trace.blocks[a:b].tolist() for a, b in zip(trace.block_start, trace.block_start[1:], strict=False)
    )
    assert first == second
    assert len(third) == 3
    assert third[0] == first[0]
    assert third[2] not in first  # the same id after another prefix is another prefix


@pytest.mark.parametrize("make", ["missing", "directory", "no folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, make):
    (tmp_path / "folder").mkdir()
    source = Azure(file={"missing": "none.csv", "directory": "folder", "no folder": "x.csv"}[make])
    with pytest.raises(UserError, match=r"STEERSMAN_TRACES|cannot be read"):
        stream(source, None if make == "no folder" else tmp_path)  # type: ignore[arg-type]


def test_a_changed_file_is_read_again(tmp_path):
    path = azure_file(tmp_path)
    source = Azure(file=path.name)
    before = source.offered_rps(Files(tmp_path))
    azure_file(tmp_path, gap_s=1.0)
    os.utime(path, ns=(1, 1))
    assert source.offered_rps(Files(tmp_path)) == pytest.approx(before / 2)


def test_a_window_is_a_stretch_of_the_trace_compressed_by_the_rate_factor(tmp_path):
    azure_file(tmp_path)
    s = stream(Azure(file="trace.csv", rate_factor=4), tmp_path, duration_s=10.0, load=2.0)
    assert len(s.arrival_s) == pytest.approx(160, abs=1)  # 80 s of a trace of 2 requests a second
    assert np.all(np.diff(s.prompt_tokens) == 1)
    assert np.diff(s.arrival_s) == pytest.approx(np.full(len(s.arrival_s) - 1, 0.5 / 8))


def test_the_parts_share_no_request(tmp_path):
    azure_file(tmp_path)
    source = Azure(file="trace.csv", train_share=0.6)
    seen = {
        split: {
            int(t)
            for seed in range(60)
            for t in stream(source, tmp_path, seed, duration_s=50.0, split=split).prompt_tokens
        }
        for split in ("train", "held-out")
    }
    assert max(seen["train"]) <= 600
    assert min(seen["held-out"]) > 600
    assert len(seen["train"]) > 500


def test_a_window_longer_than_its_part_goes_round_in_it(tmp_path):
    azure_file(tmp_path)
    s = stream(Azure(file="trace.csv", train_share=0.5), tmp_path, duration_s=600.0)
    assert len(s.arrival_s) == pytest.approx(1200, abs=2)
    assert set(s.prompt_tokens) == set(range(1, 501))
    assert np.all(np.diff(s.arrival_s) >= 0)
    assert len(np.unique(s.blocks)) == len(s.blocks)


def test_a_round_of_mooncake_is_a_text_of_its_own(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(line(1000 * i, 512, ids=[1]) for i in range(10)))
    s = stream(Mooncake(file="t.jsonl", train_share=0.5), tmp_path, duration_s=15.0)
    assert len(s.blocks) == len(s.arrival_s) == 15
    assert 3 <= len(np.unique(s.blocks)) <= 4


def test_levelled_parts_have_the_rate_of_the_whole(tmp_path):
    times = np.concatenate([np.arange(0, 50, 0.25), np.arange(50, 100, 1.0)])
    (tmp_path / "t.jsonl").write_text("".join(line(int(1000 * t), 512, ids=[1]) for t in times))
    source = Mooncake(file="t.jsonl", train_share=0.5, level_parts=True)
    for split in ("train", "held-out"):
        counts = [len(stream(source, tmp_path, seed, split=split).arrival_s) for seed in range(20)]
        assert np.mean(counts) == pytest.approx(25, abs=1.5)


def test_spreading_moves_times_alike_in_every_episode(tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(line(3000 * (i // 10), 512, ids=[1]) for i in range(300)))
    spread = Mooncake(file="t.jsonl", spread_s=3, train_share=0.99)
    s, again = (stream(spread, tmp_path, 0, duration_s=60.0) for _ in range(2))
    assert len(np.unique(s.arrival_s)) == len(s.arrival_s)
    assert np.array_equal(s.arrival_s, again.arrival_s)


def test_mooncake_needs_blocks_of_512_tokens():
    tenant = {"slo": {"ttft_s": 1, "tpot_s": 1}, "source": {"kind": "mooncake", "file": "t.jsonl"}}
    with pytest.raises(ValueError, match=r"tenants\.a\.source: a mooncake source needs block_tokens: 512, got 64"):
        Workload.model_validate({"description": "x", "tenants": {"a": tenant}})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    duration=st.floats(0.001, 2000),
    load=st.floats(0.01, 10),
    split=st.sampled_from(["train", "held-out"]),
    level=st.booleans(),
)
def test_every_window_is_sorted_and_in_range(tmp_path_factory, seed, duration, load, split, level):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "trace.csv").exists():
        azure_file(folder)
    source = Azure(file="trace.csv", rate_factor=3, level_parts=level)
    s = stream(source, folder, seed, duration_s=duration, load=load, split=split, block_tokens=64)
    assert np.all(np.diff(s.arrival_s) >= 0)
    assert np.all((s.arrival_s >= 0) & (s.arrival_s < duration))
    assert np.all(s.prompt_blocks * 64 <= s.prompt_tokens)
    assert len(s.blocks) == s.block_count.sum()

"""`python -m steersman.runtime.workload`, the statistics that it prints, and the real traces."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from simulated import episode

from steersman.runtime.configs import find_config
from steersman.runtime.workload import load_workload
from steersman.runtime.workload.__main__ import main
from steersman.runtime.workload._lengths import Lengths
from steersman.runtime.workload._statistics import cached_tokens, statistics

real_traces = pytest.mark.skipif(
    "STEERSMAN_TRACES" not in os.environ,
    reason="set STEERSMAN_TRACES to a folder with the Azure and Mooncake traces",
)

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{i:02},{100 + i},{i + 1}\n" for i in range(50)
)


def test_fit_prints_tables_that_a_workload_takes(tmp_path, capsys):
    (tmp_path / "t.csv").write_text(TRACE)
    assert main(["fit", str(tmp_path / "t.csv"), "--min-output", "11"]) == 0
    tables = yaml.safe_load(capsys.readouterr().out)
    prompt = Lengths.model_validate(tables["prompt_tokens"])
    assert prompt.quantiles[0] == 110
    assert prompt.quantiles[1] == 149


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "none.csv"], "none.csv: cannot be read: No such file or directory"),
        (["fit", "t.csv", "--min-output", "99"], "t.csv: no request has 99 or more output tokens"),
        (["show", "nothing"], "there is no file nothing"),
        (["show", "smoke", "--set", "durations_s=3"], "did you mean 'duration_s'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "t.csv").write_text(TRACE)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_show_prints_a_row_for_each_tenant_and_one_for_all(capsys):
    assert main(["show", "smoke", "--episodes", "3"]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == ["| chat", "| agent", "| all"]


def test_cached_tokens_are_those_of_blocks_that_an_earlier_request_had():
    requests = episode([0, 1, 2], prompt=[130, 200, 130], output=5, prefixes=[1, 1, 2])
    assert cached_tokens(requests).tolist() == [0, 128, 0]
    assert statistics([requests]).prefix_share == pytest.approx(128 / 460)


def test_blocks_that_an_output_filled_count_as_cached():
    requests = episode([0, 1], prompt=[64, 200], output=70, prefixes=[1, 1])
    requests.table["block_count"][0] = 1
    assert cached_tokens(requests).tolist() == [0, 64]


@real_traces
def test_the_whole_azure_trace_has_its_published_rate_and_lengths():
    source = load_workload(find_config("workloads", "azure"))
    assert source.offered_rps == pytest.approx(3 * (5.53 + 2.57), rel=0.01)
    both = [statistics([source.sample(s, split=split) for s in range(30)]) for split in ("train", "held-out")]
    assert [s.rate_rps for s in both] == pytest.approx([24.3, 24.3], rel=0.15)


@real_traces
def test_the_whole_mooncake_trace_has_its_known_prefix_share():
    whole = ["tenants.conversation.source.train_share=0.9999"]
    requests = load_workload(find_config("workloads", "mooncake"), whole).sample(0, duration_s=3530)
    s = statistics([requests])
    assert s.prefix_share == pytest.approx(0.373, abs=0.003)
    assert s.prompt_tokens == pytest.approx([6909, 27367, 85400], rel=0.02)


@real_traces
def test_the_shipped_tables_are_what_fit_prints(capsys):
    folder = Path(os.environ["STEERSMAN_TRACES"])
    tenants = yaml.safe_load(find_config("workloads", "default").read_text())["tenants"]
    for file, minimum, tenant, columns in [
        ("AzureLLMInferenceTrace_conv.csv", 1, "chat", ("prompt_tokens", "output_tokens")),
        ("AzureLLMInferenceTrace_conv.csv", 500, "long", ("prompt_tokens", "output_tokens")),
        ("mooncake_conversation.jsonl", 1, "rag", ("output_tokens",)),
    ]:
        main(["fit", str(folder / file), "--min-output", str(minimum)])
        tables = yaml.safe_load(capsys.readouterr().out)
        for column in columns:
            assert tables[column] == tenants[tenant]["source"][column]


@real_traces
def test_episodes_of_real_traces_repeat_for_a_seed():
    for name in ("azure", "mooncake"):
        source = load_workload(find_config("workloads", name))
        first, again = (source.sample(5, duration_s=60) for _ in range(2))
        assert first.table.tobytes() == again.table.tobytes()
        assert np.array_equal(first.blocks, again.blocks)

import subprocess
import sys

import comparisons
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from steersman.training import tags
from steersman.training.dashboard import Dashboard
from steersman.training.layout import layout

POLICIES = {"round-robin": 2.0, "jsed": 1.4, "learned (cma-es)": 0.7}
HYPER_PARAMETERS = {"algorithm": "cma-es", "seed": 3, "hidden": "[32]"}
STEPS = [100, 200, 400]


def events(folder):
    # 0: keep every event.
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return accumulator.Reload()


def scalars(folder):
    accumulator = events(folder)
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run: preparations, two phases, the final comparison, figures."""
    folder = tmp_path_factory.mktemp("run")
    summaries, episodes = comparisons.field(POLICIES)
    dashboard = Dashboard(folder, list(comparisons.TENANTS), comparisons.REPLICAS)
    dashboard.scalars(1, {"tune/jsed/worth": 0.7, "train/loss/imitation": 0.5})
    dashboard.reference(summaries[1], 0.75)
    dashboard.phase("cma-es", budget=400)
    for step in STEPS:
        dashboard.evaluation(step, summaries[2], {"train/reward": step / 1000, "train/sigma": 0.1})
    dashboard.phase("ppo", budget=4000)
    dashboard.scalars(2000, {"train/reward": -0.5, "train/loss/value": float("nan"), "train/kl": 0.01})
    dashboard.evaluation(4000, summaries[2], {})
    dashboard.final(summaries, episodes, HYPER_PARAMETERS)
    pictures = dashboard.save_figures(folder / "figures")
    dashboard.close()
    return folder, summaries, pictures


def test_an_evaluation_writes_what_tenants_and_replicas_saw(run):
    folder, summaries, _ = run
    learned, values = summaries[2], scalars(folder / "cma-es")
    expected = {
        "slo/attainment/all": learned.attainment,
        "slo/attainment/worst": learned.worst_tenant_attainment,
        "slo/attainment/chat": learned.tenants["chat"].attainment,
        "slo/attainment/code-completion": learned.tenants["code-completion"].attainment,
        "slo/goodput_rps": learned.goodput_rps,
        "latency/ttft_p99_s/chat": learned.tenants["chat"].ttft_s.p99,
        "latency/tpot_p99_s/code-completion": learned.tenants["code-completion"].tpot_s.p99,
        "actions/h100-1": learned.replicas[1].share,
        "actions/shed": learned.shed / learned.arrived,
        "replica/busy/h100-0": 0.75,
        "replica/occupancy/l40s": learned.replicas[2].occupancy,
        "replica/kv_use/l40s": learned.replicas[2].kv_use,
    }
    assert {tag: values[tag][1000] for tag in expected} == pytest.approx(expected, rel=1e-6)


def test_shares_of_requests_add_up(run):
    values = scalars(run[0] / "cma-es")
    assert sum(v[1000] for tag, v in values.items() if tag.startswith("actions/")) == pytest.approx(1)


def test_a_tenant_called_all_does_not_overwrite_the_whole(run):
    folder, summaries, _ = run
    values = scalars(folder / "cma-es")
    assert values["slo/attainment/all (tenant)"][1000] == pytest.approx(summaries[2].tenants["all"].attainment)
    assert values["slo/attainment/all"][1000] == pytest.approx(summaries[2].attainment)


def test_steps_are_thousandths_of_the_budget_and_the_own_steps_are_kept(run):
    values = scalars(run[0] / "cma-es")
    assert values["train/reward"] == pytest.approx({250: 0.1, 500: 0.2, 1000: 0.4})
    assert values["train/steps"] == {250: 100, 500: 200, 1000: 400}


def test_without_a_budget_steps_are_the_given_ones(run):
    assert scalars(run[0])["train/loss/imitation"] == {1: 0.5}


def test_the_best_heuristic_is_a_level_line_over_the_same_tags(run):
    folder, summaries, _ = run
    line = scalars(folder / "best-heuristic")
    assert line["slo/attainment/all"] == pytest.approx(
        dict.fromkeys([250, 500, 1000], summaries[1].attainment), rel=1e-6
    )
    assert set(line) == {tag for tag in scalars(folder / "cma-es") if not tag.startswith("train/")}


def test_the_line_never_goes_back_when_a_later_phase_has_smaller_steps(tmp_path):
    summaries, _ = comparisons.field(POLICIES)
    dashboard = Dashboard(tmp_path, list(comparisons.TENANTS), comparisons.REPLICAS)
    dashboard.reference(summaries[0], 0.5)
    for phase, step in (("first", 500), ("second", 50), ("second", 600)):
        dashboard.phase(phase)
        dashboard.evaluation(step, summaries[1], {})
    dashboard.close()
    accumulator = events(tmp_path / "best-heuristic")
    assert [e.step for e in accumulator.Scalars(tags.ATTAINMENT_ALL)] == [500, 600]


def test_values_that_are_not_finite_are_left_out(run):
    values = scalars(run[0] / "ppo")
    assert "train/loss/value" not in values
    assert "train/kl" in values


def test_a_tenant_without_completions_has_no_latency():
    dead = comparisons.summary("dead", [comparisons.episode(0, 1.0, shed=1.0)])
    watched = tags.watched(dead)
    assert not [tag for tag in watched if tag.startswith("latency/")]
    assert watched["actions/shed"] == 1.0


def test_a_resumed_run_keeps_the_charts_and_the_line_of_the_first_part(tmp_path):
    summaries, _ = comparisons.field(POLICIES)

    def part(phase, step, figures):
        dashboard = Dashboard(tmp_path, list(comparisons.TENANTS), comparisons.REPLICAS)
        dashboard.reference(summaries[0], 0.5)
        dashboard.phase(phase)
        dashboard.evaluation(step, summaries[1], figures)
        dashboard.close()

    part("first", 500, {"train/sigma": 0.1, "train/entropy": 1.0})
    for path in (tmp_path / "first").iterdir():
        path.write_bytes(path.read_bytes()[:-7])  # killed while it wrote the last event
    part("second", 50, {"train/kl": 0.1})
    # Both parts may fall into one second here, and then file names do not tell the later one.
    latest = max(tmp_path.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    assert {"Search: step size σ", "KL between updates"} <= set(charts(latest)["Learning"])
    assert [e.step for e in events(tmp_path / "best-heuristic").Scalars(tags.ATTAINMENT_ALL)] == [500]


def charts(folder):
    tensor = events(folder).Tensors("custom_scalars__config__")[-1].tensor_proto
    parsed = Layout.FromString(tensor.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in parsed.category}


def test_the_layout_tells_the_story_in_order(run):
    shown = charts(run[0])
    assert list(shown) == [
        "Does it beat the heuristics?",
        "Latency",
        "Where requests go",
        "Replicas",
        "Learning",
    ]
    assert list(shown["Does it beat the heuristics?"])[:3] == [
        "Attainment, all requests",
        "Attainment, worst tenant",
        "Goodput (req/s)",
    ]
    assert "TTFT P99 (s), chat" in shown["Latency"]
    assert len(shown["Where requests go"]["Share of requests, h100"]) == 2
    assert {"Reward", "Losses", "KL between updates"} <= set(shown["Learning"])


def test_every_chart_of_the_layout_shows_exactly_the_tags_it_names(run):
    import re

    folder = run[0]
    written = {tag for part in ("", "cma-es", "ppo", "best-heuristic") for tag in scalars(folder / part)}
    patterns = [p for chart in charts(folder).values() for tags_ in chart.values() for p in tags_]
    assert patterns
    # As TensorBoard does it: a match from the start of a tag.
    assert all(sum(bool(re.match(p, tag)) for tag in written) == 1 for p in patterns)


def test_replicas_of_too_many_kinds_share_one_chart():
    names = [f"r{i}" for i in range(30)]
    shown = layout({tags.busy(name) for name in names}, [], names)
    assert list(shown) == ["Replicas"]
    assert [len(chart[1]) for chart in shown["Replicas"].values()] == [30]


def test_the_comparison_is_there_as_pictures_and_as_a_table(run):
    folder, _, pictures = run
    accumulator = events(folder)
    assert set(accumulator.Tags()["images"]) == {
        tags.GOODPUT_BARS,
        tags.ATTAINMENT_BARS,
        tags.TTFT_CDF,
        tags.TPOT_CDF,
    }
    image = accumulator.Images(tags.TTFT_CDF)[0]
    assert image.width > 500
    assert image.encoded_image_string.startswith(b"\x89PNG")
    table = accumulator.Tensors(f"{tags.COMPARISON_TABLE}/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(policy in table for policy in POLICIES)
    assert [p.name for p in pictures] == ["goodput.png", "attainment.png", "ttft_cdf.png", "tpot_cdf.png"]
    assert all(p.stat().st_size > 5000 for p in pictures)


def test_hyper_parameters_stand_beside_the_final_figures_in_the_run_itself(run):
    folder, summaries, _ = run
    content = {
        tag: HParamsPluginData.FromString(data) for tag, data in events(folder).PluginTagToContent("hparams").items()
    }
    started = content["_hparams_/session_start_info"].session_start_info.hparams
    assert started["algorithm"].string_value == "cma-es"
    assert started["seed"].number_value == 3
    named = [m.name.tag for m in content["_hparams_/experiment"].experiment.metric_infos]
    values = scalars(folder)
    assert set(named) == {tag for tag in values if tag.startswith("final/")}
    assert values[tags.FINAL_GOODPUT_RATIO][0] == pytest.approx(summaries[2].goodput_rps / summaries[1].goodput_rps)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"cma-es", "ppo", "best-heuristic", "figures"}


def test_pictures_use_no_global_state_and_training_code_loads_no_tensorboard():
    code = (
        "import sys, steersman.training.dashboard, steersman.training.report\n"
        "assert not {'tensorboard', 'torch', 'matplotlib'} & set(sys.modules)\n"
        "import steersman.training.figures\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

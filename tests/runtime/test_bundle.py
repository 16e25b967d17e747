"""The policy bundle: a round trip, and one sentence for everything that can be wrong with it."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bundles import ARCHITECTURE, WEIGHTS, export
from encoded import situations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steersman.runtime import archive, manifest
from steersman.runtime.bundle import load_bundle, load_serving, open_bundle, write_bundle
from steersman.runtime.errors import UserError
from steersman.runtime.network import Architecture, parameters, unpack
from steersman.runtime.observation import FEATURES, WIDTH
from steersman.runtime.policy import BoundPolicy, pick
from steersman.runtime.serving import OnnxPolicy
from steersman.training.export import onnx_graph


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(tmp_path / "bundle")


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    return export(tmp_path / "policy.zip")


def refusal(path: Path) -> str:
    """The sentence with which both ways of loading refuse a bundle."""
    with pytest.raises(UserError) as caught:
        load_serving(path)
    with pytest.raises(UserError) as other:
        load_bundle(path)
    assert str(caught.value) == str(other.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change policy.json and seal it again, as a writer of another version would."""
    path = folder / "policy.json"
    data = json.loads(path.read_text())
    change(data)
    data["sha256"] = manifest.digest(data)
    path.write_text(json.dumps(data))


def replace_graph(folder: Path, graph: bytes) -> None:
    """Put another graph in and describe it rightly."""
    (folder / "policy.onnx").write_bytes(graph)
    described = {"sha256": hashlib.sha256(graph).hexdigest(), "bytes": len(graph)}
    rewrite(folder, lambda data: data.update(graph=described))


def rezip(path: Path, entries: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)


# Round trips


@pytest.mark.parametrize("name", ["bundle", "policy.zip"])
def test_a_bundle_gives_back_the_policy(tmp_path: Path, name: str) -> None:
    bundle = open_bundle(export(tmp_path / name))
    architecture, weights = unpack(bundle.compiled.values)
    assert (architecture, bundle.compiled.name, bundle.serving.name) == (ARCHITECTURE, "learned", "learned")
    assert (weights == WEIGHTS).all()
    assert bundle.manifest.seeds == {"run": 3}
    assert bundle.manifest.scorecard["ratio"] is None
    assert bundle.manifest.observation.features == tuple(f.name for f in FEATURES)


def test_served_and_compiled_choose_alike(folder: Path) -> None:
    compiled, served = load_bundle(folder).bind(), open_bundle(folder).serving
    for rows, mask in situations(300):
        exact, scores = compiled.score(rows, mask), served.score(rows, mask)
        assert exact[pick(exact, mask)] - exact[pick(scores, mask)] <= 1e-5 * np.abs(exact[mask]).max()


def test_an_mlp_is_served_by_the_graph_and_what_is_linear_compiled(tmp_path: Path) -> None:
    for hidden, form in (((), BoundPolicy), ((8,), OnnxPolicy)):
        architecture = Architecture(hidden=hidden)
        weights = np.zeros(parameters(architecture))
        made = export(tmp_path / str(hidden), architecture=architecture, weights=weights)
        assert isinstance(load_serving(made), form)


def test_scores_are_the_callers_to_keep(folder: Path) -> None:
    served = open_bundle(folder).serving
    (rows, mask), (others, _) = list(situations(2))
    first = served.score(rows, mask)
    kept = first.copy()
    served.score(others, mask)
    assert (first == kept).all()


def test_a_run_folder_stands_for_its_bundle(tmp_path: Path) -> None:
    export(tmp_path / "run" / "bundle")
    assert load_bundle(tmp_path / "run").name == "learned"


def test_a_zipped_folder_is_a_bundle(folder: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path, "bundle")
    assert load_bundle(tmp_path / "made.zip").name == "learned"


def test_a_second_export_replaces_the_first(folder: Path, zipped: Path) -> None:
    for path in (folder, zipped):
        export(path, name="second")
        assert load_bundle(path).name == "second"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["bundle", "policy.zip"]


def test_serving_needs_neither_torch_nor_onnx(folder: Path) -> None:
    code = (
        "import sys; from steersman.runtime import bundle; assert 'onnxruntime' not in sys.modules;"
        f"bundle.load_serving({str(folder)!r}); bundle.load_bundle({str(folder)!r});"
        "print([m for m in ('torch', 'onnx', 'gymnasium') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# Damage


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / data.draw(st.sampled_from(["policy.onnx", "policy.json"]))
    whole = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    broken = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    try:
        harmless = path.suffix == ".json" and json.loads(broken) == json.loads(whole)  # white space
    except ValueError:
        harmless = False
    path.write_bytes(broken)
    try:
        if not harmless:
            assert path.name in refusal(folder)
    finally:
        path.write_bytes(whole)


def test_a_truncated_graph_is_refused(folder: Path) -> None:
    path = folder / "policy.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    assert "bytes instead of" in refusal(folder)


def test_a_truncated_manifest_is_refused(folder: Path) -> None:
    path = folder / "policy.json"
    path.write_bytes(path.read_bytes()[:200])
    assert "policy.json: not valid JSON" in refusal(folder)


@pytest.mark.parametrize("name", ["policy.json", "policy.onnx"])
def test_a_missing_file_is_named(folder: Path, zipped: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name}: missing" in refusal(folder)
    rezip(zipped, [(other, b"{}") for other in archive.FILES if other != name])
    assert f"{name} is missing" in refusal(zipped)


def test_a_folder_without_a_bundle_says_what_to_do(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "name a run folder or a bundle folder" in refusal(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert "steersman train --resume" in refusal(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "policy.onnx").unlink()
    (folder / "policy.onnx").mkdir()
    assert "policy.onnx: not a file" in refusal(folder)


# Other things in the place of the graph


def torch_checkpoint() -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "called"),
    [
        *[(pickle.dumps({"a": 1}, protocol=p), "a Python pickle") for p in (0, 2, 4, 5)],
        (torch_checkpoint(), "a torch checkpoint"),
        (b"\x93NUMPY\x01\x00", "a numpy array"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"", "empty"),
        (b"hello", "not an ONNX graph"),
    ],
)
def test_what_is_no_graph_is_called_by_its_name(folder: Path, content: bytes, called: str) -> None:
    replace_graph(folder, content)
    assert f"policy.onnx: {called}" in refusal(folder).replace("a zip archive or ", "")


def test_a_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    for name in archive.FILES:
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / name).write_bytes(pickle.dumps(Evil()))
        assert name in refusal(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")
    assert not (tmp_path / "owned").exists()


def test_a_damaged_graph_of_the_right_hash_is_refused(folder: Path) -> None:
    graph = (folder / "policy.onnx").read_bytes()
    replace_graph(folder, graph[: len(graph) // 2])
    assert "ONNX Runtime cannot load it" in refusal(folder)


def test_a_graph_with_other_inputs_is_refused(folder: Path) -> None:
    model = onnx.load_from_string((folder / "policy.onnx").read_bytes())
    model.graph.input[0].name = "observation"
    for node in model.graph.node:
        node.input[:] = ["observation" if name == "rows" else name for name in node.input]
    replace_graph(folder, model.SerializeToString())
    assert "takes float rows (candidates, 41)" in refusal(folder).replace(str(WIDTH), "41")


def test_a_graph_of_other_weights_is_refused(folder: Path) -> None:
    replace_graph(folder, onnx_graph(ARCHITECTURE, WEIGHTS * 1.01))
    assert "off those of the weights in policy.json" in refusal(folder)


def test_nan_weights_in_the_graph_are_refused(folder: Path) -> None:
    model = onnx.load_from_string((folder / "policy.onnx").read_bytes())
    for tensor in model.graph.initializer:
        if tensor.name == "bilinear":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[0, 0] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, "bilinear"))
    replace_graph(folder, model.SerializeToString())
    assert "is not finite" in refusal(folder)


# The manifest


def test_another_format_is_refused_before_anything_else(folder: Path) -> None:
    rewrite(folder, lambda data: data.update(format=1, novelty=1))
    assert "bundle format 1, but this version reads format 2" in refusal(folder)


def test_another_schema_is_refused_with_the_features_that_differ(folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        names = [name for name in data["observation"]["features"] if name != "burst"]
        data["observation"] = {"version": 0, "hash": "0" * 16, "features": ["moon_phase", *names]}

    rewrite(folder, change)
    sentence = refusal(folder)
    assert "this version no longer has moon_phase; it does not know burst" in sentence


def test_a_schema_of_other_meaning_is_refused(folder: Path) -> None:
    rewrite(folder, lambda data: data["observation"].update(hash="0" * 16))
    assert "same names, but another order, unit, range or meaning" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(sumary="x"), "unknown key 'sumary'; did you mean 'summary'?"),
        (lambda d: d.pop("architecture"), "'architecture' is required"),
        (lambda d: d.update(observation=None), "policy.json: observation"),
        (lambda d: d["architecture"].update(gates=["brust"]), "did you mean 'burst'"),
        (lambda d: d["weights"].pop(), "weights, but its architecture has"),
        (lambda d: d["weights"].__setitem__(0, None), "'weights.0'"),
        (lambda d: d["weights"].__setitem__(0, 1e300), "'weights.0': input should be less than"),
    ],
)
def test_a_wrong_key_is_named(folder: Path, change: Callable[[dict[str, Any]], Any], sentence: str) -> None:
    rewrite(folder, change)
    assert sentence in refusal(folder)


@pytest.mark.parametrize("text", ["", "weights: 1", "[]", "null", '{"format": NaN}', "[" * 100_000, "\xff\xfe"])
def test_a_manifest_that_is_no_json_mapping_is_refused(folder: Path, text: str) -> None:
    (folder / "policy.json").write_bytes(text.encode("latin-1"))
    assert "policy.json: " in refusal(folder)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    path = folder / "policy.json"
    path.write_text(path.read_text().replace("1.5", "9.5"))
    assert "altered since it was written" in refusal(folder)


# Zips


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "..\\evil", "C:\\evil"])
def test_a_zip_that_points_outside_is_refused(zipped: Path, name: str) -> None:
    with zipfile.ZipFile(zipped) as file:
        entries = [(entry, file.read(entry)) for entry in file.namelist()]
    rezip(zipped, [*entries, (name, b"x")])
    assert "points outside of the archive" in refusal(zipped)


def test_a_zip_bomb_is_refused_unopened(zipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST", 1 << 20)
    rezip(zipped, [("policy.json", b"{}"), ("policy.onnx", bytes(8 << 20))])
    assert "8 MiB, but no bundle's file has over 1" in refusal(zipped)


def test_a_zip_that_lies_about_its_sizes_is_refused(zipped: Path) -> None:
    with zipfile.ZipFile(zipped) as file:
        size = file.getinfo("policy.onnx").file_size
    data = zipped.read_bytes()
    zipped.write_bytes(data.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    assert "policy.zip" in refusal(zipped)


def test_a_zip_of_many_entries_is_refused(zipped: Path) -> None:
    rezip(zipped, [(f"{i}", b"") for i in range(100)])
    assert "100 entries" in refusal(zipped)


def test_a_zip_with_two_bundles_is_refused(zipped: Path) -> None:
    rezip(zipped, [(f"{folder}/{name}", b"{}") for folder in "ab" for name in archive.FILES])
    assert "stands 2 times" in refusal(zipped)


def test_a_truncated_zip_is_refused(zipped: Path) -> None:
    zipped.write_bytes(zipped.read_bytes()[:-50])
    assert "not a bundle's zip, or a damaged one" in refusal(zipped)


# Writing


def test_nan_weights_are_never_written(tmp_path: Path) -> None:
    broken = WEIGHTS.copy()
    broken[0] = np.nan
    with pytest.raises(UserError, match=f"1 of {len(WEIGHTS)} weights are not finite"):
        export(tmp_path / "bundle", weights=broken)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_contradicts_its_weights_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="off those of the weights"):
        write_bundle(
            tmp_path / "bundle",
            graph=onnx_graph(ARCHITECTURE, WEIGHTS + 0.1),
            architecture=ARCHITECTURE,
            weights=WEIGHTS,
            name="learned",
            fleet={},
            workload={},
            command="",
            seeds={},
            scorecard={},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is no part of a bundle"):
        export(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failed_replacement_leaves_the_old_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        export(folder, name="second")
    assert load_bundle(folder).name == "learned"
    assert [p.name for p in folder.parent.iterdir()] == ["bundle"]

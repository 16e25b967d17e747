"""The documentation of heuristics says what is there, and its example runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from situations import choice, situation

from steersman.agents.policies import heuristics, resolve
from steersman.runtime.observation import COLUMN

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_names_every_heuristic_with_its_parameters() -> None:
    table = {
        cells[0].strip(" `"): cells
        for line in (DOCS / "heuristics.md").read_text().splitlines()
        if len(cells := line.strip("|").split("|")) == 4
    }
    for name, policy in heuristics().items():
        for key, param in policy.params.items():
            assert f"{key} {param.default:g}" in table[name][3].replace("`", ""), f"{name}: {key} {param.default:g}"
    assert set(heuristics()) == set(table) - {"name", "---"}


@pytest.mark.parametrize("name", sorted(heuristics()))
def test_the_table_and_the_docstring_name_only_columns_that_exist(name: str) -> None:
    module = importlib.import_module(f"steersman.agents.heuristics.{name.replace('-', '_')}")
    assert module.__doc__ is not None
    _, found, inputs = module.__doc__.partition("Inputs: ")
    assert found, "the docstring lists the inputs"
    listed = inputs.partition("\n\n")[0]
    used = [key for key in COLUMN if re.search(rf"\b{key}\b", listed)]
    source = Path(str(module.__file__)).read_text()
    assert sorted(set(re.findall(r'COLUMN\["(\w+)"\]', source))) == sorted(used)


def test_the_example_of_a_new_heuristic_works_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "add-a-heuristic.md").read_text()
    module, check = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "cheapest_in_time.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("steersman.runtime.compiled.cache_folder", lambda: str(tmp_path / "cache"))
    policy = resolve("cheapest_in_time:POLICY?margin=0.5")
    assert policy.values == pytest.approx([0.5])
    assert choice(policy, situation(3, price=[3, 1, 2], ttft_slack=[0.9, 0.4, 0.6])) == 2
    names: dict[str, object] = {}
    exec(compile(check, "add-a-heuristic.md", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        assert callable(test)
        test()

"""Gateway files."""

from __future__ import annotations

from pathlib import Path

import pytest

from steersman.runtime.config import read_yaml, validate
from steersman.runtime.configs import find_config
from steersman.runtime.errors import UserError
from steersman.runtime.fleet import load_fleet
from steersman.runtime.gateway.access import Access
from steersman.runtime.gateway.config import GatewayConfig

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "gateways").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_fit_their_fleets(path: Path) -> None:
    config = validate(GatewayConfig, read_yaml(path), str(path))
    assert Access(load_fleet(find_config("fleets", config.fleet)), config.tenants).rows


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tenant": {}}, "tenant"),
        ({"tenants": {"a/b": {"slo": {"ttft_s": 1, "tpot_s": 1}}}}, "slash"),
        ({"port": 70000}, "port"),
        ({"http": {"body_bytes": 0}}, "http.body_bytes"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        validate(GatewayConfig, values, "gateway.yaml")

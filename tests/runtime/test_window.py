"""A window of live service, summarised as episodes are."""

from __future__ import annotations

import numpy as np
import pytest
from backends import Prefer, serving

from steersman.runtime.gateway.window import Window
from steersman.training import tags

PATH, BODY = "/v1/completions", {"model": "m", "prompt": "hello", "max_tokens": 3}


async def test_a_window_counts_what_ended_in_it_and_begins_anew() -> None:
    async with serving(Prefer(0, 1)) as s:
        window = s.gateway.window = Window(s.gateway.scheduler, s.gateway.access.rows)
        for stream in (True, True, False):
            async with s.client.post(PATH, json={**BODY, "stream": stream}) as response:
                await response.read()
        await s.idle()
        summary = window.summary(window.take(), "prefer")
        assert summary is not None
        assert (summary.arrived, summary.attainment, summary.tenants["strict"].arrived) == (3, 1.0, 3)
        assert summary.replicas[0].share == 1.0
        assert summary.ttft_s.p50 > 0
        after = window.summary(window.take(), "prefer")
        assert after is None or after.arrived == 0


async def test_live_curves_have_the_names_of_training() -> None:
    async with serving(Prefer(3)) as s:
        window = s.gateway.window = Window(s.gateway.scheduler, s.gateway.access.rows)
        async with s.client.post(PATH, json=BODY) as response:
            assert response.status == 503
        summary = window.summary(window.take(), "prefer")
        assert summary is not None
        shown = tags.watched(summary)
        assert shown[tags.ATTAINMENT_ALL] == 0.0
        assert shown[tags.ACTION_SHED] == pytest.approx(1.0)
        assert np.isfinite(list(shown.values())).all()

"""What a decision is made on as one record: in one piece of memory, so that who keeps it copies once."""

from __future__ import annotations

import numpy as np

from steersman.runtime.observation import WIDTH


def situation(candidates: int) -> np.dtype:
    """A record of `rows` float32 (C, WIDTH), `mask` bool (C,) and `reasons` int8 (C,), without gaps."""
    return np.dtype(
        [
            ("rows", np.float32, (candidates, WIDTH)),
            ("mask", np.bool_, (candidates,)),
            ("reasons", np.int8, (candidates,)),
        ]
    )

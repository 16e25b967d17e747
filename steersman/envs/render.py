"""Pictures of what the observation says of the replicas: queue, batch and KV use of each."""

from __future__ import annotations

import numpy as np

from steersman.runtime.observation import COLUMN

BAR = 20
_RUNNING, _WAITING, _LIMIT = COLUMN["running"], COLUMN["waiting"], COLUMN["max_num_seqs"]
_KV, _TTFT, _PROMPT = COLUMN["kv_use"], COLUMN["predicted_ttft"], COLUMN["prompt_tokens"]

# Of the picture, in pixels and RGB.
ROW, WIDTH, NAME, MARGIN = 34, 640, 110, 12
GROUND, GROOVE, INK = (250, 250, 248), (228, 228, 224), (40, 40, 44)
BATCH, MEMORY, QUEUE = (46, 110, 180), (92, 160, 110), (210, 120, 50)


def ansi(rows: np.ndarray, names: list[str], now_s: float) -> str:
    """One line a replica: batch over its limit, queue, KV use, and the predicted TTFT of the request at hand."""
    width = max(len(name) for name in names)
    lines = [f"t = {now_s:.2f} s   a request of {rows[-1, _PROMPT]:.0f} prompt tokens"]
    for name, row in zip(names, rows, strict=False):
        batch = row[_RUNNING] / max(1.0, row[_LIMIT])
        lines.append(
            f"{name:<{width}}  batch {_bar(batch)} {row[_RUNNING]:3.0f}/{row[_LIMIT]:<3.0f}  "
            f"queue {row[_WAITING]:3.0f}  KV {_bar(row[_KV])} {row[_KV]:4.0%}  TTFT {row[_TTFT]:6.2f} s"
        )
    return "\n".join(lines)


def _bar(share: float) -> str:
    full = round(BAR * min(1.0, max(0.0, float(share))))
    return "█" * full + "·" * (BAR - full)


def rgb_array(rows: np.ndarray, names: list[str], now_s: float) -> np.ndarray:
    """uint8 (height, 640, 3): a line a replica with its batch (blue), KV use (green) and queue (orange)."""
    from PIL import Image, ImageDraw

    height = MARGIN * 2 + 20 + ROW * len(names)
    image = Image.new("RGB", (WIDTH, height), GROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 4), f"t = {now_s:.2f} s", INK)
    for label, colour, x in (("batch", BATCH, 300), ("KV in use", MEMORY, 370), ("queue (32 full)", QUEUE, 460)):
        draw.rectangle((x, MARGIN - 1, x + 8, MARGIN + 7), colour)
        draw.text((x + 13, MARGIN - 4), label, INK)
    for i, (name, row) in enumerate(zip(names, rows, strict=False)):
        top = MARGIN + 20 + i * ROW
        draw.text((MARGIN, top + 8), name[:16], INK)
        shares = (
            (row[_RUNNING] / max(1.0, row[_LIMIT]), BATCH),
            (row[_KV], MEMORY),
            (row[_WAITING] / 32.0, QUEUE),
        )
        for k, (share, colour) in enumerate(shares):
            y, right = top + 3 + 9 * k, WIDTH - MARGIN
            draw.rectangle((NAME, y, right, y + 6), GROOVE)
            length = round((right - NAME) * min(1.0, max(0.0, float(share))))
            if length:
                draw.rectangle((NAME, y, NAME + length, y + 6), colour)
    return np.asarray(image)

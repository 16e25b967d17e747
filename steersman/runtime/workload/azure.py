"""Azure's LLM inference traces: CSV with TIMESTAMP, ContextTokens and GeneratedTokens.

Published by Microsoft (Azure public dataset 2023, CC-BY-4.0) with Patel et al., "Splitwise: Efficient
generative LLM inference using phase splitting", ISCA 2024. They hold no prefix information: no two prompts
share a block.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

import numpy as np

from steersman.runtime.errors import UserError
from steersman.runtime.plugins import nearest
from steersman.runtime.workload._blocks import chained
from steersman.runtime.workload._trace import (
    Parser,
    Trace,
    TraceSource,
    check_times,
    check_tokens,
    text_lines,
)

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def parse_azure(data: bytes, where: str) -> Trace:
    """The trace in the bytes of a CSV file; `where` names it in errors.

    Raises:
        UserError: with the line and what is wrong there.
    """
    lines = text_lines(data, where)
    header = [name.strip() for name in lines[0].split(",")]
    for name in COLUMNS:
        if name not in header:
            raise UserError(f"{where}:1: there is no column {name!r} in the header; {nearest(name, header)}")
    time, prompt, output = (header.index(name) for name in COLUMNS)
    times, prompts, outputs, numbers = [], [], [], []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        at = f"{where}:{number}"
        fields = line.split(",")
        if len(fields) != len(header):
            raise UserError(f"{at}: {len(fields)} fields, but the header has {len(header)}")
        times.append(_seconds(fields[time].strip(), at))
        prompts.append(check_tokens(_whole(fields[prompt].strip()), "ContextTokens", at))
        outputs.append(check_tokens(_whole(fields[output].strip()), "GeneratedTokens", at))
        numbers.append(number)
    time_s = check_times(np.array(times, float), numbers, where)
    n = len(time_s)
    return Trace(
        time_s,
        np.array(prompts, np.int64),
        np.array(outputs, np.int64),
        np.zeros(n + 1, np.int64),
        np.zeros(0, np.int64),
    )


_START = datetime(1970, 1, 1)


def _seconds(text: str, where: str) -> float:
    try:
        # A time zone is dropped: a trace has one throughout, and only differences count.
        return (datetime.fromisoformat(text).replace(tzinfo=None) - _START).total_seconds()
    except ValueError:
        raise UserError(f"{where}: TIMESTAMP {text[:40]!r} is not a time such as 2023-11-16 18:15:46.6805900") from None


def _whole(text: str) -> int | str:
    """A number where `text` is plainly one; otherwise the text, for the error."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else text


class Azure(TraceSource):
    """Requests of an Azure LLM inference trace."""

    parse: ClassVar[Parser] = staticmethod(parse_azure)

    def blocks(self, trace: Trace, rows: np.ndarray, lap: np.ndarray, block_tokens: int) -> np.ndarray:
        # Every prompt is a text of its own; its blocks still take room in the caches.
        return chained(trace.prompt_tokens[rows] // block_tokens, 0, 0, np.arange(len(rows)))


SOURCE = Azure

"""Prompts made of common words, about one token each, for replicas whose tokenizer is not at hand."""

from __future__ import annotations

import random

import numpy as np

WORDS: list[str] = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea body information back parent face others level office door health
person art war history party result change morning reason research girl guy moment air teacher force
education
""".split()  # noqa: SIM905


def words(seed: str, count: int) -> str:
    """`count` words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def prompt_text(keys: np.ndarray, block_tokens: int, prompt_tokens: int, own: int, salt: str) -> str:
    """A prompt of about `prompt_tokens` tokens: the words of its blocks, then words of its own.

    Equal keys give equal words, within one `salt`; `own` tells prompts apart after their blocks.
    """
    parts = [words(f"{salt} block {key}", block_tokens) for key in keys]
    rest = prompt_tokens - len(keys) * block_tokens
    if rest > 0:
        parts.append(words(f"{salt} own {own}", rest))
    return " ".join(parts)

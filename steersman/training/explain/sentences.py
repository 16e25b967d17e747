"""A decision and its reasons in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steersman.runtime.observation import CANDIDATE, COLUMN, FEATURES
from steersman.training.explain.contributions import LAYERS, LEANING, Contribution

REASONS, OBJECTIONS = 3, 2
WORTH_SAYING = 0.1  # of the largest contribution
DECISIVE = 1e4  # heuristics rank by such offsets; the number itself says nothing


class Phrase(NamedTuple):
    """How to speak of a feature: of its value, and of a replica that has more or less of it than another."""

    noun: str
    more: str
    less: str


def _compared(noun: str, more: str = "higher", less: str = "lower") -> Phrase:
    return Phrase(noun, f"its {noun} is {more}", f"its {noun} is {less}")


PHRASES = {
    "is_replica": Phrase("being a replica", "it is a replica", "it is none"),
    "inflight": Phrase("number of requests in flight", "it is busier", "it is less busy"),
    "prefilling": Phrase(
        "number of requests without a first token",
        "more wait for a first token there",
        "fewer wait for a first token there",
    ),
    "prefill_ahead": Phrase("prompt work ahead", "it has more prompt work ahead", "it has less prompt work ahead"),
    "context_tokens": Phrase(
        "tokens in decoding contexts", "its decoding contexts are longer", "its decoding contexts are shorter"
    ),
    "running": _compared("batch", "larger", "smaller"),
    "waiting": _compared("queue", "longer", "shorter"),
    "kv_use": Phrase("KV use", "more of its KV memory is in use", "less of its KV memory is in use"),
    "metrics_age": Phrase("age of its metrics", "its metrics are older", "its metrics are fresher"),
    "matched_tokens": Phrase(
        "cached part of the prompt", "it has more of the prompt cached", "it has less of the prompt cached"
    ),
    "uncached_tokens": Phrase(
        "part of the prompt to compute", "it has more of the prompt to compute", "it has less of the prompt to compute"
    ),
    "kv_tokens": _compared("KV memory", "larger", "smaller"),
    "max_num_seqs": _compared("batch limit"),
    "prefill_speed": Phrase("prefill speed", "it computes prompts faster", "it computes prompts more slowly"),
    "decode_step": _compared("decode step", "slower", "faster"),
    "prefill_time": Phrase(
        "time to compute the prompt", "it needs longer for the prompt", "it needs less time for the prompt"
    ),
    "predicted_ttft": _compared("predicted TTFT", "longer", "shorter"),
    "predicted_tpot": _compared("predicted TPOT", "longer", "shorter"),
    "ttft_slack": _compared("predicted TTFT slack"),
    "tpot_slack": _compared("predicted TPOT slack"),
    "ttft_chance": _compared("chance to meet the TTFT target"),
    "tpot_chance": _compared("chance to meet the TPOT target"),
    "kv_headroom": Phrase("KV headroom", "it keeps more KV memory free", "it keeps less KV memory free"),
    "prefill_load": Phrase(
        "share of time spent on prompts", "prompts take more of its time", "prompts take less of its time"
    ),
    "others_harmed": Phrase(
        "number of others harmed", "it would break more promises to others", "it would break fewer promises to others"
    ),
    "others_lost": Phrase(
        "number of others that miss their target anyway",
        "more there miss their target anyway",
        "fewer there miss their target anyway",
    ),
    "price": _compared("price"),
    "is_hold": Phrase("being hold", "it is hold", "it is not hold"),
    "patience": Phrase("patience left", "more patience is left", "less patience is left"),
    "prompt_tokens": _compared("prompt", "longer", "shorter"),
    "expected_output": _compared("expected output", "longer", "shorter"),
    "waited": _compared("wait so far", "longer", "shorter"),
    "ttft_slo": _compared("TTFT target", "looser", "tighter"),
    "tpot_slo": _compared("TPOT target", "looser", "tighter"),
    "tenant_weight": _compared("worth"),
    "tenant_attainment": _compared("tenant's attainment"),
    "worst_attainment": _compared("worst tenant's attainment"),
    "priority": _compared("priority"),
    "burst": _compared("burst of arrivals", "stronger", "weaker"),
    "best_ttft_slack": _compared("best TTFT slack of all replicas"),
    "best_tpot_slack": _compared("best TPOT slack of all replicas"),
    "mean_ttft_slack": _compared("mean TTFT slack of the replicas"),
    "occupancy": _compared("fleet's occupancy"),
    "held": _compared("number of held requests"),
    "slo_guessed": Phrase("guess at the SLOs", "its SLOs are a guess", "its SLOs are a promise"),
}
_OF_CANDIDATE = {feature.name for feature in CANDIDATE}
_REST = {LEANING: "it leans that way anyway", LAYERS: "its hidden layers say so"}


def value_text(feature: str, value: float) -> str:
    """A feature's value with its unit, for people."""
    unit = FEATURES[COLUMN[feature]].unit
    text = f"{value:g} {unit}"
    if unit == "s":
        text = f"{1000 * value:.0f} ms" if abs(value) < 1 else f"{value:.3g} s"
    elif unit == "share":
        text = f"{100 * value:.0f} %"
    elif unit in ("tokens", "requests", "tokens/s"):
        text = f"{value:,.0f} {unit}"
    elif unit in ("ratio", "worth"):
        text = f"{value:.2f}"
    elif unit == "currency/h":
        text = f"{value:.2f} per hour"
    return text.replace("-", "−")


def effect_text(effect: float) -> str:
    """A contribution with its sign; huge ones are ranks rather than amounts."""
    if abs(effect) >= DECISIVE:
        return "decisive" if effect > 0 else "ruled out"
    return f"{'+' if effect > 0 else '−'}{abs(effect):.2g}"


def sentence(what: str, reasons: Sequence[Contribution], between_replicas: bool) -> str:
    """`what` was decided and why: the largest contributions for it, then the largest against it.

    reasons: sorted by size. between_replicas: both candidates are replicas, so that one has more of a feature than the
    other; hold and shed have no features, so that the value itself is the reason.
    """
    if not reasons:
        return f"{what}, for no feature: by turns, by lot or by the order of the candidates."
    least = WORTH_SAYING * abs(reasons[0].effect)
    said = [c for c in reasons if abs(c.effect) >= least]
    pros = [_because(c, between_replicas) for c in said if c.effect > 0][:REASONS]
    cons = [_because(c, between_replicas) for c in said if c.effect < 0][:OBJECTIONS]
    text = what
    if pros:
        text += f" because {_joined(pros)}"
    if cons:
        text += f"{',' if pros else ''} although {_joined(cons)}"
    return text + "."


def _because(c: Contribution, between_replicas: bool) -> str:
    return f"{_reason(c, between_replicas)} ({effect_text(c.effect)})"


def _reason(c: Contribution, between_replicas: bool) -> str:
    if c.feature in _REST:
        return _REST[c.feature]
    phrase = PHRASES[c.feature]
    if between_replicas and c.feature in _OF_CANDIDATE and c.value != c.against:
        return phrase.more if c.value > c.against else phrase.less
    # Of hold and shed the column is zero; the value that matters is the replica's, the other of the two.
    value = c.value if abs(c.value) >= abs(c.against) else c.against
    noun = phrase.noun if c.feature == "patience" else f"its {phrase.noun}"
    owner = noun if c.feature in _OF_CANDIDATE else f"the {phrase.noun}"
    return f"{owner} is {value_text(c.feature, value)}"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 2 else parts)

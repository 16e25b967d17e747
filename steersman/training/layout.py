"""The custom-scalar layout: what TensorBoard's "Custom Scalars" tab shows, in the order to read it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from steersman.training import tags

MAX_KINDS = 8  # of replicas, a chart each

Layout = dict[str, dict[str, list]]

TITLES = {
    "train/sigma": "Search: step size σ",
    "train/entropy": "Entropy of the policy",
    "train/kl": "KL between updates",
    "train/explained_variance": "Explained variance of the value",
    "train/clip_fraction": "Share of clipped updates",
    "train/imitation_agreement": "Imitation: share of equal decisions",
}


def layout(written: Collection[str], tenants: Sequence[str], replicas: Sequence[str]) -> Layout:
    """Categories → charts → ["Multiline", regular expressions], for `SummaryWriter.add_custom_scalars`.

    A chart shows every run that has its tags, so the learned policy and the best heuristic share one. Only
    tags that are among `written` appear; charts and categories without any are left out.
    """
    known = set(written)
    train = sorted(t for t in known - {tags.REWARD, tags.STEPS} if t.startswith("train/"))
    train = [t for t in train if not t.startswith(tags.LOSSES)]
    kinds = _kinds(replicas)
    categories: dict[str, dict[str, list[str]]] = {
        "Does it beat the heuristics?": {
            "Attainment, all requests": [tags.ATTAINMENT_ALL],
            "Attainment, worst tenant": [tags.ATTAINMENT_WORST],
            "Goodput (req/s)": [tags.GOODPUT_RPS],
            **{f"Attainment, {name}": [tags.attainment(name)] for name in tenants},
        },
        "Latency": {
            **{f"TTFT P99 (s), {name}": [tags.ttft_p99_s(name)] for name in tenants},
            **{f"TPOT P99 (s), {name}": [tags.tpot_p99_s(name)] for name in tenants},
        },
        "Where requests go": {
            **{f"Share of requests, {kind}": [tags.action(r) for r in own] for kind, own in kinds.items()},
            "Share of requests, shed": [tags.ACTION_SHED],
        },
        "Replicas": {
            **{f"KV blocks in use, {kind}": [tags.kv_use(r) for r in own] for kind, own in kinds.items()},
            **{f"Occupancy, {kind}": [tags.occupancy(r) for r in own] for kind, own in kinds.items()},
            **{f"Busy, {kind}": [tags.busy(r) for r in own] for kind, own in kinds.items()},
        },
        "Learning": {
            "Reward": [tags.REWARD],
            "Losses": sorted(t for t in known if t.startswith(tags.LOSSES)),
            **{TITLES.get(tag, _plain(tag)): [tag] for tag in train},
            "Heuristics being tuned": sorted(t for t in known if t.startswith(tags.TUNED)),
        },
    }
    shown: Layout = {}
    for category, charts in categories.items():
        kept = {title: [t for t in chart if t in known] for title, chart in charts.items()}
        drawn = {
            # TensorBoard takes every entry as a regular expression that need match only a tag's beginning.
            title: ["Multiline", [f"{re.escape(t)}$" for t in chart]]
            for title, chart in kept.items()
            if chart
        }
        if drawn:
            shown[category] = drawn
    return shown


def _kinds(replicas: Sequence[str]) -> dict[str, list[str]]:
    """Replicas that differ by a number at the end share a chart; all of them do where there are too many."""
    kinds: dict[str, list[str]] = {}
    for name in replicas:
        kinds.setdefault(re.sub(r"[-_./ ]\d+$", "", name), []).append(name)
    return kinds if len(kinds) <= MAX_KINDS else {"all": list(replicas)}


def _plain(tag: str) -> str:
    words = tag.removeprefix("train/").replace("_per_s", " (per s)").replace("_", " ").replace("/", ", ")
    return words[:1].upper() + words[1:]

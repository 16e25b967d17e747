"""TensorBoard for a training run: curves against the best heuristic, the fleet, and the final comparison.

Under the run's folder, one TensorBoard run each:

    .                layout, tuning and imitation; at the end the comparison and the hyper-parameters
    <phase>/         the curves of one learning algorithm
    best-heuristic/  the same tags, constant: a line beside the learned curve in every chart

TensorBoard is imported when the first event is written, or found: a resumed run goes on in the same folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.runtime.outcomes import Episode, Summary
from steersman.training import tags
from steersman.training.layout import layout
from steersman.training.report import comparison_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

REFERENCE = "best-heuristic"
FLUSH_S = 5  # a dashboard that lags is not watched


class Dashboard:
    """Writes the events of one run. Close it at the end."""

    def __init__(self, folder: Path, tenants: Sequence[str], replicas: Sequence[str]) -> None:
        """folder: the run's. tenants, replicas: names, in the order in which charts show them."""
        self._folder = folder
        self._tenants, self._replicas = list(tenants), list(replicas)
        self._writers: dict[str, SummaryWriter] = {}
        self._phase, self._budget = "", 0
        self._reference: Summary | None = None
        self._written, self._reference_step = _earlier(folder)
        self._laid_out: set[str] = set()
        self._figures: dict[str, Figure] = {}

    def phase(self, name: str, budget: int = 0) -> None:
        """What follows belongs to the algorithm `name` and goes to a TensorBoard run of its own.

        budget: the steps that it will take in all, in its own unit (episodes of a search, decisions of PPO).
        Where it is given, TensorBoard's step is in thousandths of it, so that algorithms share an axis, and
        `train/steps` holds the algorithm's own.
        """
        self._phase, self._budget = name, budget

    def reference(self, summary: Summary, worth: float) -> None:
        """The best heuristic on the validation episodes: the line to beat."""
        self._reference = summary
        self._writer("").add_text(
            tags.BEST_HEURISTIC,
            f"**{summary.policy}**: worth {worth:.4f}, attainment {summary.attainment:.1%}, "
            f"goodput {summary.goodput_rps:.2f} req/s on the validation episodes",
        )

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Values by tag (docs/dashboard.md) at `step` of the present phase; those not finite are left out."""
        if self._budget:
            figures = {tags.STEPS: float(step), **figures}
        self._write(self._phase, self._scaled(step), figures)

    def evaluation(self, step: int, summary: Summary, figures: Mapping[str, float]) -> None:
        """How the policy in training did on the validation episodes, and other values of the same step."""
        self.scalars(step, {**tags.watched(summary), **figures})
        step = self._scaled(step)
        # A later phase with smaller steps must not turn the line back: TensorBoard would forget its end.
        if self._reference is not None and step > self._reference_step:
            self._reference_step = step
            self._write(REFERENCE, step, tags.watched(self._reference))
        self._lay_out()
        for writer in self._writers.values():
            writer.flush()

    def final(
        self,
        summaries: Sequence[Summary],
        episodes: Mapping[str, Sequence[Episode]],
        hyper_parameters: Mapping[str, str | float | bool],
        learned: str | None = None,
    ) -> None:
        """The comparison on held-out episodes: pictures, table, and hyper-parameters with what they led to.

        learned: the policy's name among `summaries`; default: the last one.
        """
        from steersman.training.figures import figures, render

        by_name = {s.policy: s for s in summaries}
        mine = by_name[learned] if learned is not None else summaries[-1]
        rivals = [s for s in summaries if s.policy != mine.policy]
        best = max(rivals, key=lambda s: s.goodput_rps, default=mine)
        if self._reference is not None and self._reference.policy in by_name:
            best = by_name[self._reference.policy]
        writer = self._writer("")
        self._figures = figures(summaries, episodes, mine.policy, best.policy)
        for tag, figure in self._figures.items():
            writer.add_image(tag, render(figure), dataformats="HWC")
        writer.add_text(tags.COMPARISON_TABLE, comparison_markdown(summaries, mine.policy))
        metrics = {
            tags.FINAL_ATTAINMENT: mine.attainment,
            tags.FINAL_WORST: mine.worst_tenant_attainment,
            tags.FINAL_GOODPUT_RPS: mine.goodput_rps,
            tags.FINAL_GOODPUT_RATIO: mine.goodput_rps / best.goodput_rps if best.goodput_rps else math.nan,
            tags.FINAL_TTFT_P99_S: mine.ttft_s.p99,
            tags.FINAL_TPOT_P99_S: mine.tpot_s.p99,
            tags.FINAL_COST: mine.cost_per_1000_good,
        }
        self._hyper_parameters(hyper_parameters, metrics)
        self._lay_out()
        writer.flush()

    def save_figures(self, folder: Path) -> list[Path]:
        """Write the pictures of `final` as PNG; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for tag, figure in self._figures.items():
            path = folder / f"{tag.rsplit('/', 1)[-1]}.png"
            figure.savefig(path)
            paths.append(path)
        return paths

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _scaled(self, step: int) -> int:
        return round(1000 * step / self._budget) if self._budget else step

    def _writer(self, name: str) -> SummaryWriter:
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[name] = SummaryWriter(str(self._folder / name), flush_secs=FLUSH_S)
        return self._writers[name]

    def _write(self, name: str, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer(name)
        for tag, value in values.items():
            if math.isfinite(value):
                writer.add_scalar(tag, float(value), step)
                self._written.add(tag)

    def _lay_out(self) -> None:
        """Write the layout again where there are new tags; TensorBoard shows the latest."""
        if self._written != self._laid_out:
            self._laid_out = set(self._written)
            self._writer("").add_custom_scalars(layout(self._written, self._tenants, self._replicas))

    def _hyper_parameters(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A line of the HParams tab (`SummaryWriter.add_hparams` would open a run named by the time)."""
        from torch.utils.tensorboard import summary

        protocol: Any = summary
        writer: Any = self._writer("")
        for message in protocol.hparams(dict(values), dict(metrics)):
            writer.file_writer.add_summary(message)
        self._write("", 0, metrics)


def _earlier(folder: Path) -> tuple[set[str], int]:
    """Scalar tags that the interrupted run wrote, and the last step of the reference line (-1: none)."""
    written: set[str] = set()
    last = -1
    for part in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(part), size_guidance={"images": 1, "tensors": 1}).Reload()
        tags_here = found.Tags()["scalars"]
        written.update(tags_here)
        if part == folder / REFERENCE:
            last = max((found.Scalars(tag)[-1].step for tag in tags_here), default=-1)
    return written, last

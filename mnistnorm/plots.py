"""Plots: curves of one or several runs, and grids of misclassified images."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from .data import Split

History = Sequence[Mapping[str, float]]

# The lowest and the highest accuracy in a plot: a logit scale has neither 0 nor 1.
ACCURACY_RANGE = (0.02, 0.9995)

# Okabe and Ito's palette, which is safe for colour-blind readers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Mistakes:
    """Misclassified images, the most confident mistakes first.

    Attributes:
        images: uint8, (N, 1, 28, 28).
        labels: true classes, (N,).
        predictions: predicted classes, (N,).
        total: number of images in the split.
    """

    images: Tensor
    labels: Tensor
    predictions: Tensor
    total: int

    @classmethod
    def of(cls, log_probs: Tensor, split: Split) -> "Mistakes":
        """The mistakes in `log_probs`, (N, classes), a network's output for `split`."""
        best, predictions = log_probs.max(1)
        wrong = predictions.ne(split.labels).nonzero().flatten()
        wrong = wrong[best[wrong].argsort(descending=True, stable=True)]
        found = split[wrong]
        return cls(found.images.cpu(), found.labels.cpu(), predictions[wrong].cpu(), len(split))

    def __len__(self) -> int:
        return len(self.labels)


def png(figure: Figure) -> bytes:
    """Renders `figure` as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def run_curves(history: History, title: str) -> Figure:
    """Loss and accuracy of one run, epoch by epoch, on each split it was measured on."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    splits = [split for split in ("train", "validation", "test") if f"{split}_loss" in history[0]]
    _draw_losses(loss_axes, {split: _values([history], f"{split}_loss") for split in splits})
    _draw_accuracies(accuracy_axes, {split: _values([history], f"{split}_accuracy") for split in splits})
    return figure


def comparison_curves(runs: Mapping[str, Sequence[History]], metric: str) -> Figure:
    """One line per norm, the mean over its seeds, with a band from the lowest to the highest.

    Args:
        runs: the histories of the seeds, by norm.
        metric: "loss" or "accuracy", on the test images.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines = {f"{norm} norm": _values(histories, f"test_{metric}") for norm, histories in runs.items()}
    seeds = max(len(histories) for histories in runs.values())
    figure.suptitle(f"Test {metric} by norm" + (f", mean and range of {seeds} seeds" if seeds > 1 else ""))
    (_draw_losses if metric == "loss" else _draw_accuracies)(axes, lines)
    return figure


def _values(histories: Sequence[History], key: str) -> np.ndarray:
    return np.array([[metrics[key] for metrics in history] for history in histories])  # [seeds, epochs]


def _draw_losses(axes: Axes, lines: Mapping[str, np.ndarray]) -> None:
    _draw_lines(axes, lines, "{:.4f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("negative log-likelihood (nats)")


def _draw_accuracies(axes: Axes, lines: Mapping[str, np.ndarray]) -> None:
    shown = {name: values.clip(*ACCURACY_RANGE) for name, values in lines.items()}
    _draw_lines(axes, shown, "{:.2%}")
    axes.set_ylabel("accuracy (%)")
    axes.set_yscale("logit")  # halving the error is the same distance everywhere
    axes.yaxis.set_major_locator(FixedLocator((0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_lines(axes: Axes, lines: Mapping[str, np.ndarray], label: str) -> None:
    for (name, values), color in zip(lines.items(), COLORS, strict=False):
        epochs = np.arange(1, values.shape[1] + 1)
        mean = values.mean(0)
        axes.plot(epochs, mean, color=color, marker="o", markersize=3.5, label=f"{name}: {label.format(mean[-1])}")
        if len(values) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="last epoch", alignment="left", frameon=False)


def mistake_grid(mistakes: Mistakes, classes: Sequence[str], title: str, rows: int, columns: int) -> Figure:
    """A grid of the first `rows` x `columns` mistakes, each with its true and its predicted class."""
    side, cell_height = 0.94, 1.3  # image size and cell height with caption, relative to the cell's width
    figure = Figure(figsize=(1.3 * columns, 1.3 * cell_height * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title}: {len(mistakes):,} of {mistakes.total:,} misclassified, the surest mistakes first")
    axes = figure.subplots()
    for index in range(min(rows * columns, len(mistakes))):
        left, bottom = index % columns, -cell_height * (index // columns + 1)
        extent = (left, left + side, bottom, bottom + side)
        axes.imshow(mistakes.images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=255, extent=extent)
        axes.add_patch(Rectangle((left, bottom), side, side, fill=False, edgecolor="0.85"))
        true, predicted = (classes[int(labels[index])] for labels in (mistakes.labels, mistakes.predictions))
        caption = f"true {true}\npredicted {predicted}"
        axes.text(left + side / 2, bottom + side + 0.03, caption, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(side - 1, columns), ylim=(-cell_height * rows - 0.03, 0))
    axes.set_axis_off()
    return figure

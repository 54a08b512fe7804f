import pytest
import torch

from mnistnorm import plots
from mnistnorm.data import Split
from mnistnorm.plots import Mistakes


def history(epochs: int, offset: float = 0.0) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 1 - 0.2 / epoch,
            "test_loss": 0.5 / epoch + offset,
            "test_accuracy": 1 - 0.1 / epoch - offset,
        }
        for epoch in range(1, epochs + 1)
    ]


def test_the_mistakes_are_the_wrong_answers_the_surest_first() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 28, 28)
    mistakes = Mistakes.of(probabilities.log(), Split(images, torch.tensor([1, 1, 1, 0])))
    assert len(mistakes) == 3
    assert mistakes.total == 4
    assert mistakes.images[:, 0, 0, 0].tolist() == [1, 3, 0]
    assert mistakes.labels.tolist() == [1, 0, 1]
    assert mistakes.predictions.tolist() == [0, 1, 0]


@pytest.mark.parametrize("epochs", [1, 2, 15])
def test_a_runs_curves_are_drawn_for_each_split(epochs: int) -> None:
    figure = plots.run_curves(history(epochs), "title")
    for axes in figure.axes:
        assert [line.get_label().split(":")[0] for line in axes.get_lines()] == ["train", "test"]
        assert [len(line.get_xdata()) for line in axes.get_lines()] == [epochs, epochs]
        low, high = axes.get_ylim()
        assert all(low <= line.get_ydata()[-1] <= high for line in axes.get_lines())
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert plots.png(figure).startswith(b"\x89PNG")


def test_every_accuracy_is_in_the_graph() -> None:
    runs = [metrics | {"test_accuracy": value} for metrics, value in zip(history(3), (0.0, 0.98, 1.0), strict=True)]
    for figure in (plots.run_curves(runs, "title"), plots.comparison_curves({"batch": [runs]}, "accuracy")):
        low, high = figure.axes[-1].get_ylim()
        for line in figure.axes[-1].get_lines():
            assert all(low < value < high for value in line.get_ydata())
        assert 0.98 in figure.axes[-1].get_lines()[-1].get_ydata()


@pytest.mark.parametrize(
    ("metric", "label"), [("loss", "negative log-likelihood (nats)"), ("accuracy", "accuracy (%)")]
)
def test_a_comparison_is_a_line_per_norm(metric: str, label: str) -> None:
    runs = {"batch": [history(5), history(5, 0.02)], "layer": [history(5, 0.04), history(5, 0.06)]}
    (axes,) = plots.comparison_curves(runs, metric).axes
    labels = [line.get_label() for line in axes.get_lines()]
    last = {"loss": ["0.1100", "0.1500"], "accuracy": ["97.00%", "93.00%"]}[metric]
    assert labels == [f"batch norm: {last[0]}", f"layer norm: {last[1]}"]
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == label


def test_the_grid_shows_true_and_predicted_classes() -> None:
    probabilities = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    split = Split(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.tensor([1, 1, 1]))
    figure = plots.mistake_grid(Mistakes.of(probabilities.log(), split), ["cat", "dog"], "run", rows=2, columns=5)
    (axes,) = figure.axes
    assert len(axes.get_images()) == 2
    assert [text.get_text() for text in axes.texts] == ["true dog\npredicted cat"] * 2
    assert figure.get_suptitle() == "run: 2 of 3 misclassified, the surest mistakes first"
    assert plots.png(figure).startswith(b"\x89PNG")

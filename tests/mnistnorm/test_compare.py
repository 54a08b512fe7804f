import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mnistnorm import compare
from mnistnorm.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def comparison(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    out = tmp_path_factory.mktemp("compare")
    flags = [*quick, "--epochs", "1", "--norms", "batch", "layer", "--seeds", "0", "3", "--fused", "--out", str(out)]
    assert compare.main(flags) == 0
    return flags, out


def test_every_norm_is_trained_with_every_seed(comparison: tuple[list[str], Path]) -> None:
    out = comparison[1]
    for norm, lr in (("batch", 0.05), ("layer", 0.1)):
        for seed in (0, 3):
            settings = Checkpoint.load(out / f"{norm}-seed{seed}" / "last.pt").settings
            assert (settings.norm, settings.seed, settings.fused, settings.lr) == (norm, seed, True, lr)


def test_the_table_is_text_markdown_and_json(comparison: tuple[list[str], Path]) -> None:
    out = comparison[1]
    results = json.loads((out / "comparison.json").read_text())
    assert [(result["norm"], result["parameters"]) for result in results] == [("batch", 7652), ("layer", 7594)]
    for result in results:
        accuracies = [
            Checkpoint.load(out / f"{result['norm']}-seed{seed}" / "last.pt").metrics["test_accuracy"]
            for seed in result["seeds"]
        ]
        assert result["accuracies"] == accuracies
        mean, low, high = sum(accuracies) / 2, min(accuracies), max(accuracies)
        for name in ("comparison.txt", "comparison.md"):
            table = (out / name).read_text()
            assert f"{result['parameters']:,}" in table
            assert f"{mean:.2%}" in table
            assert f"{low:.2%} to {high:.2%}" in table


def test_the_pictures_are_there(comparison: tuple[list[str], Path]) -> None:
    names = {"test-loss.png", "test-accuracy.png", "misclassified-batch.png", "misclassified-layer.png"}
    for name in names:
        assert (comparison[1] / name).read_bytes().startswith(b"\x89PNG")


def test_a_comparison_is_not_overwritten_but_resumed(
    comparison: tuple[list[str], Path], one_error: Callable[[], str]
) -> None:
    flags, out = comparison
    before = (out / "comparison.json").read_bytes()
    assert compare.main(flags) == 1
    assert "holds a run: continue it (--resume)" in one_error()
    assert compare.main([*flags, "--resume"]) == 0
    assert (out / "comparison.json").read_bytes() == before


def test_an_unknown_norm_is_one_line(one_error: Callable[[], str]) -> None:
    assert compare.main(["--norms", "batch", "instance"]) == 2
    assert "argument --norms: invalid choice: 'instance'" in one_error()


def test_wrong_usage_leaves_no_folder(tmp_path: Path, one_error: Callable[[], str]) -> None:
    assert compare.main(["--device", "toaster", "--out", str(tmp_path / "none")]) == 2
    assert "--device toaster cannot be used" in one_error()
    assert not (tmp_path / "none").exists()

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnistnorm import compare
from mnistnorm.checkpoint import Checkpoint
from mnistnorm.engine import Settings, Trainer
from mnistnorm.errors import UserError
from mnistnorm.run import locked

# In one process, which trains for all of them once.
pytestmark = pytest.mark.xdist_group("compare")


@pytest.fixture(scope="module")
def comparison(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    out = tmp_path_factory.mktemp("compare")
    flags = [*quick, "--epochs", "1", "--norms", "batch", "layer", "--seeds", "0", "3", "--fused", "--out", str(out)]
    assert compare.main(flags) == 0
    return flags, out


def test_every_norm_is_trained_with_every_seed(comparison: tuple[list[str], Path]) -> None:
    out = comparison[1]
    for norm, lr, elastic in (("batch", 0.05, 0.0), ("layer", 0.2, 1.0)):
        for seed in (0, 3):
            settings = Checkpoint.load(out / f"{norm}-seed{seed}" / "last.pt").settings
            assert (settings.norm, settings.seed, settings.fused) == (norm, seed, True)
            assert (settings.lr, settings.elastic) == (lr, elastic)


def test_the_table_is_text_markdown_and_json(comparison: tuple[list[str], Path]) -> None:
    out = comparison[1]
    document = json.loads((out / "comparison.json").read_text())
    assert f"torch {torch.__version__}" in document["machine"]
    results = document["results"]
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


def test_a_single_run_has_no_range() -> None:
    result = compare.Result("batch", 7652, [0], [0.9934], [3.2])
    assert compare.text_table([result]) == (
        "norm    parameters   test accuracy   time per run\nbatch   7,652        99.34%          3 s\n"
    )
    header = "| norm | parameters | test accuracy | time per run |\n| --- | --- | --- | --- |\n"
    assert compare.markdown_table([result]) == f"{header}| batch | 7,652 | 99.34% | 3 s |\n"
    twice = compare.Result("layer", 7594, [0, 1], [0.99, 0.98], [3.2, 3.4])
    assert "| range | runs |" in compare.markdown_table([result, twice])


def test_a_comparison_that_was_stopped_is_not_complete(
    comparison: tuple[list[str], Path], tmp_path: Path, one_error: Callable[[], str]
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(comparison[1], out)
    (out / "comparison.json").unlink()
    assert compare.main([*comparison[0], "--out", str(out)]) == 1
    assert f"{out} holds a comparison: continue it (--resume)" in one_error()


def test_the_pictures_are_there(comparison: tuple[list[str], Path]) -> None:
    names = {"test-loss.png", "test-accuracy.png", "misclassified-batch.png", "misclassified-layer.png"}
    for name in names:
        assert (comparison[1] / name).read_bytes().startswith(b"\x89PNG")


def test_a_comparison_is_not_overwritten_but_resumed(
    comparison: tuple[list[str], Path], one_error: Callable[[], str]
) -> None:
    flags, out = comparison
    written = out / "comparison.json"
    document = json.loads(written.read_text()) | {"machine": "another day"}
    written.write_text(json.dumps(document))
    assert compare.main(flags) == 1
    assert "holds a comparison, complete: replace it (--overwrite) or name another" in one_error()
    assert compare.main([*flags, "--norms", "group"]) == 1
    assert "holds a comparison, complete: replace it (--overwrite) or name another" in one_error()
    assert compare.main([*flags, "--resume"]) == 0
    assert json.loads(written.read_text()) == document


@pytest.mark.parametrize("flags", [["--no-fused", "--impl", "triton"], ["--val-split", "0.999"]], ids=str)
def test_what_cannot_run_replaces_nothing(
    flags: list[str], comparison: tuple[list[str], Path], tmp_path: Path, one_error: Callable[[], str]
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(comparison[1], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert compare.main([*comparison[0], *flags, "--overwrite", "--out", str(out)]) != 0
    assert one_error()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_that_lost_its_checkpoint_is_trained_again(comparison: tuple[list[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(comparison[1], out)
    (out / "layer-seed3" / "last.pt").unlink()
    before = [row["norm"] for row in json.loads((out / "comparison.json").read_text())["results"]]
    assert compare.main(["--resume", "--norms", "layer", "--out", str(out)]) == 0
    assert (out / "layer-seed3" / "last.pt").exists()
    # The other norms stay in the table.
    assert [row["norm"] for row in json.loads((out / "comparison.json").read_text())["results"]] == before


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_with_its_own_settings_on_another_machine(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: Callable[[], str]
) -> None:
    out = ["--out", str(tmp_path)]
    flags = [*quick[:-4], "--epochs", "1", "--norms", "layer", "sample", "--seeds", "3", "--dropout", "0.1"]
    run_training = compare.run_training

    def stopped(settings: Settings, *others: Any, **options: Any) -> Trainer:
        if settings.norm == "sample":
            raise UserError("stopped")
        return run_training(settings, *others, **options)

    monkeypatch.setattr(compare, "run_training", stopped)
    assert compare.main([*flags, *out]) == 1
    assert "stopped" in one_error()
    monkeypatch.undo()
    threads = Checkpoint.load(tmp_path / "layer-seed3" / "last.pt").settings.threads
    torch.set_num_threads(threads + 1)
    before = (tmp_path / "layer-seed3" / "metrics.jsonl").read_bytes()
    assert compare.main(["--resume", *out]) == 0
    assert (tmp_path / "layer-seed3" / "metrics.jsonl").read_bytes() == before
    layer, sample = (Checkpoint.load(tmp_path / f"{norm}-seed3" / "last.pt").settings for norm in ("layer", "sample"))
    assert sample == replace(layer, norm="sample", lr=0.05, elastic=0.0)
    assert (layer.lr, layer.dropout, layer.epochs) == (0.2, 0.1, 1)
    assert compare.main(["--resume", "--dropout", "0.3", *out]) == 2
    assert "has dropout=0.1, not 0.3" in one_error()
    assert compare.main(["--resume", *out]) == 0


def test_there_must_be_something_to_resume(tmp_path: Path, one_error: Callable[[], str]) -> None:
    out = tmp_path / "none"
    assert compare.main(["--resume", "--out", str(out)]) == 1
    assert f"there is no comparison to resume in {out}: name its folder with --out or leave out --resume" in one_error()
    assert not out.exists()


def test_flags_that_are_none_of_a_comparison_are_refused(
    comparison: tuple[list[str], Path], tmp_path: Path, one_error: Callable[[], str]
) -> None:
    flags = json.loads((comparison[1] / "comparison-config.json").read_text())
    damages = [{"norms": ["none"]}, {"norms": []}, {"seeds": 3}, {"seeds": []}, {"seeds": [2**70]}, {"lr": False}]
    for content in ({"norms": ["batch"]}, [], flags | {"device": 1}, *(flags | damage for damage in damages)):
        (tmp_path / "comparison-config.json").write_text(json.dumps(content))
        assert compare.main(["--resume", "--out", str(tmp_path)]) == 1
        assert "comparison-config.json is not a comparison's config, or is damaged" in one_error()


def test_overwrite_leaves_nothing_of_the_earlier_comparison(
    comparison: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: Callable[[], str]
) -> None:
    out = tmp_path / "compare"
    shutil.copytree(comparison[1], out)

    def stop(*_: Any, **__: Any) -> Trainer:
        raise UserError("stopped")

    monkeypatch.setattr(compare, "run_training", stop)
    assert compare.main([*comparison[0], "--dropout", "0.1", "--overwrite", "--out", str(out)]) == 1
    assert "stopped" in one_error()
    assert [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()] == ["comparison-config.json"]
    assert compare.main(["--resume", "--out", str(out)]) == 1
    assert "stopped" in one_error()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_run_that_is_under_way_loses_nothing(
    flag: str, comparison: tuple[list[str], Path], tmp_path: Path, one_error: Callable[[], str]
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(comparison[1], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with locked(out / "layer-seed3"):
        assert compare.main([*comparison[0], flag, "--out", str(out)]) == 1
    assert f"another run is writing to {out / 'layer-seed3'}" in one_error()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_folder_of_a_run_is_not_that_of_a_comparison(
    comparison: tuple[list[str], Path], tmp_path: Path, one_error: Callable[[], str]
) -> None:
    flags, out = comparison
    shutil.copytree(out / "layer-seed3", tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert compare.main([*flags, "--overwrite", "--out", str(tmp_path / "run")]) == 1
    assert f"{tmp_path / 'run'} holds a run, not a comparison: name another --out" in one_error()
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_norm_is_one_line(one_error: Callable[[], str]) -> None:
    assert compare.main(["--norms", "batch", "instance"]) == 2
    assert "argument --norms: invalid choice: 'instance'" in one_error()


def test_wrong_usage_leaves_no_folder(tmp_path: Path, one_error: Callable[[], str]) -> None:
    assert compare.main(["--device", "toaster", "--out", str(tmp_path / "none")]) == 2
    assert "--device toaster cannot be used" in one_error()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("compile", [True, False])
def test_the_compiler_is_reset_before_a_run_that_is_compiled(compile, tmp_path, monkeypatch) -> None:
    calls = []

    def run_training(*arguments: Any, **options: Any) -> None:
        calls.append("run")
        raise UserError("that is enough")

    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(compare, "run_training", run_training)
    with pytest.raises(UserError, match="enough"):
        compare.compare_runs({"batch": [Settings(lr=0.1, compile=compile)]}, tmp_path, resume=False, overwrite=False)
    assert calls == (["reset", "run"] if compile else ["run"])

"""benchmarks.training: steps, epochs, and what it prints and writes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import training
from benchmarks.instruments.memory import peak_bytes
from mnistnorm.data import Normalization, Split, TrainingBatches
from mnistnorm.engine import Trainer


def stand_in(accuracies: list[float] | None = None) -> Any:
    """A trainer of 6 images in batches of 2 that records the indices of the images in its steps."""
    split = Split(torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6))
    seen: list[torch.Tensor] = []
    return SimpleNamespace(
        batches=TrainingBatches(split, 2, Normalization(0, 1)),
        model=torch.nn.Identity(),
        device=torch.device("cpu"),
        train_batch=seen.append,
        seen=seen,
        accuracies=iter(accuracies or []),
    )


def test_a_round_takes_all_its_steps() -> None:
    trainer = stand_in()
    run = training.steps_of(trainer, steps=5)
    run()
    run()
    assert len(trainer.seen) == 10
    for epoch in range(3):
        assert torch.cat(trainer.seen[3 * epoch : 3 * epoch + 3]).sort().values.equal(torch.arange(6))


def test_loops_train_in_turn_until_they_are_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "test_accuracy", lambda trainer: next(trainer.accuracies))
    monkeypatch.setattr(training, "epoch_of", lambda trainer: (trainer.seen.append(0), 2.0)[1])
    trainers = {"stock": stand_in([0.98, 0.991, 0.993]), "fused": stand_in([0.99, 0.994])}
    figures = training.train_to_accuracy(trainers, epochs=3)
    assert [len(trainer.seen) for trainer in trainers.values()] == [3, 2]
    assert figures["stock"]["reached"] == {"0.99": {"epochs": 2, "seconds": 4.0}, "0.994": None}
    assert figures["fused"]["reached"] == {
        "0.99": {"epochs": 1, "seconds": 2.0},
        "0.994": {"epochs": 2, "seconds": 4.0},
    }
    first, second = training.lines({"norm": "batch", "dropout": 0.0, "loops": figures})
    assert "not reached" in first
    assert "4.0 s, 2 epochs" in second


def test_no_network_is_left_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(training, "build", lambda loop, *_: calls.append(loop))
    monkeypatch.setattr(training, "measure", lambda *_: {})
    assert training.main(["--compile", "--norms", "batch", "group", "--dropout", "0"]) == 0
    on_a_cpu = [loop for loop in training.LOOPS if not loop.endswith("graph")]
    assert calls == ["reset", *on_a_cpu] * 2


def test_a_gpu_has_the_loops_of_cuda_graphs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eager, captured = (object.__new__(Trainer) for _ in range(2))
    eager.graph = SimpleNamespace(failure="a number was read")
    captured.graph = SimpleNamespace(failure=None)
    trainers = {"stock": captured, "fused-graph": eager}
    monkeypatch.setattr(training, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(training, "describe_machine", lambda _: "a machine")
    monkeypatch.setattr(training, "build", lambda loop, *_: trainers.get(loop))
    monkeypatch.setattr(training, "measure", lambda *_: {})
    assert training.main(["--device", "cuda", "--norms", "batch", "--dropout", "0"]) == 0
    printed = capsys.readouterr().out
    for loop in ("stock", "fused", "stock-graph", "fused-graph"):
        assert f"\n  {loop} " in printed
    assert "note: fused-graph ran eagerly because graph capture failed: a number was read" in printed
    assert printed.count("note: ") == 1


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # from torch 2.11
def test_prints_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "training.json"
    flags = "--norms group --dropout 0.05 --steps 1 --rounds 2 --batch-size 8 --json"
    assert training.main([*flags.split(), str(document)]) == 0
    (row,) = json.loads(document.read_text())["rows"]
    assert list(row["loops"]) == ["course", "stock", "fused"]
    printed = capsys.readouterr().out
    assert all(line in printed for line in training.lines(row))
    for figures in row["loops"].values():
        speed = figures["images_per_second"]["median"]
        assert figures["seconds_per_epoch"] == pytest.approx(60_000 / speed)
    assert row["loops"]["fused"]["step_bytes"] < row["loops"]["stock"]["step_bytes"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--steps", "0"], "expected an integer from 1"), (["--json", "/proc/nowhere/x.json"], "cannot be written")],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, expected, capsys) -> None:
    assert training.main(flags) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_peak_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.ones(1000)

    def call() -> None:
        kept = before + 1
        kept.exp().add_(1)
        (kept + 1).sum()

    assert 2 * 4000 <= peak_bytes(call, torch.device("cpu")) < 3 * 4000
    assert capfd.readouterr().err == ""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_hook

from mnistnorm import run, train
from mnistnorm.checkpoint import TEMP_SUFFIX, Checkpoint
from mnistnorm.cli import settings_of
from mnistnorm.data import Augmentation
from mnistnorm.engine import Trainer

FILES = {"config.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png", "misclassified.png"}
ROOT = Path(__file__).parents[2]

OneError = Callable[[], str]


def same_result(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same bits, metrics but the times included."""
    runs = [Checkpoint.load(folder / "last.pt") for folder in (left, right)]
    metrics = [{key: value for key, value in each.metrics.items() if "second" not in key} for each in runs]
    weights = [each.model for each in runs]
    return metrics[0] == metrics[1] and all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_a_run_leaves_its_files(finished_run: Path, quick: list[str]) -> None:
    names = {path.name for path in finished_run.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == FILES
    config = json.loads((finished_run / "config.json").read_text())
    assert config["settings"]["fused"] is True
    assert config["settings"]["lr"] == 0.05
    assert config["layers"].startswith("fused layers in PyTorch")
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for name in ("curves.png", "misclassified.png"):
        assert (finished_run / name).read_bytes().startswith(b"\x89PNG")


def test_tensorboard_events_are_there_where_it_is_installed(finished_run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("test_accuracy")] == [1, 2]


def test_a_run_says_what_it_runs_on_and_what_came_out(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [*quick, "--norm", "group", "--val-split", "0.2", "--dropout", "0.1", "--out", str(out)]
    assert train.main(arguments) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    lines = printed.splitlines()
    assert lines[0].startswith(f"device   cpu, CPU threads: 1, torch {torch.__version__}")
    assert lines[1] == "layers   torch.nn's own layers (--no-fused)"
    assert lines[2] == "network  group norm, 7,652 parameters"
    assert lines[3] == "data     fashion-mnist: 256 training, 64 validation, 100 test images"
    assert lines[4] == "recipe   2 epochs, batch 64, muon at 0.08, augmented, elastic 1, dropout 0.1, seed 0"
    assert lines[5] == f"out      {out}"
    assert [line.split("   ")[0] for line in lines[6:8]] == ["epoch  1/2", "epoch  2/2"]
    accuracy = Checkpoint.load(out / "last.pt").metrics["test_accuracy"]
    assert f"test     {accuracy:.2%} correct" in printed
    assert "highest validation accuracy" in printed
    assert str(out) in lines[-2]
    assert ("events.out.tfevents.*" in lines[-1]) == any(out.glob("events.out.tfevents.*"))


def test_one_epoch_is_not_epochs(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*quick, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[4].startswith("recipe   1 epoch, batch 64")


def test_without_a_terminal_lines_say_how_far_an_epoch_is(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PLAIN_LINE_SECONDS", 0.0)
    assert train.main([*quick, "--out", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " after " in line and line.startswith("epoch")]
    assert len(lines) == 10
    assert lines[0].startswith("epoch  1/2   train ")
    assert lines[0].endswith("   after 64 of 320 images")


def test_the_faster_number_of_threads_is_taken_and_kept(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = quick.index("--threads")
    flags = [*quick[:at], *quick[at + 2 :], "--out", str(tmp_path)]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    train_step = Trainer.train_step
    clock = [0.0]

    def slow_with_one(trainer: Trainer, *batch: torch.Tensor) -> None:
        train_step(trainer, *batch)
        clock[0] += 3.0 / trainer.settings.threads

    torch.set_num_threads(3)
    monkeypatch.setattr(Trainer, "train_step", slow_with_one)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert train.main(flags) == 0
    assert capsys.readouterr().out.startswith(
        "threads  3, measured: 3000.0 ms a step with 1, 1000.0 ms a step with 3\ndevice   cpu, CPU threads: 3,"
    )
    torch.set_num_threads(2)
    assert train.main(["--resume", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("device   cpu, CPU threads: 3,")


def test_omp_num_threads_is_respected(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = quick.index("--threads")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)  # as torch does at its import
    assert train.main([*quick[:at], *quick[at + 2 :], "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("device   cpu, CPU threads: 3,")


def test_the_same_seed_gives_the_same_bits(quick: list[str], finished_run: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert train.main([*quick, "--fused", "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    assert same_result(tmp_path / "0", finished_run)
    assert not same_result(tmp_path / "1", finished_run)


def test_best_is_the_best_on_the_validation_split_or_by_the_training_loss() -> None:
    history = [
        {"epoch": 1, "train_loss": 0.5, "validation_accuracy": 0.7, "test_accuracy": 0.9},
        {"epoch": 2, "train_loss": 0.3, "validation_accuracy": 0.8, "test_accuracy": 0.7},
        {"epoch": 3, "train_loss": 0.2, "validation_accuracy": 0.8, "test_accuracy": 0.8},
    ]
    assert run.best_epoch(history) == 2
    for metrics in history:
        del metrics["validation_accuracy"]
    assert run.best_epoch(history) == 3


@pytest.fixture(scope="module")
def whole_run(long_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert train.main([*long_flags, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_stopped_process_leaves_a_run_that_resumes_to_the_same_bits(
    number: signal.Signals, long_flags: list[str], whole_run: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mnistnorm.train", *long_flags, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line.startswith("epoch  1/4") for line in process.stdout)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number
        assert error.startswith("error: stopped by SIGTERM in epoch ")
        assert error.endswith(f" and saved in {tmp_path}; the same command with --resume continues\n")
        assert error.count("\n") == 1
    else:
        assert process.returncode == -number
    stopped = Checkpoint.load(tmp_path / "last.pt")
    assert stopped.training is not None
    assert 0 < stopped.training["step"] < 80
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)

    assert train.main(["--resume", "--out", str(tmp_path)]) == 0
    assert same_result(tmp_path, whole_run)


@pytest.mark.parametrize("step", [1, 20, 35])
def test_ctrl_c_saves_at_the_end_of_the_step(
    step: int,
    long_flags: list[str],
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_error: OneError,
) -> None:
    train_step = Trainer.train_step

    def interrupted(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor, size: int) -> None:
        train_step(trainer, images, labels, size)
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert train.main([*long_flags, "--out", str(tmp_path)]) == 130
    assert "stopped by SIGINT in epoch" in one_error()
    monkeypatch.undo()
    stopped = Checkpoint.load(tmp_path / "last.pt").training
    assert stopped is not None
    assert stopped["step"] == step
    if step == 35:
        assert train.main(["--resume", "--out", str(tmp_path)]) == 0
        assert same_result(tmp_path, whole_run)


def test_resuming_a_finished_run_changes_nothing(quick: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main([*quick, "--out", str(out)]) == 0
    before = {name: (out / name).read_bytes() for name in FILES}
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_a_finished_run_is_not_said_to_go_on(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = list(finished_run.glob(run.TENSORBOARD))
    assert train.main(["--resume", "--fused", "--out", str(finished_run)]) == 0
    assert capsys.readouterr().out.splitlines()[5].endswith(f"{finished_run}, already complete")
    assert list(finished_run.glob(run.TENSORBOARD)) == events


def test_a_checkpoint_is_written_after_all_it_continues_from(
    quick: list[str], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = run.save
    left: dict[str, bytes] = {}

    def killed(trainer: Trainer, path: Path, *, to_resume: bool = True) -> None:
        if path.name == "last.pt" and trainer.epoch == 1:
            left.update({file.name.split(".")[0]: file.read_bytes() for file in path.parent.iterdir()})
            raise KeyboardInterrupt
        save(trainer, path, to_resume=to_resume)

    monkeypatch.setattr(run, "save", killed)
    assert train.main([*quick, "--fused", "--out", str(tmp_path)]) == 130
    assert len(left["metrics"].splitlines()) == 1
    assert "events" not in left or b"test_accuracy" in left["events"]
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path)]) == 0
    assert same_result(tmp_path, finished_run)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_last_evaluation_stops_after_the_report(
    number: signal.Signals, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    end_epoch = Trainer._end_epoch

    def interrupted(trainer: Trainer) -> None:
        if trainer.epoch == 1:
            signal.raise_signal(number)
        end_epoch(trainer)

    monkeypatch.setattr(Trainer, "_end_epoch", interrupted)
    assert train.main([*quick, "--out", str(tmp_path)]) == 128 + number
    assert f"stopped by {number.name} after the last epoch, complete in {tmp_path}" in one_error()
    assert {path.name for path in tmp_path.iterdir()} >= FILES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--norm", "instance"], "--norm: invalid choice: 'instance'"),
        (["--dataset", "cifar"], "--dataset: invalid choice: 'cifar'"),
        (["--optimizer", "adam"], "--optimizer: invalid choice: 'adam'"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: use cpu"),
        (["--device", "toaster"], "--device toaster cannot be used: use cpu"),
        (["--device", "meta"], "--device meta cannot be used: use cpu"),
        (["--epochs", "0"], "--epochs: expected an integer from 1 to 2147483647, got '0'"),
        (["--epochs", "two"], "--epochs: expected an integer from 1 to 2147483647, got 'two'"),
        (["--batch-size", "-1"], "--batch-size: expected an integer from 1 to 2147483647, got '-1'"),
        (["--threads", "2000000"], "--threads: expected an integer from 1 to 1024, got '2000000'"),
        (["--lr", "nan"], "--lr: expected a finite number of at least 0, got 'nan'"),
        (["--dropout", "1"], "--dropout: expected a number from 0 to below 1, got '1'"),
        (["--val-split", "1.5"], "--val-split: expected a number from 0 to below 1, got '1.5'"),
        (["--val-split", "0.999"], "--val-split 0.999 leaves none of the 320 images to train on: lower it"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 2147483647, got '-1'"),
        (["--seed", "1000000000000000000000"], "--seed: expected an integer from 0 to 2147483647, got '1000"),
        (["--impl", "triton"], "--impl triton is for the fused layers: add --fused"),
        (["--elastic", "-1"], "--elastic: expected a finite number of at least 0, got '-1'"),
        (["--elastic", "1", "--no-augment"], "--elastic 1, given or from the resumed run, has no effect"),
        (["--batch-size", "321"], "--batch-size 321 is more than the 320 training images: lower it"),
        (["--cuda-graph"], "--cuda-graph is for one process on a GPU without --compile, not for --device cpu: use"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--fuse"], "unrecognized arguments: --fuse"),
        (["--out", ""], "--out: expected a value, got ''"),
        (["--data-dir", ""], "--data-dir: expected a value, got ''"),
    ],
)
def test_wrong_usage_is_one_line(
    flags: list[str], message: str, quick: list[str], tmp_path: Path, one_error: OneError
) -> None:
    out = tmp_path / "run"
    assert train.main([*quick, "--out", str(out), *flags]) == 2
    assert message in one_error()
    assert not out.exists() or not any(out.iterdir())


def test_a_run_is_not_overwritten_unasked(
    quick: list[str], finished_run: Path, tmp_path: Path, one_error: OneError
) -> None:
    before = {path.name: path.read_bytes() for path in finished_run.iterdir()}
    for name in before:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        assert train.main([*quick, "--out", str(tmp_path / name)]) == 1
        assert f"{tmp_path / name} holds a run: " in one_error()
    assert train.main([*quick, "--out", str(finished_run)]) == 1
    assert f"{finished_run} holds a run, complete: replace it (--overwrite) or name another --out" in one_error()
    saved = Checkpoint.load(finished_run / "last.pt")
    (tmp_path / "stopped").mkdir()
    replace(saved, metrics={"epoch": 1}).save(tmp_path / "stopped" / "last.pt")
    assert train.main([*quick, "--out", str(tmp_path / "stopped")]) == 1
    assert f"{tmp_path / 'stopped'} holds a run: continue it (--resume), replace it (--overwrite)" in one_error()
    assert {path.name: path.read_bytes() for path in finished_run.iterdir()} == before


def test_overwrite_replaces_a_run_and_leaves_other_files(quick: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main([*quick, "--out", str(out)]) == 0
    (out / "notes.txt").write_text("mine")
    assert train.main([*quick, "--norm", "layer", "--epochs", "1", "--overwrite", "--out", str(out)]) == 0
    assert Checkpoint.load(out / "best.pt").settings.norm == "layer"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(list(out.glob("events.out.tfevents.*"))) <= 1
    assert (out / "notes.txt").read_text() == "mine"


def test_what_cannot_be_written_does_not_destroy_what_it_replaces(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    for name in FILES:
        (tmp_path / name).write_text("old")

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert train.main([*quick, "--overwrite", "--out", str(tmp_path)]) == 1
    assert "No space left on device; any existing file is unchanged" in one_error()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(FILES, "old")


def test_events_that_cannot_be_written_are_one_line(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def full(_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", full)
    assert train.main([*quick, "--out", str(tmp_path)]) == 1
    assert f"cannot write TensorBoard's events to {tmp_path}: No space left on device" in one_error()


def test_two_runs_do_not_share_a_folder(quick: list[str], tmp_path: Path, one_error: OneError) -> None:
    with run.locked(tmp_path):
        assert train.main([*quick, "--out", str(tmp_path)]) == 1
        assert f"another run is writing to {tmp_path}: wait until it ends or name another --out" in one_error()
        assert not any(tmp_path.iterdir())
    with run.locked(tmp_path):
        pass


def test_half_written_files_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    mine, remains = tmp_path / ".mine.tmp", tmp_path / f".last.pt.0123{TEMP_SUFFIX}"
    mine.touch()
    remains.touch()
    with run.locked(tmp_path):
        assert list(tmp_path.iterdir()) == [mine]


def test_there_must_be_something_to_resume(quick: list[str], tmp_path: Path, one_error: OneError) -> None:
    assert train.main([*quick, "--resume", "--out", str(tmp_path / "none")]) == 1
    assert "there is no run to resume in" in one_error()
    assert not (tmp_path / "none").exists()


def test_resuming_with_other_settings_is_refused(finished_run: Path, one_error: OneError) -> None:
    for flags, message in (
        (["--norm", "group"], "has norm=batch, not group"),
        (["--lr", "0.3"], "has lr=0.05, not 0.3"),
    ):
        assert train.main(["--resume", "--out", str(finished_run), *flags]) == 2
        assert message in one_error()


def test_the_augmentation_is_that_of_the_norm(quick: list[str]) -> None:
    for flags, expected in (
        (["--norm", "layer"], Augmentation(elastic=1.0)),
        (["--norm", "layer", "--elastic", "0.5"], Augmentation(elastic=0.5)),
        (["--norm", "layer", "--no-augment"], None),
        (["--norm", "group"], Augmentation(elastic=1.0)),
        (["--norm", "batch"], Augmentation()),
    ):
        settings = settings_of(train.get_parser().parse_args([*quick, *flags]))
        assert run.build_trainer(settings).batches.augmentation == expected


def test_a_run_is_not_resumed_on_other_images(
    long_flags: list[str], whole_run: Path, tmp_path: Path, one_error: OneError
) -> None:
    saved = Checkpoint.load(whole_run / "last.pt")
    replace(saved, normalization=replace(saved.normalization, mean=0.5)).save(tmp_path / "last.pt")
    assert train.main([*long_flags, "--resume", "--out", str(tmp_path)]) == 1
    assert "was trained on other images: name their folder with --data-dir" in one_error()


def test_a_run_goes_on_on_another_machine_and_says_so(
    long_flags: list[str], whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Checkpoint.load(whole_run / "last.pt")
    gone = replace(saved.settings, device="cuda:7", impl="torch", threads=3, data_dir="/nowhere")
    assert saved.training is not None
    rng = saved.training["rng"]
    elsewhere = saved.training | {"rng": rng | {"cuda": rng["cpu"][:16]}}
    replace(saved, settings=gone, training=elsewhere).save(tmp_path / "last.pt")
    data_dir = long_flags[3]
    assert train.main(["--resume", "--threads", "1", "--data-dir", data_dir, "--out", str(tmp_path)]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    changes = f"device cpu instead of cuda:7, threads 1 instead of 3, data_dir {data_dir} instead of /nowhere"
    assert note == f"note     resumed with {changes}: rounding and random numbers may differ"
    assert Checkpoint.load(whole_run / "last.pt").settings == saved.settings


def test_a_foreign_training_state_is_not_resumed(finished_run: Path, tmp_path: Path, one_error: OneError) -> None:
    saved = Checkpoint.load(finished_run / "last.pt")
    replace(saved, training={"weights": [1, 2, 3]}).save(tmp_path / "last.pt")
    assert train.main(["--resume", "--out", str(tmp_path)]) == 1
    assert "last.pt holds the training state of another run or version: 'history'; start again with" in one_error()


def test_a_damaged_checkpoint_is_not_resumed(quick: list[str], tmp_path: Path, one_error: OneError) -> None:
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 and then nothing")
    assert train.main(["--resume", "--out", str(tmp_path)]) == 1
    assert "last.pt is not a checkpoint, or is truncated or damaged" in one_error()


def test_a_network_without_training_state_is_not_resumed(
    finished_run: Path, tmp_path: Path, one_error: OneError
) -> None:
    (tmp_path / "last.pt").write_bytes((finished_run / "best.pt").read_bytes())
    assert train.main(["--resume", "--out", str(tmp_path)]) == 1
    assert "holds a network only" in one_error()


def test_a_folder_that_cannot_be_made_is_one_line(quick: list[str], tmp_path: Path, one_error: OneError) -> None:
    (tmp_path / "file").touch()
    assert train.main([*quick, "--out", str(tmp_path / "file" / "run")]) == 1
    assert "cannot create the folder" in one_error()


def test_a_folder_that_cannot_be_written_is_one_line(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # which root never sees from a folder's mode
    assert train.main([*quick, "--out", str(tmp_path)]) == 1
    assert f"the folder {tmp_path} cannot be written to; name another --out" in one_error()


def test_a_full_disk_ends_the_run_and_leaves_what_was_there(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    written = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 5:  # in the second epoch
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fsync)
    assert train.main([*quick, "--out", str(tmp_path)]) == 1
    assert "No space left on device; any existing file is unchanged" in one_error()
    assert Checkpoint.load(tmp_path / "last.pt").metrics["epoch"] == 1
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_a_diverging_run_is_one_line(
    stopped: bool, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    train_step = Trainer.train_step

    def interrupted(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor, size: int) -> None:
        train_step(trainer, images, labels, size)
        if stopped and not math.isfinite(trainer.running[0]):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    flags = ["--optimizer", "sgd", "--lr", "1e30", "--norm", "layer"]
    assert train.main([*quick, *flags, "--out", str(tmp_path)]) == 1
    assert "the training diverged in epoch 1: use a lower --lr than 1e+30" in one_error()
    assert all(value.isfinite().all() for value in Checkpoint.load(tmp_path / "last.pt").model.values())


def test_the_folder_of_a_comparison_is_not_that_of_a_run(quick: list[str], tmp_path: Path, one_error: OneError) -> None:
    (tmp_path / "comparison-config.json").write_text("{}")
    assert train.main([*quick, "--overwrite", "--out", str(tmp_path)]) == 1
    assert f"{tmp_path} holds a comparison, not a run: name another --out" in one_error()
    assert [path.name for path in tmp_path.iterdir()] == ["comparison-config.json"]


def test_amp_trains_in_bfloat16(quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtypes = set()
    watch = register_module_forward_hook(
        lambda module, _, output: dtypes.add(output.dtype) if isinstance(module, nn.Conv2d) else None
    )
    with watch:
        assert train.main([*quick, "--amp", "--fused", "--out", str(tmp_path)]) == 0
    assert dtypes == {torch.bfloat16}
    assert capsys.readouterr().out.splitlines()[0].endswith(", amp")
    checkpoint = Checkpoint.load(tmp_path / "last.pt")
    assert checkpoint.metrics["train_loss"] < 2.3
    assert all(value.dtype != torch.bfloat16 for value in checkpoint.model.values())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="--compile on a CPU needs a C++ compiler")
def test_a_compiled_run_has_the_same_checkpoint(quick: list[str], finished_run: Path, tmp_path: Path) -> None:
    counters.clear()
    assert train.main([*quick, "--compile", "--fused", "--out", str(tmp_path)]) == 0
    assert counters["stats"]["calls_captured"] >= 10  # the network's, not only those of the check of the compiler
    compiled, eager = (Checkpoint.load(folder / "last.pt") for folder in (tmp_path, finished_run))
    assert list(compiled.model) == list(eager.model)
    assert compiled.metrics["train_loss"] == pytest.approx(eager.metrics["train_loss"], rel=0.05)

"""Training by several processes: against one process, stopped, resumed, and started wrongly."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mnistnorm import compare, distributed, train
from mnistnorm.checkpoint import Checkpoint
from mnistnorm.data import Augmentation, Dataset, Normalization, TrainingBatches
from mnistnorm.engine import Settings
from mnistnorm.errors import UserError
from mnistnorm.run import check_processes
from tests.mnistnorm.test_engine import trainer
from tests.mnistnorm.test_train import FILES, ROOT, same_result

OneError = Callable[[], str]

ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def start(launcher: list[str], arguments: list[str], module: str = "mnistnorm.train") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(launcher: list[str], arguments: list[str], module: str = "mnistnorm.train") -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines that the program itself left on stderr."""
    process = start(launcher, arguments, module)
    printed, error = process.communicate(timeout=300)
    return process.returncode, printed, errors_of(error)


def errors_of(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_batch_are_the_batch(parts: int, mnist: Dataset) -> None:
    def batches(**options: int) -> TrainingBatches:
        return TrainingBatches(mnist.train[:50], 7, Normalization(0.1, 0.3), Augmentation(), seed=3, **options)

    sources = [batches(parts=parts, part=part) for part in range(parts)]
    for (images, labels), *cut in zip(batches(), *sources, strict=True):
        assert torch.cat([part_labels for _, part_labels in cut]).equal(labels)
        torch.testing.assert_close(torch.cat([part_images for part_images, _ in cut]), images)
        assert max(len(part) for _, part in cut) - min(len(part) for _, part in cut) <= 1
        assert [source.size for source in sources] == [len(labels)] * parts


def test_each_process_has_its_own_dropout_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(rank: int, step: int, seed: int = 0) -> float:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        distributed.seed_dropout(seed, step)
        return torch.rand(()).item()

    assert drawn(1, 5) == drawn(1, 5)
    assert len({drawn(1, 5), drawn(2, 5), drawn(1, 6), drawn(1, 5, seed=1)}) == 4
    torch.manual_seed(0)
    first = torch.rand(2).tolist()
    torch.manual_seed(0)
    assert [drawn(0, 1), drawn(0, 2)] == first


def test_a_trainer_takes_its_own_dropout(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        run = trainer(mnist, dropout=0.5, fused=True)
        run.train_step(*next(iter(run.batches)))
        losses.append(run.running[0])
    assert losses[0] != losses[1]


# The batches are of 41 images and, at the end of an epoch, of 1: parts of 21 and 20, and of 1 and none.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sync"),
    [(["--fused"], ["--sync-batch-norm"]), (["--norm", "group", "--l1", "1e-3", "--label-smoothing", "0.1"], [])],
    ids=["batch", "group"],
)
def test_two_processes_learn_as_one(flags: list[str], sync: list[str], quick: list[str], tmp_path: Path) -> None:
    flags = [*quick, *flags, "--optimizer", "sgd", "--lr", "0.05", "--val-split", "0.1", "--batch-size", "41"]
    results = []
    for launcher, more in ((ONE, []), (TWO, sync)):
        out = tmp_path / str(len(results))
        code, printed, errors = run(launcher, [*flags, *more, "--out", str(out)], "tests.mnistnorm.train_float64")
        assert (code, errors) == (0, [])
        assert printed.count("epoch  1/2") == 1
        assert {path.name for path in out.iterdir() if "tfevents" not in path.name} == FILES
        assert len(list(out.glob("*tfevents*"))) <= 1
        checkpoint = Checkpoint.load(out / "last.pt")
        curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        results.append((checkpoint.model, [value for line in curve for key, value in line.items() if "sec" not in key]))
    (one, one_curve), (two, two_curve) = results
    assert two_curve == pytest.approx(one_curve, rel=1e-9)
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def whole_run(long_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    code, printed, errors = run(TWO, [*long_flags, "--out", str(out)])
    assert (code, errors) == (0, [])
    assert ", 2 processes\n" in printed
    return out


@pytest.mark.slow
def test_processes_stopped_by_torchrun_leave_a_run_that_resumes_to_the_same_bits(
    long_flags: list[str], whole_run: Path, tmp_path: Path
) -> None:
    process = start(TWO, [*long_flags, "--out", str(tmp_path)])
    assert process.stdout is not None
    assert any(line.startswith("epoch  1/4") for line in process.stdout)
    process.send_signal(signal.SIGTERM)  # which torchrun passes on to both
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    check_stopped_run(errors_of(error), "SIGTERM", tmp_path, whole_run)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    long_flags: list[str], whole_run: Path, tmp_path: Path
) -> None:
    code, _, errors = run(TWO, [*long_flags, "--out", str(tmp_path)], "tests.mnistnorm.train_interrupted")
    assert code != 0
    assert check_stopped_run(errors, "SIGINT", tmp_path, whole_run) == 25


def check_stopped_run(errors: list[str], name: str, out: Path, whole_run: Path) -> int:
    """Resumes the run in `out`, checks that it ends as the uninterrupted one, and returns the step it stopped at."""
    assert len(errors) == 1
    assert errors[0].startswith(f"error: stopped by {name} in epoch ")
    stopped = Checkpoint.load(out / "last.pt").training
    assert stopped is not None
    code, printed, errors = run(TWO, ["--resume", "--out", str(out)])
    assert (code, errors) == (0, [])
    assert "resumed in epoch" in printed
    assert same_result(out, whole_run)
    return stopped["step"]


@pytest.mark.slow
def test_an_error_of_several_processes_is_one_line(long_flags: list[str], whole_run: Path) -> None:
    for more, message in (
        (["--batch-size", "1"], "--batch-size 1 leaves some of 2 processes without an image: raise it"),
        ([], f"{whole_run} holds a run, complete: replace it"),
    ):
        code, printed, errors = run(TWO, [*long_flags, *more, "--out", str(whole_run)])
        assert code != 0
        assert printed == ""
        assert len(errors) == 1
        assert message in errors[0]


@pytest.fixture
def one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the one process that `torchrun --nproc-per-node 1` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environment | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("one_of_one")
def test_one_process_under_torchrun_is_one_without(quick: list[str], finished_run: Path, tmp_path: Path) -> None:
    assert train.main([*quick, "--fused", "--out", str(tmp_path)]) == 0
    assert same_result(tmp_path, finished_run)
    assert not dist.is_initialized()


@pytest.mark.usefixtures("one_of_one")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--norm", "group", "--fused"],
            "--sync-batch-norm is for batch norm: --norm group has nothing to synchronise",
        ),
        ([], "--sync-batch-norm on a CPU is for the fused layers: add --fused"),
    ],
)
def test_what_cannot_be_synchronised_is_one_line(
    flags: list[str], message: str, quick: list[str], tmp_path: Path, one_error: OneError
) -> None:
    assert train.main([*quick, *flags, "--sync-batch-norm", "--out", str(tmp_path / "run")]) == 2
    assert message in one_error()
    assert not (tmp_path / "run").exists()


def test_one_process_has_nothing_to_synchronise(quick: list[str], tmp_path: Path, one_error: OneError) -> None:
    assert train.main([*quick, "--fused", "--sync-batch-norm", "--out", str(tmp_path)]) == 2
    assert "--sync-batch-norm is for several processes: start them with torchrun" in one_error()


def test_processes_must_be_able_to_join(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train.main([*quick, "--out", str(tmp_path)]) == 2
    assert "WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT: start the processes with torchrun" in one_error()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "nonsense")
    assert train.main([*quick, "--out", str(tmp_path)]) == 2
    assert "cannot join the other processes: invalid literal for int()" in one_error()
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert train.main([*quick, "--out", str(tmp_path)]) == 2
    assert "this torch has no gloo" in one_error()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, "--batch-size 2 leaves some of 3 processes without an image: raise it"),
        ({"device": "mps"}, "--device mps is not for 3 processes: use cpu or cuda"),
        ({"device": "cuda:1"}, "--device cuda:1 is not for 3 processes: use cpu or cuda"),
        ({"device": "cuda"}, "there are more processes than the 2 GPUs of this machine: start at most 2"),
    ],
)
def test_several_processes_are_checked(
    changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=message) as failure:
        check_processes(Settings(**{"lr": 0.1, **changes}))
    assert failure.value.exit_code == 2


def test_a_run_is_resumed_by_as_many_processes(finished_run: Path, tmp_path: Path, one_error: OneError) -> None:
    saved = Checkpoint.load(finished_run / "last.pt")
    replace(saved, settings=replace(saved.settings, processes=2)).save(tmp_path / "last.pt")
    assert train.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "has processes=2, not 1: resume it with torchrun --nproc-per-node 2" in one_error()


def test_compare_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: OneError) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare.main(["--out", str(tmp_path / "comparison")]) == 2
    assert "compare runs in one process: start it without torchrun" in one_error()
    assert not (tmp_path / "comparison").exists()

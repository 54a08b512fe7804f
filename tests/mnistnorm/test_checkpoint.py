import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mnistnorm import checkpoint
from mnistnorm.checkpoint import Checkpoint, write_atomically
from mnistnorm.errors import UserError


def test_a_checkpoint_returns_what_was_saved(finished_run: Path, tmp_path: Path) -> None:
    saved = Checkpoint.load(finished_run / "last.pt")
    saved.save(tmp_path / "copy.pt")
    loaded = Checkpoint.load(tmp_path / "copy.pt")
    assert loaded.settings == saved.settings
    assert loaded.normalization == saved.normalization
    assert loaded.metrics == saved.metrics
    assert loaded.metrics["epoch"] == 2
    assert all(loaded.model[name].equal(value) for name, value in saved.network().state_dict().items())


def test_the_best_checkpoint_holds_no_training_state(finished_run: Path) -> None:
    assert Checkpoint.load(finished_run / "best.pt").training is None
    assert Checkpoint.load(finished_run / "last.pt").training is not None


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(kept: float, finished_run: Path, tmp_path: Path) -> None:
    content = (finished_run / "last.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"cut.pt is not a checkpoint, or is truncated or damaged"):
        Checkpoint.load(path)


def test_a_flipped_bit_is_seen(finished_run: Path, tmp_path: Path) -> None:
    content = bytearray((finished_run / "last.pt").read_bytes())
    weights = Checkpoint.load(finished_run / "last.pt").model["classifier.weight"]
    content[content.index(weights.numpy().tobytes()) + 700] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped.pt is not a checkpoint, or is truncated or damaged"):
        Checkpoint.load(tmp_path / "flipped.pt")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path, victim = tmp_path / "evil.pt", tmp_path / "touched"
    path.write_bytes(pickle.dumps(_Touch(victim)))
    with pytest.raises(UserError, match="is not a checkpoint"):
        Checkpoint.load(path)
    torch.save({"format": checkpoint.FORMAT, "model": _Touch(victim)}, path)
    with pytest.raises(UserError, match="is not a checkpoint"):
        Checkpoint.load(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "content", [{}, {"format": "another"}, [1, 2], {"format": checkpoint.FORMAT}, {"weight": torch.ones(2)}]
)
def test_another_files_content_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"other.pt is (not a checkpoint of mnistnorm|a checkpoint of another network)"):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    "change",
    [
        "norm",
        "unknown norm",
        "unknown dataset",
        "unknown optimizer",
        "type",
        "range",
        "lr",
        "dropout",
        "seed",
        "bool",
        "classes",
        "normalization",
        "mean",
        "shape",
        "missing",
        "settings",
        "list",
    ],
)
def test_another_network_is_refused(change: str, finished_run: Path, tmp_path: Path) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    if change == "norm":
        content["settings"]["norm"] = "layer"
    elif change.startswith("unknown"):
        content["settings"][change.split()[1]] = "instance"
    elif change == "type":
        content["settings"]["epochs"] = "two"
    elif change == "range":
        content["settings"]["batch_size"] = 0
    elif change in ("lr", "dropout", "seed"):
        content["settings"][change] = {"lr": float("nan"), "dropout": 1.0, "seed": -1}[change]
    elif change == "bool":
        content["settings"]["epochs"] = True
    elif change == "mean":
        content["normalization"]["mean"] = float("nan")
    elif change == "classes":
        content["classes"] = content["classes"][:9]
    elif change == "normalization":
        content["normalization"]["std"] = "0.3"
    elif change == "list":
        content["model"] = list(content["model"])
    elif change == "shape":
        content["model"]["classifier.weight"] = torch.zeros(10, 49, 1, 1)
    elif change == "missing":
        del content["model"]["classifier.weight"]
    else:
        content["settings"]["unheard_of"] = 1
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is a checkpoint of another network or version") as failure:
        Checkpoint.load(tmp_path / "other.pt")
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 500


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*none.pt: No such file"):
        Checkpoint.load(tmp_path / "none.pt")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(
        UserError, match=r"cannot write .*file: No space left on device; any existing file is unchanged"
    ):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"

    def meanwhile(_: int) -> None:
        monkeypatch.undo()
        write_atomically(path, "of another")

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomically(path, "the last")
    assert path.read_text() == "the last"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", "new")
    assert not any(tmp_path.iterdir())


def test_a_network_trained_on_another_implementation_runs_here(finished_run: Path) -> None:
    saved = Checkpoint.load(finished_run / "last.pt")
    network = replace(saved, settings=replace(saved.settings, impl="triton")).network()
    assert network.eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnistnorm.data import Dataset, Split, load_dataset


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    return load_dataset("mnist")


def write_idx(folder: Path, prefix: str, split: Split) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">IIII", 2051, len(split), 28, 28) + split.images.numpy().tobytes()
    labels = struct.pack(">II", 2049, len(split)) + split.labels.byte().numpy().tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


@pytest.fixture(scope="session")
def few_digits(mnist: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for 320 training and 100 test images of MNIST, laid out as the data set whose files are not checked."""
    root = tmp_path_factory.mktemp("data")
    write_idx(root / "FashionMNIST" / "raw", "train", mnist.train[:320])
    write_idx(root / "FashionMNIST" / "raw", "t10k", mnist.test[:100])
    return ["--dataset", "fashion-mnist", "--data-dir", str(root)]


@pytest.fixture(scope="session")
def quick(few_digits: list[str]) -> list[str]:
    """Flags for a run of two epochs of five steps."""
    return [*few_digits, "--epochs", "2", "--batch-size", "64", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def long_flags(quick: list[str]) -> list[str]:
    """Flags for a run of four epochs of twenty steps whose every part of the state matters."""
    return [*quick, "--epochs", "4", "--batch-size", "16", "--fused", "--dropout", "0.05"]


@pytest.fixture(scope="session")
def finished_run(quick: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mnistnorm import train  # imported here: a GPU machine may lack packages of the program

    out = tmp_path_factory.mktemp("runs") / "fused"
    assert train.main([*quick, "--fused", "--out", str(out)]) == 0
    return out


@pytest.fixture
def one_error(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What a program left on stderr, after checking that it is one line."""

    def read() -> str:
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        return error

    return read


@pytest.fixture(autouse=True)
def _same_threads() -> object:
    """Programs set torch's number of threads; put it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

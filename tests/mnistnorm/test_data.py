import gzip
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch

from mnistnorm import data
from mnistnorm.data import NODES, Augmentation, Dataset, Normalization, Split, TrainingBatches, load_dataset
from mnistnorm.errors import UserError


def test_the_packaged_mnist_is_the_whole_of_it(mnist: Dataset) -> None:
    for split, size in ((mnist.train, 60_000), (mnist.test, 10_000)):
        assert split.images.shape == (size, 1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert split.labels.shape == (size,)
        assert split.labels.dtype == torch.int64
        assert split.labels.unique().tolist() == list(range(10))
    assert mnist.classes == tuple("0123456789")
    assert mnist.normalization.mean == pytest.approx(0.1307, abs=1e-4)
    assert mnist.normalization.std == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "other content"])
def test_a_damaged_packaged_file_is_named(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mnist"
    shutil.copytree(data.PACKAGED_MNIST, folder)
    monkeypatch.setattr(data, "PACKAGED_MNIST", folder)
    victim = folder / "t10k-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(content[:-100])
    elif damage == "garbage":
        victim.write_bytes(b"no gzip at all")
    else:
        labels = bytearray(gzip.decompress(content))
        labels[-1] ^= 1
        victim.write_bytes(gzip.compress(labels))
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte.*install mnistnorm again"):
        load_dataset("mnist")


@pytest.mark.parametrize("keep", [3, 15, 5000])
def test_a_truncated_file_in_a_data_folder_is_named(keep: int, few_digits: list[str], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(few_digits[-1], root)
    victim = root / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte cannot be used: it .*; replace it") as failure:
        load_dataset("fashion-mnist", root)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "a label of 10",
            "train-labels-idx1-ubyte cannot be used: it does not hold labels from 0 to 9",
        ),
        (
            "images of 20 x 28",
            r"train-images-idx3-ubyte cannot be used: it holds values of shape \(320, 20, 28\)",
        ),
        ("no images", r"train-images-idx3-ubyte cannot be used: it holds values of shape \(0, 28, 28\), not images"),
        ("images of one grey", "train-images-idx3-ubyte cannot be trained on: std must be above 0"),
        ("blank images", "train-images-idx3-ubyte cannot be trained on: std must be above 0"),
        ("a label too few", "train-images-idx3-ubyte has 320 images, but its label file has 319 labels"),
    ],
)
def test_files_that_are_readable_but_wrong_are_named(
    damage: str, message: str, few_digits: list[str], tmp_path: Path
) -> None:
    shutil.copytree(few_digits[-1], tmp_path / "data")
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if damage == "a label of 10":
        labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    elif damage == "images of 20 x 28":
        images.write_bytes(struct.pack(">IIII", 2051, 320, 20, 28) + bytes(320 * 20 * 28))
    elif damage == "blank images":
        images.write_bytes(images.read_bytes()[:16] + bytes(320 * 28 * 28))
    elif damage == "images of one grey":
        images.write_bytes(images.read_bytes()[:16] + bytes([7]) * (320 * 28 * 28))
    elif damage == "no images":
        images.write_bytes(struct.pack(">IIII", 2051, 0, 28, 28))
    else:
        labels.write_bytes(struct.pack(">II", 2049, 319) + labels.read_bytes()[8:-1])
    with pytest.raises(UserError, match=message):
        load_dataset("fashion-mnist", tmp_path / "data")


@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("gzipped", [False, True])
def test_the_files_may_lie_as_they_come(
    folder: str, dotted: bool, gzipped: bool, mnist: Dataset, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for archive in data.PACKAGED_MNIST.glob("*.gz"):
        name = archive.stem.replace("-idx", ".idx") if dotted else archive.stem
        if gzipped:
            shutil.copyfile(archive, tmp_path / folder / f"{name}.gz")
        else:
            (tmp_path / folder / name).write_bytes(gzip.decompress(archive.read_bytes()))
    dataset = load_dataset("mnist", tmp_path)
    assert dataset.test.images.equal(mnist.test.images)
    assert dataset.train.labels.equal(mnist.train.labels)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz is in .*: name a folder"),
        (b"", "t10k-labels-idx1-ubyte cannot be used: it is not an IDX file of bytes or integers"),
        (b"<html>Not found</html>", "t10k-labels-idx1.* cannot be used: it is not an IDX file of bytes or integers"),
        (b"\0\0\x08\1\0\0", "t10k-labels-idx1-ubyte cannot be used: it ends within its header"),
        (b"\0\0\x08\1\0\0\0\5\1\2", "t10k-labels-idx1-ubyte cannot be used: it has 10 bytes, but its header says 13"),
        (b"\0\0\x08\1\0\0\0\1\1", "t10k-labels-idx1-ubyte cannot be used: its content differs from MNIST's"),
    ],
)
def test_a_missing_or_damaged_file_is_named_and_nothing_downloaded(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_download", lambda *_: pytest.fail("downloads"))
    for archive in data.PACKAGED_MNIST.glob("*.gz"):
        shutil.copyfile(archive, tmp_path / archive.name)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    if content is not None:
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=reason) as failure:
        load_dataset("mnist", tmp_path)
    assert str(tmp_path) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_another_mnist_in_a_data_folder_is_refused(few_digits: list[str], tmp_path: Path) -> None:
    shutil.copytree(Path(few_digits[-1]) / "FashionMNIST", tmp_path / "MNIST")
    with pytest.raises(UserError, match=r"train-images-idx3.* cannot be used: its content differs from MNIST's file"):
        load_dataset("mnist", tmp_path)


def test_mnist_is_not_taken_for_another_data_set() -> None:
    with pytest.raises(UserError, match=r"train-images-idx3.* cannot be used: it is MNIST's file; replace it"):
        load_dataset("fashion-mnist", data.PACKAGED_MNIST)


def test_a_failing_download_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.datasets.KMNIST, "mirrors", [(tmp_path / "nowhere").as_uri() + "/"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    for folder in (tmp_path / "own", None):  # None: ./data, which is created
        with pytest.raises(
            UserError, match=r"has no files of kmnist, and they cannot be downloaded.*--data-dir"
        ) as failure:
            load_dataset("kmnist", folder)
        assert "\n" not in str(failure.value)
    assert list(tmp_path.rglob("*")) == [tmp_path / "own"]


@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_a_data_folder_that_is_none_is_said_to_be_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(UserError, match=f"there is no folder {folder}: name one with the files of {name}, or one"):
            load_dataset(name, folder)
    assert not (tmp_path / "missing").exists()


def test_qmnist_labels_are_the_first_of_its_columns(mnist: Dataset, tmp_path: Path) -> None:
    raw = tmp_path / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for what, split in (("train", mnist.train[:5]), ("test", mnist.test[:3])):
        images = struct.pack(">IIII", 2051, len(split), 28, 28) + split.images.numpy().tobytes()
        rows = [struct.pack(">8i", int(label), 4, 99, 4, 1, 2, 0, 0) for label in split.labels]
        (raw / f"qmnist-{what}-images-idx3-ubyte").write_bytes(images)
        (raw / f"qmnist-{what}-labels-idx2-int").write_bytes(
            struct.pack(">III", 0x0C02, len(split), 8) + b"".join(rows)
        )
    dataset = load_dataset("qmnist", tmp_path)
    assert dataset.train.labels.equal(mnist.train.labels[:5])
    assert dataset.test.labels.equal(mnist.test.labels[:3])
    assert dataset.test.images.equal(mnist.test.images[:3])


def test_the_validation_split_is_part_of_the_training_split_and_stays_the_same(mnist: Dataset) -> None:
    small = Dataset("small", mnist.train[:1000], mnist.test[:10], mnist.classes, mnist.normalization)
    split, again = small.with_validation(0.2), small.with_validation(0.2)
    assert split.validation is not None
    assert again.validation is not None
    assert (len(split.train), len(split.validation)) == (800, 200)
    assert split.validation.images.equal(again.validation.images)
    both = torch.cat([split.train.images, split.validation.images]).flatten(1)
    assert both.unique(dim=0).equal(small.train.images.flatten(1).unique(dim=0))


def test_the_smallest_validation_split_is_one_image(mnist: Dataset) -> None:
    small = Dataset("small", mnist.train[:10], mnist.test[:1], mnist.classes, mnist.normalization).with_validation(
        0.001
    )
    assert small.validation is not None
    assert (len(small.train), len(small.validation)) == (9, 1)


def test_normalization_gives_mean_0_and_deviation_1() -> None:
    images = torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8)
    normalized = Normalization.of(images)(images).double()
    assert normalized.mean().item() == pytest.approx(0, abs=1e-6)
    assert normalized.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_augmentation_without_bounds_changes_nothing() -> None:
    images = torch.rand(4, 1, 28, 28)
    still = Augmentation(0, 0, 0, 0)
    same = still(images, still.draw(4, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(same, images)


def test_augmentation_maps_each_image_within_its_bounds() -> None:
    # A dot at (row, column) of an image of 28 x 28 must land where the inverse of the drawn map puts it.
    bounds = Augmentation(rotation=0.3, shift=3, scale=0.2, shear=0.2)
    row, column = 18, 9
    y, x = row - 13.5, column - 13.5
    coordinates = torch.arange(28.0)
    images = torch.exp(-((coordinates[:, None] - row) ** 2 + (coordinates - column) ** 2) / 4).expand(64, 1, 28, 28)
    uniform = bounds.draw(64, torch.Generator().manual_seed(1))
    assert -1 <= uniform.min() < -0.9 < 0.9 < uniform.max() <= 1
    mapped, drawn = bounds(images, uniform)[:, 0].double(), uniform.flatten(1).double()
    mass = mapped.sum((1, 2))
    rows = (mapped.sum(2) @ coordinates.double()) / mass - 13.5
    columns = (mapped.sum(1) @ coordinates.double()) / mass - 13.5
    for n in range(64):
        angle, scale, shear = 0.3 * drawn[0, n].item(), 1 + 0.2 * drawn[1, n].item(), 0.2 * drawn[2, n].item()
        rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        matrix = rotation @ torch.tensor([[scale, 0], [0, scale]]) @ torch.tensor([[1, shear], [0, 1]])
        source = torch.tensor([x - 3 * drawn[3, n], y - 3 * drawn[4, n]])
        expected = torch.linalg.solve(matrix.double(), source.double())
        assert columns[n].item() == pytest.approx(expected[0].item(), abs=0.05)
        assert rows[n].item() == pytest.approx(expected[1].item(), abs=0.05)


def test_an_elastic_map_that_moves_all_points_alike_is_a_shift() -> None:
    images = torch.rand(4, 1, 28, 28)
    elastic = Augmentation(shift=0, elastic=2)
    uniform = torch.zeros_like(elastic.draw(4, torch.Generator()))
    uniform[3:5] = torch.rand(2, 4) * 2 - 1
    shifted = Augmentation(shift=2)(images, uniform[:5])
    uniform[5:] = uniform[3:5].repeat_interleave(NODES**2, dim=0)
    torch.testing.assert_close(elastic(images, uniform), shifted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_point_of_an_elastic_map_bends_what_is_around_it(axis: int) -> None:
    column = torch.arange(28.0).expand(28, 28)
    ramp = column if axis == 0 else column.t()  # whose values tell where they were taken from
    elastic = Augmentation(elastic=0.8)
    uniform = torch.zeros_like(elastic.draw(1, torch.Generator()))
    middle = NODES**2 // 2
    uniform[5 + axis * NODES**2 + middle] = -1
    bent = elastic(ramp.view(1, 1, 28, 28), uniform).view(28, 28) - ramp
    torch.testing.assert_close(bent[13:15, 13:15], torch.full((2, 2), -0.8), atol=0.02, rtol=0)
    assert (bent[10:18, 10:18] < -0.2).all()
    border = torch.cat([bent[0], bent[-1], bent[:, 0], bent[:, -1]])
    torch.testing.assert_close(border, torch.zeros_like(border), atol=1e-5, rtol=0)
    assert (bent < 0.1).all()


def test_a_validation_split_leaves_images_to_train_on(mnist: Dataset) -> None:
    small = Dataset("small", mnist.train[:10], mnist.test[:1], mnist.classes, mnist.normalization)
    with pytest.raises(UserError, match=r"--val-split 0.99 leaves none of the 10 images") as failure:
        small.with_validation(0.99)
    assert failure.value.exit_code == 2


def numbered(size: int) -> Split:
    """Images of one value each, labelled by their number."""
    labels = torch.arange(size)
    return Split(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous(), labels)


def test_an_epoch_is_every_image_once_in_a_new_order() -> None:
    batches = TrainingBatches(numbered(50), 8, Normalization(0, 1 / 255))
    epochs = [[(images, labels) for images, labels in batches] for _ in range(2)]
    assert len(batches) == 7
    assert [len(labels) for _, labels in epochs[0]] == [8] * 6 + [2]
    orders = [torch.cat([labels for _, labels in epoch]) for epoch in epochs]
    assert all(order.sort().values.equal(torch.arange(50)) for order in orders)
    assert not orders[0].equal(orders[1])
    for images, labels in epochs[0]:
        assert images[:, 0, 3, 5].equal(labels.float())


@pytest.mark.parametrize("steps", [0, 1, 6, 7, 9])
def test_batches_continue_from_their_state(steps: int) -> None:
    def batches(seed: int) -> TrainingBatches:
        return TrainingBatches(numbered(50), 8, Normalization(0.1, 0.3), Augmentation(), seed)

    def take(source: TrainingBatches, count: int) -> list[torch.Tensor]:
        taken: list[torch.Tensor] = []
        while len(taken) < count:
            for images, _ in source:
                taken.append(images)
                if len(taken) == count:
                    break
        return taken

    whole = take(batches(3), steps + 10)
    interrupted, resumed = batches(3), batches(4)
    take(interrupted, steps)
    resumed.load_state_dict(interrupted.state_dict())
    for expected, actual in zip(whole[steps:], take(resumed, 10), strict=True):
        assert actual.equal(expected)


def test_batches_continue_from_a_generator_of_another_kind_of_device() -> None:
    def orders(generator_state: torch.Tensor) -> list[int]:
        batches = TrainingBatches(numbered(50), 50, Normalization(0.1, 0.3))
        batches.load_state_dict({"generator": generator_state, "order": None, "position": 0})
        return next(iter(batches))[1].tolist()

    cuda = torch.arange(16, dtype=torch.uint8)  # seed and offset
    assert orders(cuda) == orders(cuda)
    assert orders(cuda) != orders(cuda + 1)


def test_batches_of_other_images_are_refused() -> None:
    state = TrainingBatches(numbered(50), 8, Normalization(0.1, 0.3)).state_dict() | {"order": torch.arange(49)}
    with pytest.raises(ValueError, match="its order is not of 50 training images"):
        TrainingBatches(numbered(50), 8, Normalization(0.1, 0.3)).load_state_dict(state)

"""MNIST and related data sets: reading, and batches that are shuffled, augmented and normalized on the device."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import datasets

from .errors import UserError, one_line

DATASETS: dict[str, type[datasets.MNIST]] = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
    "qmnist": datasets.QMNIST,
}

PACKAGED_MNIST = Path(__file__).with_name("mnist")

# MD5 of the unpacked files: training images and labels, test images and labels.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


QMNIST_FILES = (
    "qmnist-train-images-idx3-ubyte",
    "qmnist-train-labels-idx2-int",
    "qmnist-test-images-idx3-ubyte",
    "qmnist-test-labels-idx2-int",
)

# dtype by the third byte of an IDX file.
IDX_DTYPES = {0x08: ">u1", 0x0C: ">i4"}


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, 1, 28, 28), and their labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of the training pixels, scaled to 0..1."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be above 0 and finite, got {self.std}: all pixels have the same value")

    @classmethod
    def of(cls, images: Tensor) -> "Normalization":
        """Computes exact statistics of `images` (uint8, any shape), from the histogram of the 256 values."""
        counts = torch.bincount(images.flatten(), minlength=256).double()
        values = torch.arange(256, device=images.device, dtype=torch.float64) / 255
        mean = (counts @ values) / counts.sum()
        variance = (counts @ (values - mean).square()) / counts.sum()
        if counts.count_nonzero() == 1:  # the mean may be rounded
            variance.zero_()
        return cls(mean.item(), variance.sqrt().item())

    def __call__(self, images: Tensor) -> Tensor:
        """Normalizes `images`, of any dtype with values 0..255, to float32."""
        return images.float().sub(self.mean * 255).div_(self.std * 255)


@dataclass(frozen=True)
class Dataset:
    """A data set: its splits, the names of its ten classes and the statistics of its training images."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    normalization: Normalization
    validation: Split | None = None

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on `device`."""
        validation = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    def with_validation(self, fraction: float) -> "Dataset":
        """Moves `fraction` of the training images, at least one and always the same ones, to a validation split."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        count = max(1, round(fraction * len(self.train)))
        if count >= len(self.train):
            message = f"--val-split {fraction} leaves none of the {len(self.train):,} images to train on: lower it"
            raise UserError(message, exit_code=2)
        return replace(self, validation=self.train[order[:count]], train=self.train[order[count:]])


def load_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """Reads a data set; MNIST is part of the package, the others are downloaded if their files are missing.

    Args:
        name: a key of DATASETS.
        data_dir: folder with the data set's four IDX files, gzipped or not, or with torchvision's subfolder of them,
            such as MNIST/raw; if it has none of them, they are downloaded to it. None: the package's for MNIST, else
            ./data.

    Raises:
        UserError: the folder does not exist; a file is missing, damaged or cannot be downloaded.
    """
    root = data_dir or (PACKAGED_MNIST if name == "mnist" else Path("data"))
    advice = (
        "name a folder that has all four with --data-dir" if root is not PACKAGED_MNIST else "install mnistnorm again"
    )
    if data_dir and not data_dir.is_dir():
        raise UserError(f"there is no folder {data_dir}: name one with the files of {name}, or one to download into")
    names = QMNIST_FILES if name == "qmnist" else (*MNIST_MD5,)
    files = {file: _find(root, DATASETS[name], file) for file in names}
    if root is not PACKAGED_MNIST and not (any(files.values()) if data_dir else all(files.values())):
        _download(name, root)
        files = {file: _find(root, DATASETS[name], file) for file in names}
    arrays = []
    for file, path in files.items():
        if path is None:
            raise UserError(f"neither {file} nor {file}.gz is in {root}: {advice}")
        try:
            arrays.append(_read_idx(path, "images" in file, MNIST_MD5.get(file), is_mnist=name == "mnist"))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path} cannot be used: {one_line(error)}; replace it, or {advice}") from error
    for images in (0, 2):
        if len(arrays[images]) != len(arrays[images + 1]):
            counts = f"{len(arrays[images]):,} images, but its label file has {len(arrays[images + 1]):,} labels"
            raise UserError(f"{files[names[images]]} has {counts}: replace one of them, or {advice}")
    try:
        normalization = Normalization.of(arrays[0])
    except ValueError as error:
        raise UserError(f"{files[names[0]]} cannot be trained on: {error}; replace it, or {advice}") from error
    return Dataset(
        name=name,
        train=Split(*arrays[:2]),
        test=Split(*arrays[2:]),
        classes=tuple(label.split(" - ")[0] for label in DATASETS[name].classes),
        normalization=normalization,
    )


def _find(root: Path, source: type[datasets.MNIST], name: str) -> Path | None:
    """Finds one of the four files, in `root` or in torchvision's subfolder, in either spelling, gzipped or not."""
    for folder in (root, root / source.__name__ / "raw"):
        for spelling in (name, name.replace("-idx", ".idx")):
            for path in (folder / spelling, folder / f"{spelling}.gz"):
                if path.is_file():
                    return path
    return None


def _download(name: str, root: Path) -> None:
    is_new = not root.exists()
    raw = root / DATASETS[name].__name__ / "raw"
    try:
        for train in (True, False):
            DATASETS[name](root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        for folder in (raw, raw.parent, root) if is_new else (raw, raw.parent):
            with suppress(OSError):  # not empty
                folder.rmdir()
        reason = f"{one_line(error)}; put its four files there, or name a folder that has them with --data-dir"
        raise UserError(f"{root} has no files of {name}, and they cannot be downloaded: {reason}") from error
    except (AssertionError, LookupError, TypeError, ValueError):
        pass  # A damaged file is reported when it is read.


def _read_idx(path: Path, images: bool, md5: str | None, *, is_mnist: bool) -> Tensor:
    """Reads a file of images, uint8 (N, 1, 28, 28), or of labels, int64 (N,).

    `md5` is that of MNIST's file of this name, which the file must be if `is_mnist`, and must not be otherwise.

    Source of the format: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".

    Raises:
        OSError, EOFError, ValueError, zlib.error: the file is damaged or of another kind.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES:
        raise ValueError("it is not an IDX file of bytes or integers")
    dtype, dimensions = np.dtype(IDX_DTYPES[content[2]]), content[3]
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError("it ends within its header")
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    expected = header + dtype.itemsize * math.prod(shape)
    if len(content) != expected:
        raise ValueError(f"it has {len(content):,} bytes, but its header says {expected:,}")
    array = np.frombuffer(content, dtype, offset=header).reshape(shape)
    values = torch.from_numpy(array.astype(dtype.newbyteorder("=")))
    if images:
        if dtype != np.uint8 or shape[1:] != (28, 28) or not shape[0]:
            raise ValueError(f"it holds values of shape {shape}, not images of 28 x 28 pixels")
        values = values.unsqueeze(1)
    else:
        values = (values[:, 0] if dimensions == 2 else values).long()  # QMNIST has eight columns, the label first
        if values.ndim != 1 or not len(values) or values.min() < 0 or values.max() > 9:
            raise ValueError("it does not hold labels from 0 to 9")
    if (hashlib.md5(content, usedforsecurity=False).hexdigest() == md5) != is_mnist:
        raise ValueError("its content differs from MNIST's file" if is_mnist else "it is MNIST's file")
    return values


# Grid points along each side of an image that the elastic distortion moves.
NODES = 5


@dataclass(frozen=True)
class Augmentation:
    """Random affine and elastic distortion; each parameter is drawn uniformly between minus its bound and its bound.

    Source: Simard, Steinkraus & Platt 2003, "Best Practices for Convolutional Neural Networks", section 2; here the
    displacements are interpolated (bicubically) between a few random ones instead of smoothed.
    """

    rotation: float = 0.12  # radians
    shift: float = 1.5  # pixels
    scale: float = 0.08  # relative to 1
    shear: float = 0.06  # horizontal pixels per vertical pixel
    elastic: float = 0.0  # pixels along each axis, for each of NODES x NODES grid points

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws the parameters of `count` maps: uniform in -1..1, of shape (K, count), on the generator's device."""
        parameters = 5 + (2 * NODES**2 if self.elastic else 0)
        return torch.empty(parameters, count, device=generator.device).uniform_(-1, 1, generator=generator)

    def __call__(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Applies a random map to each image, with bilinear interpolation and zero padding.

        Args:
            images: float, of shape (N, C, H, W).
            uniform: result of `draw` for N maps, on the device of `images`.
        """
        height, width = images.shape[2:]
        centre, bounds, basis = _map_constants(self, height, width, images.device)
        parameters = torch.addcmul(centre, uniform, bounds)
        angle, scale, shear = parameters[:3]
        along_x = torch.stack([angle.cos(), angle.sin()]) * scale  # image of the unit vector along x, [2, N]
        upright = torch.stack([-along_x[1], along_x[0]])
        along_y = torch.addcmul(upright, along_x, shear)
        factors = [along_x[..., None], along_y[..., None], parameters[3:5, :, None]]
        if self.elastic:
            factors.append(parameters[5:].view(2, NODES**2, -1).transpose(1, 2))
        source = torch.cat(factors, dim=2).flatten(0, 1) @ basis  # [2 * N, H * W]
        source = source.view(2, len(images), height, width)
        return F.grid_sample(images, source.permute(1, 2, 3, 0), align_corners=False)


@lru_cache
def _map_constants(
    augmentation: Augmentation, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The centre and the bound of each parameter of a map, (K, 1), and the basis of the maps, (L, height * width).

    The basis has the x and y coordinates of the pixel centres, where the image spans -1..1, a constant for the shift
    and, if elastic, each pixel's weight in the displacement of each node.
    """
    y = torch.arange(1 - height, height, 2, device=device).div(height).view(-1, 1).expand(height, width)
    x = torch.arange(1 - width, width, 2, device=device).div(width).expand(height, width)
    basis = [x.reshape(1, -1), y.reshape(1, -1), torch.ones(1, height * width, device=device)]
    bounds = [augmentation.rotation, augmentation.scale, augmentation.shear]
    bounds += [2 * augmentation.shift / size for size in (width, height)]
    if augmentation.elastic:
        nodes = torch.eye(NODES**2, device=device).view(-1, 1, NODES, NODES)
        basis.append(F.interpolate(nodes, (height, width), mode="bicubic", align_corners=True).flatten(1))
        for size in (width, height):
            bounds += [2 * augmentation.elastic / size] * NODES**2
    centre = [0.0, 1.0, 0.0] + [0.0] * (len(bounds) - 3)
    per_map = torch.tensor([centre, bounds], device=device)[..., None]
    return per_map[0], per_map[1], torch.cat(basis)


class TrainingBatches:
    """Iterates over the training split in shuffled, augmented and normalized batches.

    An iterator runs to the end of the epoch and yields images, float32 (n, 1, 28, 28), and labels, int64 (n,). The
    position within the epoch is part of the state: after load_state_dict, a new iterator continues from the batch that
    was next at state_dict.

    Args:
        split: images and labels, on the device that the batches are made on.
        batch_size: images per batch; the last batch of an epoch may be smaller.
        normalization: applied last.
        augmentation: applied to each image; None for no augmentation.
        seed: random seed of the generator that shuffling and augmentation share.
        parts: number of parts that each batch is split into, as evenly as possible; it does not affect the images.
        part: index of the part that is yielded.

    Attributes:
        size: number of images in the last batch, over all parts.
        generator: random number generator, on the device of `split`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        normalization: Normalization,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        *,
        parts: int = 1,
        part: int = 0,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.normalization = normalization
        self.augmentation = augmentation
        self.parts = parts
        self.part = part
        self.size = 0
        self.generator = torch.Generator(split.images.device).manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64, device=split.images.device)
        self._position = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.split) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.make, self.choices())

    def choices(self) -> Iterator[Tensor]:
        """Yields the indices of each batch's images, int64 (n,), on the device; `make` takes them."""
        if self._position >= len(self._order):
            self._order = torch.randperm(len(self.split), generator=self.generator, device=self._order.device)
            self._position = 0
        while self._position < len(self._order):
            chosen = self._order[self._position : self._position + self.batch_size]
            self.size = len(chosen)
            self._position += self.size
            yield chosen

    def make(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Makes a batch from indices that `choices` yielded: images and labels of this part.

        It copies nothing between host and device.
        """
        batch = self.split[chosen.tensor_split(self.parts)[self.part]]
        images = batch.images.float()
        if self.augmentation:
            uniform = self.augmentation.draw(len(chosen), self.generator)
            images = self.augmentation(images, uniform.tensor_split(self.parts, dim=1)[self.part])
        return self.normalization(images), batch.labels

    def state_dict(self) -> dict[str, Any]:
        unfinished = self._position < len(self._order)
        return {
            "generator": self.generator.get_state(),
            "order": self._order.cpu() if unfinished else None,
            "position": self._position if unfinished else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        generator, order = state["generator"], state["order"]
        if generator.shape == self.generator.get_state().shape:
            self.generator.set_state(generator)
        else:  # saved on another type of device: derive a seed, so that the result is still deterministic
            self.generator.manual_seed(zlib.crc32(generator.numpy().tobytes()))
        if order is not None and not order.sort().values.equal(torch.arange(len(self.split))):
            raise ValueError(f"its order is not of {len(self.split):,} training images")
        self._order = self._order.new_empty(0) if order is None else order.to(self._order.device)
        self._position = state["position"]

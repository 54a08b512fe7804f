"""python -m mnistnorm.predict: says which digit an image shows."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import extras  # noqa: F401

# isort: split

import numpy as np
import torch
from PIL import Image, ImageOps

from .checkpoint import INSTEAD, Checkpoint
from .cli import Parser, choose_device, print_error, run_program
from .cnn import IMAGE_SIZE
from .engine import log_probabilities
from .errors import UserError

# The longer side, in pixels, that the images of each data set were scaled to.
LONGER_SIDE = {"mnist": 20, "qmnist": 20, "kmnist": 28, "fashion-mnist": 28}

# What is below this share of the darkest stroke does not count as part of the digit's outline: it is noise or shadow.
OUTLINE = 0.4

# Photographs are reduced to this size: pixels along the longer side.
LARGEST = 1000

# What files with more than 8 bits per value call full: the first that none of an image's values exceeds.
FULL_SCALES = (1.0, 255.0, 65535.0)

# On white, a transparent image whose darkest ink is fainter than this, of 255 levels, is light ink: it goes on black.
FAINT = 80


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("mnistnorm.predict", "Say which digit each image shows, and how probable that is.")
    parser.add_argument("checkpoint", type=Path, help="a last.pt or best.pt written by mnistnorm.train")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="one digit, of any size, dark or light")
    parser.add_argument("--json", action="store_true", help="print a JSON list, with the probability of every class")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, ... (%(default)s)")
    return parser


def read_image(path: Path) -> np.ndarray:
    """The luminance of an image file, upright, on white or black, whichever contrasts, where it is transparent.

    Returns:
        float32, (height, width), in units of 255 levels.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images and odd metadata
            with Image.open(path) as file:
                image = _luminance(ImageOps.exif_transpose(file))
        image.thumbnail((LARGEST, LARGEST))
    except Exception as error:  # Pillow's errors are as many as the ways to damage a file
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from error
    if image.mode == "F":
        return np.asarray(image)
    luminance, opacity = np.moveaxis(np.asarray(image, dtype=np.float32), -1, 0)
    opacity = opacity / 255
    ground = 255 if (opacity * (255 - luminance)).max() >= FAINT else 0
    return ground + opacity * (luminance - ground)


def _luminance(image: Image.Image) -> Image.Image:
    """The image in mode F, or in mode LA if some of it is transparent, in units of 255 levels."""
    if image.mode == "LAB":  # which Pillow does not convert
        return image.getchannel("L").convert("F")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError("some of its values are infinite or not numbers; save it as PNG or JPEG")
        largest = float(np.abs(values).max())
        # A transparent value, the only kind of transparency there is here, is as good a ground as any.
        return Image.fromarray(values * (255 / next((scale for scale in FULL_SCALES if largest <= scale), largest)))
    return image.convert("RGBA").convert("LA") if image.has_transparency_data else image.convert("F")


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "it is too large; reduce it"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check its path"
    return "it is not an image, or is truncated or damaged; save it as PNG or JPEG"


def to_mnist(luminance: np.ndarray, longer_side: int = LONGER_SIDE["mnist"]) -> np.ndarray:
    """Scales a digit as those of MNIST were and puts its centre of mass into the centre of 28 x 28 pixels.

    Args:
        luminance: float, (height, width); a digit, lighter or darker than the paper it stands on.
        longer_side: of the scaled digit, in pixels.

    Returns:
        uint8, (28, 28), light on 0.

    Raises:
        ValueError: there is nothing but paper.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
    """
    ink = luminance - _paper(luminance)
    ink = ink if ink.max() > -ink.min() else -ink
    if ink.max() < 1:  # of 255 levels
        raise ValueError("it shows nothing but paper")
    ink = (ink / ink.max()).clip(0).astype(np.float32)
    rows, columns = (np.flatnonzero((ink > OUTLINE).any(axis)) for axis in (1, 0))
    digit = Image.fromarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    scale = longer_side / max(digit.size)
    width, height = (max(1, round(side * scale)) for side in digit.size)
    pixels = np.asarray(digit.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    top, left = (_offset(pixels.sum(axis)) for axis in (1, 0))
    canvas[top : top + height, left : left + width] = np.rint(255 * pixels / pixels.max())
    return canvas


def read_digit(path: Path, longer_side: int) -> np.ndarray:
    """The digit in an image file, as to_mnist returns it.

    Raises:
        UserError: the file cannot be read as an image, or shows no digit.
    """
    try:
        return to_mnist(read_image(path), longer_side)
    except ValueError as error:
        raise UserError(f"there is no digit in {path}: {error}; show one, darker or lighter than its ground") from error


def _digit_or_error(path: Path, longer_side: int) -> np.ndarray | None:
    """What read_digit returns; None, after saying so on stderr, where it raises."""
    try:
        return read_digit(path, longer_side)
    except UserError as error:
        print_error(error)
        return None


def _paper(luminance: np.ndarray) -> np.ndarray:
    """The luminance without the digit: the plane, for even or slanting light, through most of the border's pixels."""
    height, width = luminance.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    plane = np.stack([np.ones_like(x), x, y], axis=-1)  # [height, width, 3]
    border = np.ones(luminance.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    terms, values = plane[border], luminance[border]
    distance = np.abs(values - np.median(values))
    for _ in range(3):  # each time without the half that lies farthest off, where the digit touches the border
        near = distance <= np.median(distance)
        coefficients = np.linalg.lstsq(terms[near], values[near], rcond=None)[0]
        distance = np.abs(values - terms @ coefficients)
    return plane @ coefficients


def _offset(mass: np.ndarray) -> int:
    """Where a digit of this `mass` per row or column starts if its centre of mass is in pixel 14, as in MNIST."""
    centre = mass @ np.arange(len(mass)) / mass.sum()
    return int(np.clip(round(IMAGE_SIZE / 2 - centre), 0, IMAGE_SIZE - len(mass)))


def predict(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    device = choose_device(args.device)
    checkpoint = Checkpoint.load(args.checkpoint)
    longer_side = LONGER_SIDE[checkpoint.settings.dataset]
    digits = [(path, digit) for path in args.images if (digit := _digit_or_error(path, longer_side)) is not None]
    images = np.array([digit for _, digit in digits], dtype=np.uint8)
    batch = torch.from_numpy(images).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE).to(device)
    probabilities = log_probabilities(checkpoint.network().to(device), batch, checkpoint.normalization).exp()
    if not probabilities.isfinite().all():
        raise UserError(f"the network of {args.checkpoint} computes no numbers, its training diverged; {INSTEAD}")
    results = []
    for (path, _), row in zip(digits, probabilities.tolist(), strict=True):
        by_class = dict(zip(checkpoint.classes, row, strict=True))
        prediction = max(by_class, key=lambda name: by_class[name])
        results.append(
            {
                "image": str(path),
                "prediction": prediction,
                "probability": by_class[prediction],
                "probabilities": by_class,
            }
        )
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(f"{result['image']}: {result['prediction']} ({result['probability']:.2%})")
    return 0 if len(digits) == len(args.images) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(predict, argv)


if __name__ == "__main__":
    sys.exit(main())

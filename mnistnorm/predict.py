"""python -m mnistnorm.predict: says which digit an image shows."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import extras  # noqa: F401

# isort: split

import numpy as np
import torch
from PIL import Image, ImageOps

from .checkpoint import CHECKPOINT_HINT, Checkpoint
from .cli import Parser, choose_device, print_error, run_program
from .cnn import CNN
from .digits import DIGITS, is_stroke, to_mnist
from .engine import log_probabilities
from .errors import UserError

# If no class is as probable as this, the image shows none of them.
MIN_PROBABILITY = 0.5

# Photographs are reduced to this size: pixels along the longer side.
LARGEST = 500

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


def classify(path: Path, checkpoint: Checkpoint, network: CNN, device: torch.device) -> dict[str, Any]:
    """What the program says of an image file.

    Raises:
        UserError: the file cannot be read as an image, or shows no digit; the network is not usable.
    """
    luminance, dataset = read_image(path), checkpoint.settings.dataset
    try:
        image = to_mnist(luminance, dataset)
        if dataset in DIGITS and not is_stroke(image):
            raise ValueError("it shows a blot")
    except ValueError as error:
        advice = "show one digit, darker or lighter than its paper"
        raise UserError(f"no single digit was found in {path}: {error}; {advice}") from error
    log_probs = log_probabilities(network, torch.from_numpy(image[None, None]).to(device), checkpoint.normalization)[0]
    if not log_probs.isfinite().all():
        raise UserError(f"the network computes no numbers, its training diverged; {CHECKPOINT_HINT}")
    by_class = dict(zip(checkpoint.classes, log_probs.exp().tolist(), strict=True))
    best = max(by_class, key=lambda name: by_class[name])
    if by_class[best] < MIN_PROBABILITY:
        message = f"the nearest, {best}, has a probability of {by_class[best]:.0%}; show one"
        raise UserError(f"{path} resembles none of the classes: {message}")
    return {"image": str(path), "prediction": best, "probability": by_class[best], "probabilities": by_class}


def predict(argv: Sequence[str] | None) -> int:
    args = get_parser().parse_args(argv)
    device = choose_device(args.device)
    checkpoint = Checkpoint.load(args.checkpoint)
    network = checkpoint.network().to(device)

    def try_to_classify(path: Path) -> dict[str, Any] | None:
        try:
            return classify(path, checkpoint, network, device)
        except UserError as error:
            print_error(error)
            return None

    results = [result for path in args.images if (result := try_to_classify(path))]
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(f"{result['image']}: {result['prediction']} ({result['probability']:.2%})")
    return 0 if len(results) == len(args.images) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(predict, argv)


if __name__ == "__main__":
    sys.exit(main())

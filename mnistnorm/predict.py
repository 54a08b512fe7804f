"""python -m mnistnorm.predict: predicts which digit an image shows."""

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

# If no class has at least this probability, the image is rejected.
MIN_PROBABILITY = 0.5

# Larger images are scaled down to this many pixels along the longer side.
MAX_SIDE = 500

# Full scales of images with more than 8 bits per value: the first that no value of the image exceeds applies.
FULL_SCALES = (1.0, 255.0, 65535.0)

# A transparent image whose darkest ink on white is below this, of 255 levels, is light ink and goes on black.
MIN_INK_ON_WHITE = 80


def get_parser() -> argparse.ArgumentParser:
    parser = Parser("mnistnorm.predict", "Predict which digit each image shows, with its probability.")
    parser.add_argument("checkpoint", type=Path, help="a last.pt or best.pt written by mnistnorm.train")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="image", help="image of one digit, of any size, dark or light"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, with the probability of every class")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda, ... (%(default)s)")
    return parser


def read_image(path: Path) -> np.ndarray:
    """Reads the luminance of an image file, upright; transparent images go on white or black, whichever contrasts.

    Returns:
        float32, (height, width), in units of 255 levels.

    Raises:
        UserError: the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from Pillow, about large images and odd metadata
            with Image.open(path) as file:
                image = _luminance(ImageOps.exif_transpose(file))
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    except Exception as error:  # Pillow raises all kinds of errors for damaged files
        raise UserError(f"cannot read the image {path}: {_reason(error)}") from error
    if image.mode == "F":
        return np.asarray(image)
    luminance, opacity = np.moveaxis(np.asarray(image, dtype=np.float32), -1, 0)
    opacity = opacity / 255
    background = 255 if (opacity * (255 - luminance)).max() >= MIN_INK_ON_WHITE else 0
    return background + opacity * (luminance - background)


def _luminance(image: Image.Image) -> Image.Image:
    """The image in mode F, or in mode LA if some of it is transparent, in units of 255 levels."""
    if image.mode == "LAB":  # which Pillow does not convert
        return image.getchannel("L").convert("F")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError("some of its values are infinite or NaN; save it as PNG or JPEG")
        largest = float(np.abs(values).max())
        # In these modes at most one value is transparent; it serves as the background unchanged.
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
    """Classifies an image file and returns its entry of the JSON list.

    Raises:
        UserError: the file cannot be read as an image, or shows no digit; the network's output is not finite.
    """
    luminance, dataset = read_image(path), checkpoint.settings.dataset
    try:
        image = to_mnist(luminance, dataset)
        if dataset in DIGITS and not is_stroke(image):
            raise ValueError("it shows a blot")
    except ValueError as error:
        advice = "use an image of one digit, darker or lighter than its paper"
        raise UserError(f"no single digit was found in {path}: {error}; {advice}") from error
    log_probs = log_probabilities(network, torch.from_numpy(image[None, None]).to(device), checkpoint.normalization)[0]
    if not log_probs.isfinite().all():
        raise UserError(f"the network's output is not finite, its training diverged; {CHECKPOINT_HINT}")
    by_class = dict(zip(checkpoint.classes, log_probs.exp().tolist(), strict=True))
    best = max(by_class, key=lambda name: by_class[name])
    if by_class[best] < MIN_PROBABILITY:
        message = f"the best match, {best}, has a probability of {by_class[best]:.0%}; use an image of one of them"
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

"""Finds the digit in a picture and converts it to the format of MNIST's images."""

import numpy as np
from PIL import Image
from scipy.ndimage import (
    binary_dilation,
    binary_erosion,
    binary_fill_holes,
    center_of_mass,
    distance_transform_edt,
    uniform_filter,
)
from scipy.spatial import ConvexHull
from skimage.filters import gaussian, threshold_otsu
from skimage.filters.rank import median
from skimage.measure import label, regionprops
from skimage.segmentation import clear_border
from skimage.transform import resize

from .cnn import IMAGE_SIZE

# The longer side, in pixels, that the images of each data set were scaled to.
LONGER_SIDE = {"mnist": 20, "qmnist": 20, "kmnist": 28, "fashion-mnist": 28}

# The data sets of single shapes, and the most holes that a shape may have: an 8 has two, and noise may add one.
DIGITS = ("mnist", "qmnist")
MAX_HOLES = 3

# Half the width of the widest stroke, in pixels of 28; in MNIST, one image in a thousand exceeds 5.
MAX_HALF_STROKE = 5.5

# The least distance of ink from paper, in standard deviations of the paper; pure noise has 2.7 or less.
MIN_SEPARATION = 3

# Ink paler than this share of the darkest stroke does not count as part of the digit's outline.
OUTLINE = 0.4

# Window of the median filter, relative to the picture's sides: most of it is paper, lit like the pixel in its centre.
SHADOW_WINDOW = 0.4

# The least share of paper along the border of a picture with a digit.
PAPER_BORDER = 0.9

# A sheet on a table or a board in a frame: the least share of the picture, the least share of the smallest rectangle
# around it, and the least and the most share of ink on it.
MIN_SHEET = 0.2
MIN_RECTANGLE = 0.85
INK_ON_SHEET = 0.002, 0.3

# The table along a side of the picture: the least share of that side, and the most luminance, relative to the paper's.
WHOLE_SIDE = 0.9
MAX_TABLE = 0.4

# The least share that the rectangle around a closely cropped digit covers of the picture.
MIN_CROPPED = 0.7

# Pieces below this share of the largest piece's area are specks.
SPECK = 0.02


def to_mnist(luminance: np.ndarray, dataset: str = "mnist") -> np.ndarray:
    """Scales a digit as in MNIST and moves its centre of mass to the centre of 28 x 28 pixels.

    Args:
        luminance: float, (height, width); a digit, lighter or darker than its paper. Light may be uneven, and there
            may be specks and dark edges.
        dataset: a key of LONGER_SIDE.

    Returns:
        uint8, (28, 28), light on 0.

    Raises:
        ValueError: the picture shows only paper, or not exactly one digit.

    Source: LeCun, Cortes & Burges, "The MNIST database of handwritten digits".
    """
    ink, is_ink = _separate_ink(_on_sheet(luminance) if dataset in DIGITS else luminance)
    shape = _digit(is_ink) if dataset in DIGITS else is_ink
    # Keep the soft edges of the strokes.
    ink[distance_transform_edt(~shape) > max(2, 0.01 * max(shape.shape))] = 0
    ink = (ink / ink.max()).clip(0).astype(np.float32)
    digit = Image.fromarray(ink[regionprops((ink > OUTLINE).astype(np.uint8))[0].slice])
    scale = LONGER_SIDE[dataset] / max(digit.size)
    width, height = (max(1, round(side * scale)) for side in digit.size)
    pixels = np.asarray(digit.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    middles = zip(center_of_mass(pixels), pixels.shape, strict=True)
    top, left = (int(np.clip(round(IMAGE_SIZE / 2 - middle), 0, IMAGE_SIZE - side)) for middle, side in middles)
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    canvas[top : top + height, left : left + width] = np.rint(255 * pixels / pixels.max())
    return canvas


def is_stroke(image: np.ndarray) -> bool:
    """Whether an image from to_mnist shows pen strokes, not a blot."""
    return bool(distance_transform_edt(image > 127).max() <= MAX_HALF_STROKE)


def _on_sheet(luminance: np.ndarray) -> np.ndarray:
    """The picture with its sheet extended over the table or frame around it, or along a side."""
    is_light = _above_threshold(luminance)
    sides = is_light[0], is_light[-1], is_light[:, 0], is_light[:, -1]
    is_outer = is_light if np.concatenate(sides).mean() >= 0.5 else ~is_light
    pieces = label(~is_outer)
    if pieces.max() == 0:
        return luminance
    margin = max(1, max(pieces.shape) // 100)  # of soft edges
    sheet = binary_fill_holes(pieces == max(regionprops(pieces), key=lambda piece: piece.area).label)
    least, most = INK_ON_SHEET
    if sheet.mean() >= MIN_SHEET and least <= is_outer[sheet].mean() <= most and _rectangle(sheet) >= MIN_RECTANGLE:
        sheet, paper = binary_erosion(sheet, iterations=margin), ~is_outer
    else:  # the sheet is around
        lines = pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]
        table = np.isin(pieces, [line[0] for line in lines if line[0] and (line == line[0]).mean() >= WHOLE_SIDE])
        if not table.any() or np.median(luminance[table]) > MAX_TABLE * np.median(luminance[is_outer]):
            return luminance
        sheet, paper = ~binary_dilation(table, iterations=margin), is_outer
    visible = luminance[sheet & paper]
    return np.where(sheet, luminance, np.median(visible)) if visible.size else luminance


def _rectangle(mask: np.ndarray) -> float:
    """The share that a mask fills of the smallest rectangle around it, in any direction."""
    points = np.argwhere(mask)
    corners = points[ConvexHull(points).vertices]
    sides = np.diff(corners, axis=0, append=corners[:1])
    angles = np.arctan2(sides[:, 1], sides[:, 0])
    extents = (np.ptp(corners @ [np.cos(angles + turn), np.sin(angles + turn)], axis=0) + 1 for turn in (0, np.pi / 2))
    return float(len(points) / np.prod(list(extents), axis=0).min())


def _separate_ink(luminance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The contrast of each pixel to the paper, and a mask of the ink; dark edges are cropped."""
    paper = _trend(luminance)
    if np.ptp(luminance - paper) < 1:  # of 255 levels
        raise ValueError("it shows nothing but paper")
    border, ink, is_paper = _on_paper(luminance, paper)
    if border < PAPER_BORDER:  # the digit is cropped closely, or a shadow was taken for ink
        border, lit, is_lit_paper = _on_paper(luminance, paper + _shadow(luminance - paper))
        inner = clear_border(_above_threshold(lit))  # without the remains of the shadow's edge
        if border >= PAPER_BORDER and inner.any() and _stands_out(lit, is_lit_paper):
            return lit, inner
    if not _stands_out(ink, is_paper):
        raise ValueError("nothing stands out from its paper")
    return ink, _above_threshold(ink)


def _stands_out(ink: np.ndarray, is_paper: np.ndarray) -> bool:
    if is_paper.all() or not is_paper.any():
        return False
    return bool(ink[~is_paper].mean() - ink[is_paper].mean() >= MIN_SEPARATION * ink[is_paper].std())


def _on_paper(luminance: np.ndarray, paper: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The share of paper along the border, the contrast of each pixel to the paper, and a mask of the paper."""
    is_light = _above_threshold(luminance - paper)
    difference = luminance - paper
    border = np.concatenate([is_light[[0, -1]].ravel(), is_light[:, [0, -1]].ravel()])
    dark_ink = border.mean() >= 0.5
    is_paper = is_light if dark_ink else ~is_light
    # The mean of the paper nearby, which follows shadows; where there is none, the mean of all paper.
    window, far = max(1, max(is_paper.shape) // 4), 1e-3
    total = uniform_filter(np.where(is_paper, difference, 0.0), window) + far * difference[is_paper].mean()
    nearby = total / (uniform_filter(is_paper.astype(float), window) + far)
    # Dark ink absorbs a fraction of the light, so its contrast is relative to the paper's luminance.
    ink = (nearby - difference) / (paper + nearby).clip(1) if dark_ink else difference - nearby
    return max(border.mean(), 1 - border.mean()), ink, is_paper


def _trend(luminance: np.ndarray) -> np.ndarray:
    """The luminance of unevenly lit paper: a quadratic surface, fitted to the half of the pixels nearest to it."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in luminance.shape), indexing="ij")
    surface = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)  # [height, width, 6]
    sampled = tuple(slice(None, None, -(-side // 100)) for side in luminance.shape)
    terms, values = surface[sampled].reshape(-1, 6), luminance[sampled].ravel()
    distance = np.abs(values - np.median(values))
    for _ in range(5):
        near = distance <= np.median(distance)
        coefficients = np.linalg.lstsq(terms[near], values[near], rcond=None)[0]
        distance = np.abs(values - terms @ coefficients)
    return surface @ coefficients


def _shadow(difference: np.ndarray) -> np.ndarray:
    """The luminance of paper with a shadow, relative to its trend: the median around each pixel."""
    sampled = tuple(slice(None, None, -(-side // 100)) for side in difference.shape)
    levels = (difference[sampled] + 128).clip(0, 255).round().astype(np.uint8)
    window = [max(1, round(SHADOW_WINDOW * side)) for side in levels.shape]
    medians = median(np.pad(levels, [(side, side) for side in window], "symmetric"), np.ones(window, np.uint8))
    inner = tuple(slice(side, side + length) for side, length in zip(window, levels.shape, strict=True))
    return resize(medians[inner] - 128.0, difference.shape)


def _above_threshold(values: np.ndarray) -> np.ndarray:
    """Which pixels are above Otsu's threshold."""
    smooth = gaussian(values, min(1, max(values.shape) / 200), preserve_range=True)
    return smooth > threshold_otsu(smooth)


def _digit(is_ink: np.ndarray) -> np.ndarray:
    """A mask of the digit: the tallest shape and pieces near it, such as the upper stroke of a 5."""
    pieces = label(is_ink, connectivity=2)
    largest = max(regionprops(pieces), key=lambda piece: piece.area)
    is_ink = np.isin(pieces, [piece.label for piece in regionprops(pieces) if piece.area >= SPECK * largest.area])
    close = distance_transform_edt(~is_ink) <= max(1, 0.04 * max(largest.image.shape))
    shapes = label(close, connectivity=2) * is_ink
    # A shape that touches the border is a neighbour or the table, unless there are no other shapes.
    inner = [shape for shape in regionprops(clear_border(shapes)) if shape.area >= 0.1 * largest.area]
    *others, digit = sorted(inner or regionprops(shapes), key=lambda shape: shape.image.shape[0])
    # A shape in a corner is a shadow, unless the digit is cropped closely.
    rectangle = regionprops((shapes > 0).astype(np.uint8))[0].area_bbox
    if digit.label in shapes[np.ix_([0, -1], [0, -1])] and rectangle < MIN_CROPPED * shapes.size:
        raise ValueError("nothing stands out from its paper")
    height, width = digit.image.shape
    if count := sum(other.image.shape[0] >= 0.5 * height for other in others):
        raise ValueError(f"it shows {count + 1} separate shapes")
    if (width > 1.75 * height and digit.extent < 0.7) or digit.euler_number < 1 - MAX_HOLES:
        raise ValueError("its shape is not a digit's")
    near = distance_transform_edt(shapes != digit.label) <= 0.3 * max(height, width)
    return np.isin(pieces, np.unique(pieces[is_ink & near]))

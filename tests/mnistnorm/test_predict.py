import json
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters import gaussian

from mnistnorm import predict
from mnistnorm.checkpoint import Checkpoint
from mnistnorm.cnn import CNN
from mnistnorm.data import Augmentation, Dataset, Split, TrainingBatches
from mnistnorm.digits import to_mnist
from mnistnorm.engine import Settings, Trainer, log_probabilities
from mnistnorm.predict import read_image

# In one process, which trains for all of them once.
pytestmark = pytest.mark.xdist_group("predict")

COUNT = 200


@pytest.fixture(scope="module")
def checkpoint(mnist: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network that has seen enough of MNIST to read it."""
    settings = Settings(norm="group", lr=0.05, epochs=1, batch_size=32)
    torch.manual_seed(0)
    dataset = Dataset("mnist", mnist.train[:6000], mnist.test[:COUNT], mnist.classes, mnist.normalization)
    batches = TrainingBatches(dataset.train, settings.batch_size, dataset.normalization, Augmentation())
    trainer = Trainer(CNN("group"), dataset, settings, batches)
    trainer.train_epoch()
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    state = trainer.model.state_dict()
    Checkpoint(settings, state, dataset.classes, dataset.normalization, trainer.history[-1]).save(path)
    return path


def as_is(digit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return digit


def dark_on_light(digit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return 255 - digit


def cropped(digit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    return 255 - digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def photographed(digit: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Somewhere on a sheet of grey paper in slanting light, with noise."""
    side = random.integers(60, 250)
    height, width = side + random.integers(0, 200, 2)
    ink = np.zeros((height, width))
    top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    ink[top : top + side, left : left + side] = np.asarray(Image.fromarray(digit).resize((side, side))) / 255
    light = 190 + np.linspace(-25, 25, height)[:, None] + np.linspace(20, -20, width)
    return (light * (1 - 0.7 * ink) + random.normal(0, 4, ink.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("drawn", [as_is, dark_on_light, cropped, photographed])
def test_digits_are_read_however_they_are_drawn(
    drawn: Callable[[np.ndarray, np.random.Generator], np.ndarray], checkpoint: Path, mnist: Dataset
) -> None:
    network = Checkpoint.load(checkpoint).network()
    test: Split = mnist.test[:COUNT]
    random = np.random.default_rng(0)
    images = [to_mnist(drawn(digit[0].numpy(), random).astype(np.float32)) for digit in test.images]
    right = []
    for batch in (test.images, torch.from_numpy(np.stack(images)).unsqueeze(1)):
        answers = log_probabilities(network, batch, mnist.normalization).argmax(1)
        right.append(answers.eq(test.labels).float().mean().item())
    assert right[1] >= right[0] - 0.03, right
    assert right[1] >= 0.94


def sheet(digit: np.ndarray) -> np.ndarray:
    """A digit in black ink on white paper, (200, 240)."""
    paper = np.full((200, 240), 235.0)
    paper[44:156, 64:176] -= 195 * (np.asarray(Image.fromarray(digit).resize((112, 112))) / 255)
    return paper


Y, X = np.meshgrid(np.linspace(-1, 1, 200), np.linspace(-1, 1, 240), indexing="ij")


def in_a_shadow(digit: np.ndarray) -> np.ndarray:
    return sheet(digit) * (1 - 0.2 / (1 + np.exp(-12 * (X + Y - 0.3))))


def in_a_deep_shadow(digit: np.ndarray) -> np.ndarray:
    return sheet(digit) * (1 - 0.4 / (1 + np.exp(-12 * (X + Y - 0.3))))


def in_a_hard_shadow(digit: np.ndarray) -> np.ndarray:
    return sheet(digit) * (1 - 0.3 * (0.5 + 30 * (X + Y - 0.1)).clip(0, 1))


def in_a_shadow_with_specks_and_noise(digit: np.ndarray) -> np.ndarray:
    paper = in_a_shadow(digit)
    paper[3, 5] = paper[190, 20] = 40
    return paper + np.random.default_rng(0).normal(0, 4, paper.shape)


def with_a_vignette(digit: np.ndarray) -> np.ndarray:
    return sheet(digit) * (1 - 0.5 * (X**2 + Y**2) / 2)


def with_two_dark_edges(digit: np.ndarray) -> np.ndarray:
    return np.pad(sheet(digit), ((0, 2), (0, 2)), constant_values=5)


def with_dark_edges_all_around(digit: np.ndarray) -> np.ndarray:
    return np.pad(sheet(digit), 2, constant_values=5)


def with_wide_dark_edges(digit: np.ndarray) -> np.ndarray:
    return np.pad(sheet(digit), ((8, 15), (20, 8)), constant_values=5)


def on_a_dark_table(digit: np.ndarray) -> np.ndarray:
    return np.pad(sheet(digit), 40, constant_values=60)


def on_a_table_at_an_angle(digit: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(on_a_dark_table(digit).astype(np.float32)).rotate(8, fillcolor=60))


def beside_the_table(digit: np.ndarray) -> np.ndarray:
    return np.pad(sheet(digit), ((0, 0), (0, 60)), constant_values=60)


def on_a_board_in_a_frame(digit: np.ndarray) -> np.ndarray:
    return np.pad(255 - sheet(digit), 20, constant_values=160)


def with_a_speck(digit: np.ndarray) -> np.ndarray:
    paper = sheet(digit)
    paper[3, 5] = 40
    return paper


def with_many_specks(digit: np.ndarray) -> np.ndarray:
    paper = sheet(digit)
    for row, column in np.random.default_rng(0).integers(0, 198, (8, 2)):
        paper[row : row + 2, column : column + 2] = 40
    return paper


def light_on_dark(digit: np.ndarray) -> np.ndarray:
    return 255 - with_dark_edges_all_around(digit)


@pytest.mark.parametrize(
    "drawn",
    [
        *(in_a_shadow, with_a_vignette, with_two_dark_edges, with_a_speck, light_on_dark),
        with_wide_dark_edges,
        *(
            pytest.param(drawn, marks=pytest.mark.slow)
            for drawn in (
                *(in_a_deep_shadow, in_a_hard_shadow, in_a_shadow_with_specks_and_noise),
                *(with_dark_edges_all_around, with_many_specks, on_a_dark_table, beside_the_table),
                *(on_a_table_at_an_angle, on_a_board_in_a_frame),
            )
        ),
    ],
)
def test_what_else_a_sheet_shows_does_not_change_the_digit(
    drawn: Callable[[np.ndarray], np.ndarray], checkpoint: Path, mnist: Dataset
) -> None:
    """Of a hundred digits that the network reads, at least 97 are read from a sheet as well."""
    network = Checkpoint.load(checkpoint).network()
    test: Split = mnist.test[:COUNT]
    answers = log_probabilities(network, test.images, mnist.normalization).argmax(1)
    hundred = test[answers.eq(test.labels).nonzero()[:100, 0]]
    images = np.stack([to_mnist(drawn(digit[0].numpy())) for digit in hundred.images])
    answers = log_probabilities(network, torch.from_numpy(images).unsqueeze(1), mnist.normalization).argmax(1)
    assert answers.eq(hundred.labels).sum() >= 97


def random(scale: float, blur: float) -> np.ndarray:
    return 128 + scale * gaussian(np.random.default_rng(0).normal(size=(200, 200)), blur)


def pair(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda digit: np.concatenate([sheet(digit), sheet(digit)], axis)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (pair(0), "it shows 2 separate shapes; use an image of one digit"),
        (pair(1), "it shows 2 separate shapes; use an image of one digit"),
        (lambda digit: random(30, 0.1), "nothing stands out from its paper"),
        (lambda digit: random(300, 8), "nothing stands out from its paper"),
        (lambda digit: np.where(X**2 + Y**2 < 0.2, 20, 230), "it shows a blot"),
        (lambda digit: np.where((abs(X) < 0.6) & (abs(Y) < 0.6) & ((X * 8 % 1 < 0.4) | (Y * 8 % 1 < 0.4)), 20, 230),
         "its shape is not a digit's"),
        (lambda digit: np.where((abs(X) < 0.9) & (abs(Y - 0.1 * np.sin(9 * X)) < 0.05), 20, 230), "not a digit's"),
    ],
)  # fmt: skip
def test_other_pictures_are_not_guessed(
    drawn: Callable[[np.ndarray], np.ndarray],
    message: str,
    checkpoint: Path,
    mnist: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(drawn(mnist.test.images[0, 0].numpy()).clip(0, 255).astype(np.uint8)).save(path)
    assert predict.main([str(checkpoint), str(path)]) == 1
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith(f"error: no single digit was found in {path}: ")
    assert message in error
    assert error.count("\n") == 1


def test_what_no_class_is_likely_for_is_not_guessed(
    checkpoint: Path, mnist: Dataset, tmp_path: Path, one_error: Callable[[], str]
) -> None:
    undecided = Checkpoint.load(checkpoint)
    undecided.model["classifier.weight"].zero_()
    undecided.save(tmp_path / "undecided.pt")
    assert predict.main([str(tmp_path / "undecided.pt"), *save_digits(mnist, tmp_path, 1)]) == 1
    assert "0.png resembles none of the classes: the best match, 0, has a probability of 10%" in one_error()


def test_the_pieces_of_a_broken_digit_stay_together(mnist: Dataset) -> None:
    digit = mnist.test.images[8, 0].numpy()  # a 5 whose upper stroke is apart
    difference = to_mnist(sheet(digit)).astype(int) - digit
    assert np.abs(difference).mean() < 0.2 * digit.mean()


def test_a_speck_beside_the_digit_changes_nothing(mnist: Dataset) -> None:
    paper = sheet(mnist.test.images[0, 0].numpy())
    expected = to_mnist(paper)
    paper[100:102, 80:82] = 40
    assert np.abs(to_mnist(paper).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("width", [3, 8, 20])
def test_an_edge_of_a_blank_sheet_is_no_digit(width: int) -> None:
    paper = np.pad(np.full((300, 240), 240.0), ((0, 0), (0, width)), constant_values=10)
    with pytest.raises(ValueError, match="nothing but paper"):
        to_mnist(paper)


@pytest.mark.parametrize("strength", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("angle", [0.3, 2.0, 3.5, 5.0])
def test_a_shadow_on_a_blank_sheet_is_no_digit(angle: float, strength: float) -> None:
    across = 1.5 * (np.cos(angle) * X + np.sin(angle) * Y)
    paper = 235 * (1 - strength * (across + 0.5).clip(0, 1))
    with pytest.raises(ValueError, match=r"nothing stands out|not a digit"):
        to_mnist(paper + np.random.default_rng(0).normal(0, 2, paper.shape))


def test_tiny_pictures_are_digits_or_errors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = rng.integers(1, 14, 2)
        with suppress(ValueError):
            assert to_mnist(rng.choice([10.0, 120.0, 240.0], (height, width))).shape == (28, 28)


def test_clothes_may_show_several_shapes(mnist: Dataset) -> None:
    both = np.concatenate([sheet(mnist.test.images[0, 0].numpy())] * 2, axis=1)
    columns = np.flatnonzero(to_mnist(both, "fashion-mnist").any(0))
    assert columns[-1] - columns[0] + 1 == 28


@pytest.mark.parametrize("shape", [(28, 28), (1, 9), (9, 1), (300, 40), (2000, 1500), (3, 3)])
def test_the_digit_is_scaled_to_20_pixels_and_centred(shape: tuple[int, int]) -> None:
    luminance = np.full((shape[0] + 6, shape[1] + 20), 200, dtype=np.float32)
    luminance[3 : 3 + shape[0], 2 : 2 + shape[1]] = 30
    image = to_mnist(luminance)
    assert image.shape == (28, 28)
    assert image.dtype == np.uint8
    assert image.max() == 255
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 == 20
    for extent in (rows, columns):
        assert abs((extent[0] + extent[-1]) / 2 - 14) <= 0.5


def test_mnist_itself_stays_where_it_is(mnist: Dataset) -> None:
    differences = []
    for digit in mnist.test.images[:COUNT, 0].numpy():
        original, again = digit.astype(int), to_mnist(digit.astype(np.float32)).astype(int)
        differences.append(np.abs(again - original).mean() / original.mean())
    assert np.mean(differences) < 0.15, "a shift by one pixel makes this about 0.5"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK", "LAB"])
def test_every_kind_of_image_file_is_read(mode: str, mnist: Dataset, tmp_path: Path) -> None:
    digit = 255 - mnist.test.images[0, 0].numpy()
    if mode == "I;16":
        image = Image.fromarray(digit.astype(np.uint16) * 257)
    elif mode == "RGBA":
        image = Image.fromarray(np.stack([np.zeros_like(digit)] * 3 + [255 - digit], axis=-1))
    elif mode == "LAB":
        neutral = Image.new("L", (28, 28), 128)
        image = Image.merge("LAB", [Image.fromarray(digit), neutral, neutral])
    else:
        image = Image.fromarray(digit).convert(mode)
    path = tmp_path / ("digit.tif" if mode in ("CMYK", "LAB") else "digit.png")
    image.save(path)
    difference = to_mnist(read_image(path)).astype(int) - to_mnist(digit.astype(np.float32))
    assert np.abs(difference).mean() < (12 if mode == "1" else 1)


def save_16_bit_png(path: Path, values: np.ndarray, transparent: int) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    body = chunk(b"tRNS", struct.pack(">H", transparent)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


@pytest.mark.parametrize("ink", [0, 200, 255])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "16 bits"])
def test_ink_of_any_shade_is_read_on_a_transparent_ground(kind: str, ink: int, mnist: Dataset, tmp_path: Path) -> None:
    path, digit = tmp_path / "digit.png", mnist.test.images[0, 0].numpy()
    tolerance = 1.0
    if kind in ("RGBA", "LA"):
        shade = np.full_like(digit, ink)
        Image.fromarray(np.stack([*[shade] * (len(kind) - 1), digit], axis=-1)).save(path)
    else:
        tolerance = 12.0  # fully transparent or not at all
        mask = digit > 127
        if kind == "P":
            image = Image.fromarray(mask.astype(np.uint8)).convert("P")
            image.putpalette([90, 90, 90, ink, ink, ink])
            image.save(path, transparency=0)
        else:
            save_16_bit_png(path, np.where(mask, 257 * ink, 40_000), 40_000)
    difference = to_mnist(read_image(path)).astype(int) - to_mnist(digit.astype(np.float32))
    assert np.abs(difference).mean() < tolerance


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, scale) for scale in (1e-4, 1 / 255, 1, 257, 1e6)]
    + [(dtype, scale) for dtype in (np.uint16, np.int32) for scale in (1, 16, 257)],
)
def test_values_beyond_8_bits_are_read_on_their_own_scale(
    dtype: type[np.generic], scale: float, mnist: Dataset, tmp_path: Path
) -> None:
    digit = mnist.test.images[0, 0].numpy().astype(np.float64)
    Image.fromarray((digit * scale).astype(dtype)).save(tmp_path / "digit.tif")
    difference = to_mnist(read_image(tmp_path / "digit.tif")).astype(int) - to_mnist(digit.astype(np.float32))
    assert np.abs(difference).mean() < 1


def save_digits(mnist: Dataset, folder: Path, count: int) -> list[str]:
    paths = [folder / f"{index}.png" for index in range(count)]
    for path, digit in zip(paths, mnist.test.images, strict=False):
        Image.fromarray(255 - digit[0].numpy()).resize((140, 140)).save(path)
    return [str(path) for path in paths]


def test_the_program_prints_digit_and_probability(
    checkpoint: Path, mnist: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = save_digits(mnist, tmp_path, 3)
    assert predict.main([str(checkpoint), *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, path, digit in zip(lines, paths, (7, 2, 1), strict=True):
        assert line.startswith(f"{path}: {digit} (")
        assert line.endswith("%)")

    assert predict.main([str(checkpoint), *paths, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["prediction"] for result in results] == ["7", "2", "1"]
    for result, path in zip(results, paths, strict=True):
        assert result["image"] == path
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert result["probability"] == max(result["probabilities"].values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the image .*: No such file or directory"),
        (b"", "cannot read the image .*: it is not an image, or is truncated"),
        (b"just text", "cannot read the image .*: it is not an image, or is truncated"),
        ("truncated", "cannot read the image .*: it is not an image, or is truncated"),
        ("blank", "no single digit was found in .*: it shows nothing but paper"),
        ("infinite", "cannot read the image .*: some of its values are infinite or NaN; save it"),
        ("not numbers", "cannot read the image .*: some of its values are infinite or NaN; save it"),
        ("too large", "cannot read the image .*: it is too large; reduce it"),
        ("slanting light", "no single digit was found in .*: it shows nothing but paper"),
    ],
)
def test_an_image_that_is_none_is_one_line(
    content: bytes | str | None,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_error: Callable[[], str],
) -> None:
    path = tmp_path / "image.png"
    if content == "blank":
        Image.new("RGB", (30, 20), "beige").save(path)
    elif content == "slanting light":
        Image.fromarray(np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)).save(path)
    elif content == "truncated":
        Image.effect_noise((100, 100), 50).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content in ("infinite", "not numbers"):
        path = tmp_path / "image.tif"
        Image.fromarray(np.array([[0, float("inf" if content == "infinite" else "nan")]], dtype=np.float32)).save(path)
    elif content == "too large":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("L", (15, 15)).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert predict.main([str(checkpoint), str(path)]) == 1
    assert re.search(message, one_error())


def test_a_large_image_is_read_without_a_warning(
    mnist: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = save_digits(mnist, tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 140 * 140 - 1)  # warned of from here, refused from twice that
    assert read_image(Path(path)).shape == (140, 140)


def test_whatever_pillow_raises_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_error: Callable[[], str]
) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("Failed to decode frame 0: Decoding of color planes failed")  # a damaged AVIF

    monkeypatch.setattr(Image, "open", fail)
    assert predict.main([str(checkpoint), "image.avif"]) == 1
    assert "cannot read the image image.avif: it is not an image, or is truncated" in one_error()


def test_an_image_that_is_none_does_not_stop_the_others(
    checkpoint: Path, mnist: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save_digits(mnist, tmp_path, 2)
    assert predict.main([str(checkpoint), first, "none.png", second, "--json"]) == 1
    printed, error = capsys.readouterr()
    assert [result["prediction"] for result in json.loads(printed)] == ["7", "2"]
    assert error == "error: cannot read the image none.png: No such file or directory; check its path\n"


def test_a_checkpoint_that_is_none_is_one_line(tmp_path: Path, one_error: Callable[[], str]) -> None:
    path = tmp_path / "not.pt"
    path.write_text("text")
    assert predict.main([str(path), "image.png"]) == 1
    assert f"{path} is not a checkpoint" in one_error()


def test_a_network_that_diverged_predicts_nothing(
    checkpoint: Path, mnist: Dataset, tmp_path: Path, one_error: Callable[[], str]
) -> None:
    diverged = Checkpoint.load(checkpoint)
    diverged.model["classifier.weight"][3] = float("nan")
    diverged.save(tmp_path / "diverged.pt")
    assert predict.main([str(tmp_path / "diverged.pt"), *save_digits(mnist, tmp_path, 1), "--json"]) == 1
    assert "the network's output is not finite, its training diverged" in one_error()


def test_an_image_must_be_given(checkpoint: Path, one_error: Callable[[], str]) -> None:
    assert predict.main([str(checkpoint)]) == 2
    assert "required: image" in one_error()

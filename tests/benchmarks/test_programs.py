"""The programs that count and benchmarks.models: what they print, write and reject."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import compiled, host, layers, models, results, traffic, training
from benchmarks.instruments.chain import Chain
from benchmarks.instruments.counting import Kernel, eager
from mnistnorm import fuse
from mnistnorm.cli import command_of

PROGRAMS = [traffic.main, compiled.main]
BASELINE = Path(compiled.__file__).with_name("compiled.json")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--shape", "64x256"], "four positive sizes such as 64x256x56x56, got '64x256'"),
        (["--shape", "0x1x2x3"], "four positive sizes"),
        (["--shape", "4x8x5x7", "--groups", "3"], "--groups 3 does not divide the 8 channels"),
        (["--shape", "1x8x1x1"], "one value for each channel"),
        (["--json", "/proc/nowhere/counts.json"], "cannot be written"),
        (["--norms", "instance"], "invalid choice: 'instance'"),
        (["--plan", "resident", "--shape", "2x4x1024x1024", "--norms", "batch"], "--plan resident: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(program, flags, expected, capsys) -> None:
    assert program(flags) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("program", [traffic, layers])
def test_two_outputs_do_not_share_a_file(program, tmp_path, capsys) -> None:
    assert program.main(["--json", str(tmp_path / "file"), "--plot", str(tmp_path / "file")]) == 2
    assert "is to be written twice: name two files" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [["--json", "a.json", "--norms", "batch"], ["--norms", "batch", "--plot=a.png", "--json=a.json"]]
)
def test_the_command_is_told_without_the_files_it_writes(argv) -> None:
    assert command_of("benchmarks.layers", argv) == "python -m benchmarks.layers --norms batch"


@pytest.mark.parametrize("program", [layers, training, models, traffic, compiled, host, results])
def test_help(program, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert f"usage: python -m {program.__name__} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--models", "timm/nope"], ["--coverage", "nope"], ["--coverage", "torchvision/nope"]]
)
def test_unknown_models(flags, capsys) -> None:
    assert models.main(flags) == 2
    assert "has no model 'nope'" in capsys.readouterr().err


def test_unknown_targets(capsys) -> None:
    assert compiled.main(["--target", "sm_10"]) == 2
    assert "invalid choice: 'sm_10'" in capsys.readouterr().err
    assert traffic.main(["--gpu", "Voodoo"]) == 2
    assert "invalid choice: 'Voodoo'" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "", "{}", '{"kernels": [{}]}', '{"kernels": 3}'])
def test_a_baseline_that_is_none(content, tmp_path, capsys) -> None:
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    assert compiled.main(["--baseline", str(path)]) == 2
    assert f"--baseline {path}" in capsys.readouterr().err


@pytest.mark.slow
def test_traffic(tmp_path, capsys) -> None:
    document, picture = tmp_path / "traffic.json", tmp_path / "traffic.png"
    flags = ["--shape", "4x8x5x7", "--norms", "batch", "group", "--dropout", "0.1", "--tensors"]
    assert traffic.main([*flags, "--json", str(document), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("the interpreter counted the same bytes for the fused launches") == 2
    assert "nothing was run on a GPU" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    chains = json.loads(document.read_text())["chains"]
    assert [chain["chain"]["norm"] for chain in chains] == ["batch", "group"]
    for chain in chains:
        assert chain["interpreted"]
        assert list(chain["contenders"]) == list(traffic.CONTENDERS)
        assert chain["contenders"]["fused"]["launches"]["forward"] == 1
        moved = {name: sum(map(sum, them["bytes"].values())) for name, them in chain["contenders"].items()}
        assert moved["minimum"] < moved["fused"] < moved["inductor"] < moved["eager"] < moved["eager, all kernels"]


@pytest.mark.slow
def test_traffic_says_when_the_interpreter_counts_otherwise(monkeypatch, capsys) -> None:
    unlike = {"forward": [Kernel("forward_kernel", {"x_ptr": 1}, {})], "backward": []}
    monkeypatch.setattr(traffic, "launches", lambda phases: unlike)
    assert traffic.main(["--shape", "2x2x3x3", "--norms", "layer"]) == 1
    assert "the interpreter and the formulas count different bytes" in capsys.readouterr().err


def test_bounds_are_bytes_over_bandwidth() -> None:
    chain = Chain("layer", (4, 8, 5, 7))
    gpu = next(gpu for gpu in compiled.GPUS if gpu.name == "H100")
    microseconds = compiled.bounds(chain, gpu, eager(chain), eager(chain))
    assert microseconds["minimum"] == pytest.approx(5 * chain.activation_bytes / 3.35e12 * 1e6)


def test_changes_since_a_baseline() -> None:
    rows = json.loads(BASELINE.read_text())["kernels"]
    assert compiled.changes(rows, rows) == ([], [])
    assert compiled.changes([], rows) == ([], [])  # the flags selected none of the baseline
    changed, worse = compiled.changes(rows[1:], rows)
    assert ([change.partition(":")[0] for change in changed], worse) == (["gone"], [])

    spilling, narrow, smaller = copy.deepcopy(rows[:3])
    spilling["spill_bytes"] = 8
    narrow["load_bits"] = 32
    smaller["registers"] -= 1
    changed, worse = compiled.changes([spilling, narrow, smaller, *rows[3:]], rows)
    assert len(changed) == 3
    assert "registers" in changed[2]
    assert [problem.partition(":")[0] for problem in worse] == [
        "spills 8 bytes, 0 before",
        f"load_bits 32, {rows[1]['load_bits']} before",
    ]
    _, worse = compiled.changes([spilling], [])
    assert [problem.partition(":")[0] for problem in worse] == ["spills 8 bytes"]


@pytest.mark.slow
def test_the_kernels_are_no_worse_than_the_baseline(capsys) -> None:
    flags = "--target sm_80 sm_90 gfx942 --shape 128x8x26x26 64x256x14x14 --no-bounds"
    assert compiled.main([*flags.split(), "--baseline", str(BASELINE)]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_compiled(tmp_path, capsys) -> None:
    document = tmp_path / "compiled.json"
    flags = ["--shape", "128x8x26x26", "--norms", "batch", "--json", str(document)]
    assert compiled.main(flags) == 0
    printed = capsys.readouterr().out
    assert "Bounds, not measurements" in printed
    written = json.loads(document.read_text())
    assert [row["kernel"] for row in written["kernels"]] == ["forward_kernel", "backward_kernel"]
    assert [(row["load_bits"], row["store_bits"], row["spill_bytes"]) for row in written["kernels"]] == [
        (128, 128, 0)
    ] * 2
    assert [row["gpu"] for row in written["bounds"]] == ["H100", "H200"]
    for row in written["kernels"]:
        row["spill_bytes"] = row["registers"] = -1
    document.write_text(json.dumps(written))
    assert compiled.main([*flags[:4], "--no-bounds", "--baseline", str(document)]) == 1
    printed = capsys.readouterr().out
    assert "registers -1 ->" in printed
    assert printed.count("WORSE: spills 0 bytes, -1 before") == 2


def test_models(tmp_path, capsys) -> None:
    document = tmp_path / "models.json"
    flags = "--models resnet18 --batch-size 2 --image-size 40 --rounds 2 --dropout 0 0.1"
    threads = torch.get_num_threads()
    assert models.main([*flags.split(), "--threads", str(threads), "--json", str(document)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\nresnet18") == 2
    plain, dropped = json.loads(document.read_text())["rows"]
    for row in (plain, dropped):
        assert (row["fused"], row["sums"], row["left"]) == (17, 8, 3)
        assert {name: len(values) for name, values in row["milliseconds"].items()} == {"stock": 2, "fused": 2}
    assert plain["saved_bytes"]["fused"] <= plain["saved_bytes"]["stock"]
    assert dropped["saved_bytes"]["fused"] < 0.75 * dropped["saved_bytes"]["stock"]


@pytest.mark.slow
def test_dropout_before_each_relu_of_resnet50_costs_no_memory() -> None:
    stock = models.stock_model("resnet50", 0.05)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    saved = [models.Step(model, images, labels).saved_bytes() for model in (stock, fuse(stock))]
    assert saved[1] <= 0.7 * saved[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--models", "alexnet"], "invalid choice: 'alexnet'"),
        (["--image-size", "16"], "expected an integer from 32"),
        (["--dropout", "1"], "expected a number from 0 to below 1, got '1'"),
        (["--json", "/proc/nowhere/models.json"], "cannot be written"),
    ],
)
def test_models_with_bad_input(flags, expected, capsys) -> None:
    assert models.main(flags) == 2
    assert expected in capsys.readouterr().err


def test_coverage_counts_the_chains_that_a_model_runs(capsys) -> None:
    pytest.importorskip("timm")
    assert models.main(["--coverage", "resnet18", "torchvision/mnasnet0_5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:4] == ["resnet18", "20", "17", "17"]
    assert printed[2].split()[:4] == ["torchvision/mnasnet0_5", "52", "35", "35"]
    assert printed[3] == "fused 52 of 52 chains of 2 models: 100.0%"

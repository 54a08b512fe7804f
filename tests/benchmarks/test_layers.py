"""benchmarks.layers: what it rejects, skips, checks, prints, writes and plots."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.conftest
from benchmarks import layers
from benchmarks.instruments import contenders
from benchmarks.instruments.chain import Chain
from benchmarks.instruments.contenders import CONTENDERS, Case, UnavailableError, WrongResultError, prepare
from mnistnorm.cli import choose_device

ROOT = Path(layers.__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = (5, 6, 7, 3)
FLAGS = ["--shapes", "5x6x7x3", "4x8x13x7", "--rounds", "2"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--shapes", "64x256"], "network-512, ladder or four positive sizes such as 64x256x56x56, got '64x256'"),
        (["--shapes", "4x7x5x5"], "--groups 2 does not divide the 7 channels"),
        (["--shapes", "1x8x1x1", "--norms", "batch"], "one value for each channel"),
        (["--shapes", "1x2x1x1", "--norms", "group"], "one value for each group"),
        (["--contenders", "pencil"], "invalid choice: 'pencil'"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["--json", "/proc/nowhere/layers.json"], "cannot be written"),
        (["--plot", "/proc/nowhere/layers.png"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, expected, capsys) -> None:
    assert layers.main(flags) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_prints_writes_and_draws_every_figure(tmp_path, capsys) -> None:
    document, picture = tmp_path / "layers.json", tmp_path / "layers.png"
    options = (
        "--norms batch layer --dropout 0.1 --residual --passes forward backward both --layouts contiguous channels_last"
    )
    assert layers.main([*FLAGS, *options.split(), "--json", str(document), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(document.read_text())["rows"]
    assert len(rows) == len({(row["shapes"], row["norm"], row["layout"], row["passes"]) for row in rows}) == 24
    for row in rows:
        assert layers.section(row) in printed
        assert all(line in printed for line in layers.lines(row))
        stock, fused = row["contenders"]["stock"], row["contenders"]["fused"]
        assert (stock["best_other"], fused["best_other"]) == ("fused", "stock")
        assert (list(stock["times_as_fast_as"]), list(fused["times_as_fast_as"])) == (["fused"], ["stock"])
        assert fused["milliseconds"]["median"] > 0
        assert fused["saved_bytes"] < stock["saved_bytes"]


def test_the_default_shapes() -> None:
    args = layers.get_parser().parse_args([])
    sets = {name: sizes for each in args.shapes for name, sizes in each.items()}
    assert {name: len(sizes) for name, sizes in sets.items()} == {
        "network, batch 128": 8,
        "network, batch 512": 8,
        "32 x 64 x 56 x 56": 1,
    }
    assert layers.choose_contenders(args.contenders, CPU) == (["stock", "fused"], {})


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
class TestCheck:
    def chain(self, norm, channels_last, dropout, residual) -> Chain:
        return Chain(norm, SHAPE, torch.float32, dropout, residual, channels_last, groups=2)

    @pytest.mark.parametrize("name", ["stock", "fused"])
    def test_right_results_pass(self, name, norm, channels_last, dropout, residual) -> None:
        case = prepare(name, self.chain(norm, channels_last, dropout, residual), CPU)
        case.check()

    @pytest.mark.parametrize("wrong", ["output", "input", "weight", "bias", "dropout"])
    def test_wrong_results_do_not(self, wrong, norm, channels_last, dropout, residual, monkeypatch) -> None:
        case = Case.of("fused", self.chain(norm, channels_last, dropout, residual), CPU)
        forward, gradients = Case.forward, Case.gradients
        if wrong == "output":
            monkeypatch.setattr(Case, "forward", lambda self: forward(self) * 1.001)
        elif wrong == "dropout":
            monkeypatch.setattr(case.module, "dropout_p", 0.6)
        else:
            index = ["input", "weight", "bias"].index(wrong)

            def scaled(self, output, grad):
                found = list(gradients(self, output, grad))
                found[index] = found[index] * 1.001
                return tuple(found)

            monkeypatch.setattr(Case, "gradients", scaled)
        with pytest.raises(WrongResultError):
            case.check()


def test_every_contender_computes_with_the_same_values() -> None:
    chain = Chain("group", SHAPE, residual=True, groups=2)
    stock, fused = (Case.of(name, chain, CPU) for name in ("stock", "fused"))
    for one, other in zip(stock.module.parameters(), fused.module.parameters(), strict=True):
        assert one.equal(other)
    torch.testing.assert_close(stock.forward(), fused.forward())


@pytest.mark.parametrize(
    ("passes", "timed"), [("forward", ["forward"]), ("backward", ["backward"]), ("both", ["forward", "backward"])]
)
def test_only_the_passes_that_were_asked_for_are_timed(passes, timed, monkeypatch) -> None:
    case = Case.of("fused", Chain("batch", SHAPE), CPU)
    seen, forward, gradients = [], Case.forward, Case.gradients
    monkeypatch.setattr(Case, "forward", lambda self: (seen.append("forward"), forward(self))[1])
    monkeypatch.setattr(Case, "gradients", lambda *args: (seen.append("backward"), gradients(*args))[1])

    def clock(call) -> float:
        seen.clear()
        call()
        assert seen == timed
        return 0.5

    assert layers.total([case, case], passes, clock)() == 1.0


def test_what_is_saved_is_counted_once_and_without_what_is_alive_anyway() -> None:
    elements = torch.Size(SHAPE).numel()
    saved = {
        (name, dropout): Case.of(name, Chain("layer", SHAPE, dropout=dropout), CPU).saved_bytes()
        for name in ("stock", "fused")
        for dropout in (0.0, 0.5)
    }
    statistics = 2 * 4 * elements // SHAPE[-1]
    assert saved["stock", 0.0] == saved["fused", 0.0] == statistics
    assert saved["fused", 0.5] - statistics in (0, 2 * 4 * SHAPE[-1])  # scaled copies of weight and bias may be kept
    assert saved["stock", 0.5] >= statistics + 4 * elements


def test_one_of_ours_that_is_wrong_is_not_timed(monkeypatch, capsys) -> None:
    monkeypatch.setitem(
        CONTENDERS, "fused", contenders.Contender(lambda chain: contenders.stock(Chain("group", SHAPE)))
    )
    assert layers.main(["--shapes", "5x6x7x3", "--rounds", "2", "--norms", "batch", "--dropout", "0"]) == 1
    printed = capsys.readouterr().out
    assert "skipped: fused has a wrong output: error" in printed
    assert " stock " in printed


class TestPeers:
    """Uses stand-ins built from torch operations, since the peers are not installed without a GPU."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch) -> None:
        class Liger(nn.Module):
            def __init__(self, size: int, *groups: int, eps: float) -> None:
                super().__init__()
                self.groups, self.eps = groups, eps
                self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if self.groups:
                    return nn.functional.group_norm(x, *self.groups, self.weight, self.bias, self.eps)
                return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

        native = {f"{norm}_norm": getattr(torch.ops.aten, f"native_{norm}_norm") for norm in layers.NORMS}
        native |= {
            f"{norm}_norm_backward": getattr(torch.ops.aten, f"native_{norm}_norm_backward") for norm in layers.NORMS
        }

        class GroupNorm(nn.GroupNorm):
            SUPPORTED_GROUPS, SUPPORTED_CHANNELS = (2,), (6,)

        for name, content in {
            "liger_kernel": {},
            "liger_kernel.transformers": {},
            "liger_kernel.transformers.group_norm": {"LigerGroupNorm": Liger},
            "liger_kernel.transformers.layer_norm": {"LigerLayerNorm": Liger},
            "flag_gems": native,
            "torchnorm": {"LayerNorm": nn.LayerNorm},
            "apex": {},
            "apex.normalization": {"FusedLayerNorm": nn.LayerNorm},
            "apex.contrib": {},
            "apex.contrib.group_norm": {"GroupNorm": GroupNorm},
        }.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)

    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize(
        ("name", "norm"), [(n, norm) for n, c in CONTENDERS.items() if c.package for norm in c.norms]
    )
    def test_they_run_what_they_have(self, name, norm, channels_last) -> None:
        chain = Chain(norm, SHAPE, dropout=0.2, residual=True, channels_last=channels_last, groups=2)
        missing = {
            ("liger-kernel", "layer", True): "last dimension only",
            ("torchnorm", "layer", True): "last dimension only",
            ("torchnorm", "group", False): "is torch's",
            ("torchnorm", "group", True): "is torch's",
            ("apex", "group", False): "falls back to torch's except for channels_last",
        }
        if reason := missing.get((name, norm, channels_last)):
            with pytest.raises(UnavailableError, match=reason):
                prepare(name, chain, CPU)
        else:
            prepare(name, chain, CPU)

    def test_one_that_fails_or_is_wrong_is_named_and_skipped(self, monkeypatch) -> None:
        monkeypatch.setattr(sys.modules["torchnorm"], "LayerNorm", SimpleNamespace)
        with pytest.raises(UnavailableError, match="fails: TypeError: "):
            prepare("torchnorm", Chain("layer", SHAPE), CPU)
        monkeypatch.setattr(sys.modules["torchnorm"], "LayerNorm", lambda width: nn.LayerNorm(width, eps=0.1))
        with pytest.raises(UnavailableError, match="has a wrong output: error"):
            prepare("torchnorm", Chain("layer", SHAPE), CPU)

    def test_on_a_cpu_they_are_named_and_skipped(self, capsys) -> None:
        assert layers.main([*FLAGS, "--norms", "layer", "--contenders", "liger-kernel", "triton", "fused"]) == 0
        printed = capsys.readouterr().out
        for name in ("liger-kernel", "triton"):
            assert f"skipped: {name} has kernels for GPUs only; on a CPU this would time Triton's" in printed


class TestAbsentPeers:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch) -> Path:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torchnorm", raising=False)
        return tmp_path

    def test_are_skipped_quietly_unless_asked_for(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "torchnorm", None)  # as if it was not installed
        names, skipped = layers.choose_contenders(["all"], CPU)
        assert "torchnorm" not in names
        assert "torchnorm" not in skipped
        names, skipped = layers.choose_contenders(["torchnorm"], CPU)
        assert (names, skipped) == (["stock"], {"torchnorm": "is not installed"})

    def test_installed_but_broken(self, path) -> None:
        (path / "torchnorm.py").write_text("raise OSError('libcuda.so is\\nmissing')")
        for asked in (["all"], ["torchnorm"]):
            names, skipped = layers.choose_contenders(asked, CPU)
            assert "torchnorm" not in names
            assert skipped["torchnorm"] == "is installed but cannot be imported: OSError: libcuda.so is missing"

    def test_broken_since_something_else_is_missing(self, path) -> None:
        (path / "torchnorm.py").write_text("import surely_not_installed")
        assert "No module named 'surely_not_installed'" in layers.choose_contenders(["all"], CPU)[1]["torchnorm"]


def test_compiled_needs_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(contenders, "_has_compiler", lambda: False)
    assert layers.choose_contenders(["compiled"], CPU) == (
        ["stock"],
        {"compiled": "needs a C++ compiler on a CPU: install g++"},
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_compiled(tmp_path) -> None:
    if not contenders._has_compiler():
        pytest.skip("there is no C++ compiler")
    document = tmp_path / "layers.json"
    flags = "--shapes 5x6x7x3 --rounds 2 --norms group --dropout 0.1 --residual --contenders compiled fused-compiled"
    assert layers.main([*flags.split(), "--json", str(document)]) == 0
    (row,) = json.loads(document.read_text())["rows"]
    assert list(row["contenders"]) == ["stock", "compiled", "fused-compiled"]


def test_of_a_gpu_the_bandwidth_is_shown_and_drawn() -> None:
    chain = Chain("batch", SHAPE)
    case = prepare("stock", chain, CPU)
    figures = layers.measure({"stock": [case]}, "both", 2, lambda call: (call(), 0.5)[1], copy=1e3)["stock"]
    assert figures["gigabytes_per_second"] == pytest.approx(5 * chain.activation_bytes / 0.5 / 1e9)
    assert figures["of_copy"] == pytest.approx(5 * chain.activation_bytes / 0.5 / 1e3)
    row = {
        "shapes": "x",
        "sizes": [SHAPE],
        "norm": "batch",
        "dropout": 0.0,
        "residual": False,
        "dtype": "float32",
        "layout": "contiguous",
        "passes": "both",
        "contenders": {"stock": figures},
    }
    (line,) = layers.lines(row)
    assert line.endswith(f"{figures['of_copy']:.0%}")
    _, bandwidths = layers.plot([row]).axes
    assert bandwidths.get_ylabel() == "GB/s (dotted: a copy)"


class TestPytestBenchmark:
    """`pytest benchmarks` times the cases that --layers selects."""

    def config(self, flags: str) -> Any:
        return SimpleNamespace(getoption=lambda name: flags, stash={})

    @pytest.mark.parametrize(
        ("flags", "devices"),
        [("", ["cpu", "cuda"]), ("--device cpu", ["cpu"]), ("--device auto", [str(choose_device("auto"))])],
    )
    def test_takes_cpu_and_gpu_or_the_device_asked_for(self, flags: str, devices: list[str]) -> None:
        config = self.config(flags)
        benchmarks.conftest.pytest_configure(config)
        assert [str(device) for device in config.stash[benchmarks.conftest.DEVICES]] == devices

    def test_shows_the_flags(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(pytest.exit.Exception):
            benchmarks.conftest.pytest_configure(self.config("--help"))
        assert "--contenders" in capsys.readouterr().out

    @pytest.mark.slow
    def test_times_the_cases_of_the_flags(self, tmp_path: Path) -> None:
        document = tmp_path / "benchmark.json"
        what = "--shapes 2x4x5x5 4x4x3x3 --norms layer --dropout 0 --passes backward --rounds 3"
        flags = ["--benchmark-only", "--benchmark-json", document, "-rs", f"--layers={what} --contenders fused triton"]
        command = [sys.executable, "-m", "pytest", "benchmarks", *flags]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        assert "triton: has kernels for GPUs only" in result.stdout
        timed = json.loads(document.read_text())["benchmarks"]
        found = [(case["group"], case["params"]["name"], case["stats"]["rounds"]) for case in timed]
        assert [each for each in found if each[0].endswith("cpu")] == [
            (f"{shapes}: layer norm + ReLU, float32, contiguous, backward, cpu", name, 3)
            for name in ("stock", "fused")
            for shapes in ("2 x 4 x 5 x 5", "4 x 4 x 3 x 3")
        ]

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ("--shapes 3", "expected network-128, network-512, ladder or four positive sizes"),
            ("--shapes 2x4x5x5 --groups 3", "--groups 3 does not divide the 4 channels"),
            ("--device cuda:77", "--device cuda:77 cannot be used"),
            ("--json x.json", "use pytest-benchmark's --benchmark-json"),
            ("'", "No closing quotation"),
        ],
    )
    def test_refuses_bad_flags(self, flags: str, expected: str) -> None:
        config = self.config(flags)
        with pytest.raises(pytest.UsageError, match=f"--layers: .*{expected}"):
            benchmarks.conftest.pytest_configure(config)

import io
import math
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mnistnorm.cli import Parser, add_setting, at_least, output_file, run_program
from mnistnorm.engine import BOUNDS, CHOICES, Settings
from mnistnorm.errors import UserError


def prints(text: str) -> Callable[[Sequence[str] | None], int]:
    def program(_: Sequence[str] | None) -> int:
        print(text)
        return 0

    return program


def test_nobody_need_read_the_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run_program(prints("x" * 100_000), None) == 141
        stdout.write("at exit")
    assert capsys.readouterr().err == ""


def test_lack_of_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def exhaust(_: Sequence[str] | None) -> int:
        return len(torch.empty(2**60))

    assert run_program(exhaust, None) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory, use smaller batches or shapes: ")
    assert printed.count("\n") == 1


def test_a_file_that_cannot_be_used_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def read(_: Sequence[str] | None) -> int:
        return len(tmp_path.read_bytes())

    assert run_program(read, None) == 1
    assert capsys.readouterr().err == f"error: cannot use {tmp_path}: Is a directory; check its path and permissions\n"


def test_other_errors_are_not_hidden() -> None:
    def fail(_: Sequence[str] | None) -> int:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        run_program(fail, None)


def test_stdout_and_stderr_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Sequence[str] | None) -> int:
        sys.stdout.write("text")
        raise UserError("wrong", exit_code=2)

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_program(fail, None) == 2
    sys.stdout.close()
    sys.stderr.close()


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run_program(prints("caf\u00e9.png"), None) == 0
    assert stdout.buffer.getvalue() == b"caf\\xe9.png\n"


@pytest.mark.parametrize(
    ("command", "prog"),
    [
        ("/venv/bin/mnistnorm-test", "mnistnorm-test"),
        ("mnistnorm-test.exe", "mnistnorm-test"),
        ("/site-packages/mnistnorm/test.py", "python -m mnistnorm.test"),
        ("pytest", "python -m mnistnorm.test"),
    ],
)
def test_usage_names_the_command_that_was_typed(command: str, prog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [command])
    assert Parser("mnistnorm.test", "").format_usage().startswith(f"usage: {prog} ")


def test_the_package_names_its_programs() -> None:
    with pytest.raises(SystemExit, match=r"python -m mnistnorm\.train, \.compare, \.predict or \.summary"):
        runpy.run_module("mnistnorm", run_name="__main__")


def test_flags_take_what_settings_take() -> None:
    parser = Parser("mnistnorm.test", "")
    for name in (*BOUNDS, *CHOICES):
        add_setting(parser, name, "")
    for name, (low, end) in BOUNDS.items():
        flag = f"--{name.replace('_', '-')}"
        assert vars(parser.parse_args([flag, str(low)]))[name] == low
        with pytest.raises(UserError, match=f"{flag}: expected"):
            parser.parse_args([flag, str(end)])
        with pytest.raises(ValueError, match=f"{name} must be from {low} to below {end}, got"):
            Settings(**{"lr": 0.1, name: int(end) if end > 1 and end < math.inf else float(end)})


def flag(kind: Callable[[str], object], text: str) -> object:
    parser = Parser("mnistnorm.test", "")
    parser.add_argument("--flag", type=kind)
    return parser.parse_args(["--flag", text]).flag


def test_integers_are_bounded() -> None:
    assert flag(at_least(0), "2147483647") == 2**31 - 1
    for text in ("-1", "2147483648", "1" + 30 * "0", "1" + 5000 * "0"):
        with pytest.raises(UserError, match=r"--flag: expected an integer from 0 to 2147483647, got"):
            flag(at_least(0), text)


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert flag(output_file, "file.json") == tmp_path / "file.json"
    assert not any(tmp_path.iterdir())
    (tmp_path / "link.json").symlink_to("file.json")
    assert flag(output_file, "link.json") == tmp_path / "file.json"
    os.mkfifo(tmp_path / "pipe")
    for text in (str(tmp_path), str(tmp_path / "none" / "file.json"), "", "pipe", os.devnull):
        with pytest.raises(UserError, match="cannot be written: name a regular file in a folder that you may write to"):
            flag(output_file, text)

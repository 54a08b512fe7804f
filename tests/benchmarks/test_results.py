"""The pages' tables match docs/results, and docs/results matches what the programs write."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import PARTS

LAYERS = {
    "command": "python -m benchmarks.layers --rounds 2",
    "machine": "yesterday, an abacus",
    "rows": [
        {
            "shapes": "1 x 2 x 3 x 4",
            "norm": "batch",
            "dropout": dropout,
            "contenders": {
                name: {
                    "milliseconds": {"lower": 1.0, "median": median, "upper": 3.0},
                    "times_as_fast_as": {other: {"lower": 1.2345678, "median": ratio, "upper": 3.0}},
                    "saved_bytes": 2**20,
                }
                for name, other, median in (("stock", "fused", 4.0), ("fused", "stock", 4.0 / ratio))
            },
        }
        for dropout, ratio in ((0.5, 2.0), (0, 2.5))
    ],
}
LAYERS_TABLE = (
    "| shapes | norm | dropout 0.5 | times as fast | saved | dropout 0 | times as fast | saved |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    "| 1 x 2 x 3 x 4 | batch | 4.0 / 2.0 ms | 2.00 (1.23 to 3.00) | 1.0 / 1.0 MB "
    "| 4.0 / 1.6 ms | 2.50 (1.23 to 3.00) | 1.0 / 1.0 MB |\n"
)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A writable copy of the pages and docs/results."""
    shutil.copytree(results.RESULTS, tmp_path / "docs" / "results")
    pages = tuple(tmp_path / page.relative_to(results.ROOT) for page in results.PAGES)
    for page, target in zip(results.PAGES, pages, strict=True):
        shutil.copyfile(page, target)
    monkeypatch.setattr(results, "PAGES", pages)
    for name, path in {"DOCS": "docs", "RESULTS": "docs/results", "RUNS": "runs"}.items():
        monkeypatch.setattr(results, name, tmp_path / path)
    return tmp_path


def results_page() -> str:
    return results.PAGES[1].read_text()


def test_the_pages_are_what_the_results_give() -> None:
    assert results.main(["--check"]) == 0, "run python -m benchmarks.results --render"


def test_the_pictures_and_pages_that_are_named_are_there() -> None:
    for page in results.PAGES:
        links = re.findall(r"\]\(([^):#]+)\)", page.read_text())
        assert links
        for link in links:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", PARTS)
def test_the_commands_are_understood(name: str, tmp_path: Path) -> None:
    _, _, module, *flags = f"{PARTS[name].command} {PARTS[name].output.format(tmp_path)}".split()
    importlib.import_module(module).get_parser().parse_args(flags)


def test_what_is_taken_is_kept_and_shown(copy: Path) -> None:
    file = copy / "measured.json"
    file.write_text(json.dumps(LAYERS))
    assert LAYERS_TABLE not in results_page()
    assert results.main(["--take", f"layers={file}"]) == 0
    text = results_page()
    assert f"`{LAYERS['command']}`; {LAYERS['machine']}\n" in text
    assert LAYERS_TABLE in text
    kept = json.loads((results.RESULTS / "layers.json").read_text())
    fused = kept["rows"][0]["contenders"]["fused"]
    assert fused["times_as_fast_as"]["stock"]["lower"] == 1.2346
    assert results.main(["--check"]) == 0


def test_what_a_command_writes_is_kept_and_shown(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = copy / "program.py"
    script.write_text(f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({json.dumps(LAYERS)!r})")
    part = PARTS["layers"]._replace(command=f"python {script}", output="{0}/results.json")
    monkeypatch.setitem(PARTS, "layers", part)
    assert results.main(["--only", "layers"]) == 0
    assert LAYERS_TABLE in results_page()


def test_a_command_that_fails_changes_nothing(copy: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(PARTS, "host", PARTS["host"]._replace(command="python -m surely_not_there"))
    before = results_page()
    assert results.main(["--only", "host"]) == 1
    assert "host is unchanged because its command failed" in capsys.readouterr().err
    assert results_page() == before


def test_what_was_measured_before_a_failure_is_shown(copy: Path) -> None:
    file = copy / "measured.json"
    file.write_text(json.dumps(LAYERS))
    assert results.main(["--take", f"layers={file}", f"traffic={results.PAGES[0]}"]) == 1
    assert LAYERS_TABLE in results_page()
    assert results.main(["--check"]) == 0


def test_a_part_that_was_not_measured_says_so(copy: Path) -> None:
    (results.RESULTS / "layers.json").unlink()
    assert results.main(["--render"]) == 0
    assert "`python -m benchmarks.layers --rounds 60`: not measured yet\n" in results_page()


def test_drift_is_found(copy: Path, capsys) -> None:
    text = results_page()
    results.PAGES[1].write_text(text.replace("| batch | 7,652 |", "| batch | 7,651 |"))
    assert results.main(["--check"]) == 1
    assert "results.md differs from docs/results" in capsys.readouterr().err
    assert results.main(["--render"]) == 0
    assert results_page() == text


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}', json.dumps({"rows": LAYERS["rows"]})]
)
def test_other_documents_are_refused(content: str, copy: Path, capsys) -> None:
    file = copy / "measured.json"
    file.write_text(content)
    before = (results.RESULTS / "layers.json").read_text()
    assert results.main(["--take", f"layers={file}"]) == 1
    assert f"{file} was not written by python -m benchmarks.layers --rounds 60" in capsys.readouterr().err
    assert (results.RESULTS / "layers.json").read_text() == before


def test_damaged_results_and_markers_are_reported(copy: Path, capsys) -> None:
    text = results_page()
    results.PAGES[1].write_text(text.replace("<!-- end of results: layers -->", ""))
    assert results.main(["--check"]) == 1
    markers = "<!-- results: layers --> ... <!-- end of results: layers -->"
    assert f"expected {markers} once in README.md, results.md, fuse.md, found 0" in capsys.readouterr().err
    (results.RESULTS / "layers.json").write_text("{")
    assert results.main(["--check"]) == 1
    assert "layers.json is damaged: run python -m benchmarks.results --only layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--only", "pencils"],
        ["--take", "layers"],
        ["--take", "layers=nowhere.json"],
        ["--render", "--check"],
        ["--check", "--only", "layers"],
        ["--render", "--take", f"layers={__file__}"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags: list[str], capsys) -> None:
    assert results.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_host_times_become_spreads() -> None:
    row = {"norm": "batch", "dropout": 0.0, "pass": "forward", "ratio": {"lower": 1.0, "median": 2.0, "upper": 3.0}}
    (kept,) = results.host_rows({"rows": [row | {"microseconds": {"stock": [1.0, 2.0, 9.0], "fused": [1.0, 1.0]}}]})
    assert kept["microseconds"]["stock"] == {"lower": 1.5, "median": 2.0, "upper": 5.5}
    assert "| batch | 0 | forward | 2 us | 1 us | 2.00 (1.00 to 3.00) |" in results.host_table([kept])


def test_models_become_rows() -> None:
    row = {"model": "resnet18", "dropout": 0.0, "fused": 17, "sums": 8, "left": 3, "fuse_seconds": 0.456}
    row |= {"ratio": {"lower": 1.0, "median": 1.5, "upper": 2.0}, "saved_bytes": {"stock": 2**21, "fused": 2**20}}
    (kept,) = results.models_rows({"rows": [row | {"milliseconds": {"stock": [10.0, 30.0], "fused": [5.0, 7.0]}}]})
    assert kept["milliseconds"]["stock"] == {"lower": 15.0, "median": 20.0, "upper": 25.0}
    assert results.models_table([kept]).endswith(
        "| resnet18 | 0 | 17 | 20 ms | 6 ms | 1.50 (1.00 to 2.00) | 2.0 MB | 1.0 MB | 0.46 s |\n"
    )


def test_tables_of_ladder_and_time_to_accuracy() -> None:
    ratios = {"stock": {"lower": 1, "median": 2, "upper": 3}, "compiled": {"lower": 4, "median": 5, "upper": 6}}
    rows = [
        {"shapes": "1 x 2 x 3 x 4", "norm": norm, "contenders": {"fused": {"times_as_fast_as": ratios}}}
        for norm in ("batch", "group")
    ]
    assert results.ladder_table(rows).endswith(
        "| 1 x 2 x 3 x 4 | 2.00 | 5.00 (4.00 to 6.00) | 2.00 | 5.00 (4.00 to 6.00) |\n"
    )
    reached = {"0.99": {"epochs": 2, "seconds": 14.6}, "0.994": None}
    loops = {"stock": {"seconds_per_epoch": 7.3, "reached": reached}}
    table = results.to_accuracy_table([{"norm": "batch", "dropout": 0.0, "loops": loops}])
    assert table.endswith("| batch | 0 | stock | 7.3 | 15 s (2 epochs) | not reached |\n")

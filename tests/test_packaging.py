"""The wheel and the sdist: what they hold, and that they work beside another distribution that owns `kernels`."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SUBPACKAGES = ("compiler", "fusion", "torch_impl", "triton_impl")

# In one process: setuptools unpacks the sdist into the source tree, where two builds at once disturb each other.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

USE = """
import importlib
import kernels, mnistnorm, torch
from mnistnorm.data import load_dataset
from mnistnorm.kernels import BatchNormReLU2d
assert kernels.OWNER == "somebody else", kernels.__file__
assert BatchNormReLU2d is mnistnorm.BatchNormReLU2d
assert mnistnorm.BatchNormReLU2d(3)(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
for name in ("compiler", "fusion", "torch_impl", "triton_impl"):
    assert importlib.import_module(f"mnistnorm.kernels.{name}").__file__.startswith(mnistnorm.__path__[0]), name
assert len(load_dataset("mnist").test) == 10_000
print(mnistnorm.__file__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment or None, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_contents(distributions):
    sdist, wheel = distributions
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mnistnorm"}
    with tarfile.open(sdist) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mnistnorm").glob("*.py")}
    kernels = {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert {path.parent.name for path in kernels} == {"kernels", *SUBPACKAGES}
    sources |= {f"mnistnorm/{path}" for path in kernels}
    sources |= {f"mnistnorm/mnist/{path.name}" for path in (ROOT / "mnistnorm" / "mnist").iterdir()}
    sources |= {"mnistnorm/py.typed", "mnistnorm/kernels/py.typed"}
    assert sources <= set(names)
    assert sources <= unpacked
    # Nothing of the kernels under another name either, such as that of a module that has moved.
    for held in (set(names), unpacked):
        assert {name for name in held if name.startswith("mnistnorm/kernels/") and name.endswith(".py")} <= sources
    assert {"LICENSE", "README.md", "setup.py", "pyproject.toml"} <= unpacked


def test_works_beside_another_distribution_called_kernels(distributions, tmp_path):
    _, wheel = distributions
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text('OWNER = "somebody else"\n')
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    for program in ("train", "compare", "predict", "summary"):
        usage = run(sys.executable, site / "bin" / f"mnistnorm-{program}", "--help", cwd=tmp_path, PYTHONPATH=str(site))
        assert usage.startswith(f"usage: mnistnorm-{program} ")
    where = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)

"""The wheel and the sdist: what they hold, and that they work beside another distribution that owns `kernels`."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mnistnorm

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


LAYERS = """
import sys, torch
from mnistnorm import BatchNormReLU2d, fuse
BatchNormReLU2d(3)(torch.randn(2, 3, 4, 4)).sum().backward()
fuse(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()))
print("mnistnorm.kernels.triton_impl" in sys.modules)
"""

PROGRAMS = ("compare", "predict", "summary", "train")


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


@pytest.fixture(scope="module")
def site(distributions, tmp_path_factory):
    """A folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("site")
    _, wheel = distributions
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_works_beside_another_distribution_called_kernels(site, tmp_path):
    (tmp_path / "kernels.py").write_text('OWNER = "somebody else"\n')
    where = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)


@pytest.mark.parametrize("program", PROGRAMS)
def test_usage_names_the_console_script(program, site, tmp_path):
    script = site / "bin" / f"mnistnorm-{program}"
    usage = run(sys.executable, script, "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert usage.startswith(f"usage: mnistnorm-{program} ")


def test_needs_torch_numpy_and_on_linux_triton_only(distributions):
    _, wheel = distributions
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    required = re.findall("^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert {line for line in required if "extra ==" not in line} == {
        "numpy>=1.26",
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
    }
    assert f"\nVersion: {mnistnorm.__version__}\n" in metadata


def test_layers_work_without_triton_and_the_programs_packages(site, tmp_path):
    missing = ("matplotlib", "PIL", "skimage", "torchinfo", "torchvision", "tqdm")
    hide = f"import sys\nfor name in {(*missing, 'triton')}: sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    path = f"{tmp_path}:{site}"
    assert run(sys.executable, "-c", LAYERS, cwd=tmp_path, PYTHONPATH=path) == "False\n"
    for program in PROGRAMS:
        command = [sys.executable, "-m", f"mnistnorm.{program}", "--help"]
        result = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True)
        line = f"error: the programs need {', '.join(missing)}: pip install 'mnistnorm[mnist]'\n"
        assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_programs_run_without_triton_and_file_locks(site, tmp_path):
    # As on Windows; macOS has the locks.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = sys.modules['fcntl'] = None\n")
    code = "import mnistnorm.compare, mnistnorm.predict, mnistnorm.train, mnistnorm.summary as s; s.main(['--fused'])"
    assert "Total params" in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{site}")


def test_the_folder_above_a_checkout_does_not_hide_an_install(site, tmp_path):
    (tmp_path / "mnistnorm").symlink_to(ROOT)
    script = "import setuptools.build_meta; print(setuptools.build_meta.build_editable({!r}))"
    editable = tmp_path / run(sys.executable, "-c", script.format(str(tmp_path)), cwd=ROOT).splitlines()[-1]
    zipfile.ZipFile(editable).extractall(tmp_path / "editable")
    for folder, root in ((site, site), (tmp_path / "editable", ROOT)):
        code = f"import site; site.addsitedir({str(folder)!r}); import mnistnorm; print(mnistnorm.__file__)"
        hide = f"import sys; sys.path = [path for path in sys.path if path != {str(ROOT)!r}]; "
        hide += "sys.meta_path = [each for each in sys.meta_path if 'Editable' not in getattr(each, '__name__', '')]; "
        where = run(sys.executable, "-c", hide + code, cwd=tmp_path)
        assert Path(where.strip()).is_relative_to(root)


def test_a_checkout_without_symbolic_links_says_what_to_do(tmp_path):
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mnistnorm").mkdir()
    (tmp_path / "mnistnorm" / "kernels").write_text("../kernels")
    result = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("setup.py: mnistnorm/kernels must be a link to ../kernels")
    assert result.stderr.count("\n") == 1

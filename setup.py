"""Metadata and dependencies of mnistnorm; the build system and the tools' settings are in pyproject.toml."""

import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# mnistnorm/kernels is a link to the top-level kernels/, so that no top-level `kernels` is ever installed: that name
# belongs to another distribution.
if not (ROOT / "mnistnorm" / "kernels").is_dir():
    sys.exit(
        "setup.py: mnistnorm/kernels must be a link to ../kernels, but the checkout has none: delete it, turn on "
        "Developer Mode (Windows), then git config core.symlinks true && git checkout mnistnorm/kernels"
    )

VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mnistnorm" / "__init__.py").read_text("utf-8"), re.MULTILINE)[1]

# What the programs need besides the layers.
MNIST = [
    "matplotlib>=3.8",
    "pillow>=10.1",
    "scikit-image>=0.25",  # thresholds and labels pictures for mnistnorm.predict; with SciPy still smaller than OpenCV
    "torchinfo>=1.8",
    "torchvision>=0.26",
    "tqdm>=4.66",
]

TEST = [
    "hypothesis",
    "pytest<9.2",  # under 9.2 pytest-xdist 3.8 overlooks its groups
    "pytest-benchmark",
    "pytest-xdist",
]

DEV = [
    *MNIST,
    *TEST,
    "build",
    "mypy",
    "ruff",
    "setuptools>=77",
    "tensorboard",
    "timm",
]

KERNEL_PACKAGES = [
    "kernels",
    "kernels.compiler",
    "kernels.fusion",
    "kernels.torch_impl",
    "kernels.triton_impl",
]

setup(
    name="mnistnorm",
    version=VERSION,
    description="Fused normalization + dropout + residual + ReLU for PyTorch, and the MNIST CNN that trains on it",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT AND CC-BY-SA-3.0",
    license_files=["LICENSE", "mnistnorm/mnist/README.md"],
    python_requires=">=3.10",
    packages=["mnistnorm", *(f"mnistnorm.{name}" for name in KERNEL_PACKAGES)],
    package_data={"mnistnorm": ["py.typed", "mnist/*"], "mnistnorm.kernels": ["py.typed"]},
    install_requires=["numpy>=1.26", "torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    # An editable install by the folder's path: a checkout in the current folder then does not hide the package.
    options={"editable_wheel": {"mode": "compat"}},
    entry_points={
        "console_scripts": [
            f"mnistnorm-{program} = mnistnorm.{program}:main" for program in ("train", "compare", "predict", "summary")
        ]
    },
    extras_require={"mnist": MNIST, "tensorboard": ["tensorboard"], "test": TEST, "dev": DEV},
)

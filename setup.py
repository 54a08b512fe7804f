"""Metadata and dependencies of mnistnorm; the build system and the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import setup

DEV = [
    "build",
    "hypothesis",
    "mypy",
    "pytest<9.2",  # under 9.2 pytest-xdist 3.8 overlooks its groups
    "pytest-benchmark",
    "pytest-xdist",
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
    version="0.1.0",
    description="Fused normalization + dropout + residual + ReLU for PyTorch, and the MNIST CNN that trains on it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT AND CC-BY-SA-3.0",
    license_files=["LICENSE", "mnistnorm/mnist/README.md"],
    python_requires=">=3.10",
    # mnistnorm/kernels is a link to the top-level kernels/, so that no top-level `kernels` is ever installed:
    # that name belongs to another distribution.
    packages=["mnistnorm", *(f"mnistnorm.{name}" for name in KERNEL_PACKAGES)],
    package_data={"mnistnorm": ["py.typed", "mnist/*"], "mnistnorm.kernels": ["py.typed"]},
    install_requires=[
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        # Thresholds and labels pictures for mnistnorm.predict; with SciPy still smaller than OpenCV.
        "scikit-image>=0.25",
        "torch>=2.14",
        "torchinfo>=1.8",
        "torchvision>=0.29",
        "tqdm>=4.66",
        "triton>=3.8; platform_system == 'Linux'",
    ],
    entry_points={
        "console_scripts": [
            f"mnistnorm-{program} = mnistnorm.{program}:main" for program in ("train", "compare", "predict", "summary")
        ]
    },
    extras_require={"tensorboard": ["tensorboard"], "dev": DEV},
)

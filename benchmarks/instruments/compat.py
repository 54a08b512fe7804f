"""Differences between the supported versions of Triton's interpreter; each entry names the one that needs no shim."""

from typing import Any

try:
    from triton._utils import _tuple_create as tuple_create
except ImportError:  # Triton 3.7 has it there
    from triton.runtime.interpreter import _tuple_create as tuple_create

__all__ = ["index", "tuple_create"]


def index(tensor: Any) -> int:
    """The interpreter's tensor.__index__, for NumPy 2.4, which refuses to make an int of a vector. Triton 3.7 can."""
    return int(tensor.handle.data.item())

"""Shims for older versions of Triton's interpreter."""

from typing import Any

try:
    from triton._utils import _tuple_create as tuple_create
except ImportError:  # older than Triton 3.7
    from triton.runtime.interpreter import _tuple_create as tuple_create

__all__ = ["index", "tuple_create"]


def index(tensor: Any) -> int:
    """The interpreter's tensor.__index__ before Triton 3.7, where NumPy 2.4 does not convert a vector to int."""
    return int(tensor.handle.data.item())

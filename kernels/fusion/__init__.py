"""fuse and unfuse: conversion of existing models to fused layers and back."""

from .conversion import UnfusedLayer, fuse, unfuse
from .report import FusionReport

__all__ = ["FusionReport", "UnfusedLayer", "fuse", "unfuse"]

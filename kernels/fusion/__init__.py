"""fuse and unfuse: conversion of existing models to fused layers and back."""

from .convert import FusionReport, fuse, unfuse

__all__ = ["FusionReport", "fuse", "unfuse"]

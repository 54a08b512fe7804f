"""Machine code of the kernels for GPUs that are not there: it fits, keeps to its registers and moves 128 bits at a time."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from benchmarks import compilation
from mnistnorm.kernels import launchers

# Eight layers of the network, sizes of ImageNet networks, and one whose every size is prime.
NETWORK = [(128, 8, 26, 26), (128, 10, 24, 24), (128, 13, 11, 11)]
SHAPES = [(128, 8, 26, 26), (64, 64, 56, 56), (64, 256, 14, 14), (13, 7, 17, 19)]

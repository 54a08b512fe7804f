"""Dropout in PyTorch: forward and backward draw the same mask from the seed, so that no mask is saved."""

import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contract import Seed

_aten = torch.ops.aten

# Up to this probability, draw the indices of the dropped elements; beyond it, a random byte for each element.
MAX_SPARSE_P = 0.125
# Elements processed at a time by either method, so that the draws stay small and the bytes in the cache.
SPARSE_CHUNK = 2**22
CHUNK = 2**18


def drop_(values: Tensor, memory_format: torch.memory_format, dropout_p: float, seed: Seed) -> None:
    """Zeroes each element with probability `dropout_p`, in place. The seed determines the mask, in memory order.

    `memory_format` is that of the values. Forward and backward must pass the same one: for inputs with gaps, torch's
    results may have either.
    """
    flat = (values if memory_format == torch.contiguous_format else values.movedim(1, -1)).view(-1)
    if isinstance(seed, Tensor):
        flat.masked_fill_(_hashes(seed, len(flat)) < round(dropout_p * 2**31), 0)
        return
    if flat.device.type != "cpu":
        generator = torch.Generator(flat.device).manual_seed(seed)
        uniform = torch.rand(flat.shape, generator=generator, device=flat.device, dtype=torch.float32)
        flat.masked_fill_(uniform < dropout_p, 0)
        return
    random = _seeded_random(seed)
    if dropout_p <= MAX_SPARSE_P:
        for part in flat.split(SPARSE_CHUNK):
            part.index_fill_(0, _successes(random, dropout_p, part.numel()), 0)
        return
    # Draw a byte for each element, drop those with the lowest `count` values, and draw again for the rest of dropout_p:
    # several times as fast as a Bernoulli draw for each element.
    count = int(dropout_p * 256)
    second_chance = (dropout_p - count / 256) / (1 - count / 256) if count < 256 else 0.0
    for part in flat.split(CHUNK):
        # Integers from -129 to 127 are exact in half precision, too.
        words = torch.from_numpy(_bytes(random, part.numel())).to(values.dtype)
        if second_chance > 0:
            words.index_fill_(0, _successes(random, second_chance, part.numel()), -129)
        # Keep the values whose word is above the threshold and zero the others, in one pass.
        _aten.threshold_backward.grad_input(part, words, count - 129, grad_input=part)


def _hashes(seed: Tensor, count: int) -> Tensor:
    """`count` uniform 31-bit integers from a seed on the device, which torch's generators do not accept.

    Source: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators", figure 17, with variant 13.
    """
    bits = torch.arange(count, device=seed.device).mul_(-0x61C8864680B583EB).add_(seed)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return bits.bitwise_and_(2**31 - 1)


def _bytes(random: np.random.Generator, count: int) -> Any:
    """`count` uniform int8 values."""
    return random.bit_generator.random_raw(-(-count // 8)).view(np.int8)[:count]


def _successes(random: np.random.Generator, probability: float, trials: int) -> Tensor:
    """The indices of the successes in independent trials, unsorted and with duplicates.

    A Poisson number of uniform draws hits each index independently, a Poisson number of times (Kingman 1993, "Poisson
    Processes", 2.4): never with probability exp(-rate) = 1 - probability.
    """
    rate = -math.log1p(-probability)
    return torch.from_numpy(random.integers(trials, size=random.poisson(rate * trials)))


class _Random(threading.local):
    """A random number generator per thread: creating one takes much longer than seeding it."""

    def __init__(self) -> None:
        self.generator = np.random.Generator(np.random.SFC64(0))


_random = _Random()


def _seeded_random(seed: int) -> np.random.Generator:
    """This thread's generator, seeded as in the reference: the seed in all three words, a counter of 1, 12 rounds.

    Source: Doty-Humphrey, PractRand 0.94, RNGs/sfc.cpp.
    """
    generator = _random.generator
    words = np.array((seed, seed, seed, 1), dtype=np.uint64)
    state = {"bit_generator": "SFC64", "state": {"state": words}, "has_uint32": 0, "uinteger": 0}
    generator.bit_generator.state = state
    generator.bit_generator.random_raw(12, output=False)
    return generator

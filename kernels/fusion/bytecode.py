"""Checks the code of a forward, and of the functions that it calls, for what a trace cannot record."""

import dis
import random
from collections.abc import Iterator
from functools import lru_cache
from inspect import getattr_static
from itertools import pairwise
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
CHECKS_TYPE = "it, or a function that it calls, checks the type of a value"
_DRAWS = "it, or a function that it calls, uses a generator of random numbers"
_READS_STATE = "it, or a function that it calls, reads or changes a state of torch"
_COMPARES = "it, or a function that it calls, compares values by identity"
_SETS = "it, or a function that it calls, sets an attribute or a variable of another scope"

_GLOBALS = {"type": CHECKS_TYPE, "callable": CHECKS_TYPE}
_NAMES = {
    **dict.fromkeys(("default_rng", "RandomState", "Random", "SystemRandom"), _DRAWS),
    **dict.fromkeys(("fork_rng", "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"), _READS_STATE),
    "__class__": CHECKS_TYPE,  # also in super(self.__class__, self), which recurses in a subclass
    # Training flags and tensors are buffers of the modules that are traced.
    **dict.fromkeys(("buffers", "named_buffers", "state_dict"), "it reads all buffers of a module"),
}
# Modules whose functions are not searched; __package__ has what replaces isinstance during a trace.
_SKIPPED = ("torch.", f"{__package__}.")
_CATCHES = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH")


def problem_of(module: nn.Module) -> str | None:
    """Why a trace of the module's forward may be wrong, although torch.fx can record it; None if there is no reason."""
    # Modules without a forward, which only their methods use.
    helpers = [child for child in module.modules() if type(child).forward is nn.Module.forward]
    if any(isinstance(value, GENERATORS) for helper in helpers for value in vars(helper).values()):
        return _DRAWS
    return _problem_of((type(module), *dict.fromkeys(map(type, helpers))))


@lru_cache(maxsize=4096)
def _problem_of(kinds: tuple[type[nn.Module], ...]) -> str | None:
    problems = (problem for function, values in _functions(kinds) for problem in _problems(function.__code__, values))
    return next(problems, None)


def _functions(kinds: tuple[type[nn.Module], ...]) -> Iterator[tuple[FunctionType, list[Any]]]:
    """The forward of the first class and what it calls, as far as names tell, each with the values it refers to."""
    pending: list[Any] = [kinds[0].forward]
    seen = set()
    while pending:
        function = pending.pop()
        if isinstance(function, (property, classmethod, staticmethod)):
            function = function.fget if isinstance(function, property) else function.__func__
        if not isinstance(function, FunctionType) or function in seen or f"{function.__module__}.".startswith(_SKIPPED):
            continue
        seen.add(function)
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        values = [function.__globals__.get(name) for name in names]
        values += [getattr_static(kind, name, None) for kind in kinds for name in names]
        values += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # not an empty one
        yield function, values
        pending += [*values, vars(function).get("__wrapped__")]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and those inside it, such as comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _problems(code: CodeType, values: list[Any]) -> Iterator[str]:
    if any(isinstance(value, GENERATORS) for value in values):
        yield _DRAWS
    for each in _codes(code):
        instructions = [i for i in dis.get_instructions(each) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
        for before, instruction in pairwise(instructions):
            name, value = instruction.opname, instruction.argval
            if name == "LOAD_GLOBAL" and value in _GLOBALS:
                yield _GLOBALS[value]
            elif name in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD") and value in _NAMES:
                yield _NAMES[value]
            elif name == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None):
                yield _COMPARES
            elif name in _CATCHES or (before.opname == "PUSH_EXC_INFO" and name == "POP_TOP"):
                yield "it, or a function that it calls, catches exceptions"
            elif _sets(before, instruction, code.co_freevars if each is code else ()):
                yield _SETS


def _sets(before: dis.Instruction, instruction: dis.Instruction, outer: tuple[str, ...]) -> bool:
    """Whether an instruction sets a global or outer variable, or an attribute of `self` or of another attribute."""
    if instruction.opname == "STORE_ATTR":
        loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
        return before.opname in ("LOAD_ATTR", "SWAP", "ROT_TWO") or loaded == "self"  # the two in `self.count += 1`
    return instruction.opname == "STORE_GLOBAL" or (instruction.opname == "STORE_DEREF" and instruction.argval in outer)

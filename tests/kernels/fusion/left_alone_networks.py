"""Networks whose chains fuse leaves alone, each with the reason."""

import copy
import functools
import logging
import random
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from fusion_networks import (
    Chains,
    Counter,
    DataDependent,
    Functional,
    LayerDrop,
    RandomBranch,
    Reverse,
    draw_from_numpy,
    sequence,
)
from torch import Tensor, fx, library, nn
from torch.nn.utils import parametrize


class UsedTwice(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.relu(x) + x


class UsedTwiceInTraining(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return (self.relu(x), x) if self.training else self.relu(x)


class Statement(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        self.eval_relu(x)
        return x


class SumChangesOther(Chains):
    def forward(self, x):
        identity = self.conv1(x)
        before = identity
        identity += self.norm1(identity * 2)
        return F.relu(identity) + before


class SumOfNumber(Chains):
    def forward(self, x):
        return F.relu(self.norm1(self.conv1(x)) + 1)


class SumWithItself(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return F.relu(x + x)


class SumScaled(Chains):
    def forward(self, x):
        x = self.conv1(x)
        return F.relu(torch.add(self.norm1(x), x, alpha=2))


class WriteBetween(Chains):
    def forward(self, x):
        x = self.conv1(x)
        with torch.no_grad():
            out = self.norm1(x)
            out = F.relu(out + self.eval_relu(x))
        return out * self.scale


@library.custom_op("mnistnorm_tests::double", mutates_args={"x"})
def double(x: Tensor) -> None:
    x.mul_(2)


class OperatorBetween(Chains):
    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        x = self.conv1(x)
        with torch.no_grad():
            out = self.norm1(x)
            self.write(x)
            out = F.relu(out + x)
        return out * self.scale


class AlwaysDropout(Chains):
    def forward(self, x):
        return F.relu(F.dropout(self.norm1(self.conv1(x)), 0.0))


class NoGrad(Chains):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv1(x)
        return F.relu(self.norm1(x))


class Checkpointed(Chains):
    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self.conv1, x, use_reentrant=False)
        return F.relu(self.norm1(x))


class SavedElsewhere(Chains):
    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return F.relu(self.norm1(self.conv1(x)))


class Autocast(Chains):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.conv1(x)
        return F.relu(self.norm1(x))


class CustomFunction(Chains):
    def forward(self, x):
        return F.relu(self.norm1(Reverse.apply(self.conv1(x))))


class OwnGenerator(Chains):
    def __init__(self, generator, draw, relu=None) -> None:
        super().__init__()
        self.generators, self.draw = {"depth": [generator]}, draw
        self.act = relu or self.relu

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.act(x) if self.draw(self.generators["depth"][0]) > -1 else x


class StoresNorm(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        self.features = x
        return self.relu(x)


class StoresDropout(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.log = {"dropped": []}

    def forward(self, x):
        x = self.drop(self.norm1(self.conv1(x)))
        self.log["dropped"].append(x)
        return self.relu(x)


class Store:
    def __init__(self) -> None:
        self.values = []

    def add(self, value):
        self.values.append(value)


class StoresByMethod(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store().add

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        self.store(x)
        return self.relu(x)


class StoresEnds(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log = 0, []

    def forward(self, x):
        self.calls += 1
        x = self.conv1(x)
        self.log.append(x)
        self.result = self.relu(self.norm1(x))
        return self.result


class StoresInside(nn.Module):
    """Stores what the module inside hands over."""

    class Inner(Chains):
        def forward(self, x):
            x = self.norm1(self.conv1(x))
            return self.relu(x), x

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x):
        x, self.features = self.inner(x)
        return x


class GradModeChanges(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        with torch.no_grad():
            x = self.relu(x)
        return x + self.conv1.bias.sum()


class CustomGradientBetween(Chains):
    def forward(self, x):
        return self.relu(Reverse.apply(self.norm1(self.conv1(x))))


class AsksForType(Chains):
    def forward(self, x):
        x = self.conv1(x) * 2
        if isinstance(x, dict):
            x = x["out"]
        return F.relu(self.norm1(x))


class AsksByFunction(Chains):
    def __init__(self, asks) -> None:
        super().__init__()
        self.asks = asks

    def forward(self, x):
        x = self.conv1(x)
        return F.relu(self.norm1(x * 2 if self.asks(x) else x))


class AsksByType(Chains):
    def forward(self, x):
        x = self.conv1(x)
        return F.relu(self.norm1(x * 2 if type(x) is Tensor else x))


class AsksForTheNormsType(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.relu(x) + x if isinstance(x, Tensor) else self.relu(x)


class AsksForAParameter(Chains):
    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.relu(x) + x if isinstance(x, (list, nn.Parameter)) else self.relu(x)


class DropoutOfAnotherMode(Chains):
    def forward(self, x):
        return F.relu(F.dropout(self.norm1(self.conv1(x)), 0.5, self.drop.training))


class NewBuffer(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1
        return F.relu(self.norm1(self.conv1(x))) * self.calls


class Remembers(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.seen = {"shape": None}

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        self.seen["shape"] = x.shape
        return x


class RemembersDeep(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.seen = {"shapes": []}

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        self.seen["shapes"].append(x.shape)
        return x


class CountsElsewhere(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = SimpleNamespace(calls=0)

    def forward(self, x):
        self.statistics.calls += 1
        return F.relu(self.norm1(self.conv1(x)))


class OwnTensor(Chains):
    def forward(self, x):
        return F.relu(self.norm1(self.conv1(x))) + torch.ones(7, dtype=torch.float64)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class StatisticsBetween(Chains):
    def forward(self, x):
        x = self.conv1(x)
        y = self.norm1(x)
        return F.relu(y + x * self.norm1.running_mean.view(-1, 1, 1))


class ChangesData(Chains):
    def forward(self, x):
        x = self.conv1(x)
        y = self.norm1(x)
        x.data = 2 * x
        return F.relu(y + x)


class CalledBetween(Chains):
    def forward(self, x):
        x = self.conv1(x)
        y = self.norm1(x)
        return F.relu(F.relu(self.norm1(2 * x + 1) + x) + y)


def hooked(path):
    model = sequence(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU())
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)
    return model


def hooked_inside():
    model = nn.Sequential(sequence(nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU()))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


def replaced_relu():
    model = sequence(nn.BatchNorm2d(4), nn.ReLU())
    model[2].forward = F.leaky_relu
    return model


def in_two_modes():
    model = sequence(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU())
    model[1].eval()
    return model


def replaced_forward():
    model = Functional()
    model.forward = lambda x: model.conv1(x)
    return model


KEPT: list[torch.Tensor] = []


class LooksAt(Chains):
    """Hands its value to a function that computes nothing of it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        self.function(x)
        return x


def by_decorator(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        return function(self, *args)

    return wrapper


def doubled_if_tensor(x):
    return x * 2 if type(x) is torch.Tensor else x


GENERATOR = np.random.default_rng(0)


class Policy(nn.Module):
    """A helper, whose methods a forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.count = random.Random(0), 0

    def draw(self):
        return self.generator.random()


class Meter(nn.Module):
    count = 0

    def tick(self):
        self.count += 1
        return self.count


class Hidden(Chains):
    """A chain whose output goes through a function of the module and the value, of which a trace shows one outcome."""

    def __init__(self, function) -> None:
        super().__init__()
        type(self).compute = function  # a method, as functions that are found by their name
        if "policy" in function.__code__.co_names:
            self.policy = Policy()
        self.meter = Meter()

    def forward(self, x):
        return self.compute(self.relu(self.norm1(self.conv1(x))))


def hidden(function):
    """Hidden with a class of its own."""
    return type("Hidden", (Hidden,), {"__init__": Hidden.__init__, "__module__": __name__})(function)


def catches(self, x):
    try:
        return self.conv1(x)  # which has another number of channels
    except RuntimeError:
        return x * 2


def swallows(self, x):
    try:
        return x * 2 if x.mean() > 0 else x
    except:  # noqa: E722
        return x * 3


def in_a_comprehension(self, x):
    return sum([each * 2 for each in (x,) if type(each) is torch.Tensor])


def sets_attribute(self, x):
    self.norm2.momentum = 0.5
    return x


def forks(self, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return F.dropout(x, 0.5, True)


def copies(self, x):
    return x + copy.deepcopy(x.detach())


class Decorated(Chains):
    @by_decorator
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return x * 2 if type(x) is torch.Tensor else x


class CallsTwice(nn.Module):
    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return x + 1


class CallOverridden(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.twice = CallsTwice()

    def forward(self, x):
        return self.twice(self.relu(self.norm1(self.conv1(x))))


class Registered(nn.Module):
    names: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        assert cls.__name__ not in Registered.names
        Registered.names.append(cls.__name__)


class OfARegistry(Registered, Chains):
    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x)))


class ReadsStatistics(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return x * self.norm.running_mean.sum()


class StatisticsInAChild(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.child = ReadsStatistics(self.norm1)

    def forward(self, x):
        x = self.conv1(x)
        y = self.norm1(x)
        return self.relu(y + self.child(x))


class ChangesOutput(Chains):
    """An in-place sum after an activation whose input torch saves, and the fused operation its output."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x):
        x = self.conv1(x)
        y = self.activation(self.norm1(x))
        y += x
        return y


class ChangesResidual(Chains):
    """An in-place sum into a residual that the fused operation saves."""

    def forward(self, x):
        x = self.conv1(x)
        skip = self.conv2(x)
        y = F.silu(self.norm1(x) + skip)
        skip += 1
        return y + skip


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class AnyDimensions(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        pass


class OwnMethod(nn.BatchNorm2d):
    def half_weight(self):
        return self.weight / 2


def with_attribute():
    norm = nn.BatchNorm2d(4)
    norm.activation = "mine"
    return norm


class OneChain(Chains):
    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x)))


class CallsSuperOfItsClass(OneChain):
    """In a subclass, this calls itself."""

    def forward(self, x):
        return super(self.__class__, self).forward(x)


class FreezesNorms(Chains):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x)))


class CalledByKeyword(Chains):
    def forward(self, x):
        return self.relu(self.norm1(input=self.conv1(x)))


class TwoActivations(Chains):
    def forward(self, x):
        x = self.conv1(x)
        return self.relu(self.norm1(x)) + F.silu(self.norm1(2 * x))


class DropsByValue(Chains):
    def forward(self, x):
        return self.relu(F.dropout(self.norm1(self.conv1(x)), 0 * x.mean(), self.training))


@fx.wrap
def double_in_place(x):
    return x.mul_(2)


class ChainOfDict(Chains):
    """Replaces a value of its argument, and is called by FillsDict."""

    def forward(self, values):
        values["y"] = self.relu(self.norm1(self.conv1(values["x"])))
        return values["x"]


class FillsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chain = ChainOfDict()

    def forward(self, x):
        values = {"x": x, "y": x}
        return self.chain(values) + values["y"].mean()


class AsksItsOwner(Chains):
    """Reads the mode of the module that contains it."""

    def __init__(self, owner) -> None:
        super().__init__()
        self.owners = [owner]

    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x))) * (2 if self.owners[0].training else 1)


class TakesFromAnother(Chains):
    """Reads a value that another forward has left behind."""

    def __init__(self, values) -> None:
        super().__init__()
        self.values = values

    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x))) * self.values.pop()


class LeavesForAnother(nn.Module):
    def __init__(self, values) -> None:
        super().__init__()
        self.values = values

    def forward(self, x):
        self.values.append(x.mean())
        return x


def owned():
    owner = nn.Sequential()
    owner.append(AsksItsOwner(owner))
    return owner


def through_a_list():
    values = []
    return nn.Sequential(LeavesForAnother(values), TakesFromAnother(values))


def parametrized():
    model = sequence(nn.BatchNorm2d(4), nn.ReLU())
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    return model


LEFT = [
    (CalledByKeyword, "called with other than one positional argument"),
    (TwoActivations, "called in several places with different chains"),
    (DropsByValue, "the probability of the dropout after it is not a constant"),
    (lambda: OperatorBetween(double_in_place), "may change a tensor in place"),
    (FillsDict, "modifies the contents of an argument"),
    (owned, "the training flag of a module that it does not contain"),
    (through_a_list, "a value from another forward"),
    (parametrized, "it is parametrized"),
    (lambda: hidden(lambda self, x: doubled_if_tensor(x)), "checks the type of a value"),
    (lambda: hidden(in_a_comprehension), "checks the type of a value"),
    (lambda: hidden(lambda self, x: x if callable(x) else x * 2), "checks the type of a value"),
    (Decorated, "checks the type of a value"),
    (CallsSuperOfItsClass, "checks the type of a value"),
    (lambda: hidden(lambda self, x: x * len(self.__class__.__mro__)), "checks the type of a value"),
    (lambda: hidden(catches), "catches exceptions"),
    (lambda: hidden(swallows), "catches exceptions"),
    (lambda: hidden(lambda self, x: x * 2 if self.training is True else x), "by identity"),
    (lambda: hidden(lambda self, x: x * 2 if x.dtype is torch.float64 else x), "by identity"),
    (lambda: hidden(lambda self, x: x * {True: 2.0}.get(self.training, 1.0)), "uses a value as a key"),
    (lambda: hidden(lambda self, x: x if GENERATOR.random() < 0.5 else x * 2), "generator of random numbers"),
    (
        lambda: hidden(lambda self, x: x if np.random.default_rng().random() < 2 else x * 2),
        "generator of random numbers",
    ),
    (lambda: hidden(lambda self, x: x if self.policy.draw() < 2 else x * 2), "generator of random numbers"),
    (lambda: hidden(lambda self, x: x * self.meter.tick()), "sets an attribute"),
    (lambda: hidden(sets_attribute), "sets an attribute"),
    (lambda: hidden(lambda self, x: x + len(list(self.buffers()))), "all buffers"),
    (lambda: hidden(lambda self, x: x if torch.is_grad_enabled() else x * 2), "state of torch"),
    (lambda: hidden(forks), "state of torch"),
    (lambda: hidden(copies), "copy.deepcopy"),
    (CallOverridden, "overrides __call__"),
    (OfARegistry, "overrides __init_subclass__"),
    (StatisticsInAChild, "a module that contains it is called before the sum"),
    (lambda: ChangesOutput(nn.LeakyReLU(0.1)), "is changed in place"),
    (lambda: ChangesOutput(nn.ReLU6()), "is changed in place"),
    (ChangesResidual, "is changed in place"),
    (lambda: sequence(AnyDimensions(4), nn.ReLU()), "defines _check_input_dim"),
    (lambda: sequence(OwnMethod(4), nn.ReLU()), "defines half_weight"),
    (lambda: sequence(with_attribute(), nn.ReLU()), "has an attribute activation"),
    (UsedTwice, "used 2 times"),
    (UsedTwiceInTraining, "used 2 times"),
    (Statement, "used 2 times"),
    (SumChangesOther, "changes the other tensor in place"),
    (SumOfNumber, "does not add a tensor"),
    (SumWithItself, "does not add a tensor"),
    (SumScaled, "further arguments"),
    (WriteBetween, "may change a tensor in place"),
    (lambda: OperatorBetween(torch.ops.aten.exp_), "may change a tensor in place"),
    (lambda: OperatorBetween(torch.ops.aten.exp_.default), "may change a tensor in place"),
    (lambda: OperatorBetween(lambda x: double(x)), "may change a tensor in place"),
    (lambda: OperatorBetween(lambda x: x.__setitem__(0, 5.0)), "may change a tensor in place"),
    (StatisticsBetween, "its running statistics are used"),
    (ChangesData, "sets an attribute of a value"),
    (CalledBetween, "called again before the sum"),
    (AlwaysDropout, "^the dropout after it does not follow its training mode"),
    (NoGrad, "another grad mode"),
    (
        Checkpointed,
        "cannot be (rewritten: it.* (runs a part under|checks the type)|traced: it applies an autograd Function)",
    ),
    (SavedElsewhere, "saved-tensor hook"),
    (Autocast, "autocast"),
    (CustomFunction, "autograd Function"),
    (CustomGradientBetween, "autograd Function"),
    (RandomBranch, "random numbers"),
    (lambda: LayerDrop(random.random), "random numbers"),
    (lambda: LayerDrop(draw_from_numpy), "random numbers"),
    (lambda: LayerDrop(lambda: torch.rand(())), "random numbers"),
    (lambda: LayerDrop(random.Random(0).random), "random numbers"),
    (lambda: LayerDrop(np.random.default_rng(0).random), "random numbers"),
    (lambda: OwnGenerator(torch.Generator(), lambda own: torch.rand((), generator=own)), "random numbers"),
    (lambda: OwnGenerator(random.Random(0), random.Random.random), "random numbers"),
    (lambda: OwnGenerator(np.random.PCG64(0), np.random.PCG64.random_raw), "random numbers"),
    (lambda: OwnGenerator(np.random.default_rng(0), np.random.Generator.random), "random numbers"),
    (lambda: OwnGenerator(np.random.default_rng(0), np.random.Generator.random, F.relu), "random numbers"),
    (lambda: OwnGenerator(np.random.RandomState(0), np.random.RandomState.random_sample), "random numbers"),
    (lambda: OwnGenerator(SimpleNamespace(own=random.Random(0)), lambda held: held.own.random()), "random numbers"),
    (StoresNorm, "the output of norm1 .torch.nn.BatchNorm2d. is stored in an attribute"),
    (StoresDropout, "the output of drop .torch.nn.Dropout. is stored in an attribute"),
    (StoresByMethod, "stored in an attribute"),
    (StoresInside, "used 2 times"),
    (GradModeChanges, "what follows it runs under another grad mode"),
    (AsksForTheNormsType, "used 2 times"),
    (AsksForAParameter, "checks the type of a value"),
    (StoresEnds, "changes attributes|checks the type"),
    (AsksForType, "checks the type of a value"),
    (lambda: AsksByFunction(torch.is_tensor), "checks the type of a value"),
    (lambda: AsksByFunction(lambda x: isinstance(x.shape, (list, tuple))), "checks the type of a value"),
    (AsksByType, "checks the type of a value"),
    (DropoutOfAnotherMode, "the dropout after it does not follow its training mode"),
    (NewBuffer, "changes attributes|checks the type"),
    (Remembers, "changes attributes"),
    (RemembersDeep, "changes attributes"),
    (CountsElsewhere, "changes attributes"),
    (replaced_relu, "followed by 2 .torch.nn.ReLU."),
    (Counter, "changes attributes"),
    (OwnTensor, "creates a tensor"),
    (lambda: LooksAt(lambda x: KEPT.append(x)), "stores a value"),
    (lambda: LooksAt(print), "converts a value to a string"),
    (lambda: LooksAt(lambda x: logging.getLogger().warning("shape %s", x.shape)), "converts a value to a string"),
    (lambda: LooksAt(lambda x: f"{x.shape}"), "converts a value to a string"),
    (DataDependent, "cannot be traced: it branches on a value or a shape"),
    (replaced_forward, "overridden on the instance"),
    (lambda: sequence(nn.BatchNorm2d(4), nn.ELU()), "followed by 2 .torch.nn.ELU."),
    (lambda: sequence(nn.BatchNorm2d(4), nn.Dropout2d(0.0), nn.ReLU()), "followed by 2 .torch.nn.Dropout2d."),
    (lambda: sequence(nn.BatchNorm2d(4)), "followed by the output"),
    (lambda: sequence(OwnForward(4), nn.ReLU()), "no fused left_alone_networks.OwnForward"),
    (
        lambda: sequence(nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()),
        "instance norm with running",
    ),
    (lambda: hooked("1"), "1 has hooks"),
    (lambda: hooked("2"), "2 has hooks"),
    (lambda: hooked("3"), "3 has hooks"),
    (hooked_inside, "0 has hooks"),
    (in_two_modes, "in another mode"),
]

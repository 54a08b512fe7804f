"""fuse and unfuse: the converted model computes what the model computed, and what is not certain is left alone."""

import copy
import io
import pickle
import random
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, library, nn
from torch.nn.utils import prune

from mnistnorm import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    GroupNormReLU,
    LayerNormReLU,
    fuse,
    unfuse,
)

FUSED = (BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d, GroupNormReLU, LayerNormReLU)

# torchvision's name, input shape, chains that fuse, those with a sum, norms that are left alone
MODELS = [
    ("resnet18", (2, 3, 32, 32), 17, 8, 3),
    ("resnet50", (2, 3, 32, 32), 49, 16, 4),
    ("resnext50_32x4d", (2, 3, 32, 32), 49, 16, 4),
    ("wide_resnet50_2", (2, 3, 32, 32), 49, 16, 4),
    ("densenet121", (2, 3, 32, 32), 121, 0, 0),
    ("vgg16_bn", (2, 3, 32, 32), 13, 0, 0),
    ("googlenet", (2, 3, 64, 64), 59, 0, 0),
    ("inception_v3", (2, 3, 96, 96), 94, 0, 0),
    ("shufflenet_v2_x1_0", (2, 3, 32, 32), 37, 0, 19),
    ("mnasnet1_0", (2, 3, 32, 32), 35, 0, 17),
    ("regnet_y_400mf", (2, 3, 32, 32), 49, 16, 4),
    ("convnext_tiny", (2, 3, 32, 32), 0, 0, 23),
    ("fcn_resnet50", (2, 3, 32, 32), 51, 16, 4),
    ("deeplabv3_resnet50", (2, 3, 32, 32), 57, 16, 4),
    ("r2plus1d_18", (2, 3, 4, 16, 16), 34, 8, 3),
]

FAST = ("resnet18", "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf")


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in ("fcn_resnet50", "deeplabv3_resnet50"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=True)
    elif name in ("googlenet", "inception_v3"):
        aux_logits = name == "googlenet"  # inception_v3's ask for images of 299 x 299
        model = torchvision.models.get_model(name, init_weights=False, aux_logits=aux_logits, num_classes=5)
    else:
        model = torchvision.models.get_model(name, num_classes=5)
    return model.double()


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for tensor in (output.values() if isinstance(output, dict) else output) if tensor is not None]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def same_step(actual: nn.Module, expected: nn.Module, *inputs: Tensor) -> None:
    """One forward and backward of both, from the same random state: outputs, gradients and buffers are equal."""
    results = []
    for model in (actual, expected):
        torch.manual_seed(1)
        outputs = tensors(model(*inputs))
        grads = [torch.randn_like(output) for output in outputs]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(outputs, parameters, grads, allow_unused=True) if parameters else ()
        results.append((outputs, list(gradients)))
    close(*results)
    close(dict(actual.named_buffers()), dict(expected.named_buffers()))


def counts(model: nn.Module) -> tuple[int, int, int]:
    report = model.fusion_report
    return len(report.fused), sum(chain.residual for chain in report.fused), len(report.left)


@pytest.mark.parametrize(
    ("name", "shape", "fused", "summed", "left"),
    [pytest.param(*model, id=model[0], marks=[] if model[0] in FAST else [pytest.mark.slow]) for model in MODELS],
)
def test_models_of_torchvision(name, shape, fused, summed, left):
    stock = torchvision_model(name)
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert counts(model) == (fused, summed, left)
    assert sum(isinstance(module, FUSED) for module in model.modules()) == fused
    assert list(model.state_dict()) == list(expected.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        same_step(model.train(training), expected.train(training), x)
    back = unfuse(model)
    assert repr(back) == repr(stock)
    for training in (True, False):
        same_step(back.train(training), expected.train(training), x)


class Chains(nn.Module):
    """Small networks that differ in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.norm2 = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU()
        self.eval_relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.tensor(0.7))


class Functional(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x))) * self.scale


class InPlace(Chains):
    def forward(self, x):
        x = F.relu_(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class Method(Chains):
    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu_())).relu()


class SharedReLU(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(x)))


class PartlySharedReLU(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.eval_relu(self.norm2(self.conv2(x))) - 0.1)


class Sum(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(x)))


class SumInPlace(Chains):
    def forward(self, x):
        identity = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(identity))
        out += identity
        return self.eval_relu(out)


class SumMethod(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return torch.add(x, self.norm2(self.conv2(x))).relu()


class SumOfNorms(Chains):
    def forward(self, x):
        x = self.conv1(x)
        return self.relu(self.norm1(x).add(self.norm2(self.conv2(x))))


class BroadcastSum(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + x.mean((2, 3), keepdim=True))


class BroadcastSumInPlace(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(x))
        out += x.mean((2, 3), keepdim=True)
        return F.relu(out)


class WideningSum(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        pooled = self.norm2(self.conv2(F.adaptive_avg_pool2d(x, 1)))
        return F.relu(pooled + x)


class PromotingSum(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + x.float())


class Counting(Chains):
    """Counts its calls in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros((), dtype=torch.float64)

    def forward(self, x):
        self.calls.add_(1)
        return F.relu(self.norm1(self.conv1(x))) * self.calls


class ModeOfAnother(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return F.dropout(F.relu(self.norm2(self.conv2(x))), 0.5, self.drop.training)


class TakesSeveral(Chains):
    """Takes a tensor or several, and asks which."""

    def forward(self, x):
        x = torch.cat([x] if isinstance(x, Tensor) else x, 1)
        return self.relu(self.norm1(self.conv1(x)))


class ChecksTypes(Chains):
    """Asks for the type of a value on the way, in a forward that need not be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TakesSeveral()

    def forward(self, x):
        return self.relu(self.norm1(self.conv2(self.block(self.conv1(x)[:, :3]))))


class CalledTwice(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm1(self.conv2(x)))


class ModeOutside(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return F.dropout(F.relu(self.norm2(self.conv2(x))), 0.5, self.training)


class Tail(Chains):
    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.norm1(x) + x.abs())
        return self.norm2(self.conv2(F.dropout(x, 0.5, self.training)))


class Nested(Chains):
    """A sum whose norm is the last part of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = Tail()

    def forward(self, x):
        return F.relu(self.tail(x) + self.conv1(x))


SMALL = [
    (Functional, (2, 0, 0)),
    (InPlace, (2, 0, 0)),
    (Method, (2, 0, 0)),
    (SharedReLU, (2, 0, 0)),
    (PartlySharedReLU, (2, 0, 0)),
    (Sum, (2, 1, 0)),
    (SumInPlace, (2, 1, 0)),
    (SumMethod, (2, 1, 0)),
    (SumOfNorms, (1, 1, 1)),
    (BroadcastSum, (2, 1, 0)),
    (BroadcastSumInPlace, (2, 1, 0)),
    (WideningSum, (2, 1, 0)),
    (PromotingSum, (2, 1, 0)),
    (Counting, (1, 0, 1)),
    (ModeOfAnother, (2, 0, 0)),
    (ChecksTypes, (2, 0, 2)),
    (CalledTwice, (1, 0, 1)),
    (ModeOutside, (2, 0, 0)),
    (Nested, (2, 2, 2)),
]
IMAGE = (3, 3, 5, 7)


def image():
    return torch.randn(IMAGE, dtype=torch.float64)


@pytest.mark.parametrize(("network", "expected_counts"), SMALL, ids=lambda value: getattr(value, "__name__", ""))
def test_small_networks(network, expected_counts):
    torch.manual_seed(0)
    stock = network().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert counts(model) == expected_counts, str(model.fusion_report)
    for training in (True, False, True):
        same_step(model.train(training), expected.train(training), image())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fuse(unfuse(model)), fuse(model)):
        same_step(copy.deepcopy(again).train(), copy.deepcopy(expected).train(), image())
    back = unfuse(model)
    assert type(back) is network
    same_step(back, expected, image())


@pytest.mark.parametrize(
    ("norm", "shape", "fused"),
    [
        (nn.BatchNorm1d(4), (5, 4), BatchNormReLU1d),
        (nn.BatchNorm1d(4), (5, 4, 3), BatchNormReLU1d),
        (nn.BatchNorm2d(4, momentum=None), (5, 4, 3, 3), BatchNormReLU2d),
        (nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 3, 3), BatchNormReLU2d),
        (nn.BatchNorm2d(4, affine=False, eps=0.1), (5, 4, 3, 3), BatchNormReLU2d),
        (nn.BatchNorm3d(4), (2, 4, 3, 3, 3), BatchNormReLU3d),
        (nn.GroupNorm(2, 4), (2, 4, 5), GroupNormReLU),
        (nn.GroupNorm(2, 4), (2, 4, 1, 2, 3, 2), GroupNormReLU),
        (nn.LayerNorm(4), (2, 5, 4), LayerNormReLU),
        (nn.LayerNorm((5, 4), eps=0.1, bias=False), (2, 5, 4), LayerNormReLU),
    ],
    ids=repr,
)
def test_every_norm(norm, shape, fused):
    torch.manual_seed(0)
    stock = nn.Sequential(copy.deepcopy(norm), nn.ReLU()).double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert [type(module) for module in model] == [fused, type(model[1])]
    assert isinstance(model[1], nn.Identity)
    for training in (True, True, False):
        same_step(model.train(training), expected.train(training), torch.randn(shape, dtype=torch.float64))
    assert repr(unfuse(model)) == repr(stock)


class DropoutFunction(Chains):
    def forward(self, x):
        return F.relu(F.dropout(self.norm1(self.conv1(x)), 0.25, self.training))


class DropoutFunctionByName(Chains):
    def forward(self, x):
        return F.dropout(self.norm1(self.conv1(x)), training=self.training, p=0.25).relu()


class DropoutAndSum(Chains):
    def forward(self, x):
        return F.relu(F.dropout(self.norm1(self.conv1(x)), 0.25, self.training) + self.conv1(x).abs())


@pytest.mark.parametrize(
    "network",
    [
        DropoutFunction,
        DropoutFunctionByName,
        DropoutAndSum,
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.25, inplace=True), nn.ReLU()),
    ],
)
def test_dropout_follows_the_mode(network):
    torch.manual_seed(0)
    stock = network().double()
    model = fuse(stock)
    (chain,) = model.fusion_report.fused
    assert chain.dropout_p == 0.25
    x = image()
    same_step(model.eval(), copy.deepcopy(stock).eval(), x)

    model.train()
    torch.manual_seed(1)
    output = model(x)
    assert not torch.equal(output, model(x))
    torch.manual_seed(1)
    assert torch.equal(output, model(x))
    back = unfuse(model)
    assert not torch.equal(back(x), back(x))
    assert torch.equal(back.eval()(x), back(x))

    if network is not DropoutAndSum:
        kept = unfuse(model).train()
        for module in kept.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x)
            whole = kept(x)
        torch.testing.assert_close(output, torch.where(output > 0, whole / 0.75, 0.0))
        assert 0.1 < ((output == 0) & (whole > 0)).sum() / (whole > 0).sum() < 0.4


# What is left alone


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


class BranchOnMode(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return x * 2 if self.training else x


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


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


class CustomFunction(Chains):
    def forward(self, x):
        return F.relu(self.norm1(Reverse.apply(self.conv1(x))))


class LayerDrop(Chains):
    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.relu(x) if self.draw() > -1 else x


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
        x = self.conv1(x)
        if isinstance(x, dict):
            x = x["out"]
        return F.relu(self.norm1(x))


class Named(nn.Module):
    def forward(self, x):
        return {"out": x}


class GetsDictionary(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.named = Named()

    def forward(self, x):
        return F.relu(self.norm1(self.conv1(self.named(x)["out"])))


class DropoutOfAnotherMode(Chains):
    def forward(self, x):
        return F.relu(F.dropout(self.norm1(self.conv1(x)), 0.5, self.drop.training))


class BranchOnModeOfAnother(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return x * 2 if self.norm1.training else x


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


class RandomBranch(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return x + 1 if torch.rand(()) < 2 else x


class Counter(Chains):
    count = 0

    def forward(self, x):
        self.count += 1
        return F.relu(self.norm1(self.conv1(x)))


class OwnTensor(Chains):
    def forward(self, x):
        return F.relu(self.norm1(self.conv1(x))) + torch.ones(7, dtype=torch.float64)


class DataDependent(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return x + 1 if x.sum() > 0 else x


class Optional(Chains):
    def forward(self, x, mask=None):
        x = self.norm1(self.conv1(x))
        return F.relu(x if mask is None else x * mask)


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


def draw_from_numpy():
    return np.random.random()  # noqa: NPY002 - the generator that a forward may draw from


class Subclass(nn.BatchNorm2d):
    pass


def sequence(*modules):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *modules)


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


LEFT = [
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
    (ChangesData, "changes an attribute of a value"),
    (CalledBetween, "called again before the sum"),
    (AlwaysDropout, "^the dropout behind it does not follow the mode"),
    (BranchOnMode, "cannot be rewritten: symbolically traced variables"),
    (NoGrad, "another grad mode"),
    (Checkpointed, "cannot be traced: symbolically traced variables"),
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
    (StoresNorm, "the output of norm1 .BatchNorm2d. is stored in an attribute"),
    (StoresDropout, "the output of drop .Dropout. is stored in an attribute"),
    (StoresByMethod, "stored in an attribute"),
    (StoresInside, "stored in an attribute"),
    (GradModeChanges, "what follows runs under another grad mode"),
    (AsksForType, "asks for the type of a value"),
    (GetsDictionary, "a module it calls returns something else"),
    (DropoutOfAnotherMode, "the dropout in it does not follow the mode"),
    (BranchOnModeOfAnother, "cannot be rewritten: symbolically traced variables"),
    (NewBuffer, "changes attributes"),
    (Remembers, "changes attributes"),
    (RemembersDeep, "changes attributes"),
    (CountsElsewhere, "changes attributes"),
    (replaced_relu, "followed by 2 .ReLU."),
    (Counter, "changes attributes"),
    (OwnTensor, "makes a tensor"),
    (DataDependent, "cannot be traced: symbolically traced variables"),
    (Optional, "optional or variable arguments"),
    (replaced_forward, "replaced on the instance"),
    (lambda: sequence(nn.BatchNorm2d(4), nn.ReLU6()), "followed by 2 .ReLU6."),
    (lambda: sequence(nn.BatchNorm2d(4), nn.Dropout2d(0.0), nn.ReLU()), "followed by 2 .Dropout2d."),
    (lambda: sequence(nn.BatchNorm2d(4)), "followed by the output"),
    (lambda: sequence(Subclass(4), nn.ReLU()), "no fused Subclass"),
    (lambda: sequence(nn.InstanceNorm2d(4), nn.ReLU()), "no fused InstanceNorm2d"),
    (lambda: hooked("1"), "1 has hooks"),
    (lambda: hooked("2"), "2 has hooks"),
    (lambda: hooked("3"), "3 has hooks"),
    (hooked_inside, "0 has hooks"),
    (in_two_modes, "in another mode"),
]


@pytest.mark.parametrize(("network", "reason"), LEFT, ids=lambda value: getattr(value, "__name__", value))
def test_left_alone(network, reason):
    torch.manual_seed(0)
    stock = network().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    report = model.fusion_report
    assert not report.fused, str(report)
    assert re.search(reason, report.left[0].reason), str(report)
    assert repr(model) == repr(expected)
    if network is not replaced_forward:  # its forward is that of the model it was made for
        same_step(model, expected, image())


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


def test_a_forward_may_store_what_goes_into_a_chain_and_comes_out():
    stock = StoresEnds()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert counts(model) == (1, 0, 1)
    x = torch.randn(IMAGE)
    for stores in (model, expected):
        stores(x)
    assert (model.calls, expected.calls, stock.calls) == (1, 1, 0)
    torch.testing.assert_close([*model.log, model.result], [*expected.log, expected.result])


def test_other_norms_are_left_alone_and_reported():
    norms = [nn.SyncBatchNorm(4), nn.RMSNorm(4), torchvision.ops.FrozenBatchNorm2d(4)]
    report = fuse(nn.Sequential(*(layer for norm in norms for layer in (norm, nn.ReLU())))).fusion_report
    assert [norm.reason for norm in report.left] == [f"there is no fused {type(norm).__name__}" for norm in norms]


def test_a_sum_that_broadcasts_on_the_example_is_left_alone():
    report = fuse(BroadcastSum(), example_inputs=torch.randn(IMAGE)).fusion_report
    assert [chain.norm for chain in report.fused] == ["norm1"]
    assert "broadcasts (3, 4, 5, 7) and (3, 4, 1, 1)" in report.left[0].reason
    assert len(fuse(Sum(), example_inputs=(torch.randn(IMAGE),)).fusion_report.fused) == 2
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        fuse(Sum(), example_inputs=(torch.randn(1, 1, 1, 1),))


def test_what_cannot_be_traced_is_fused_by_parts():
    class Root(DataDependent):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([sequence(nn.BatchNorm2d(4), nn.ReLU()), Sum()])

        def forward(self, x):
            return super().forward(x), self.blocks[0](x), self.blocks[1](x)

    torch.manual_seed(0)
    stock = nn.Sequential(Root(), nn.Flatten()).double()[:1]
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert [chain.norm for chain in model.fusion_report.fused] == [
        "0.blocks.0.1",
        "0.blocks.1.norm1",
        "0.blocks.1.norm2",
    ]
    assert [norm.norm for norm in model.fusion_report.left] == ["0.norm1", "0.norm2"]
    assert "the forward of 0 cannot be traced" in model.fusion_report.left[0].reason
    for training in (True, False):
        same_step(model.train(training), expected.train(training), image())


def test_a_relu_shared_with_what_is_not_traced_stays():
    class Root(Chains):
        def __init__(self):
            super().__init__()
            self.opaque = DataDependent()
            self.opaque.relu = self.relu

        def forward(self, x):
            return self.opaque(self.relu(self.norm1(self.conv1(x)))[:, :3])

    torch.manual_seed(0)
    stock = Root().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert not model.fusion_report.fused
    assert model.fusion_report.left[0].reason == "relu is also a part of opaque, whose forward is not traced"
    same_step(model, expected, image())


class DataDependentOuter(nn.Module):
    def __init__(self, *blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.sum() < 1e9 else x
        return x


@pytest.mark.parametrize(
    ("shared", "fused"),
    [
        (lambda norm, relu: nn.Sequential(nn.Conv2d(4, 4, 1), relu), 1),
        (lambda norm, relu: nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Sigmoid()), 0),
    ],
    ids=["relu", "norm"],
)
def test_modules_shared_by_blocks_that_are_traced_apart(shared, fused):
    torch.manual_seed(0)
    norm, relu = nn.BatchNorm2d(4), nn.ReLU()
    stock = DataDependentOuter(sequence(norm, relu), shared(norm, relu)).double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert len(model.fusion_report.fused) == fused, str(model.fusion_report)
    for training in (True, False):
        same_step(model.train(training), expected.train(training), image())


def test_modules_shared_by_traced_calls():
    class Root(Chains):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([SumInPlace(), Sum()])
            self.blocks[1].relu = self.blocks[0].relu = self.relu

        def forward(self, x):
            for block in (*self.blocks, self.blocks[0]):
                x = block(x)[:, :3]
            return self.relu(self.norm1(self.conv1(x)))

    torch.manual_seed(0)
    stock = Root().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert counts(model) == (5, 2, 1)
    for training in (True, False):
        same_step(model.train(training), expected.train(training), image())


class EndsInside(nn.Module):
    """Ends the chain of whoever calls it, and holds one of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = F.relu(x)
        return F.relu(self.norm(x) + x)


class BeginsOutside(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.norm, self.inside = nn.BatchNorm2d(3), inside

    def forward(self, x):
        return self.inside(self.norm(x))


@pytest.mark.parametrize(
    "calls", ["first", "inside first", "first inside", "first second", "second first inside"], ids=str
)
@pytest.mark.parametrize("order", [["inside", "first", "second"], ["second", "first", "inside"]], ids="-".join)
def test_a_chain_inside_what_other_chains_open_is_rewritten_wherever_it_is_called(calls, order):
    torch.manual_seed(0)
    inside = EndsInside()
    modules = {"inside": inside, "first": BeginsOutside(inside), "second": BeginsOutside(inside)}

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            for name in order:
                setattr(self, name, modules[name])

        def forward(self, x):
            for name in calls.split():
                x = getattr(self, name)(x)
            return x

    stock = Root().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    called = set(calls.split()) - {"inside"}
    assert counts(model) == (1 + len(called), 1, 2 - len(called)), str(model.fusion_report)
    for training in (True, False):
        same_step(model.train(training), expected.train(training), image())
    assert repr(unfuse(model)) == repr(stock)


class Recursive(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.inner = Recursive(depth - 1) if depth else None

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        if self.inner is None:
            return x if x.sum() > 0 else -x
        return self.inner(x)


class Calls(nn.Module):
    """Calls what cannot be traced, with what no trace can record."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(3), DataDependent()

    def forward(self, x):
        return self.inner(F.relu(self.norm(x)), object())


@pytest.mark.parametrize(
    ("network", "expected_counts", "reason"),
    [
        (lambda: Recursive(2), (1, 0, 2), "symbolically traced variables cannot be used"),
        (Calls, (0, 0, 3), "argument of type"),
    ],
    ids=["recursive", "called with an object"],
)
def test_what_cannot_be_traced_ends_and_is_reported(network, expected_counts, reason):
    model = fuse(network())
    assert counts(model) == expected_counts, str(model.fusion_report)
    assert reason in str(model.fusion_report)


# What stays as it is


def test_structure_parameters_and_modes_stay():
    stock = torchvision.models.resnet18(num_classes=5)
    stock.layer1.eval()
    stock.layer2[0].bn1.eval()
    stock.layer1.requires_grad_(False)
    stock.note = {"kept": stock.layer1}
    before = repr(stock), {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    model = fuse(stock)

    assert type(model) is type(stock)
    assert isinstance(model.layer1[0], torchvision.models.resnet.BasicBlock)
    assert model.note["kept"] is model.layer1
    assert [name for name, _ in model.named_modules()] == [name for name, _ in stock.named_modules()]
    assert [m.training for m in model.modules()] == [m.training for m in stock.modules()]
    for mine, theirs in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert mine[0] == theirs[0]
        assert mine[1] is theirs[1]
    assert all(a is b for a, b in zip(model.buffers(), stock.buffers(), strict=True))

    assert repr(stock) == before[0]
    torch.testing.assert_close(dict(stock.state_dict()), before[1])
    weight = stock.fc.weight.detach().clone()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight, weight)
    assert stock.fc.weight is model.fc.weight
    assert stock.layer1[0].conv1.weight.grad is None


class DropoutModuleThenFunction(Chains):
    def forward(self, x):
        return F.relu(self.drop(self.norm1(self.conv1(x))))


class SharedDropout(Chains):
    def forward(self, x):
        x = F.relu(self.drop(self.norm1(self.conv1(x))))
        return self.relu(self.drop(self.norm2(self.conv2(x))))


@pytest.mark.parametrize(
    ("network", "absorbed"),
    [
        (DropoutModuleThenFunction, {"drop": "Dropout, part of norm1"}),
        (SharedDropout, {"drop": "Dropout, part of norm1, norm2"}),
        (PartlySharedReLU, {"eval_relu": "ReLU, part of norm2"}),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU()), {"1": "Dropout", "2": "ReLU"}),
    ],
)
def test_a_dropout_or_relu_that_is_no_longer_called_is_not_found(network, absorbed):
    stock = network()
    model = fuse(stock)
    found = [path for path, module in model.named_modules() if isinstance(module, (nn.Dropout, nn.ReLU))]
    members = [path for path, module in stock.named_modules() if isinstance(module, (nn.Dropout, nn.ReLU))]
    assert found == [path for path in members if path not in absorbed]
    assert all(what in repr(model.get_submodule(path)) for path, what in absorbed.items())
    assert repr(unfuse(model)) == repr(stock)


def test_checkpoints_move_both_ways(tmp_path):
    stock, other = Sum(), Sum()
    model = fuse(stock)
    other.load_state_dict(model.state_dict(), strict=True)
    fuse(other).load_state_dict(stock.state_dict(), strict=True)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    assert type(unfuse(again)) is Sum


def test_hooks_around_a_chain_still_run():
    stock = torchvision.models.resnet18(num_classes=5)
    model = fuse(stock)
    seen = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append("layer1"))
    model.layer1[0].register_forward_hook(lambda module, args, output: seen.append("block"))
    model.layer1[0].conv1.register_forward_hook(lambda module, args, output: seen.append("conv"))
    model(torch.randn(2, 3, 32, 32))
    assert seen == ["conv", "block", "layer1"]


@pytest.mark.parametrize("network", [Sum, SumInPlace, BroadcastSum, BroadcastSumInPlace, WideningSum, PromotingSum])
def test_hooks_on_a_layer_run_whatever_the_residual(network):
    torch.manual_seed(0)
    stock = network().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    for module in (model, expected):
        prune.custom_from_mask(module.norm2, "weight", torch.tensor([1, 0, 1, 1]))
        with torch.no_grad():
            module.norm2.weight_orig.mul_(3)
    same_step(model, expected, image())

    seen = []
    model.norm2.register_forward_hook(lambda module, args, output: seen.append((len(args), output)))
    output = model(image())
    assert len(seen) == 1
    assert seen[0][0] == 2
    assert torch.equal(seen[0][1], output)


def test_a_sum_in_place_that_would_widen_fails_as_before():
    class WideningSumInPlace(Chains):
        def forward(self, x):
            out = self.norm1(self.conv1(x).mean((2, 3), keepdim=True))
            out += x[:, :1]
            return F.relu(out)

    stock = WideningSumInPlace()
    model = fuse(stock)
    assert counts(model) == (1, 1, 1)
    for module in (model, stock):
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            module(torch.randn(IMAGE))


class Recorder:
    def __init__(self) -> None:
        self.seen = []

    def hook(self, module, args, output):
        self.seen.append(type(module))


class OwnRecorder(Chains, Recorder):
    def __init__(self) -> None:
        Chains.__init__(self)
        Recorder.__init__(self)
        self.conv1.register_forward_hook(self.hook)
        self.conv1.register_forward_hook(partial(OwnRecorder.hook, self))
        self.conv1.register_forward_hook(partial(self.hook))

    def forward(self, x):
        return self.relu(self.norm1(self.conv1(x)))


def test_hooks_reach_the_objects_that_registered_them():
    recorder, stock = Recorder(), OwnRecorder()
    stock.conv1.register_forward_hook(recorder.hook)
    stock.conv1.register_forward_hook(partial(lambda seen, *args: seen.append(args), recorder.seen))
    model = fuse(stock)
    model(torch.randn(IMAGE))
    assert (len(recorder.seen), len(model.seen), len(stock.seen)) == (2, 3, 0)


class Merging(nn.Conv2d):
    """Changes its weights when the mode changes, as adapters of low rank do."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.add_(1)
        return super().train(mode)


def test_tracing_switches_no_mode():
    stock = nn.Sequential(Merging(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    weight = stock[0].weight.detach().clone()
    assert len(fuse(stock).fusion_report.fused) == 1
    assert torch.equal(stock[0].weight, weight)


def test_lazy_modules():
    model = fuse(nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.LazyBatchNorm2d(), nn.ReLU()))
    assert [norm.reason for norm in model.fusion_report.left] == ["there is no fused LazyBatchNorm2d"]
    assert model(torch.randn(IMAGE)).shape == (3, 4, 5, 7)
    assert counts(fuse(model)) == (1, 0, 1)


def test_tracing_calls_no_hook_and_changes_no_buffer_nor_generator():
    networks = RandomBranch(), LayerDrop(random.random), LayerDrop(draw_from_numpy)
    numpy_generator = np.random.mtrand._rand
    states = torch.get_rng_state(), random.getstate(), numpy_generator.get_state()[1].tolist()
    for stock in networks:
        fuse(stock)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy_generator.get_state()[1].tolist()) == states[1:]

    stock = Counter()
    stock.register_forward_pre_hook(lambda module, args: pytest.fail("called"))
    before = copy.deepcopy(stock.state_dict())
    model = fuse(stock)
    assert (stock.count, model.count) == (0, 0)
    torch.testing.assert_close(model.state_dict(), before)


@pytest.mark.parametrize("network", [Sum, SumInPlace, BroadcastSum])
def test_compiles_whole(network):
    torch.manual_seed(0)
    model = fuse(network())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    x = torch.randn(IMAGE)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.export's own
def test_exports_whole_with_any_batch_size(training):
    model = fuse(torchvision_model("resnet18")).train(training)
    x = torch.randn(4, 3, 40, 40, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    for size in (7, 1):
        same_step(exported, model, torch.randn(size, 3, 40, 40, dtype=torch.float64))
    assert not [node for node in program.graph.nodes if ".out" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_is_traced_by_torch_jit(training):
    model = fuse(torchvision_model("resnet18")).train(training)
    traced = torch.jit.trace(copy.deepcopy(model), (torch.randn(4, 3, 40, 40, dtype=torch.float64),), check_trace=False)
    traced.load_state_dict(model.state_dict())
    same_step(traced, model, torch.randn(7, 3, 40, 40, dtype=torch.float64))


def test_fusing_again_and_nothing_to_fuse():
    model = fuse(Sum())
    again = fuse(model)
    assert counts(again) == (0, 0, 2)
    assert {norm.reason for norm in again.fusion_report.left} == {"already fused"}
    assert repr(again) == repr(model)
    assert "fused 2 chains, 1 with a sum; left 0 norms alone" in str(model.fusion_report)
    assert "norm2: BatchNorm2d + sum + ReLU, in the forward of the model" in str(model.fusion_report)
    assert counts(fuse(nn.Linear(2, 3))) == (0, 0, 0)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = BatchNormReLU2d(4)
        self.norm2 = GroupNormReLU(2, 4, activation="identity")
        self.norm3 = LayerNormReLU(7)

    def forward(self, x):
        x = self.norm1(self.conv(x))
        return self.norm3(self.norm2(x), residual=x)


def test_unfuse_of_layers_made_by_hand():
    model = ByHand().double()
    stock = unfuse(model)
    assert not any(isinstance(module, FUSED) for module in stock.modules())
    assert list(stock.state_dict()) == list(model.state_dict())
    assert isinstance(pickle.loads(pickle.dumps(stock)).norm1, nn.BatchNorm2d)
    expected = copy.deepcopy(model)
    for training in (True, False):
        same_step(stock.train(training), expected.train(training), image())
    assert repr(fuse(stock)) == repr(model)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What one forward keeps for backward beside parameters and buffers, storage that is shared counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert tensors(output)
    return sum(size for address, (_, size) in kept.items() if address not in own)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_keeps_no_more_than_stock(name):
    stock = torchvision_model(name).float()
    x = torch.randn(4, 3, 64, 64)
    assert saved_bytes(fuse(stock), x) <= saved_bytes(stock, x)


def test_keeps_less_with_dropout():
    layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.ReLU()) for _ in range(6)]
    stock = nn.Sequential(*(layer for chain in layers for layer in chain))
    x = torch.randn(4, 8, 16, 16)
    assert saved_bytes(fuse(stock), x) <= 0.7 * saved_bytes(stock, x)


@pytest.mark.parametrize("network", [SharedReLU, SumInPlace])
def test_runs_on_triton(network, device):
    torch.manual_seed(0)
    stock = network().to(device)
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    for module in model.modules():
        if isinstance(module, FUSED):
            module.impl = "triton"
    x = torch.randn(IMAGE, device=device)
    output, reference = model(x), expected(x)
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)
    output.sum().backward()
    reference.sum().backward()
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


# Bad input


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit's own
def test_not_a_module():
    compiled_inside = nn.Sequential(Sum())
    compiled_inside[0].compile()
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
            function(F.relu)
        with pytest.raises(TypeError, match="before it is wrapped or compiled, got DataParallel"):
            function(nn.DataParallel(Sum()))
        with pytest.raises(TypeError, match="before it is wrapped or compiled, got OptimizedModule"):
            function(torch.compile(Sum()))
        with pytest.raises(TypeError, match="before it is wrapped or compiled, got RecursiveScriptModule"):
            function(torch.jit.script(nn.ReLU()))
        for inside in (compiled_inside, nn.Sequential(torch.jit.script(nn.ReLU()))):
            with pytest.raises(TypeError, match="before it is wrapped or compiled, got Sequential"):
                function(inside)


def test_a_model_that_cannot_be_copied_is_not_changed():
    model = Sum()
    model.lock = (value for value in ())
    before = repr(model)
    with pytest.raises(RuntimeError, match=r"Sum cannot be copied by copy.deepcopy: cannot pickle 'generator'"):
        fuse(model)
    assert repr(model) == before


def test_process_group_must_be_one():
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or None, got str"):
        fuse(Sum(), process_group="world")


def test_process_group_reaches_every_batch_norm(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        by_hand = fuse(ByHand(), process_group=group)
        assert by_hand.norm1.process_group is group
        model = fuse(Sum(), process_group=group)
        assert model.norm1.process_group is group
        assert fuse(model).norm1.process_group is group
        assert fuse(fuse(Sum()), process_group=group).norm2.process_group is group
        with pytest.raises(TypeError, match="1 cannot be synchronised: it is a Subclass"):
            fuse(sequence(Subclass(4)), process_group=group)
        alone = fuse(nn.BatchNorm2d(4), process_group=group)
        x = torch.randn(5, 4, 3, 3)
        torch.testing.assert_close(alone(x), nn.BatchNorm2d(4)(x))
        assert type(unfuse(alone)) is nn.BatchNorm2d
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="init_process_group first"):
        fuse(Sum(), process_group=group)


def train_synchronised(rank: int, folder: Path) -> None:
    """One process's half of a step of SumOfNorms."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = fuse(SumOfNorms().double(), process_group=dist.group.WORLD)
    assert all(model.get_submodule(f"norm{i}").process_group is dist.group.WORLD for i in (1, 2))
    torch.manual_seed(1)
    x = torch.randn((6, 3, 5, 7), dtype=torch.float64)
    output = model(x[3 * rank :][:3])
    torch.save({"output": output.detach(), "buffers": dict(model.named_buffers())}, folder / f"{rank}.pt")
    assert type(unfuse(model).norm2) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=rf"0 has {4 + rank} channels here and {5 - rank} in process {1 - rank}"):
        fuse(nn.Sequential(nn.BatchNorm2d(4 + rank)), process_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.slow
def test_process_group_is_for_all_batch_norms(tmp_path, run_two_processes):
    run_two_processes(train_synchronised, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    model = SumOfNorms().double()
    torch.manual_seed(1)
    close(torch.cat([part["output"] for part in parts]), model(torch.randn((6, 3, 5, 7), dtype=torch.float64)))
    close(parts[0]["buffers"], dict(model.named_buffers()))

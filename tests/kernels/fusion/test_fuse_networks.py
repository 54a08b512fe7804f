"""fuse on small networks: each kind of chain computes what it computed."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from fusion_networks import (
    FUSED,
    IMAGE,
    BroadcastSum,
    BroadcastSumInPlace,
    Chains,
    DataDependentOuter,
    Functional,
    PartlySharedReLU,
    PromotingSum,
    SharedReLU,
    Sum,
    SumInPlace,
    SumMethod,
    SumOfNorms,
    WideningSum,
    counts,
    image,
    same_step,
    sequence,
)
from torch import Tensor, nn

from mnistnorm import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    GroupNormReLU,
    LayerNormReLU,
    fuse,
    unfuse,
)


class InPlace(Chains):
    def forward(self, x):
        x = F.relu_(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)), inplace=True)


class Method(Chains):
    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu_())).relu()


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
    """Asks for the type of a tensor, and calls a forward that does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TakesSeveral()

    def forward(self, x):
        x = self.block(self.conv1(x)[:, :3])
        assert not isinstance(x, list | tuple)
        assert isinstance(x, (dict, Tensor))
        return self.relu(self.norm1(self.conv2(x)))


class Named(nn.Module):
    def forward(self, x):
        return {"out": x}


class SumsIntoTemporaries(Chains):
    """As the branches of a MobileOne block."""

    def forward(self, x):
        x = self.conv1(x)
        out = self.norm2(x) + x
        out += x * 2
        out += self.norm1(x)
        return self.relu(out)


class GetsDictionary(Chains):
    def __init__(self) -> None:
        super().__init__()
        self.named = Named()

    def forward(self, x):
        return F.relu(self.norm1(self.conv1(self.named(x)["out"])))


class ChangesAList(Chains):
    """Changes the list that it is given, which the caller reads afterwards."""

    def forward(self, values):
        values[0] = self.relu(self.norm1(self.conv1(values[0])))
        values.append(values[0] * 2)
        return values[1]


class CallsWithAList(Chains):
    def __init__(self, is_read):
        super().__init__()
        self.inner, self.is_read = ChangesAList(), is_read

    def forward(self, x):
        values = [x, x + 1]
        x = self.relu(self.norm1(self.conv1(self.inner(values)[:, :3])))
        return x + sum(values[::2]) if self.is_read else x


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
    (SumsIntoTemporaries, (1, 1, 1)),
    (GetsDictionary, (1, 0, 1)),
    (lambda: CallsWithAList(False), (2, 0, 2)),
    (lambda: CallsWithAList(True), (1, 0, 3)),
    (CalledTwice, (1, 0, 1)),
    (ModeOutside, (2, 0, 0)),
    (Nested, (2, 2, 2)),
]


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
    assert type(back) is type(stock)
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
    assert not isinstance(model[1], nn.ReLU)
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


def test_threads_may_fuse_at_once():
    before = vars(torch.autograd.Function)["apply"]
    networks = [SumInPlace() for _ in range(24)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as threads:
            fused = list(threads.map(fuse, networks))
    finally:
        sys.setswitchinterval(interval)
    assert vars(torch.autograd.Function)["apply"] is before
    assert {counts(model) for model in fused} == {counts(fuse(SumInPlace()))}

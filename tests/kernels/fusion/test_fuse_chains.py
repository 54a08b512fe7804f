"""fuse: every activation in every form, what stands in between, timm's layers, and forwards with default arguments."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fusion_networks import Chains, close, counts, image, same_step, sequence
from torch import nn

from mnistnorm import fuse, unfuse


class Applies(nn.Module):
    """A convolution, a norm, and a function."""

    def __init__(self, function, norm=None) -> None:
        super().__init__()
        self.conv, self.norm, self.function = nn.Conv2d(3, 4, 3, padding=1), norm or nn.BatchNorm2d(4), function

    def forward(self, x):
        return self.function(self.norm(self.conv(x)))


ACTIVATIONS = [
    (nn.ReLU(), "relu"),
    (nn.ReLU6(), "relu6"),
    (nn.Hardtanh(0, 6, inplace=True), "relu6"),
    (nn.LeakyReLU(), "leaky_relu(0.01)"),
    (nn.LeakyReLU(0.2, inplace=True), "leaky_relu(0.2)"),
    (nn.SiLU(inplace=True), "silu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (nn.Hardswish(), "hardswish"),
    (F.relu6, "relu6"),
    (lambda x: F.hardtanh(x, 0, 6), "relu6"),
    (lambda x: F.hardtanh_(x, min_val=0.0, max_val=6.0), "relu6"),
    (lambda x: F.leaky_relu(x, 0.3), "leaky_relu(0.3)"),
    (lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True), "leaky_relu(0.3)"),
    (F.silu, "silu"),
    (F.gelu, "gelu"),
    (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    (lambda x: F.hardswish(x, inplace=True), "hardswish"),
    (lambda x: x.clamp(min=0), "relu"),
    (lambda x: x.clamp_(0, 6), "relu6"),
    (lambda x: x.clamp_min(0.0), "relu"),
    (lambda x: torch.clamp(x, min=0), "relu"),
]


@pytest.mark.parametrize(("function", "name"), ACTIVATIONS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_activation(function, name):
    torch.manual_seed(0)
    stock = Applies(function).double()
    model = fuse(stock)
    assert [chain.activation for chain in model.fusion_report.fused] == [name], str(model.fusion_report)
    for training in (True, False):
        same_step(model.train(training), copy.deepcopy(stock).train(training), image())
    assert repr(unfuse(model)) == repr(stock)


@pytest.mark.parametrize(
    "function",
    [
        nn.LeakyReLU(0.0),
        nn.Hardtanh(),
        nn.ELU(),
        F.hardtanh,
        lambda x: F.hardtanh(x, 0),
        lambda x: x.clamp(0, 5),
        lambda x: x.clamp(max=6),
        lambda x: F.leaky_relu(x, -0.1),
        lambda x: torch.clamp(x, min=x.mean()),
        torch.sigmoid,
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_no_known_activation(function):
    torch.manual_seed(0)
    stock = Applies(function).double()
    model = fuse(stock)
    assert counts(model) == (0, 0, 1)
    assert model.fusion_report.left[0].status == "no activation"
    same_step(model, copy.deepcopy(stock), image())


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.Dropout(0.0),
        nn.Sequential(nn.Identity(), nn.Sequential()),
        nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.Identity()),
    ],
    ids=["identity", "dropout", "empty", "sequence"],
)
def test_what_has_no_effect_may_stand_in_between(between):
    torch.manual_seed(0)
    stock = sequence(nn.BatchNorm2d(4), between, nn.ReLU()).double()
    model = fuse(stock)
    assert counts(model) == (1, 0, 0), str(model.fusion_report)
    for training in (True, False):
        same_step(model.train(training), copy.deepcopy(stock).train(training), image())
    assert repr(unfuse(model)) == repr(stock)


class Off(nn.Module):
    """As DropPath of timm."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) > self.p)


class WithPath(Chains):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.path = Off(p)

    def forward(self, x):
        x = self.relu(self.path(self.norm1(self.conv1(x))))
        return F.relu(self.path(self.norm2(self.conv2(x)).contiguous()) + x)


def test_a_drop_path_that_is_off_and_contiguous_may_stand_in_between():
    torch.manual_seed(0)
    stock = WithPath().double()
    model = fuse(stock)
    assert counts(model) == (2, 1, 0), str(model.fusion_report)
    for training in (True, False):
        same_step(model.train(training), copy.deepcopy(stock).train(training), image())
    assert counts(fuse(WithPath(0.5)))[0] == 0


class TwoSums(Chains):
    def forward(self, x):
        x = self.conv1(x)
        return F.relu(self.norm1(x) + self.norm2(x) + x)


def test_two_sums():
    torch.manual_seed(0)
    stock = TwoSums().double()
    model = fuse(stock)
    assert counts(model) == (1, 1, 1)
    assert "2 norms" not in str(model.fusion_report)
    for training in (True, False):
        same_step(model.train(training), copy.deepcopy(stock).train(training), image())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norms(dims, affine):
    torch.manual_seed(0)
    norm = getattr(nn, f"InstanceNorm{dims}d")(4, affine=affine)
    stock = nn.Sequential(getattr(nn, f"Conv{dims}d")(3, 4, 1), norm, nn.LeakyReLU(0.01, inplace=True)).double()
    model = fuse(stock)
    assert counts(model) == (1, 0, 0)
    for training in (True, False):
        x = torch.randn(2, 3, *(4, 3, 5)[:dims], dtype=torch.float64)
        same_step(model.train(training), copy.deepcopy(stock).train(training), x)
    assert repr(unfuse(model)) == repr(stock)


class Inherits(nn.GroupNorm):
    """As some libraries have them: other defaults, the same forward."""

    def __init__(self) -> None:
        super().__init__(2, 4, eps=1e-3)


def test_a_subclass_that_inherits_its_forward():
    stock = sequence(Inherits(), nn.SiLU()).double()
    model = fuse(stock)
    assert counts(model) == (1, 0, 0)
    same_step(model, copy.deepcopy(stock), image())
    assert type(unfuse(model)[1]) is Inherits


def fast(norm):
    norm._fast_norm = True
    return norm


def hooked(norm):
    norm.act.register_forward_hook(lambda module, args, output: output * 2)
    return norm


def timm_layers():
    layers = pytest.importorskip("timm.layers")
    drop = nn.Dropout
    return {
        "batch": layers.BatchNormAct2d(4, act_layer=nn.SiLU),
        "batch without an activation": layers.BatchNormAct2d(4, apply_act=False),
        "batch with a dropout": layers.BatchNormAct2d(4, drop_layer=lambda: drop(0.25)),
        "group": layers.GroupNormAct(4, num_groups=2, act_layer="hard_swish"),
        "group 1": layers.GroupNorm1Act(4, act_layer="gelu_tanh"),
        "layer": layers.LayerNormAct(7, act_layer="leaky_relu"),
        "layer over channels": layers.LayerNormAct2d(4),
        "frozen": layers.FrozenBatchNormAct2d(4),
        "elu": layers.BatchNormAct2d(4, act_layer=nn.ELU),
        "dropout without an activation": layers.BatchNormAct2d(4, apply_act=False, drop_layer=lambda: drop(0.25)),
        "fast": fast(layers.GroupNormAct(4, num_groups=2)),
        "hooked": hooked(layers.BatchNormAct2d(4)),
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("batch", None),
        ("batch with a dropout", None),
        ("group", None),
        ("group 1", None),
        ("layer", None),
        ("batch without an activation", "followed by the output"),
        ("layer over channels", "there is no fused timm.layers.norm_act.LayerNormAct2d"),
        ("frozen", "there is no fused timm.layers.norm_act.FrozenBatchNormAct2d"),
        ("elu", "its parts torch.nn.Identity and torch.nn.ELU cannot be fused"),
        ("dropout without an activation", "it has a dropout without an activation"),
        ("fast", "it uses timm's fast norm, which computes in another dtype"),
        ("hooked", "a part of it has hooks"),
    ],
)
def test_layers_of_timm(name, reason):
    torch.manual_seed(0)
    stock = sequence(timm_layers()[name]).double()
    model = fuse(stock)
    assert [norm.reason for norm in model.fusion_report.left] == ([reason] if reason else []), str(model.fusion_report)
    for training in (False,) if "dropout" in name else (True, False):
        same_step(model.train(training), copy.deepcopy(stock).train(training), image())
    if name == "batch with a dropout":
        assert model[1].dropout_p == 0.25
        assert not any(isinstance(module, nn.Dropout) for module in model.modules())
    assert repr(unfuse(model)) == repr(stock)
    assert type(unfuse(model)[1]) is type(stock[1])


def test_a_layer_of_timm_without_activation_begins_a_chain():
    torch.manual_seed(0)
    stock = sequence(timm_layers()["batch without an activation"], nn.Identity(), nn.Hardswish()).double()
    model = fuse(stock)
    assert counts(model) == (1, 0, 0)
    same_step(model, copy.deepcopy(stock), image())


class Optional(Chains):
    def forward(self, x, mask=None, *, scale=1.0, **kwargs):
        x = self.norm1(self.conv1(x))
        x = F.relu(x if mask is None else x * mask)
        return self.relu(self.norm2(self.conv2(x))) * scale


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Optional()

    def forward(self, x, mask=None):
        return self.inner(x, mask)


@pytest.mark.parametrize("network", [Optional, PassesOn])
def test_calls_with_other_arguments_take_the_original_forward(network):
    torch.manual_seed(0)
    stock = network().double()
    model = fuse(stock)
    assert counts(model) == (2, 0, 0), str(model.fusion_report)
    mask = torch.rand(3, 4, 5, 7, dtype=torch.float64)
    for training in (True, False):
        expected = copy.deepcopy(stock).train(training)
        same_step(model.train(training), expected, image())
        same_step(model, expected, image(), mask)
        x = image()
        close(model(x, mask=None), expected(x))
        close(model(x, mask=mask), expected(x, mask))
    if network is Optional:
        x = image()
        close(model(x, scale=2.0), 2 * model(x))
        close(model(x, unused=1), model(x))
        with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments"):
            model(x, mask, 1)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        close(again.eval()(x, mask), model.eval()(x, mask))


class Unhashable:
    pass


class TakesObject(Chains):
    def forward(self, x, options=Unhashable()):  # noqa: B008
        return F.relu(self.norm1(self.conv1(x)))


def test_an_argument_that_cannot_be_compared_is_named():
    report = fuse(TakesObject()).fusion_report
    assert not report.fused
    assert "its argument options is neither a tensor nor a number" in report.left[0].reason


class TakesList(Chains):
    def forward(self, xs):
        x, other = xs
        return F.relu(self.norm1(self.conv1(x)) + other)


class GivesList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first = TakesList(), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.inner([x, self.first(x)])


def test_a_list_of_tensors_as_argument():
    torch.manual_seed(0)
    stock = GivesList().double()
    model = fuse(stock)
    assert counts(model) == (1, 1, 1), str(model.fusion_report)
    same_step(model, copy.deepcopy(stock), image())


class Parts(Chains):
    """Its forward is made of methods that others call as well."""

    def features(self, x):
        return F.relu(self.drop(self.norm1(self.conv1(x))) + self.conv1(x))

    def forward(self, x):
        return self.features(x).mean((2, 3))


def test_other_methods_compute_what_they_did():
    torch.manual_seed(0)
    stock = Parts().double().eval()
    model = fuse(stock)
    assert counts(model)[:2] == (1, 1)
    x = image()
    close(model.features(x), stock.features(x))
    close(model.norm1(model.conv1(x)), stock.norm1(stock.conv1(x)))
    torch.manual_seed(1)
    expected = copy.deepcopy(stock).train().features(x)
    torch.manual_seed(1)
    close(copy.deepcopy(model).train().features(x), expected)


def test_distributed_data_parallel(tmp_path):
    torch.manual_seed(0)
    model = fuse(sequence(nn.BatchNorm2d(4), nn.SiLU()).double())
    expected = copy.deepcopy(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        x = image()
        parallel(x).square().sum().backward()
        expected(x).square().sum().backward()
        close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])
    finally:
        dist.destroy_process_group()


class BranchOnMode(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return x * 2 if self.training else x


class BranchOnModeOfAnother(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return x * 2 if self.norm1.training else x


class BranchOnTwoModes(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = x * 2 if self.norm1.training else x
        return x + 1 if self.training else x


@pytest.mark.parametrize("network", [BranchOnMode, BranchOnModeOfAnother, BranchOnTwoModes])
def test_a_forward_that_branches_on_the_mode(network):
    torch.manual_seed(0)
    stock = network().double()
    model = fuse(stock)
    assert counts(model) == (1, 0, 1), str(model.fusion_report)
    for again in (model, pickle.loads(pickle.dumps(model))):
        for training in (True, False):
            same_step(copy.deepcopy(again).train(training), copy.deepcopy(stock).train(training), image())
            other, expected = copy.deepcopy(again).train(training), copy.deepcopy(stock).train(training)
            other.norm1.train(not training)
            expected.norm1.train(not training)
            same_step(other, expected, image())

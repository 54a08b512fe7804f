"""What fuse keeps of a model: structure, hooks, pickles, modes; what compiles."""

import copy
import io
import pickle
import random
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from fusion_networks import (
    IMAGE,
    BroadcastSum,
    BroadcastSumInPlace,
    Chains,
    Counter,
    LayerDrop,
    PartlySharedReLU,
    PromotingSum,
    RandomBranch,
    Sum,
    SumInPlace,
    SumOfNorms,
    WideningSum,
    counts,
    draw_from_numpy,
    image,
    same_step,
)
from torch import nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor

from mnistnorm import (
    fuse,
    unfuse,
)

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

    assert isinstance(model, torchvision.models.ResNet)
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
        (SharedDropout, {"drop": "Dropout, part of norm1, norm2", "relu": "ReLU, part of norm2"}),
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
    assert [norm.reason for norm in model.fusion_report.left] == ["there is no fused torch.nn.LazyBatchNorm2d"]
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


def test_fusing_again_and_nothing_to_fuse():
    model = fuse(Sum())
    again = fuse(model)
    assert counts(again) == (0, 0, 2)
    assert {norm.reason for norm in again.fusion_report.left} == {"already fused"}
    assert repr(again) == repr(model)
    assert "fused 2 of 2 norm-activation chains, 1 with a sum\n" in str(model.fusion_report)
    assert "norm2: torch.nn.BatchNorm2d + sum + relu, in a rewritten forward" in str(model.fusion_report)
    assert counts(fuse(nn.Linear(2, 3))) == (0, 0, 0)


# Bad input


class SizesInATuple(Chains):
    """Hands sizes of a traced value to a function of torch that wants numbers."""

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        batch, _, height, width = x.shape
        mask = ~torch.zeros((batch, height, width)).to(device=x.device, dtype=torch.bool)
        return x * mask.cumsum(1, dtype=x.dtype)[:, None]


def test_traced_sizes_end_no_process():
    torch.manual_seed(0)
    stock = SizesInATuple().double()
    same_step(fuse(stock), copy.deepcopy(stock), image())


@pytest.mark.parametrize("training", [True, False])
def test_a_feature_extractor_keeps_its_mode_and_its_class(training):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.0)).double()
    stock = create_feature_extractor(inner, ["2", "3"]).train(training)
    stock.note = "kept"
    x = image()
    expected = copy.deepcopy(inner[:3].train(training))(x)
    model = fuse(stock)
    assert "it is a GraphModule: fuse the model that it was created from" in model.fusion_report.left[0].reason
    assert (model.training, model.note) == (training, "kept")
    torch.testing.assert_close(model(x)["2"], expected)
    model.train(not training)
    model.train(training)
    for other in (stock, unfuse(model)):
        assert other.training == training
    torch.testing.assert_close(unfuse(model).eval()(x)["3"], copy.deepcopy(inner).eval()(x))


def test_a_graph_module_and_its_copy_are_recompiled_apart():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    model = fuse(traced)
    before = traced.code
    for node in model.graph.nodes:
        if node.op == "output":
            with model.graph.inserting_before(node):
                node.args = (model.graph.call_function(torch.neg, (node.args[0],)),)
    model.recompile()
    x = torch.randn(IMAGE)
    assert traced.code == before
    assert (model(x) <= 0).all()
    assert (traced(x) >= 0).all()


class Doubled(nn.Sequential):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize("kind", [nn.Sequential, Doubled])
def test_a_sequence_that_changes_afterwards(kind):
    torch.manual_seed(0)
    model = fuse(kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).double().eval())
    x = image()
    whole, part = model(x), model[:3](x)
    torch.testing.assert_close(unfuse(model)(x), whole)
    torch.testing.assert_close(unfuse(model)[:3](x), part)
    model[4] = nn.Sigmoid()
    model.append(nn.Tanh())
    torch.testing.assert_close(model(x), unfuse(model)(x))
    assert not torch.equal(model(x), whole)


@pytest.mark.parametrize(("index", "other"), [(2, nn.Tanh()), (2, nn.Identity()), (1, nn.GroupNorm(2, 4).double())])
def test_a_part_that_is_replaced_afterwards(index, other):
    torch.manual_seed(0)
    stock = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    )
    model, x = fuse(stock), image()
    model[index] = stock[index] = other
    for each in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(each(x), stock(x))


class InlinedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.extra = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Sequential()
        self.register_module("down", None)

    def forward(self, x):
        y = self.extra(self.features(x))
        return F.relu(y if self.down is None else y + self.down(x))


def doubles(module, args, output):
    return output * 2


CHANGES = {
    "append": lambda model: model.features.append(nn.Softmax(1)),
    "replace": lambda model: setattr(model, "features", nn.Conv2d(3, 4, 3).double()),
    "fill": lambda model: model.extra.append(nn.Softmax(1)),
    "hook": lambda model: model.features.register_forward_hook(doubles),
    "hook on an empty one": lambda model: model.extra.register_forward_hook(doubles),
    "child instead of None": lambda model: setattr(model, "down", nn.Conv2d(3, 4, 1, bias=False).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_inlined_part_that_changes_afterwards(change):
    torch.manual_seed(0)
    stock = InlinedNorm().double().eval()
    model, x = fuse(stock), image()
    assert len(model.fusion_report.fused) == 1
    stock, before = copy.deepcopy(stock), model(x)
    for each in (stock, model):
        torch.manual_seed(1)
        CHANGES[change](each)
    torch.testing.assert_close(model(x), stock(x))
    assert not torch.equal(model(x), before)


def test_a_child_that_becomes_none():
    torch.manual_seed(0)
    stock = InlinedNorm().double().eval()
    stock.down = nn.Conv2d(3, 4, 1).double()
    model, x = fuse(stock), image()
    assert len(model.fusion_report.fused) == 1
    model.down = stock.down = None
    torch.testing.assert_close(model(x), stock(x))


def test_an_unregistered_module_is_shared():
    class Student(nn.Sequential):
        def __init__(self, teacher) -> None:
            super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.teacher = {"of": [teacher]}

    teacher = nn.Conv2d(3, 4, 1)
    assert fuse(Student(teacher)).teacher["of"][0] is teacher


def test_modules_of_one_class_stay_of_one_class():
    models = [fuse(InlinedNorm()) for _ in range(2)]
    assert type(models[0]) is type(models[1])
    torch.func.stack_module_state(models)


def test_fuse_keeps_no_model_alive():
    model = fuse(nn.Sequential(SumOfNorms()))
    references = [weakref.ref(model), weakref.ref(model[0])]
    del model
    assert [reference() for reference in references] == [None, None]

"""torch.fx: fused layers are leaves of a trace, and can be traced alone."""

import copy

import pytest
import torch
from oracle import impls
from torch import fx, nn

from mnistnorm import batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.kernels import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    GroupNormAct,
    InstanceNormAct1d,
    InstanceNormAct2d,
    InstanceNormAct3d,
    LayerNormAct,
)

LAYERS = {
    "batch 1d": (lambda **options: BatchNormAct1d(4, **options), (2, 4, 3)),
    "batch 2d": (lambda **options: BatchNormAct2d(4, **options), (2, 4, 2, 3)),
    "batch 3d": (lambda **options: BatchNormAct3d(4, **options), (2, 4, 2, 3, 2)),
    "batch cumulative": (lambda **options: BatchNormAct2d(4, momentum=None, **options), (2, 4, 2, 3)),
    "batch untracked": (lambda **options: BatchNormAct2d(4, track_running_stats=False, **options), (2, 4, 2, 3)),
    "group": (lambda **options: GroupNormAct(2, 4, **options), (2, 4, 2, 3)),
    "layer": (lambda **options: LayerNormAct((4, 2, 3), **options), (2, 4, 2, 3)),
    "instance 1d": (lambda **options: InstanceNormAct1d(4, affine=True, **options), (2, 4, 3)),
    "instance 2d": (lambda **options: InstanceNormAct2d(4, affine=True, **options), (2, 4, 2, 3)),
    "instance 3d": (lambda **options: InstanceNormAct3d(4, affine=True, **options), (2, 4, 2, 3, 2)),
}
layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
training_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()))


@layers
@impls
@training_modes
def test_a_layer_is_a_leaf(make, shape, impl, training, device):
    model = nn.Sequential(nn.Identity(), make(impl=impl, device=device)).train(training)
    reference = copy.deepcopy(model)
    traced = fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in traced.graph.nodes if node.op.startswith("call")] == [
        ("call_module", "0"),
        ("call_module", "1"),
    ]
    assert traced.get_submodule("1") is model[1]
    for _ in range(2):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(traced(x), reference(x))
        same_state(traced, reference)
    same_state(model, reference)


@layers
def test_a_leaf_keeps_its_residual_and_its_mode(make, shape):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = make(dropout_p=0.5)

        def forward(self, x):
            return self.norm(x, x * 2), self.norm(x, residual=x)

    block = Block()
    traced = fx.symbolic_trace(block)
    x = torch.randn(shape)
    for training in (True, False):
        block.train(training)
        reference = copy.deepcopy(block)
        torch.manual_seed(0)
        expected = reference(x)
        torch.manual_seed(0)
        actual = traced(x)
        torch.testing.assert_close(actual, expected)
        same_state(block, reference)


@layers
@training_modes
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_a_layer_is_traced_alone(make, shape, training, with_residual):
    # As the root of the trace, it is a call of its function in the mode it is in.
    layer = make(activation=nn.LeakyReLU(0.2)).train(training)
    reference = copy.deepcopy(layer)
    traced = fx.symbolic_trace(layer, concrete_args=None if with_residual else {"residual": None})
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {batch_norm_relu, group_norm_relu, layer_norm_relu}.intersection(functions)
    for _ in range(2):
        x = torch.randn(shape)
        arguments = (x, x.flip(0)) if with_residual else (x,)
        torch.testing.assert_close(traced(*arguments), reference(*arguments))
        same_state(layer, reference)
    held = dict(traced.state_dict())  # by a trace in eval mode, no counter
    torch.testing.assert_close(held, {name: layer.state_dict()[name] for name in held})
    assert {name: tensor.data_ptr() for name, tensor in held.items()} == {
        name: layer.state_dict()[name].data_ptr() for name in held
    }


def test_features_of_a_model_with_fused_layers():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        BatchNormAct2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 3), GroupNormAct(2, 4, activation="silu")),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 2),
    )
    train_nodes, eval_nodes = feature_extraction.get_graph_node_names(model)
    assert {"1", "2.1"} <= {*train_nodes} & {*eval_nodes}
    extractor = feature_extraction.create_feature_extractor(model, ["1", "2.1", "4"])
    for training in (True, False):
        extractor.train(training)
        model.train(training)
        x = torch.randn(5, 3, 8, 8)
        reference = copy.deepcopy(model)
        features = extractor(x)
        first = reference[1](reference[0](x))
        second = reference[2](first)
        torch.testing.assert_close(
            [features["1"], features["2.1"], features["4"]], [first, second, reference[4](second.flatten(1))]
        )
        same_state(model, reference)

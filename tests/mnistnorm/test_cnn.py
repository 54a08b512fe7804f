import pytest
import torch

from mnistnorm import summary
from mnistnorm.cnn import CNN, NORMS

PARAMETERS = {"batch": 7652, "group": 7652, "layer": 7594, "sample": 7652}
SIZES = [28, 26, 24, 22, 11, 9, 7, 7, 5, 5, 1]
CHANNELS = [8, 8, 8, 12, 14, 8, 26, 50]


def pair(norm: str, dropout: float = 0.0) -> tuple[CNN, CNN]:
    models = []
    for fused in (False, True):
        torch.manual_seed(7)
        models.append(CNN(norm, fused=fused, dropout=dropout))
    return models[0], models[1]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_summary_has_the_networks_figures(norm: str, fused: bool) -> None:
    statistics = summary.summarize(norm, fused)
    assert statistics.total_params == PARAMETERS[norm]
    shapes = [layer.output_size for layer in statistics.summary_list if layer.class_name in ("Conv2d", "MaxPool2d")]
    assert [28] + [shape[-1] for shape in shapes] == SIZES
    convolutions = [layer for layer in statistics.summary_list if layer.class_name == "Conv2d"]
    assert [layer.output_size[1] for layer in convolutions] == [*CHANNELS, 10]
    norms = [layer for layer in statistics.summary_list if layer.var_name == "norm"]
    widths = CHANNELS if norm != "layer" else [26, 24, 22, 9, 7, 7, 5, 5]
    assert [layer.num_params for layer in norms] == [2 * width for width in widths]


def test_the_summary_program_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main(["--norm", "layer", "--fused"]) == 0
    printed = capsys.readouterr().out
    assert "LayerNormAct (norm)" in printed
    assert "Total params: 7,594" in printed
    assert "[1, 26, 5, 5]" in printed


def test_group_norms_have_their_groups() -> None:
    for norm, groups in (("group", 2), ("sample", 1)):
        stock, fused = pair(norm)
        assert {block.norm.num_groups for model in (stock, fused) for block in model.blocks} == {groups}


@pytest.mark.parametrize("norm", NORMS)
def test_stock_and_fused_are_the_same_network(norm: str) -> None:
    stock, fused = pair(norm)
    assert list(stock.state_dict()) == list(fused.state_dict())
    for name, value in stock.state_dict().items():
        assert value.equal(fused.state_dict()[name]), name
    images, labels = torch.randn(5, 1, 28, 28), torch.tensor([3, 1, 4, 1, 5])
    for training in (True, False):
        outputs = [model.train(training)(images) for model in (stock, fused)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs[0].exp().sum(1), torch.ones(5))
        for model, output in zip((stock, fused), outputs, strict=True):
            model.zero_grad()
            torch.nn.functional.nll_loss(output, labels).backward()
        for (name, parameter), other in zip(stock.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer)


def test_both_have_the_dropout_asked_for() -> None:
    stock, fused = pair("batch", dropout=0.3)
    assert all(block.dropout.p == 0.3 for block in stock.blocks)
    assert all(block.norm.dropout_p == 0.3 for block in fused.blocks)
    assert list(dict(stock.blocks[2].named_children())) == ["conv", "norm", "dropout", "relu", "pool"]


def test_an_unknown_norm_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="norm must be one of batch, group, layer, sample, got 'instance'"):
        CNN("instance")

"""The CPU's own ways against torch's kernels in float64, at the sizes where they are taken."""

import itertools

import pytest
import torch
from torch import Tensor

from mnistnorm import batch_norm_relu, layer_norm_relu
from mnistnorm.kernels.torch_impl import cpu

# Some hundred roundings of 2^-24, and those of the input where the mean is large next to the deviation.
TOLERANCE = 2e-5


def close(actual: Tensor, exact: Tensor, offset: float) -> None:
    tolerance = TOLERANCE * (1 + abs(offset)) * max(1.0, exact.abs().max().item())
    torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=0)


def gradients_of(output: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [3, 5, 7, 8, 9, 15, 16, 22, 24, 31, 32, 33, 56, 128, 129])
def test_layer_norm_of_many_rows(length, threads, offset, affine, activation, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "MANY_LONG_ROWS", cpu.MANY_ROWS)
    monkeypatch.setattr(cpu, "CHUNK", (cpu.MANY_ROWS - 1) * length)
    torch.manual_seed(length)
    shape = (7, max(cpu.MANY_ROWS, cpu.SHORT_ROWS_ELEMENTS // length) // 7 + 3, length)
    inputs = [torch.randn(shape) + offset]
    inputs += [torch.rand(length) + 0.5, torch.randn(length)] if affine else []
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = layer_norm_relu(inputs[0], (length,), *inputs[1:], activation=activation)
    exact = torch.nn.functional.layer_norm(exact_inputs[0], (length,), *exact_inputs[1:])
    grad = torch.randn_like(output) + 0.3
    if activation == "relu":  # as the output says, which rounding may have put on the other side of 0
        exact = exact * (output > 0)
    close(output, exact, offset)
    expected = gradients_of(exact, exact_inputs, grad.double())
    for actual, each in zip(gradients_of(output, inputs, grad), expected, strict=True):
        close(actual, each, offset)


@pytest.mark.parametrize("affine_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalized_shape", [(5,), (26,), (3, 40), (300_000,)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_layer_norm_sums_half_precision_in_float32(normalized_shape, dtype, affine_dtype, transposed, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "CHUNK", 2**17)
    x = torch.randn(2 if normalized_shape == (300_000,) else 4200, *normalized_shape).to(dtype)
    x = (x.t().contiguous().t() if transposed and x.dim() == 2 else x).requires_grad_()
    affine_dtype = affine_dtype or dtype
    weight, bias = ((torch.rand(normalized_shape) + shift).to(affine_dtype).requires_grad_() for shift in (0.5, 0.0))
    inputs = [weight, bias]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = (torch.randn_like(x) + 0.3).detach()
    actual = gradients_of(layer_norm_relu(x, normalized_shape, *inputs, activation="identity"), inputs, grad)
    exact = torch.nn.functional.layer_norm(x.detach().double(), normalized_shape, *exact_inputs)
    for each, expected in zip(actual, gradients_of(exact, exact_inputs, grad.double()), strict=True):
        assert each.dtype == affine_dtype
        # One rounding to the parameter's dtype at the end; before it, float32's.
        rtol = max(torch.finfo(affine_dtype).eps / 2, TOLERANCE)
        torch.testing.assert_close(each.double(), expected, rtol=rtol, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize(
    ("norm", "memory_format"),
    [("batch", torch.channels_last), ("batch", torch.contiguous_format), ("layer", torch.contiguous_format)],
    ids=str,
)
def test_sums_are_exact_whatever_the_precision_of_matrix_products(norm, memory_format, monkeypatch):
    product = torch.mv

    def in_bfloat16(matrix: Tensor, vector: Tensor) -> Tensor:  # as CPUs with AMX do
        assert matrix.dtype == torch.float32
        return product(matrix.bfloat16().float(), vector.bfloat16().float())

    monkeypatch.setattr(torch, "mv", in_bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    torch.manual_seed(0)
    shape = (200, 8, 13, 13) if norm == "batch" else (2000, 4, 5)
    size = shape[1] if norm == "batch" else shape[-1]
    inputs = [torch.randn(shape).contiguous(memory_format=memory_format), torch.rand(size) + 0.5, torch.randn(size)]
    exact_inputs = [tensor.double().requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    torch.set_float32_matmul_precision("medium")
    try:
        if norm == "batch":
            output = batch_norm_relu(inputs[0], None, None, *inputs[1:], training=True, activation="identity")
            exact = torch.nn.functional.batch_norm(exact_inputs[0], None, None, *exact_inputs[1:], training=True)
        else:
            output = layer_norm_relu(inputs[0], (size,), *inputs[1:], activation="identity")
            exact = torch.nn.functional.layer_norm(exact_inputs[0], (size,), *exact_inputs[1:])
        grad = torch.randn_like(output) + 0.3
        actual = gradients_of(output, inputs, grad)
    finally:
        torch.set_float32_matmul_precision("highest")
    close(output, exact, 0)
    for each, expected in zip(actual, gradients_of(exact, exact_inputs, grad.double()), strict=True):
        close(each, expected, 0)


@pytest.mark.parametrize("rows", [1, 100, 4096, 4100, 5001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [2, 26, 128, 129])
@pytest.mark.parametrize("transposed", [False, True])
def test_column_sums(length, dtype, rows, transposed):
    torch.manual_seed(rows)
    values = torch.randn(rows, length, dtype=dtype) + 3
    values = values.t().contiguous().t() if transposed else values
    # Sums of up to 5,001 numbers around 3, one after the other in each of two threads.
    rtol = 2500 * torch.finfo(dtype).eps
    (total,) = cpu._column_sums(values)
    torch.testing.assert_close(total.double(), values.double().sum(0), rtol=rtol, atol=0)
    factors = torch.rand(rows, length, dtype=dtype)
    total, products = cpu._column_sums(values.abs(), factors)
    torch.testing.assert_close(total.double(), values.abs().double().sum(0), rtol=rtol, atol=0)
    torch.testing.assert_close(products.double(), (values.abs() * factors).double().sum(0), rtol=rtol, atol=0)


@pytest.mark.parametrize("length", [5, 26, 56])
def test_layer_norm_of_many_rows_takes_only_the_gradients_asked_for(length, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "MANY_LONG_ROWS", cpu.MANY_ROWS)
    torch.manual_seed(length)
    tensors = [torch.randn(cpu.MANY_ROWS, length), torch.rand(length) + 0.5, torch.randn(length)]
    exact_inputs = [tensor.double().requires_grad_() for tensor in tensors]
    exact = torch.nn.functional.layer_norm(exact_inputs[0], (length,), *exact_inputs[1:])
    grad = torch.randn_like(tensors[0]) + 0.3
    expected = gradients_of(exact, exact_inputs, grad.double())
    for asked in itertools.product([True, False], repeat=3):
        if any(asked):
            inputs = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(tensors, asked, strict=True)]
            layer_norm_relu(inputs[0], (length,), *inputs[1:], activation="identity").backward(grad)
            for tensor, needed, each in zip(inputs, asked, expected, strict=True):
                assert (tensor.grad is not None) == needed
                if needed:
                    close(tensor.grad, each, 0)


# Gradients asked of torch's backward.
INPUT, INPUT_AND_WEIGHT, BIAS = [True, False, False], [True, True, False], [False, False, True]
PARAMETERS, ALL = [False, True, True], [True, True, True]


@pytest.mark.parametrize(
    ("length", "rows", "threads", "calls"),
    [
        (7, cpu.SHORT_ROWS_ELEMENTS // 7 + 1, 2, []),
        (7, cpu.SHORT_ROWS_ELEMENTS // 7, 2, None),
        (9, cpu.MANY_ROWS, 2, [(9, INPUT), (112 * 9, PARAMETERS)]),
        (26, cpu.MANY_ROWS, 2, [(26, INPUT), (32 * 26, PARAMETERS)]),
        (33, cpu.MANY_LONG_ROWS, 2, [(33, INPUT_AND_WEIGHT), (16 * 33, BIAS)]),
        (72, cpu.MANY_LONG_ROWS + 1, 2, [(72, INPUT_AND_WEIGHT), (16 * 72, BIAS)]),
        (9, cpu.MANY_ROWS - 1, 2, None),
        (33, cpu.MANY_LONG_ROWS - 1, 2, None),
        (16, cpu.MANY_LONG_ROWS, 2, None),
        (129, cpu.MANY_LONG_ROWS, 2, None),
        (15, cpu.MANY_ROWS, 1, [(15, ALL)]),
        (26, cpu.MANY_LONG_ROWS, 1, None),
    ],
)
def test_threads_do_not_add_up_in_the_same_cache_lines(length, rows, threads, calls, monkeypatch):
    """`calls` are those of torch's backward: row length and gradients asked for; None where autograd makes one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    made = []
    backward = cpu._native_backward

    def spied(grad, input, normalized_shape, *others):
        made.append((normalized_shape[0], others[-1]))
        return backward(grad, input, normalized_shape, *others)

    monkeypatch.setattr(cpu, "_native_backward", spied)
    weight, bias = torch.ones(length), torch.zeros(length)

    def differentiate(needs_weight: bool, needs_bias: bool) -> str:
        made.clear()
        x = torch.randn(rows, length, requires_grad=True)
        parameters = [weight.clone().requires_grad_(needs_weight), bias.clone().requires_grad_(needs_bias)]
        output = layer_norm_relu(x, (length,), *parameters)
        output.sum().backward()
        return output.grad_fn.name()

    name = differentiate(True, True)
    assert made == (calls or [])
    assert ("_Fused" in name) == (calls is not None)
    # Where fewer gradients are asked for there is less to avoid.
    if calls and length >= 16:
        assert "_Fused" not in differentiate(False, False)
    if calls and length > 32:
        assert "_Fused" not in differentiate(True, False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize(
    ("weight", "bias", "taken"),
    [
        (-0.7, 2.7, True),
        (0.7, None, True),
        (2.0**-59, 0.0, True),
        (2.0**-62, 0.0, False),
        (2.0**61, 0.0, False),
        (0.0, 0.0, False),
        (0.0, 1.0, False),
        (0.7, -3.0, False),
        (float("nan"), 0.0, False),
    ],
)
def test_parameters_gradients_from_the_output(weight, bias, taken, dropout_p, monkeypatch):
    """`weight` and `bias` are the ones of a single column, by which the output there may say too little."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = []
    output_sums = cpu._output_sums
    monkeypatch.setattr(cpu, "_output_sums", lambda *arguments: found.append(output_sums(*arguments)) or found[-1])
    torch.manual_seed(0)
    x = torch.randn(cpu.MANY_ROWS + 5, 26) * 3 + 1
    parameters = [torch.rand(26) + 0.5] + ([] if bias is None else [torch.rand(26)])
    for tensor, value in zip(parameters, (weight, bias), strict=False):
        tensor[3] = value
    inputs = [x, *(parameter.requires_grad_() for parameter in parameters)]
    output = layer_norm_relu(inputs[0], (26,), *inputs[1:], dropout_p=dropout_p)
    grad = torch.randn_like(output) + 0.3
    actual = gradients_of(output, inputs[1:], grad)
    assert [each is not None for each in found] == [taken]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.nn.functional.layer_norm(exact_inputs[0], (26,), *exact_inputs[1:])
    mask = ~(output <= 0) / (1 - dropout_p)
    for each, expected in zip(actual, gradients_of(exact * mask, exact_inputs[1:], grad.double()), strict=True):
        close(each, expected, 0)


def test_with_a_residual_the_output_does_not_tell_the_parameters_gradients(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "_output_sums", None)  # which cannot be called
    x, residual = torch.randn(2, cpu.MANY_ROWS, 26)
    parameters = [torch.rand(26).requires_grad_(), torch.rand(26).requires_grad_()]
    output = layer_norm_relu(x, (26,), *parameters, residual=residual)
    exact_parameters = [parameter.detach().double().requires_grad_() for parameter in parameters]
    exact = torch.nn.functional.layer_norm(x.double(), (26,), *exact_parameters)
    grad = torch.randn_like(output) * (output > 0)
    for each, expected in zip(
        gradients_of(output, parameters, grad), gradients_of(exact, exact_parameters, grad.double()), strict=True
    ):
        close(each, expected, 0)


@pytest.mark.parametrize("value", [0.3, 3.0, 1000.1, 1e6, 1e7])
@pytest.mark.parametrize(("length", "threads"), [(5, 2), (12, 1)])
def test_a_row_of_one_value_becomes_the_bias(length, threads, value, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x = torch.randn(cpu.MANY_ROWS + 3, length)
    x[7] = value
    weight, bias = torch.rand(length) + 0.5, torch.randn(length)
    assert cpu.has_short_rows(x, (length,))
    output = layer_norm_relu(x, (length,), weight, bias, activation="identity")
    atol = cpu.MAX_SAFE_PRODUCT * 2**-23
    torch.testing.assert_close(output, torch.nn.functional.layer_norm(x, (length,), weight, bias), rtol=0, atol=atol)


def test_cache_lines_are_of_bytes(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for length, sums in ((8, "torch"), (12, "own"), (16, "torch")):
        rows = torch.empty(cpu.MANY_ROWS, length, dtype=torch.float64)
        assert cpu._sums(rows, (length,), True, True) == sums


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize(
    "shape", [(16, 8, 26, 26), (64, 14, 5, 5), (3, 7, 29, 31), (1, 3, 90, 91), (5, 6, 7, 8, 11)], ids=str
)
def test_batch_norm_of_channels_last(shape, offset, affine):
    torch.manual_seed(shape[0])
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = (torch.randn(shape) + offset).contiguous(memory_format=memory_format)
    assert cpu.has_columns(x)
    inputs = [x, *((torch.rand(shape[1]) + 0.5, torch.randn(shape[1])) if affine else ())]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    statistics = [torch.zeros(shape[1]), torch.ones(shape[1])]
    exact_statistics = [torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()]
    for training in (True, False):
        output = batch_norm_relu(inputs[0], *statistics, *inputs[1:], training=training, activation="identity")
        exact = torch.nn.functional.batch_norm(exact_inputs[0], *exact_statistics, *exact_inputs[1:], training=training)
        assert output.is_contiguous(memory_format=memory_format)
        grad = torch.randn_like(output) + 0.3
        close(output, exact, offset)
        expected = gradients_of(exact, exact_inputs, grad.double())
        for actual, each in zip(gradients_of(output, inputs, grad), expected, strict=True):
            close(actual, each, offset)
        for actual, each in zip(statistics, exact_statistics, strict=True):
            close(actual, each, offset)


def test_columns_are_for_channels_whose_sums_share_cache_lines():
    def asked(channels: int, dtype: torch.dtype = torch.float32) -> bool:
        return cpu.has_columns(torch.empty(64, channels, 16, 16, dtype=dtype, memory_format=torch.channels_last))

    assert [channels for channels in (1, 2, 8, 15, 16, 20, 24, 32, 33, 64) if asked(channels)] == [2, 8, 15, 20]
    assert asked(12, torch.float64)
    assert not asked(8, torch.float64)


def test_batch_norm_of_channels_last_takes_only_the_gradients_asked_for():
    x = torch.randn(16, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    parameters = [torch.rand(8) + 0.5, torch.randn(8)]
    for asked in range(3):
        inputs = [t.detach().clone().requires_grad_(i == asked) for i, t in enumerate([x, *parameters])]
        batch_norm_relu(inputs[0], None, None, *inputs[1:], training=True).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [i == asked for i in range(3)]


def test_several_threads_take_batch_statistics_of_larger_tensors_alone(monkeypatch):
    shapes = [(128, 8, 26, 26), (128, 50, 9, 9), (8, 64, 56, 56), (512, 50, 9, 10)]
    for threads, taken in ((1, [True, True, True, True]), (2, [False, False, True, False])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert [cpu.has_batch_statistics(torch.empty(shape)) for shape in shapes] == taken


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [12, 60])
def test_batch_statistics_of_a_small_deviation_around_a_large_mean(size, memory_format):
    x = (torch.randn(128, 3, size, size) + 1e5).contiguous(memory_format=memory_format)
    mean, var, unbiased, _ = cpu.batch_statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2**-23, atol=0)
    # The means of planes, whose variance is a part of the whole, are rounded to 2^-24 of 1e5: 1e-5 of the variance.
    tolerance = 1e-4 if size == 60 and x.is_contiguous() else 1e-5
    torch.testing.assert_close(var.double(), exact_var, rtol=tolerance, atol=0)
    torch.testing.assert_close(unbiased.double(), x.double().var((0, 2, 3)), rtol=tolerance, atol=0)

"""The native convolutions against ATen in float64: every geometry, ragged in every dimension, as exact as eager."""

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_as_exact_as_eager

from fusedres import native

pytestmark = pytest.mark.skipif(native.missing is not None, reason=f"needs the native library: {native.missing}")

CL = torch.channels_last
kernels = torch.ops.fusedres_cpu

# N, C, H, W, K, R, S, stride, padding, dilation
PROBLEMS = [
    (2, 3, 20, 17, 10, 7, 7, (2, 2), (3, 3), (1, 1)),  # a stem: columns of a filter row merge
    (1, 3, 9, 9, 70, 3, 5, (1, 2), (1, 0), (1, 1)),  # merged, no padding to write out
    (2, 3, 9, 8, 7, 3, 3, (1, 1), (2, 2), (2, 2)),  # few channels, dilated: not merged
    (1, 64, 7, 7, 64, 1, 1, (1, 1), (0, 0), (1, 1)),
    (3, 5, 9, 8, 33, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 70, 11, 10, 20, 3, 2, (2, 1), (1, 1), (1, 1)),
    (2, 300, 8, 9, 17, 3, 3, (3, 3), (2, 2), (2, 2)),  # taps that meet no input of some residue; a tap of two runs
    (2, 16, 9, 9, 16, 1, 1, (2, 2), (0, 0), (1, 1)),  # inputs that no tap meets
    (2, 8, 3, 3, 8, 5, 5, (1, 1), (3, 3), (1, 1)),  # outputs that see nothing but padding
    (1, 40, 23, 1, 300, 3, 1, (1, 1), (1, 0), (1, 1)),
    (2, 260, 7, 7, 20, 3, 3, (1, 1), (1, 1), (1, 1)),  # a row of pixels that meets a row of taps in the padding
    (0, 8, 5, 5, 8, 3, 3, (1, 1), (1, 1), (1, 1)),  # an empty batch
    (0, 25, 6, 3, 300, 2, 5, (3, 2), (1, 3), (1, 2)),  # whatever the number of panels
    (37, 24, 4, 5, 24, 3, 3, (1, 1), (1, 1), (1, 1)),  # more than one block of pixels
    (2, 150, 7, 7, 270, 3, 3, (1, 1), (1, 1), (1, 1)),  # many panels that meet few pixels: runs of taps
    (1, 1300, 5, 5, 140, 1, 1, (1, 1), (0, 0), (1, 1)),  # and runs of one tap's depth
    # Winograd: squares that reach outside, taps with holes, no padding and too much, several blocks, several runs.
    (1, 16, 5, 5, 19, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 21, 17, 12, 24, 3, 3, (1, 1), (2, 3), (2, 3)),
    (1, 18, 9, 14, 16, 3, 3, (1, 1), (0, 4), (1, 1)),
    (3, 17, 23, 31, 70, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 1200, 6, 6, 40, 3, 3, (1, 1), (1, 1), (1, 1)),
]


def operands(problem, dtype):
    n, c, h, w, k, r, s, *geometry = problem
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w, dtype=dtype).contiguous(memory_format=CL)
    weight = torch.randn(k, c, r, s, dtype=dtype) / (c * r * s) ** 0.5
    return x, weight, geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_fprop_adds_bias_and_residual_and_applies_relu(problem, dtype):
    x, w, geometry = operands(problem, dtype)
    bias = torch.randn(w.shape[0], dtype=dtype)
    plain = F.conv2d(x, w, bias, *geometry)
    residual = torch.randn_like(plain).contiguous(memory_format=CL)
    oracle = (F.conv2d(x.double(), w.double(), bias.double(), *geometry) + residual.double()).relu()
    y = kernels.conv_fprop(x, w, None, bias, residual, *geometry, True)
    assert y.is_contiguous(memory_format=CL)
    assert y.shape == oracle.shape
    assert_as_exact_as_eager(y, (plain + residual).relu(), oracle)


def channels_innermost(w):
    """Strides of (C, R, S, K) memory."""
    return w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


LAYOUTS = {
    "oihw": torch.Tensor.contiguous,
    "ohwi": lambda w: w.contiguous(memory_format=CL),
    "oiwh": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "ihwo": channels_innermost,
    "strided": lambda w: w[:, ::2],
    "expanded": lambda w: w[:, :1].expand(w.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_packed_weight_gives_the_same_bits(layout, dtype):
    for problem in PROBLEMS:
        x, w, geometry = operands(problem, dtype)
        w = layout(w)
        x = x[:, : w.shape[1]].contiguous(memory_format=CL)
        direct = kernels.conv_fprop(x, w, None, None, None, *geometry, False)
        packed = kernels.conv_fprop(x, w, kernels.conv_pack(w, x.shape[2:], *geometry), None, None, *geometry, False)
        assert torch.equal(direct, packed)
        assert torch.equal(direct, kernels.conv_fprop(x, w.clone(), None, None, None, *geometry, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_convs_have_panels_without_empty_channels(dtype):
    """With AVX-512 half of the panel of a conv to 16 channels had been multiplied for nothing."""
    w = torch.randn(64 // dtype.itemsize, 5, 1, 1, dtype=dtype)
    assert kernels.conv_pack(w, (6, 7), (1, 1), (0, 0), (1, 1)).numel() == w.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dgrad_is_the_input_gradient(problem, dtype):
    x, w, geometry = operands(problem, dtype)
    leaf = x.double().clone().requires_grad_()
    y = F.conv2d(leaf, w.double(), None, *geometry)
    dz = torch.randn(y.shape, dtype=dtype).contiguous(memory_format=CL)
    y.backward(dz.double())
    eager_leaf = x.detach().clone().requires_grad_()
    F.conv2d(eager_leaf, w, None, *geometry).backward(dz)
    dx = kernels.conv_dgrad(dz, w, x.shape[2:], *geometry, None, (1, 1))
    assert_as_exact_as_eager(dx, eager_leaf.grad, leaf.grad)


@pytest.mark.parametrize("step", [(1, 1), (2, 2), (2, 3)])
def test_dgrad_adds_the_residual_on_its_grid_alone(step):
    for problem in PROBLEMS:
        x, w, geometry = operands(problem, torch.float64)
        dz = torch.randn_like(F.conv2d(x, w, None, *geometry)).contiguous(memory_format=CL)
        expected = kernels.conv_dgrad(dz, w, x.shape[2:], *geometry, None, (1, 1)).clone()
        residual = torch.randn_like(x[:, :, :: step[0], :: step[1]]).contiguous(memory_format=CL)
        expected[:, :, :: step[0], :: step[1]] += residual
        torch.testing.assert_close(kernels.conv_dgrad(dz, w, x.shape[2:], *geometry, residual, step), expected)


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, w, geometry = operands(PROBLEMS[-1], torch.float32)
            y = kernels.conv_fprop(x, w, None, None, None, *geometry, True)
            results.append((y, kernels.conv_dgrad(y, w, x.shape[2:], *geometry, None, (1, 1))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_nan_passes_through_the_relu_and_padding_adds_nothing():
    x, w, geometry = operands((1, 16, 5, 5, 16, 3, 3, (1, 1), (1, 1), (1, 1)), torch.float32)
    x[0, 0, 0, 0] = float("nan")
    y = kernels.conv_fprop(x, w, None, None, None, *geometry, True)
    assert y[..., :2, :2].isnan().all()
    assert not y[..., 2:, :].isnan().any()
    assert not y[..., 2:].isnan().any()


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 3e38])
def test_infinity_and_what_is_close_to_it_give_what_they_give_in_eager(value, dilation):
    x, w, geometry = operands((1, 18, 9, 9, 21, 3, 3, (1, 1), (1, 2), (dilation, dilation)), torch.float32)
    for c, row, col in ((2, 3, 3), (2, 3, 4), (7, 3, 4), (7, 8, 8), (0, 0, 0)):
        x[0, c, row, col] = value
    w = w / 8
    expected = F.conv2d(x, w, None, *geometry)
    residual = torch.randn_like(expected).contiguous(memory_format=CL)
    y = kernels.conv_fprop(x, w, None, None, residual, *geometry, False)
    torch.testing.assert_close(y, expected + residual, rtol=1e-4, atol=1e-4, equal_nan=True)
    leaf, dz = torch.zeros_like(x).requires_grad_(), torch.randn_like(residual)
    dz[0, 3, 5, 5:7] = dz[0, 4, 5, 6] = value
    F.conv2d(leaf, w, None, *geometry).backward(dz)
    dx = kernels.conv_dgrad(dz, w, x.shape[2:], *geometry, None, (1, 1))
    torch.testing.assert_close(dx, leaf.grad, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("number of channels", {"w": torch.zeros(4, 7, 3, 3)}),
        ("float32 or float64", {"w": torch.zeros(4, 8, 3, 3, dtype=torch.bfloat16)}),
        ("one dtype", {"w": torch.zeros(4, 8, 3, 3, dtype=torch.float64)}),
        (r"bias is .*\(5,\)", {"bias": torch.zeros(5)}),
        ("residual is", {"residual": torch.zeros(2, 4, 6, 5).contiguous(memory_format=CL)}),
        ("packed is", {"packed": torch.zeros(3)}),
        ("channels_last", {"x": torch.zeros(2, 8, 6, 6)}),
        ("does not fit", {"padding": (0, 0), "dilation": (3, 3)}),
        ("stride is not a pair", {"stride": (0, 1)}),
    ],
)
def test_bad_input_raises_and_names_what_is_wrong(message, change):
    good = {
        "x": torch.zeros(2, 8, 6, 6).contiguous(memory_format=CL),
        "w": torch.zeros(4, 8, 3, 3),
        "packed": None,
        "bias": None,
        "residual": None,
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
    }
    kernels.conv_fprop(*good.values(), True)
    with pytest.raises(RuntimeError, match=message):
        kernels.conv_fprop(*(good | change).values(), True)


def packed_for(input_size, w, geometry):
    return kernels.conv_pack(w, input_size, geometry[:2], geometry[2:4], geometry[4:])


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("width", [4, 8, 24])  # its 3x3 conv with merged columns, by the direct sum, by Winograd's
@pytest.mark.parametrize("n", [1, 2, 3, 9])
@pytest.mark.parametrize("shortcut", ["none", "identity", "tensor", "projection"])
@pytest.mark.parametrize("pool", [(), (3, 2, 1)], ids=["", "pool"])
def test_a_chain_is_its_convs_and_batch_norms_one_by_one(n, shortcut, width, is_packed, pool):
    torch.manual_seed(0)
    x = torch.randn(n, 16, 26, 25).contiguous(memory_format=CL)  # large enough to go image by image
    weights = [torch.randn(width, 16, 1, 1), torch.randn(width, width, 3, 3) / width, torch.randn(16, width, 1, 1)]
    if shortcut == "projection":
        weights.append(torch.randn(16, 16, 1, 1))
    biases, *bn = [[torch.randn(w.shape[0]) for w in weights] for _ in range(5)]
    bn[3] = [v.exp() for v in bn[3]]
    eps = [0.1, 1e-5, 1e-3, 1e-2][: len(weights)]
    biases[1] = bn[0][2] = bn[1][0] = torch.empty(0)  # no conv bias, BN weight, BN bias
    geometry = [(1, 1, 0, 0, 1, 1), (1, 1, 1, 1, 1, 1), (1, 1, 0, 0, 1, 1), (1, 1, 0, 0, 1, 1)][: len(weights)]
    given = torch.randn_like(x) if shortcut == "tensor" else None
    y = kernels.eval_chain(
        x,
        given,
        weights,
        [packed_for(x.shape[2:], w, sizes) for w, sizes in zip(weights, geometry, strict=True)] if is_packed else [],
        [vector for of_conv in zip(biases, *bn, strict=True) for vector in of_conv],
        torch.tensor(eps, dtype=torch.float64),
        [size for sizes in geometry for size in sizes],
        shortcut == "identity",
        shortcut == "projection",
        True,
        pool,
    )

    def conv(i, a):
        bias, weight, shift, mean, var = (v[i].double() if v[i].numel() else None for v in (biases, *bn))
        z = F.conv2d(a, weights[i].double(), bias, padding=weights[i].shape[-1] // 2)
        return F.batch_norm(z, mean, var, weight, shift, eps=eps[i])

    a = conv(2, conv(1, conv(0, x.double()).relu()).relu())
    expected = {"none": 0, "identity": x, "tensor": given}.get(shortcut)
    a = a + (conv(3, x.double()) if expected is None else expected)
    expected = F.max_pool2d(a.relu(), *pool) if pool else a.relu()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pool", [(3, 2, 1), (2, 2, 0), (2, 1, 1), (16, 3, 8)], ids=str)
@pytest.mark.parametrize("channels", [5, 8, 37])
def test_the_pool_of_a_chain_is_eager_s(channels, pool, dtype):
    """Behind a conv that adds a bias: negative maps, infinite ones, NaN."""
    torch.manual_seed(0)
    x = (torch.randn(2, channels, 17, 14, dtype=dtype) - 3).contiguous(memory_format=CL)
    x[1, 0, 4, 4] = torch.nan
    w, bias, none = (
        torch.eye(channels, dtype=dtype)[:, :, None, None],
        torch.zeros(channels, dtype=dtype),
        x[0, :0, 0, 0],
    )
    bias[1:4] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    vectors, eps, form = [bias, none, none, none, none], torch.zeros(1, dtype=torch.float64), (False, False, False)
    y = kernels.eval_chain(x, None, [w], [], vectors, eps, [1, 1, 0, 0, 1, 1], *form, pool)
    expected = F.max_pool2d(F.conv2d(x, w, bias), *pool)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_a_chain_refuses_half_dtypes_however_large_its_maps():
    x = torch.zeros(2, 16, 26, 25, dtype=torch.bfloat16).contiguous(memory_format=CL)
    w, bias = torch.zeros(16, 16, 1, 1, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.bfloat16)
    packed, geometry = torch.zeros(256, dtype=torch.bfloat16), [1, 1, 0, 0, 1, 1]
    eps = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        kernels.eval_chain(x, None, [w] * 2, [packed] * 2, [bias] * 10, eps, geometry * 2, True, False, True, [])


def test_activations_reuse_the_memory_of_those_that_died():
    x = torch.randn(1, 16, 160, 160).contiguous(memory_format=CL)
    w = torch.randn(16, 16, 1, 1)

    def address():
        return kernels.conv_fprop(x, w, None, None, None, (1, 1), (0, 0), (1, 1), False).data_ptr()

    first = address()
    assert address() == first
    kept = kernels.conv_fprop(x, w, None, None, None, (1, 1), (0, 0), (1, 1), False)
    other = kernels.conv_fprop(x, w, None, None, None, (1, 1), (0, 0), (1, 1), False)
    assert kept.data_ptr() != other.data_ptr()

"""Every operation against plain loops or SciPy forwards, and against central differences in float64 backwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from finite_differences import check_gradients
from scipy import ndimage

pytest.importorskip("autograd", reason="training needs autograd: pip install 'tinyvad[train]'")

from tinyvad.errors import InputError
from tinyvad.training import blocks, ops
from tinyvad.training.network import EPSILON
from tinyvad.training.tape import differentiable

WINDOWS = [  # kernel, stride, pads (top, bottom, left, right), dilation
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((5, 3), (2, 1), (2, 1, 0, 1), (1, 1)),
    ((3, 2), (1, 3), (0, 0, 2, 0), (2, 1)),
    ((1, 1), (2, 2), (1, 0, 0, 1), (1, 1)),
    ((2, 2), (3, 3), (0, 0, 0, 0), (1, 1)),
]


def plain_windows(x, kernel, stride, pads, dilation):
    """(n, Ho, Wo, kh, kw, C): what each window sees, by slicing."""
    top, bottom, left, right = pads
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height = (x.shape[1] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (x.shape[2] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    out = np.empty((len(x), height, width, *kernel, x.shape[3]), x.dtype)
    for oy in range(height):
        for ox in range(width):
            for ky in range(kernel[0]):
                for kx in range(kernel[1]):
                    y, column = oy * stride[0] + ky * dilation[0], ox * stride[1] + kx * dilation[1]
                    out[:, oy, ox, ky, kx] = x[:, y, column]
    return out


@pytest.mark.parametrize(("kernel", "stride", "pads", "dilation"), WINDOWS)
def test_conv2d(rng, kernel, stride, pads, dilation):
    x, weights, bias = rng.normal(size=(2, 7, 8, 3)), rng.normal(size=(4, *kernel, 3)), rng.normal(size=4)
    settings = {"stride": stride, "pads": pads, "dilation": dilation}
    expected = np.einsum("nyxhwc,ohwc->nyxo", plain_windows(x, kernel, stride, pads, dilation), weights) + bias
    np.testing.assert_allclose(ops.conv2d(x, weights, bias, **settings), expected, rtol=1e-12, atol=1e-12)
    check_gradients(
        lambda p: ops.conv2d(p["x"], p["w"], p["b"], **settings), {"x": x, "w": weights, "b": bias}
    )  # fmt: skip


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_pointwise_conv2d(rng, stride):
    x, weights, bias = rng.normal(size=(2, 5, 7, 3)), rng.normal(size=(4, 1, 1, 3)), rng.normal(size=4)
    expected = np.einsum("nyxc,oc->nyxo", x[:, :: stride[0], :: stride[1]], weights[:, 0, 0]) + bias
    np.testing.assert_allclose(ops.conv2d(x, weights, bias, stride=stride), expected, rtol=1e-12, atol=1e-12)
    check_gradients(
        lambda p: ops.conv2d(p["x"], p["w"], p["b"], stride=stride), {"x": x, "w": weights, "b": bias}
    )  # fmt: skip


@pytest.mark.parametrize(("kernel", "stride", "pads", "dilation"), WINDOWS)
@pytest.mark.parametrize("channels", [3, 18])  # less than sixteen lanes; a full group and a part of one
def test_depthwise_conv2d(rng, kernel, stride, pads, dilation, channels):
    x, weights = rng.normal(size=(2, 6, 7, channels)), rng.normal(size=(1, *kernel, channels))
    bias = rng.normal(size=channels)
    settings = {"stride": stride, "pads": pads, "dilation": dilation}
    expected = np.einsum("nyxhwc,hwc->nyxc", plain_windows(x, kernel, stride, pads, dilation), weights[0]) + bias
    np.testing.assert_allclose(ops.depthwise_conv2d(x, weights, bias, **settings), expected, rtol=1e-12, atol=1e-12)
    if channels == 3 or stride == (2, 2):
        check_gradients(
            lambda p: ops.depthwise_conv2d(p["x"], p["w"], p["b"], **settings), {"x": x, "w": weights, "b": bias}
        )  # fmt: skip


def test_depthwise_conv2d_equals_scipy(rng):
    x, weights = rng.normal(size=(1, 20, 21, 33)).astype(np.float32), rng.normal(size=(1, 7, 7, 33)).astype(np.float32)
    ours = ops.depthwise_conv2d(x, weights, pads=(3, 3, 3, 3))
    for c in range(33):
        expected = ndimage.correlate(x[0, :, :, c].astype(np.float64), weights[0, :, :, c], mode="constant")
        np.testing.assert_allclose(ours[0, :, :, c], expected, atol=2e-5)


def test_fully_connected(rng):
    x, weights, bias = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), rng.normal(size=4)
    np.testing.assert_allclose(ops.fully_connected(x, weights, bias), x @ weights.T + bias, rtol=1e-12)
    check_gradients(lambda p: ops.fully_connected(p["x"], p["w"], p["b"]), {"x": x, "w": weights, "b": bias})


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_batch_norm(rng, activation):
    x, scale, offset = rng.normal(2, 3, size=(3, 2, 4, 5)), rng.normal(2, 1, size=5), rng.normal(2, 1, size=5)
    clip = {"none": (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6)}[activation]

    def expected(mean, variance):
        return np.clip(scale * (x - mean) / np.sqrt(variance + EPSILON) + offset, *clip)

    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(np.stack(ops.moments(x)), np.stack([mean, variance]), rtol=1e-12)
    np.testing.assert_allclose(ops.batch_norm_train(x, scale, offset, activation), expected(mean, variance), atol=1e-12)
    arrays = {"x": x, "scale": scale, "offset": offset}
    found = check_gradients(lambda p: ops.batch_norm_train(p["x"], p["scale"], p["offset"], activation), arrays)
    if activation == "none":  # what is added to all values of a channel is taken off again
        np.testing.assert_allclose(found["x"].sum((0, 1, 2)), 0, atol=1e-9)
    fixed = rng.normal(size=5), rng.uniform(1, 2, size=5)
    evaluated = ops.batch_norm_eval(x, scale, offset, *fixed, activation)
    np.testing.assert_allclose(evaluated, expected(*fixed), atol=1e-12)
    check_gradients(lambda p: ops.batch_norm_eval(p["x"], p["scale"], p["offset"], *fixed, activation), arrays)


def test_moments_far_from_zero():
    """A mean a thousand times the deviation costs float32 sums of squares all their digits; blocks keep them."""
    values = np.random.default_rng(1).normal(1000, 1, size=(8, 40, 40, 20)).astype(np.float32)
    mean, variance = ops.moments(values)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(("name", "function", "reference"), [
    ("relu", ops.relu, lambda x: np.maximum(x, 0)),
    ("relu6", ops.relu6, lambda x: np.clip(x, 0, 6)),
    ("leaky_relu", ops.leaky_relu, lambda x: np.where(x > 0, x, 0.2 * x)),
    ("hard_swish", ops.hard_swish, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    ("logistic", ops.logistic, lambda x: 1 / (1 + np.exp(-x))),
])  # fmt: skip
def test_elementwise(rng, name, function, reference):
    x = rng.uniform(-8, 8, size=(2, 3, 4, 5))
    np.testing.assert_allclose(function(x), reference(x), rtol=1e-12, atol=1e-15)
    check_gradients(lambda p: function(p["x"]), {"x": x})


def test_logistic_far_out():
    np.testing.assert_array_equal(ops.logistic(np.array([-1e4, 0.0, 1e4])), [0.0, 0.5, 1.0])


@pytest.mark.parametrize(("name", "x", "slope"), [
    ("relu", [-1.0, 0.0, 1.0, 7.0], [0, 0, 1, 1]),
    ("relu6", [-1.0, 0.0, 6.0, 3.0], [0, 0, 0, 1]),
    ("hard_swish", [-3.0, 3.0, 0.0, 4.0], [0, 1, 0.5, 1]),
    ("leaky_relu", [-1.0, 0.0, 1.0, 2.0], [0.2, 0.2, 1, 1]),
])  # fmt: skip
def test_slopes_at_the_corners(name, x, slope):
    function = getattr(ops, name)
    _, _, found = ops.value_and_gradients(lambda p: (function(p["x"]).sum(), None), {"x": np.array(x)})
    np.testing.assert_allclose(found["x"], slope, rtol=1e-15)


def test_nan_stays_nan():
    """A training that has run away must show it, not clip it to a number."""
    x = np.full((1, 2, 2, 1), np.nan)
    one = np.ones(1)
    for y in (ops.relu6(x), ops.batch_norm_eval(x, one, one, one, one, "relu6"), ops.max_pool(x, (2, 2), (1, 1))):
        assert np.isnan(y).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 1, 5), (1, 1, 1, 5), (5,)])
def test_add_and_mul_broadcast(rng, shape):
    x, y = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=shape)
    np.testing.assert_array_equal(ops.add(x, y), x + y)
    np.testing.assert_array_equal(ops.mul(x, y), x * y)
    check_gradients(lambda p: ops.mul(p["x"], p["y"]), {"x": x, "y": y})
    check_gradients(lambda p: ops.add(p["x"], p["y"]), {"x": x, "y": y})


POOLS = [((3, 3), (1, 1), (1, 1, 1, 1)), ((2, 3), (2, 2), (0, 0, 0, 0)), ((3, 3), (2, 2), (0, 1, 1, 0))]


@pytest.mark.parametrize(("kernel", "stride", "pads"), POOLS)
@pytest.mark.parametrize("count_include_pad", [False, True])
def test_average_pool(rng, kernel, stride, pads, count_include_pad):
    x = rng.normal(size=(2, 5, 6, 3))
    seen = plain_windows(x, kernel, stride, pads, (1, 1)).sum((3, 4))
    inside = plain_windows(np.ones_like(x), kernel, stride, pads, (1, 1)).sum((3, 4))
    expected = seen / (kernel[0] * kernel[1] if count_include_pad else inside)
    np.testing.assert_allclose(ops.average_pool(x, kernel, stride, pads, count_include_pad), expected, atol=1e-12)
    check_gradients(lambda p: ops.average_pool(p["x"], kernel, stride, pads, count_include_pad), {"x": x})


@pytest.mark.parametrize(("kernel", "stride", "pads"), POOLS)
def test_max_pool(rng, kernel, stride, pads):
    x = rng.normal(size=(2, 5, 6, 3))
    far = plain_windows(x - 100, kernel, stride, pads, (1, 1))  # zeros of the padding would win: take them out
    expected = np.where(far == 0, -np.inf, far).max((3, 4)) + 100
    np.testing.assert_allclose(ops.max_pool(x, kernel, stride, pads), expected, atol=1e-12)
    check_gradients(lambda p: ops.max_pool(p["x"], kernel, stride, pads), {"x": x})


def test_mean_pad_concat_reshape(rng):
    x, y = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 2))
    np.testing.assert_allclose(ops.mean(x), x.mean((1, 2), keepdims=True), rtol=1e-12)
    padded = ops.pad(x, (1, 2, 0, 3))
    assert padded.shape == (2, 6, 7, 5) and padded.sum() == pytest.approx(x.sum())
    np.testing.assert_array_equal(padded[:, 1:4, 0:4], x)
    np.testing.assert_array_equal(ops.concat(x, y), np.concatenate([x, y], 3))
    check_gradients(lambda p: ops.mean(p["x"]), {"x": x})
    check_gradients(lambda p: ops.pad(p["x"], (1, 2, 0, 3)), {"x": x})
    check_gradients(lambda p: ops.concat(p["x"], p["y"], p["x"]), {"x": x, "y": y})
    check_gradients(lambda p: ops.reshape(p["x"], (6, 20)), {"x": x})


@pytest.mark.parametrize("size", [(7, 9), (2, 3), (3, 4)])
def test_resize_nearest(rng, size):
    x = rng.normal(size=(2, 3, 4, 5))
    expected = x[:, np.arange(size[0]) * 3 // size[0]][:, :, np.arange(size[1]) * 4 // size[1]]
    np.testing.assert_array_equal(ops.resize_nearest(x, size), expected)
    check_gradients(lambda p: ops.resize_nearest(p["x"], size), {"x": x})


@pytest.mark.parametrize("size", [(7, 9), (2, 3), (3, 4)])
def test_resize_bilinear(rng, size):
    x = rng.normal(size=(2, 3, 4, 5))
    rows, columns = (np.arange(out) * length / out + 0.5 * length / out - 0.5 for out, length in zip(size, (3, 4)))
    places = np.meshgrid(rows, columns, indexing="ij")
    ours = ops.resize_bilinear(x, size)
    for n in range(2):
        for c in range(5):
            expected = ndimage.map_coordinates(x[n, :, :, c], places, order=1, mode="nearest")
            np.testing.assert_allclose(ours[n, :, :, c], expected, atol=1e-12)
    check_gradients(lambda p: ops.resize_bilinear(p["x"], size), {"x": x})


def test_resize_keeps_a_ramp():
    """A linear ramp stays one between the outermost centres, whatever the size."""
    ramp = np.tile(np.arange(8.0)[None, None, :, None], (1, 2, 1, 1))
    np.testing.assert_allclose(ops.resize_bilinear(ramp, (2, 16))[0, 0, 1:-1, 0], np.arange(14) * 0.5 + 0.25)


def test_frozen_arguments_get_no_gradient(rng):
    """What is not on the tape costs nothing on the way back, and nothing flows through stop_gradient."""
    x, weights = rng.normal(size=(1, 4, 4, 3)), rng.normal(size=(2, 3, 3, 3))
    value, extra, found = ops.value_and_gradients(
        lambda p: ((ops.conv2d(ops.stop_gradient(p["x"]), p["w"]) ** 2).sum(), "kept"), {"x": x, "w": weights}
    )
    assert extra == "kept" and value == pytest.approx((ops.conv2d(x, weights) ** 2).sum())
    assert not found["x"].any() and found["w"].any()


def test_memory_falls_on_the_way_back():
    """What an operation kept is gone when the one before it is reached, and nothing waits for the garbage collector."""
    kept: list[weakref.ref] = []
    gone: list[list[bool]] = []

    def look(argnums, y, args, kwargs):
        def back(g):
            gone.append([reference() is None for reference in kept])
            return (g,)

        return back

    first = differentiable(look)(lambda x: x + 1)

    def loss(p):
        y = first(p["x"])
        for function in (ops.hard_swish, ops.relu, lambda z: ops.mul(z, z)):
            y = function(y)
            kept.append(weakref.ref(ops.plain(y)))
        return y.sum(), None

    gc.disable()
    try:
        ops.value_and_gradients(loss, {"x": np.ones((1, 2, 2, 3))})
        assert gone == [[True, True, True]]
    finally:
        gc.enable()


def test_a_loss_without_influence_has_zero_gradient():
    value, _, found = ops.value_and_gradients(lambda p: (3.0, None), {"x": np.ones(2, np.float32)})
    assert value == 3.0 and found["x"].dtype == np.float32 and not found["x"].any()


def test_only_a_number_is_a_loss():
    with pytest.raises(InputError, match="return one number"):
        ops.value_and_gradients(lambda p: (p["x"] * 2, None), {"x": np.ones(2)})


def test_unknown_activation_is_an_input_error():
    with pytest.raises(InputError, match="use none, relu, relu6"):
        ops.activate(np.ones((1, 1, 1, 1)), "tanh")


def test_work_is_shared_out_whole():
    """Each block is worked on once, whatever the number of threads; little work stays with the caller."""
    for count, workers in ((10, 3), (2, 5), (7, 7)):
        seen: list[tuple[int, int]] = []
        with blocks.threads(workers):
            blocks.run_blocks(lambda first, last, seen=seen: seen.append((first, last)), count, blocks.WORTH)
        assert [i for first, last in sorted(seen) for i in range(first, last)] == list(range(count))
        with blocks.threads(workers):
            blocks.run_blocks(lambda first, last, seen=seen: seen.append((first, last)), count, blocks.WORTH - 1)
        assert seen[-1] == (0, count)


def test_what_goes_wrong_in_a_thread_is_not_lost():
    caller, met = threading.get_ident(), threading.Event()

    def work(first, last):
        if threading.get_ident() != caller:
            met.set()
            raise InputError("no")
        assert met.wait(10)

    with blocks.threads(2), pytest.raises(InputError, match="no"):
        blocks.run_blocks(work, 2, blocks.WORTH)


def test_any_number_of_threads_gives_the_same_bytes(rng, monkeypatch):
    monkeypatch.setattr(blocks, "WORTH", 0)
    x = rng.normal(size=(5, 23, 21, 40)).astype(np.float32)
    arrays = {
        "expand": rng.normal(size=(72, 1, 1, 40)).astype(np.float32), "scale": np.ones(72, np.float32),
        "offset": np.ones(72, np.float32), "depth": rng.normal(size=(1, 5, 5, 72)).astype(np.float32),
        "dense": rng.normal(size=(8, 3, 3, 72)).astype(np.float32),
    }  # fmt: skip

    def loss(p):
        y = ops.batch_norm_train(ops.conv2d(x, p["expand"]), p["scale"], p["offset"], "relu6")
        y = ops.depthwise_conv2d(y, p["depth"], stride=(2, 2), pads=(2, 2, 2, 2))
        y = ops.conv2d(ops.resize_bilinear(ops.hard_swish(y), (20, 20)), p["dense"], pads=(1, 1, 1, 1))
        return (ops.average_pool(y, (3, 3), (1, 1), (1, 1, 1, 1)) ** 2).sum(), ops.moments(y)

    results = []
    for count in (1, 2, 3, 7):
        with blocks.threads(count):
            value, kept, found = ops.value_and_gradients(loss, arrays)
        results.append((value, *(array.tobytes() for array in (*kept, *found.values()))))
    assert len(set(results)) == 1


def test_products_in_blocks(rng):
    a, b = rng.normal(size=(1700, 33)), rng.normal(size=(1700, 9))
    np.testing.assert_allclose(blocks.multiply_rows(a, b[:33]), a @ b[:33], rtol=1e-10, atol=1e-10)
    dx, dw = blocks.multiply_back(a, b, a[:33, :9])
    np.testing.assert_allclose(dx, a @ a[:33, :9], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(dw, a.T @ b, rtol=1e-10, atol=1e-10)
    assert blocks.multiply_back(a, None, a[:33, :9])[1] is None and blocks.multiply_back(a, b, None)[0] is None


def test_without_autograd_one_line_says_what_to_do():
    code = (
        "import sys; sys.modules['autograd'] = None\n"
        "from tinyvad.errors import InputError\n"
        "try:\n    import tinyvad.training.ops\n"
        "except InputError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "training needs autograd: pip install 'tinyvad[train]'\n"

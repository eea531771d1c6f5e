"""A backbone from formulas: no training, no download, no random numbers; nine thousand weights in closed form.

Flows in: an input size. Flows out: a Graph (convolutions with bias, ready to quantise) with taps ``block1``,
``XX
The idea is the scattering transform, a cascade of "wavelet, modulus, average" that keeps what a texture is and
forgets where exactly it lies, written as inverted residual blocks:

* *Wavelets* are derivatives of a Gaussian, sigma 1 on the grid they are applied to. Every block halves the grid,
  so its wavelets are an octave coarser: a Gaussian of a Gaussian is a Gaussian, whose sigma^2 is the sum.
* They are *steered*: the derivative along any angle is a weighted sum of gx and gy (first order, answers to
  edges) or of gxx, gxy and gyy (second order, answers to lines). A depthwise convolution makes the five
  derivatives, a 1x1 convolution turns them. Second order needs three angles; 0, 60 and 120 degrees serve both.
* The *modulus* is split over two layers. A value v leaves a block as the pair relu(v), relu(-v), so rectifying
  loses nothing; the next block's first 1x1 convolution adds the pair, edges and lines, into one modulus an angle.
* *Averages* are the Gaussian itself, applied as the grid is halved.
* *Second order paths*: a modulus is itself a picture, of how much texture there is. It is averaged, and also
  filtered by a Laplacian of Gaussian, which answers where the texture changes.

Colour is three opponent channels, luminance, red-green and blue-yellow; wavelets see luminance only. The values
of a tap lie in [0, 6] (ReLU6); a step of 6 / 255 is half a grey level of luminance. All biases are zero. The
input is normalised with mean 128/255 and std 64/255, so int8 pixels are v - 128, exactly, and padding is mid-grey.

A block; m moduli came in (0, 3, 9)::

    channels in            1x1: merge           7x7 depthwise, stride 2   1x1 + ReLU6: steer, split
    6  L, RG, BY +-        3  L, RG, BY         Gaussian                  6   L, RG, BY +-
                           5  L five times      gx gy gxx gxy gyy         12  edge, line at 3 angles +-
    12 edge, line +-       3  modulus an angle  Gaussian                  3   to the moduli
                           3  the same          Laplacian                 6   second order at 3 angles +-
    6  second order +-     3  modulus an angle  Gaussian                  3   to the moduli
    m  moduli              m  as they are       Gaussian                  m

Sources: Freeman & Adelson, The Design and Use of Steerable Filters (PAMI 1991); Bruna & Mallat, Invariant
Scattering Convolution Networks (PAMI 2013); Burt & Adelson, The Laplacian Pyramid as a Compact Image Code (1983).
"""

from __future__ import annotations

import numpy as np

from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph

MEAN = (128 / 255,) * 3
STD = (64 / 255,) * 3

ANGLES = (0, 1, 2)  # times 60 degrees
OPPONENT = {"L": (1 / 3, 1 / 3, 1 / 3), "RG": (1 / 2, -1 / 2, 0.0), "BY": (1 / 4, 1 / 4, -1 / 2)}
DERIVATIVES = ("gx", "gy", "gxx", "gxy", "gyy")
GAIN = 3.0  # white is 2 after normalisation and 6 in the luminance channel
SECOND_GAIN = 2.0  # a modulus varies less than the picture it comes from

Sum = dict[str, float]  # one channel as a weighted sum of named channels


def build(input_size: int = 128) -> Graph:
    """The filter bank for a (1, input_size, input_size, 3) image normalised with ``MEAN`` and ``STD``."""
    b = GraphBuilder("filter-bank", (1, input_size, input_size, 3))
    x, channels = _stem(b)
    for name in ("block1", "block2", "block3"):
        x, channels = _block(b, x, name, channels)
    return b.finish([x])


def gaussian_derivatives() -> dict[str, np.ndarray]:
    """Gaussian of sigma 1, its first and second derivatives and its Laplacian, each (7, 7) float64.

    The Gaussian sums to 1 and all others to 0: a flat picture answers with its value and with 0. Derivatives of one
    order share a factor, so that they can be steered, with which a step of height 1 answers at most 1; for int8's
    sake the Laplacian has ``SECOND_GAIN`` more.
    """
    y, x = np.mgrid[-3.0:4.0, -3.0:4.0]  # (7, 7)
    g = np.exp(-(x**2 + y**2) / 2)
    g /= g.sum()
    first = {"gx": x * g, "gy": y * g}
    second = {"gxx": (x**2 - 1) * g, "gxy": x * y * g, "gyy": (y**2 - 1) * g}
    for name in ("gxx", "gyy"):  # the cut at 3 sigma leaves a small sum
        second[name] = second[name] - second[name].sum() * g
    laplacian = second["gxx"] + second["gyy"]
    filters = {"g": g, "laplacian": SECOND_GAIN / _largest_answer(laplacian) * laplacian}
    filters |= {name: window / _largest_answer(first["gx"]) for name, window in first.items()}
    filters |= {name: window / _largest_answer(second["gxx"]) for name, window in second.items()}
    return filters


def _largest_answer(window: np.ndarray) -> float:
    """The most a zero-mean filter can answer to a picture of range 1: the sum of its positive weights."""
    return float(np.abs(window).sum() / 2)


def responses() -> dict[str, Sum]:
    """What the stem and every block answer afresh, as sums of filtered channels, before the split into signs.

    ``L``, ``RG``, ``BY`` pass; ``edge`` and ``line`` at each angle are steered from the luminance's derivatives.
    """
    sums: dict[str, Sum] = {colour: {colour: 1.0} for colour in OPPONENT}
    for k in ANGLES:
        cos, sin = np.cos(np.pi * k / 3), np.sin(np.pi * k / 3)
        sums[f"edge{k}"] = {"gx": cos, "gy": sin}
        sums[f"line{k}"] = {"gxx": cos**2, "gxy": 2 * sin * cos, "gyy": sin**2}
    return sums


def _stem(b: GraphBuilder) -> tuple[str, list[str]]:
    """The first octave as one 7x7 convolution. Returns its tensor and the names of its channels."""
    filters = gaussian_derivatives()
    planes = {colour: np.multiply.outer(filters["g"], rgb) for colour, rgb in OPPONENT.items()}  # each (7, 7, 3)
    planes |= {name: np.multiply.outer(filters[name], OPPONENT["L"]) for name in DERIVATIVES}
    outputs = _split(responses())
    sums = [sum(weight * planes[key] for key, weight in terms.items()) for terms in outputs.values()]
    weights = GAIN * np.stack(sums)  # (18, 7, 7, 3)
    return _convolution(b, "conv2d", b.input, "stem", weights, stride=2, activation="relu6"), list(outputs)


def _block(b: GraphBuilder, x: str, name: str, channels: list[str]) -> tuple[str, list[str]]:
    """One octave further, see the table at the top. Returns the tap and the names of its channels."""
    luminance: Sum = {"L+": 1, "L-": -1}
    chosen: dict[str, tuple[Sum, str]] = {}  # filtered channel: (sum of the channels that come in, filter)
    chosen |= {colour: ({f"{colour}+": 1, f"{colour}-": -1}, "g") for colour in OPPONENT}
    chosen |= {derivative: (luminance, derivative) for derivative in DERIVATIVES}
    for k in ANGLES:
        modulus: Sum = {f"{kind}{k}{sign}": 0.5 for kind in ("edge", "line") for sign in "+-"}
        chosen[f"modulus {name}.{k}"] = (modulus, "g")
        chosen[f"laplacian{k}"] = (modulus, "laplacian")
        if f"second{k}+" in channels:
            chosen[f"modulus second {name}.{k}"] = ({f"second{k}+": 1, f"second{k}-": 1}, "g")
    chosen |= {channel: ({channel: 1}, "g") for channel in channels if channel.startswith("modulus")}

    filters = gaussian_derivatives()
    merge = _mix([terms for terms, _ in chosen.values()], channels)
    windows = np.stack([filters[key] for _, key in chosen.values()], axis=-1)[None]  # (1, 7, 7, len(chosen))
    outputs = _split(responses() | {f"second{k}": {f"laplacian{k}": 1.0} for k in ANGLES})
    outputs |= {key: {key: 1.0} for key in chosen if key.startswith("modulus")}
    x = _convolution(b, "conv2d", x, f"{name}.merge", merge)
    x = _convolution(b, "depthwise_conv2d", x, f"{name}.filter", windows, stride=2)
    x = _convolution(b, "conv2d", x, name, _mix(list(outputs.values()), list(chosen)), activation="relu6")
    return x, list(outputs)


def _split(sums: dict[str, Sum]) -> dict[str, Sum]:
    """Every sum twice, as it is and negated, so that a ReLU after it keeps the whole value as a pair."""
    return {
        name + sign: {key: factor * weight for key, weight in terms.items()}
        for name, terms in sums.items()
        for sign, factor in (("+", 1), ("-", -1))
    }


def _mix(sums: list[Sum], channels: list[str]) -> np.ndarray:
    """Sums of named channels as the weights of a 1x1 convolution, (len(sums), 1, 1, len(channels))."""
    return np.array([[terms.get(channel, 0.0) for channel in channels] for terms in sums])[:, None, None, :]


def _convolution(
    b: GraphBuilder, op: str, x: str, name: str, weights: np.ndarray, stride: int = 1, activation: str = "none"
) -> str:
    """Append a convolution with these weights, zero bias and symmetric padding."""
    channels = weights.shape[0] if op == "conv2d" else weights.shape[3]
    w = b.constant(f"{name}.weights", weights.astype(np.float32))
    bias = b.constant(f"{name}.bias", np.zeros(channels, np.float32))
    geometry = {"stride": (stride, stride), "pads": (weights.shape[1] // 2,) * 4, "dilation": (1, 1)}
    return b.add(op, [x, w, bias], name, **geometry, activation=activation)

"""Items: rows by index, made once. Oracle: onnxruntime."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tinyvad.backbones.source import open_backbone
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.passes import truncate
from tinyvad.training.items import ArrayItems, ChosenItems, FrozenItems, JoinedItems, numpy_engine
from tinyvad.training.student import student_layers, tail

SIZE = 64


@pytest.fixture(scope="module")
def parts():
    """Trunk, targets and the whole of a small network."""
    pytest.importorskip("autograd")
    graph = open_backbone("mcunet-in1").graph_at(SIZE)
    shared, layers = student_layers(graph)
    return truncate(graph, [shared]), tail(graph, layers, shared), truncate(graph, [shared, *layers])


def test_rows_are_the_networks_maps_of_each_image(parts, rng):
    trunk, targets, whole = parts
    images = rng.normal(size=(5, SIZE, SIZE, 3)).astype(np.float32)
    items = FrozenItems(trunk, targets, images)
    assert len(items) == 5
    assert items.stored == 1
    chosen = np.array([3, 0, 3])
    expected = OnnxEngine(to_onnx(whole).SerializeToString()).features(images[chosen])
    found = items.take(chosen)
    assert items.nbytes == sum(4 * 5 * array[0].size for array in found)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_without_a_trunk_the_image_itself_is_stored(parts, rng):
    whole = parts[2]
    images = rng.normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    items = FrozenItems(None, whole, iter(images))
    assert items.take(np.arange(3))[0].tobytes() == images.tobytes()
    assert len(items.take(np.arange(3))) == 1 + len(whole.outputs)
    assert len(FrozenItems(None, None, images).take(np.array([2]))) == 1


def test_each_frozen_part_runs_once_an_image(parts, rng):
    calls = {graph.name + graph.outputs[0]: 0 for graph in parts[:2]}

    def counting(graph):
        run = numpy_engine(graph)

        def counted(inputs):
            assert len(inputs[0]) == 1
            calls[graph.name + graph.outputs[0]] += 1
            return run(inputs)

        return counted

    items = FrozenItems(*parts[:2], rng.normal(size=(4, SIZE, SIZE, 3)).astype(np.float32), counting)
    for _ in range(3):
        items.take(np.arange(4))
    assert list(calls.values()) == [4, 4]


def test_a_row_depends_on_its_image_alone(parts, rng):
    """So that replaying stored maps equals replaying the images, bit for bit."""
    images = rng.normal(size=(4, SIZE, SIZE, 3)).astype(np.float32)
    together = FrozenItems(*parts[:2], images).take(np.arange(4))
    for i in range(4):
        alone = FrozenItems(*parts[:2], images[i : i + 1]).take(np.array([0]))
        assert all(a.tobytes() == b[i : i + 1].tobytes() for a, b in zip(alone, together, strict=True))
    stored = FrozenItems(None, parts[1], together[0]).take(np.arange(4))  # targets from the stored maps
    assert all(a.tobytes() == b.tobytes() for a, b in zip(stored, together, strict=True))


def test_memory_stays_that_of_an_image(rng):
    image = rng.normal(size=(256, 256, 3)).astype(np.float32)  # 0.8 MB
    tracemalloc.start()
    items = FrozenItems(None, None, (image + i for i in range(40)))
    row = items.take(np.array([39]))[0][0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(row, image + 39)
    assert items.nbytes == 40 * image.nbytes
    assert peak < 8 * image.nbytes


@pytest.mark.parametrize(("images", "message"), [
    ([], "no good images to train on"),
    ([np.zeros((8, 8, 3)), np.zeros((9, 9, 3))], "image 1 gives maps .*use one image size"),
    ([np.zeros((8, 8, 3)), np.full((8, 8, 3), np.nan)], "image 1 gives values that are not finite"),
])  # fmt: skip
def test_bad_images_are_told(images, message):
    with pytest.raises(InputError, match=message):
        FrozenItems(None, None, images)


def test_items_of_items(rng):
    first, second = (ArrayItems([rng.normal(size=(n, 2, 3)), rng.normal(size=(n, 4))]) for n in (5, 3))
    both = JoinedItems([first, second])
    assert len(both) == 8
    order = np.array([7, 0, 5, 4, 0])
    for i, array in enumerate(both.take(order)):
        assert np.array_equal(array, np.concatenate([first.arrays[i], second.arrays[i]])[order])
    some = ChosenItems(both, np.array([6, 1]))
    assert len(some) == 2
    assert np.array_equal(some.take(np.array([1, 0]))[0], both.take(np.array([1, 6]))[0])
    with pytest.raises(InputError, match="one row an image"):
        ArrayItems([np.zeros((2, 1)), np.zeros((3, 1))])

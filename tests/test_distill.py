"""Distillation: Graph -> Keras -> Graph keeps every value, views and resumed trainings repeat, errors are one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tinyvad.backbones import BACKBONES, get_backbone
from tinyvad.backbones.assign import random_weights
from tinyvad.backbones.blocks import conv_bn
from tinyvad.backbones.source import open_backbone
from tinyvad.cli import main
from tinyvad.distill import finish, readout, train
from tinyvad.distill import teacher as teaching
from tinyvad.distill.picture import loss_picture
from tinyvad.distill.readout import explained
from tinyvad.distill.views import HELD_OUT_SHARE, Pictures, views
from tinyvad.engines.onnx import OnnxEngine
from tinyvad.errors import InputError
from tinyvad.export.onnx import to_onnx
from tinyvad.graph.builder import GraphBuilder
from tinyvad.graph.ir import Graph
from tinyvad.graph.passes import normalise, truncate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

needs_keras = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import keras, tensorflow"], capture_output=True).returncode != 0,
    reason="Keras with TensorFlow is not installed: pip install 'tinyvad[tensorflow]'",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(6):
        blocks = rng.integers(0, 256, (7, 9 + i, 3), np.uint8)
        Image.fromarray(blocks).resize((90, 70), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small float network as .onnx: layers a, b, c at strides 4, 8, 16, batch norms folded."""
    b = GraphBuilder("teacher", (1, 64, 64, 3))
    rng = np.random.default_rng(3)
    x, channels = b.input, 3
    for i, (name, out) in enumerate([("stem", 8), ("a", 8), ("b", 10), ("c", 12)]):
        weights = b.constant(f"w{i}", rng.normal(0, (2 / (9 * channels)) ** 0.5, (out, 3, 3, channels)).astype(np.float32))
        bias = b.constant(f"b{i}", rng.normal(0, 0.1, out).astype(np.float32))
        x = b.add("conv2d", [x, weights, bias], name, stride=(2, 2), pads=(1, 1, 1, 1), dilation=(1, 1), activation="relu6")
        channels = out
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    to_onnx(b.finish(["a", "b", "c"]), path)
    return path


# ------------------------------------------------------------------------------------------------ Graph <-> Keras


@needs_keras
@pytest.mark.parametrize("name", ["mcunet-in0", "mobilenet-v3-small", "phinet-1.2-0.5-6"])
def test_keras_computes_what_onnxruntime_computes(name: str) -> None:
    from tinyvad.distill.keras_graph import from_keras, to_keras

    info = get_backbone(name)
    definition = truncate(random_weights(info.build(input_size=64), 1), list(info.layers))
    model = to_keras(definition)
    # values that a training leaves: statistics and affine parts that are not 0 and 1
    rng = np.random.default_rng(5)
    for layer in model.layers:
        if layer.__class__.__name__ == "BatchNormalization":
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(np.float32) for w in layer.get_weights()])
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    trained = from_keras(model, definition)
    engine = OnnxEngine(to_onnx(normalise(trained)).SerializeToString(), 1)
    for ours, theirs in zip(model.predict_on_batch(images), engine.features(images)):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@needs_keras
def test_ops_of_no_definition_are_refused() -> None:
    from tinyvad.distill.keras_graph import to_keras

    b = GraphBuilder("net", (1, 8, 8, 3))
    graph = b.finish([b.add("max_pool", [b.input], "pool", kernel=(2, 2), stride=(2, 2), pads=(0, 0, 0, 0))])
    with pytest.raises(InputError, match="max_pool -> pool cannot be trained"):
        to_keras(graph)


# ------------------------------------------------------------------------------------------------ views


def test_views_depend_on_their_key_alone(photos: Path) -> None:
    pictures, again = (Pictures([photos], 4, 0) for _ in range(2))
    first = views(pictures, (0, 1, 2), 6, 40)
    views(again, (9, 9, 9), 5, 40)  # fills the cache in another order
    assert first.shape == (6, 40, 40, 3) and first.dtype == np.uint8
    assert np.array_equal(first, views(again, (0, 1, 2), 6, 40))
    assert not np.array_equal(first, views(again, (0, 1, 3), 6, 40))


def test_held_out_pictures_are_never_trained_on(photos: Path) -> None:
    training, held_out = Pictures([photos], 100, 0).split()
    assert not set(training.paths) & set(held_out.paths) and not set(training.seeds) & set(held_out.seeds)
    assert len(training) + len(held_out) == 106
    assert len(held_out.seeds) == -(-100 // HELD_OUT_SHARE)


def test_unreadable_files_are_named_and_others_take_their_place(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    pictures = Pictures([photos, tmp_path], 0, 0)
    assert views(pictures, (0,), 40, 32).shape == (40, 32, 32, 3)
    assert list(pictures.skipped) == [tmp_path / "broken.png"]
    with pytest.raises(InputError, match=r"none of the images can be read: .*broken\.png"):
        views(Pictures([tmp_path], 0, 0), (0,), 1, 32)


def test_one_readable_file_among_many_is_found(photos: Path, tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}.png").write_bytes(b"")
    (tmp_path / "photo.png").write_bytes((photos / "0.png").read_bytes())
    assert views(Pictures([tmp_path], 0, 0), (0,), 3, 32).shape == (3, 32, 32, 3)


def test_a_file_of_two_folders_counts_once(photos: Path) -> None:
    twice = Pictures([photos, photos, photos / ".." / photos.name], 0, 0)
    assert len(twice) == 6 and twice.paths == Pictures([photos], 0, 0).paths


def test_digests_tell_changed_files(photos: Path, tmp_path: Path) -> None:
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = Pictures([tmp_path], 0, 0).digest()
    assert first.startswith("6 files (") and first == Pictures([tmp_path], 7, 1).digest()
    with (tmp_path / "3.png").open("ab") as file:
        file.write(b" ")
    assert Pictures([tmp_path], 0, 0).digest() != first


def test_the_cache_counts_what_pillow_keeps(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyvad.distill.views.CACHE_BYTES", 2 * 90 * 70 * 4)
    pictures = Pictures([photos], 0, 0)
    views(pictures, (0,), 20, 32)
    assert len(pictures._kept) == 2 and pictures._bytes == 2 * 90 * 70 * 4


# ------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("kind", ["channel", "half", "whitened"])
def test_normalised_targets_have_mean_0_and_mean_square_1(kind: str) -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    vectors = (rng.normal(size=(20000, 5)) * [1, 5, 0.5, 3, 2]) @ turn + 7
    target = teaching.normalisation(vectors, kind)(vectors)
    np.testing.assert_allclose(target.mean(0), 0, atol=1e-3)
    assert np.square(target).mean() == pytest.approx(1, rel=1e-3)
    covariance = np.cov(target.T)
    if kind == "channel":
        np.testing.assert_allclose(covariance.diagonal(), 1, rtol=0.05)
    else:  # rotated into principal directions
        np.testing.assert_allclose(covariance - np.diag(covariance.diagonal()), 0, atol=1e-3)
    if kind == "half":  # spreads are the square roots of the vectors' own, up to one factor
        spread = np.linalg.eigvalsh(np.cov(vectors.T))
        ratio = covariance.diagonal() ** 2 / spread
        np.testing.assert_allclose(ratio, ratio[-1], rtol=0.05)


def test_targets_of_several_teachers_are_joined(teacher: Path) -> None:
    once = teaching.Teachers([(str(teacher), None)], 64, [(16, 16), (8, 8), (4, 4)], 1)
    twice = teaching.Teachers([(str(teacher), None), (str(teacher), ["b"])], 64, [(16, 16), (8, 8), (4, 4)], 1)
    assert once.channels == [8, 10, 12] and twice.channels == [8, 20, 12]
    assert twice.names[1] == ["teacher:b", "teacher:b"]
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for alone, joined in zip(once.maps(images), twice.maps(images)):
        assert np.array_equal(alone, joined[..., : alone.shape[3]])


def test_a_network_reads_off_itself_and_noise_does_not(photos: Path, teacher: Path) -> None:
    teachers = teaching.Teachers([(str(teacher), None)], 64, [(16, 16), (8, 8), (4, 4)], 1)
    training, held_out = Pictures([photos], 40, 0).split()
    rng = np.random.default_rng(0)
    turn = [rng.normal(size=(c, c)) for c in teachers.channels]

    def itself(images: np.ndarray) -> list[np.ndarray]:  # in any other basis
        return [maps @ matrix for maps, matrix in zip(teachers.maps(images), turn)]

    def noise(images: np.ndarray) -> list[np.ndarray]:
        return [rng.normal(size=maps.shape) for maps in teachers.maps(images)]

    assert min(explained(itself, teachers, training, held_out, 64)) > 0.95  # but for the clipped tails
    assert max(explained(noise, teachers, training, held_out, 64)) < 0.02


# ------------------------------------------------------------------------------------------------ training


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of four layers called tiny, and few views to measure by, so that a training takes a second."""

    def build(input_size: int) -> Graph:
        b = GraphBuilder("tiny", (1, input_size, input_size, 3))
        x = b.input
        for name, channels in (("stem", 8), ("a", 8), ("b", 8), ("c", 8)):
            x = conv_bn(b, x, name, channels, kernel=3, stride=2)
        return b.finish([x])

    info = dataclasses.replace(get_backbone("mcunet-in0"), name="tiny", build=build, layers=("a", "b", "c"))
    monkeypatch.setitem(BACKBONES, "tiny", info)
    monkeypatch.setattr(train, "STATISTICS_VIEWS", 16)
    monkeypatch.setattr(readout, "FIT_VIEWS", 32)
    monkeypatch.setattr(readout, "HELD_OUT_VIEWS", 32)
    monkeypatch.setattr(finish, "CHECK_VIEWS", 8)


def flags(teacher: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [
        "distill", "--teacher", str(teacher), "--layers", "a,b,c", "--student", "tiny", "--images", str(photos),
        "--generated", "2", "--image-size", "64", "--batch-size", "4", "--steps", "12", "--out", str(out), *more,
    ]  # fmt: skip


@needs_keras
def test_distil_from_the_command_line(small: None, teacher: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.npz"
    result = CliRunner().invoke(main, flags(teacher, photos, out, "--export-quantised-check", "--note", "MIT", "--json"))
    assert result.exit_code == 0, result.output
    card = json.loads(result.stdout)
    assert card["architecture"] == "tiny" and card["licence"] == ["MIT"]
    assert [layer["stride"] for layer in card["layers"]] == [4, 8, 16]
    assert all(layer["int8_snr_db"] > 15 for layer in card["layers"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student.npz", "student.svg", "student.toml"]
    with np.load(out) as arrays:
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
        assert sum(array.size for array in arrays.values()) == card["parameters"]
    again = CliRunner().invoke(main, flags(teacher, photos, out))
    assert again.exit_code == 2 and "exists; give another name" in again.output
    trained = open_backbone("tiny", weights=out)
    assert trained.layers == ("a", "b", "c") and not trained.random


@needs_keras
def test_a_stopped_training_goes_on_to_the_same_weights(
    small: None, teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = train.Recipe(((str(teacher), None),), "tiny", None, (str(photos),), 0, 64, 12, 4)
    monkeypatch.setattr(train, "HISTORY_POINTS", 3)  # each the mean of 4 steps
    stops = [1, 8, 11]

    def stopped(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == stops[0]:
            del stops[0]
            raise InterruptedError

    whole = train.distil(recipe, tmp_path / "whole.checkpoint")
    while stops:
        with pytest.raises(InterruptedError):
            train.distil(recipe, tmp_path / "stopped.checkpoint", every=0, progress=stopped)
    again = train.distil(recipe, tmp_path / "stopped.checkpoint")
    assert [point[0] for point in again.history] == [4, 8, 12]
    np.testing.assert_allclose(again.history, whole.history, rtol=1e-3)
    for name, values in whole.definition.constants.items():
        np.testing.assert_allclose(again.definition.constants[name], values, rtol=2e-3, atol=2e-4)


@needs_keras
def test_a_single_layer_at_an_odd_size(small: None, teacher: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "student.npz"
    more = ("--student-layers", "c", "--image-size", "100", "--note", "not UTF-8: \udc80, DEL: \x7f")
    given = flags(teacher, photos, out, *more)
    given[given.index("a,b,c")] = "c"
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 0, result.output
    card = tomllib.loads(out.with_suffix(".toml").read_text(encoding="utf-8"))
    assert [(layer["name"], layer["stride"]) for layer in card["layers"]] == [("c", 16)]  # of 7 cells
    assert card["licence"] == ["not UTF-8: ?, DEL: \x7f"] and len(card["training"]["final_loss"]) == 1


@needs_keras
def test_training_lowers_the_loss(small: None, teacher: Path, photos: Path, tmp_path: Path) -> None:
    recipe = train.Recipe(((str(teacher), None),), "tiny", None, (str(photos),), 0, 64, 60, 8)
    history = np.array(train.distil(recipe, tmp_path / "x.checkpoint").history)
    assert (history[-10:, 1:].mean(0) < 0.8 * history[:3, 1:].mean(0)).all()


@needs_keras
def test_checkpoints_of_another_training_are_refused(small: None, teacher: Path, photos: Path, tmp_path: Path) -> None:
    recipe = train.Recipe(((str(teacher), None),), "tiny", None, (str(photos),), 0, 64, 2, 4)
    checkpoint = tmp_path / "x.checkpoint"
    train.distil(recipe, checkpoint, every=0)
    before = checkpoint.read_bytes()
    with pytest.raises(InputError, match=r"x\.checkpoint is of a training with seed 0, not 1"):
        train.distil(dataclasses.replace(recipe, seed=1), checkpoint)
    assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:100])
    with pytest.raises(InputError, match=r"x\.checkpoint is no checkpoint"):
        train.distil(recipe, checkpoint)
    np.save(checkpoint.open("wb"), np.zeros(3))
    with pytest.raises(InputError, match=r"x\.checkpoint is no checkpoint"):
        train.distil(recipe, checkpoint)


@needs_keras
def test_checkpoints_of_other_files_or_another_network_are_refused(
    small: None, teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, taught, checkpoint = tmp_path / "photos", tmp_path / "teacher.onnx", tmp_path / "x.checkpoint"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    taught.write_bytes(teacher.read_bytes())
    recipe = train.Recipe(((str(taught), None),), "tiny", None, (str(folder),), 0, 64, 2, 4)
    train.distil(recipe, checkpoint)
    (folder / "7.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"training with image files 6 files \(.*\), not 7 files"):
        train.distil(recipe, checkpoint)
    (folder / "7.png").unlink()
    taught.write_bytes(teacher.read_bytes() + b"\x72\x00")  # an empty field of metadata more
    with pytest.raises(InputError, match="training with teacher files "):
        train.distil(recipe, checkpoint)
    taught.write_bytes(teacher.read_bytes())
    monkeypatch.setitem(BACKBONES, "tiny", dataclasses.replace(get_backbone("mcunet-in0"), name="tiny"))
    with pytest.raises(InputError, match=r"x\.checkpoint is of another version of tiny"):
        train.distil(recipe, checkpoint)


@needs_keras
def test_no_training_without_a_readable_held_out_image(small: None, teacher: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(b"broken")
    (tmp_path / "photos" / "1.png").write_bytes((photos / "1.png").read_bytes())
    recipe = train.Recipe(((str(teacher), None),), "tiny", None, (str(tmp_path / "photos"),), 0, 64, 2, 4)
    with pytest.raises(InputError, match=r"none of the images can be read: .*0\.png"):
        train.distil(recipe, tmp_path / "x.checkpoint")
    assert not (tmp_path / "x.checkpoint").exists()


@needs_keras
def test_weights_are_written_last_and_nothing_of_others_is_replaced(
    small: None, teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tinyvad.npz"
    (tmp_path / "tinyvad.toml").write_text("a project")
    result = CliRunner().invoke(main, flags(teacher, photos, out))
    assert result.exit_code == 2 and "tinyvad.toml exists" in result.output
    (tmp_path / "tinyvad.toml").unlink()

    def full(path: Path, data: bytes) -> None:
        raise InputError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_bytes", full)
        result = CliRunner().invoke(main, flags(teacher, photos, out))
    assert result.exit_code == 2 and "No space left" in result.output and not out.exists()
    result = CliRunner().invoke(main, flags(teacher, photos, out))  # goes on from the checkpoint of the last step
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tinyvad.npz", "tinyvad.svg", "tinyvad.toml"]


@needs_keras
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    small: None, teacher: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = train.Recipe(((str(teacher), None),), "tiny", None, (str(photos),), 0, 64, 3, 4)
    checkpoint = tmp_path / "x.checkpoint"
    train.distil(recipe, checkpoint, every=0)
    before = checkpoint.read_bytes()
    state = train._State(recipe, {}, checkpoint, [])

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tinyvad.files.os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        state.save()
    assert checkpoint.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.checkpoint"]


@needs_keras
@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (("--layers", "a,b,zzz"), "no layer zzz"),
        (("--layers", "a,b"), "no teacher layer has maps of 4x4 like one of the student's at 64 px"),
        (("--layers", "stem,a,b,c"), "layer stem of teacher is 32x32, but the student's layers are 16x16, 8x8, 4x4"),
        (("--student", "nonesuch"), "no backbone called nonesuch"),
        (("--student-layers", "a,b,b"), "given twice"),
        (("--teacher", "absent.onnx"), "absent.onnx"),
        (("--images", "absent"), "absent is not a folder"),
        (("--loss", "l1"), "--loss is l1, must be one of"),
        (("--seed", "4294967296"), "--seed is 4294967296, must be 0 to 4294967295"),
        (("--steps", "0"), "--steps is 0, must be at least 1"),
        (("--image-size", "16"), "--image-size is 16, must be 32 to 512"),
        (("--out", "weights.bin"), "give a name that ends in .npz"),
    ],
)
def test_wrong_use_is_one_line(
    small: None, teacher: Path, photos: Path, tmp_path: Path, changed: tuple[str, str], line: str
) -> None:
    given = [*flags(teacher, photos, tmp_path / "out" / "s.npz")]
    given = [*given, *changed] if changed[0] not in given else given
    given[given.index(changed[0]) + 1] = changed[1]
    result = CliRunner().invoke(main, given)
    assert result.exit_code == 2 and line in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_one_line(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images"):
        Pictures([tmp_path], 0, 0)
    with pytest.raises(InputError, match="no images to train on: give --images DIR, or --generated N"):
        Pictures([], 0, 0)


def test_loss_picture_names_its_layers() -> None:
    svg = loss_picture("net", ("a<b", "c"), [[i + 1, 1 / (i + 1), 0.5] for i in range(40)])
    assert svg.startswith("<svg") and "a&lt;b" in svg and svg.count("<polyline") == 4 and "nan" not in svg

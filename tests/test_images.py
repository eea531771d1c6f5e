"""Reading images: every mode to RGB, every broken file to one line, the input tables, and streaming."""

from __future__ import annotations

import io
import json
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyvad.errors import InputError
from tinyvad.images import (
    Preprocessing,
    apply_table,
    frame_to_rgb,
    input_table,
    load_images,
    read_image,
    read_mask,
    rgb_to_frame,
)

SMALL = Preprocessing(8, 8)


def png_bytes(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand: ``rows`` are the unfiltered pixel rows, big-endian."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[k : k + stride] for k in range(0, len(rows), stride)) if stride else b""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(filtered))
        + chunk(b"IEND", b"")
    )


def saved(folder: Path, image: Image.Image | np.ndarray, name: str = "x.png", **options: object) -> Path:
    path = folder / name
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.fixture
def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.TIFF", "x.webp"])
def test_lossless_files_come_back_exactly(tmp_path: Path, picture: np.ndarray, name: str) -> None:
    result = read_image(saved(tmp_path, picture, name, **({"lossless": True} if name == "x.webp" else {})))
    assert result.dtype == np.uint8 and result.flags.c_contiguous and np.array_equal(result, picture)


def test_jpeg_and_one_pixel(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 30, 90), np.uint8)
    assert np.abs(read_image(saved(tmp_path, flat, "x.jpg", quality=95)).astype(int) - flat).max() <= 3
    assert read_image(saved(tmp_path, flat[:1, :1])).tolist() == [[[200, 30, 90]]]


UPRIGHT = {  # what undoes each EXIF orientation, from the table of the standard (CIPA DC-008, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_exif_orientation(tmp_path: Path, picture: np.ndarray, orientation: int, name: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    expected = UPRIGHT[orientation](picture)
    assert np.array_equal(read_image(saved(tmp_path, picture, name, exif=exif)), expected)
    mask = picture[:, :, 0] > 127
    assert np.array_equal(read_mask(saved(tmp_path, mask, name, exif=exif)), UPRIGHT[orientation](mask))


def test_grey_is_replicated(tmp_path: Path, picture: np.ndarray) -> None:
    grey = picture[:, :, 0]
    assert np.array_equal(read_image(saved(tmp_path, grey)), np.stack([grey] * 3, 2))
    bits = grey > 127
    assert np.array_equal(read_image(saved(tmp_path, bits)), np.stack([bits * np.uint8(255)] * 3, 2))


def test_transparency_is_composited_over_black(tmp_path: Path, rng: np.random.Generator) -> None:
    rgba = rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    rgba[0, :3, 3] = 0, 255, 128
    over_black = (rgba[:, :, :3].astype(int) * rgba[:, :, 3:] + 127) // 255
    for name in ("x.png", "x.tif"):
        assert np.array_equal(read_image(saved(tmp_path, rgba, name)), over_black)
    grey = Image.fromarray(rgba[:, :, ::3].copy(), "LA")
    assert np.array_equal(read_image(saved(tmp_path, grey)), over_black[:, :, :1].repeat(3, axis=2))


def test_palettes(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 10, 20, 30, 200, 100, 50])
    assert read_image(saved(tmp_path, image)).tolist() == [[[255, 0, 0], [10, 20, 30], [200, 100, 50]]]
    expected = [[[0, 0, 0], [10, 20, 30], [100, 50, 25]]]
    assert read_image(saved(tmp_path, image, transparency=bytes([0, 255, 128]))).tolist() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(saved(tmp_path, image, transparency=1)).tolist()[0][1] == [0, 0, 0]


def test_a_transparent_colour_is_black(tmp_path: Path) -> None:
    grey = saved(tmp_path, np.array([[10, 200]], np.uint8), transparency=200)
    assert read_image(grey)[0, :, 0].tolist() == [10, 0]
    rgb = saved(tmp_path, np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), transparency=(4, 5, 6))
    assert read_image(rgb).tolist() == [[[1, 2, 3], [0, 0, 0]]]


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert read_image(saved(tmp_path, image, "x.tif")).tolist() == [[[255, 0, 0]]]
    assert (np.abs(read_image(saved(tmp_path, image, "x.jpg", quality=100))[0, 0].astype(int) - [255, 0, 0]) <= 2).all()


WIDE = np.array([[0, 255, 256, 4095, 4096, 65535]], np.uint16)


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize(
    ("depth", "expected"), [(16, [0, 0, 1, 15, 16, 255]), (12, [0, 15, 16, 255, 255, 255]), (8, [0] + [255] * 5)]
)
def test_sixteen_bit_grey_is_shifted(tmp_path: Path, name: str, depth: int, expected: list[int]) -> None:
    result = read_image(saved(tmp_path, WIDE, name), bit_depth=depth)
    assert np.array_equal(result, np.array([expected]).T.reshape(1, 6, 1).repeat(3, axis=2))


def test_sixteen_bit_grey_in_other_dresses(tmp_path: Path) -> None:
    expected = [0, 0, 1, 15, 16, 255]
    wide = saved(tmp_path, WIDE.astype(np.int32), "x.tif")
    assert Image.open(wide).mode == "I" and read_image(wide)[0, :, 0].tolist() == expected
    big_endian = tmp_path / "big.tif"
    tags = [(256, 6), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 12)]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    ifd = struct.pack(">H", len(tags)) + entries + b"\0" * 4
    big_endian.write_bytes(b"MM\0*" + struct.pack(">I", 20) + WIDE.astype(">u2").tobytes() + ifd)
    assert Image.open(big_endian).mode == "I;16B" and read_image(big_endian)[0, :, 0].tolist() == expected
    by_hand = tmp_path / "hand.png"
    by_hand.write_bytes(png_bytes(6, 1, 16, 0, WIDE.astype(">u2").tobytes()))
    assert read_image(by_hand)[0, :, 0].tolist() == expected
    for values in ([[-1, 5]], [[0, 65536]]):
        with pytest.raises(InputError, match="not 16 bits"):
            read_image(saved(tmp_path, np.array(values, np.int32), "x.tif"))


def test_sixteen_bit_colour_keeps_the_upper_bits_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(1, 1, 16, 2, struct.pack(">HHH", 0x1280, 0xFF00, 0x00FF)))
    assert read_image(path).tolist() == [[[0x12, 0xFF, 0x00]]]
    with pytest.raises(InputError, match=r"x\.png: 16-bit colour.*bit_depth 16, not 12"):
        read_image(path, bit_depth=12)


@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.tif"])
def test_first_of_several_frames(tmp_path: Path, picture: np.ndarray, name: str) -> None:
    other = Image.fromarray(255 - picture)
    options = {"lossless": True} if name == "x.webp" else {}
    path = saved(tmp_path, picture, name, save_all=True, append_images=[other], **options)
    assert np.array_equal(read_image(path), picture)


def error_line(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    with pytest.raises(InputError):
        read_mask(path)
    return message


def test_floats_are_refused(tmp_path: Path) -> None:
    assert "floats" in error_line(saved(tmp_path, np.zeros((2, 2), np.float32), "x.tif"))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.tif", "x.webp"])
def test_truncated_files(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    path = saved(tmp_path, rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), name)
    whole = path.read_bytes()
    for share in (0.05, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        error_line(path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(InputError, match="No such file"):
        read_image(path)
    path.write_text("no image\n")
    assert "is not a PNG, JPEG" in error_line(path)
    path.write_bytes(b"")
    assert "0 bytes" in error_line(path)
    Image.new("RGB", (4, 4)).save(path, "GIF")  # decoders that nobody asked for stay closed
    assert "is not a PNG, JPEG" in error_line(path)
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "cannot read" in error_line(folder)


@pytest.mark.parametrize("size", [(20_000, 20_000), (16_385, 1), (1, 16_385), (10_001, 10_000), (2**31 - 1, 2**31 - 1)])
def test_too_large_is_seen_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_bytes(*size, 8, 2, b""))  # only a header: decoding would fail in another way
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "16384 pixels a side or 100 000 000 in all" in error_line(path)


def test_large_but_allowed_images_do_not_warn(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_bytes(10_000, 10_000, 8, 2, b""))  # above Pillow's own limit of 89 million
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "cannot decode" in error_line(path)  # the size is fine, the missing pixels are not
    assert read_image(saved(tmp_path, np.zeros((1, 16_384), np.uint8))).shape == (1, 16_384, 3)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, np.zeros((2, 2), np.uint8))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything

        def refuse(self: Path, mode: str) -> io.BytesIO:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in error_line(path)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]), st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_damaged_bytes_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, damages: int
) -> None:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for _ in range(damages):
        data[rng.integers(len(data))] = rng.integers(256)
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow on odd TIFF tags
        try:
            assert read_image(path).dtype == np.uint8
        except InputError as error:
            assert "damaged" in str(error) and "\n" not in str(error)


def test_masks(tmp_path: Path, rng: np.random.Generator) -> None:
    truth = rng.random((16, 24)) < 0.5
    for values in (np.uint8(255), np.uint8(1), rng.integers(1, 10, truth.shape, dtype=np.uint8)):
        assert np.array_equal(read_mask(saved(tmp_path, truth * values)), truth)
    assert np.array_equal(read_mask(saved(tmp_path, truth)), truth)
    assert np.array_equal(read_mask(saved(tmp_path, truth * np.uint16(3), "x.tif")), truth)
    painted = np.full((*truth.shape, 4), 200, np.uint8)  # drawn on a transparent layer
    painted[:, :, 3] = truth * 255
    assert np.array_equal(read_mask(saved(tmp_path, painted)), truth)
    palette = Image.fromarray(truth.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 0, 200, 0])
    assert np.array_equal(read_mask(saved(tmp_path, palette)), truth)


def test_jpeg_masks_ignore_ringing(tmp_path: Path) -> None:
    truth = np.zeros((64, 64), bool)
    truth[20:40, 10:30] = True
    path = saved(tmp_path, truth * np.uint8(255), "x.jpg", quality=60)
    assert (np.asarray(Image.open(path))[~truth] != 0).any()  # there is ringing
    assert np.array_equal(read_mask(path), truth)


def test_table_of_the_identity() -> None:
    table = input_table((0, 0, 0), (1, 1, 1), 1 / 255, -128)
    assert table.shape == (3, 256) and table.dtype == np.int8
    assert (table == np.arange(256) - 128).all()


def test_table_rounds_halves_away_from_zero_and_clips() -> None:
    # at scale 2: pixel 255 is 0.5 with mean 0, pixel 0 is -0.5 with mean 1
    assert input_table((0, 1, 0), (1, 1, 1), 2.0, 0)[:2, [0, 255]].tolist() == [[0, 1], [-1, 0]]
    table = input_table((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 200, 3)
    assert table[0, 0] == -128 and table[0, 255] == 127 and table[0].min() == -128
    # 1/2 steps: pixel p is p/2, halves go up
    assert input_table((0, 0, 0), (1, 1, 1), 2 / 255, 0)[2, :6].tolist() == [0, 1, 1, 2, 2, 3]


def test_table_and_float_input_say_the_same(rng: np.random.Generator) -> None:
    preprocessing = Preprocessing(6, 4)
    image = rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    real = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    floats = preprocessing.float_input(image)
    assert floats.dtype == np.float32 and np.array_equal(floats, real.astype(np.float32))
    scale, zero_point = 0.0186, -14
    quantised = apply_table(image, input_table(preprocessing.mean, preprocessing.std, scale, zero_point))
    assert quantised.dtype == np.int8 and quantised.shape == image.shape
    inside = (quantised > -128) & (quantised < 127)
    assert np.abs((quantised.astype(int) - zero_point) * scale - real)[inside].max() <= scale / 2 * (1 + 1e-9)
    batch = np.stack([image, 255 - image])
    assert np.array_equal(apply_table(batch, np.stack([np.arange(256)] * 3).astype(np.uint8)), batch)


def test_table_refuses_a_scale_of_zero() -> None:
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale"):
            input_table((0, 0, 0), (1, 1, 1), scale, 0)


def test_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing(160, 96, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1), bit_depth=12)
    text = json.dumps(preprocessing.to_dict())
    assert Preprocessing.from_dict(json.loads(text)) == preprocessing
    assert list(json.loads(text)) == ["height", "width", "mean", "std", "colour", "bit_depth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height is 0"),
        ({"width": 2.5}, "width is 2.5"),
        ({"bit_depth": 17}, "bit_depth is 17"),
        ({"mean": [0, 0]}, "mean"),
        ({"mean": "grey"}, "mean"),
        ({"std": [1, 1, 0]}, "std .* above 0"),
        ({"std": None}, "std"),
        ({"colour": "bgr"}, "colour is 'bgr'"),
        ({"crop": 224}, "unknown field 'crop'"),
    ],
)
def test_bad_preprocessing_names_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing.from_dict({**Preprocessing(8, 8).to_dict(), **change})
    with pytest.raises(InputError, match="'width' is missing"):
        Preprocessing.from_dict({"height": 8})


def test_uint8_input_takes_files_and_arrays(tmp_path: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = saved(tmp_path, image)
    assert np.array_equal(SMALL.uint8_input(path), image) and np.array_equal(SMALL.uint8_input(str(path)), image)
    assert np.array_equal(SMALL.uint8_input(image), image)
    grey = image[:, :, 0]
    for source in (grey, grey[:, :, None]):
        assert np.array_equal(SMALL.uint8_input(source), np.stack([grey] * 3, 2))
    assert np.array_equal(
        Preprocessing(8, 8, bit_depth=10).uint8_input(saved(tmp_path, np.full((8, 8), 1000, np.uint16))),
        np.full((8, 8, 3), 250),
    )
    for bad in (image.astype(np.float32), image[:, :, :2], np.zeros((0, 3, 3), np.uint8), image[None]):
        with pytest.raises(InputError, match="image array must be"):
            SMALL.uint8_input(bad)


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    """Forty images of constant grey 0, 1, ... in order."""
    return [saved(tmp_path, np.full((9, 7), k, np.uint8), f"{k:02}.png") for k in range(40)]


@pytest.mark.parametrize("workers", [1, 2, 16])
def test_images_stream_in_order(folder: list[Path], workers: int) -> None:
    calls: list[tuple[int, int]] = []
    loaded = list(load_images(folder, SMALL, workers=workers, progress=lambda done, total: calls.append((done, total))))
    assert [path for path, _ in loaded] == folder
    assert all((image == k).all() and image.shape == (8, 8, 3) for k, (_, image) in enumerate(loaded))
    assert calls == [(k, 40) for k in range(1, 41)]
    assert list(load_images([], SMALL)) == []


def test_unreadable_files_stop_or_are_listed(folder: list[Path]) -> None:
    folder[3].write_text("broken")
    folder[30].unlink()
    stream = load_images(folder, SMALL)
    assert [next(stream)[0] for _ in range(3)] == folder[:3]
    with pytest.raises(InputError, match=r"03\.png is not a PNG.*--on-error skip"):
        next(stream)
    skipped: list[tuple[Path, str]] = []
    calls: list[int] = []
    loaded = [p for p, _ in load_images(folder, SMALL, "skip", skipped=skipped, progress=lambda d, _: calls.append(d))]
    assert loaded == [path for k, path in enumerate(folder) if k not in (3, 30)]
    assert [path for path, _ in skipped] == [folder[3], folder[30]] and "No such file" in skipped[1][1]
    assert calls == list(range(1, 41))
    for path in folder:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 40 .*00\.png is empty"):
        list(load_images(folder, SMALL, "skip", skipped=[]))


def test_bad_arguments_are_seen_at_once(folder: list[Path]) -> None:
    for arguments in ({"on_error": "ignore"}, {"on_error": "skip"}, {"workers": 0}, {"workers": 17}):
        with pytest.raises(InputError):
            load_images(folder, SMALL, **arguments)  # type: ignore[arg-type]


def test_reading_stays_a_little_ahead_and_ends_with_the_reader(
    folder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []
    at_once, most = 0, 0
    lock = threading.Lock()
    plain = Preprocessing.uint8_input

    def counted(self: Preprocessing, source: Path) -> np.ndarray:
        nonlocal at_once, most
        with lock:
            started.append(source)
            at_once += 1
            most = max(most, at_once)
        try:
            return plain(self, source)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(Preprocessing, "uint8_input", counted)
    before = threading.active_count()
    stream = load_images(folder, SMALL, workers=3)
    assert not started  # nothing is read before it is asked for
    for taken in range(1, 21):
        next(stream)
        assert len(started) <= taken + 5 and most <= 3
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and len(started) <= 26


def test_frames_of_a_camera() -> None:
    words = np.arange(65536, dtype="<u2")  # every RGB565 pixel
    rgb = frame_to_rgb(words.tobytes(), 256, 256, "rgb565")
    assert rgb.shape == (256, 256, 3) and rgb.dtype == np.uint8
    flat = rgb.reshape(-1, 3)
    assert flat[[0xF800, 0x07E0, 0x001F]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert flat[0b10110_101101_01001].tolist() == [0b10110101, 0b10110110, 0b01001010]
    for channel, (shift, top) in enumerate([(11, 31), (5, 63), (0, 31)]):
        exact = (words >> shift & top) * 255 / top
        assert np.abs(flat[:, channel] - exact).max() < 1
    assert rgb_to_frame(rgb, "rgb565") == words.tobytes()
    assert np.array_equal(frame_to_rgb(words.view(np.uint8), 256, 256, "rgb565"), rgb)


def test_frames_in_rgb888_and_grey(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(frame_to_rgb(rgb_to_frame(image, "rgb888"), 7, 5, "rgb888"), image)
    grey = rgb_to_frame(image, "grey")
    assert grey == Image.fromarray(image).convert("L").tobytes()
    wide = frame_to_rgb(grey, 7, 5, "grey")
    assert wide.shape == (5, 7, 3) and wide[..., 1].tobytes() == grey and rgb_to_frame(wide, "grey") == grey


def test_bad_frames_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="a 4x3 frame in rgb565 is 24 bytes, not 23"):
        frame_to_rgb(bytes(23), 4, 3, "rgb565")
    for call in (lambda: frame_to_rgb(b"", 0, 0, "yuv"), lambda: rgb_to_frame(np.zeros((1, 1, 3), np.uint8), "yuv")):
        with pytest.raises(InputError, match="'yuv' is unknown; there are rgb888, rgb565, grey"):
            call()
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(InputError, match=r"\(H, W, 3\) uint8"):
            rgb_to_frame(bad, "rgb888")

"""The C reader of banks against the Python one: both open the same files, and refuse the same."""

from __future__ import annotations

import ctypes
import functools
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from c_runtime import RUNTIME, WARNINGS, compiler
from c_scorer import DSP, SOURCES, STATUS, OpenBank
from forgeries import of_entries, of_grids, of_header, of_sections, of_tasks, seal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_banks import (
    Small,
    bank_of,
    every_kind,
    every_kind_of_tasks,
    memory,
    python_accepts,
    quantised,
    scores_of,
    small_embedding,
    triangular,
    write_seeds,
)

from tinyvad.bank import read_bank, write_bank
from tinyvad.detectors import Scorer, check_bank
from tinyvad.errors import InputError

HERE = Path(__file__).resolve().parent
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHECK = b"123456789"


@functools.lru_cache
def banks() -> dict[str, Small]:
    several = every_kind_of_tasks(np.random.default_rng(8), 3)
    return {**every_kind(np.random.default_rng(7)), **{f"{name} of 3": small for name, small in several.items()}}


def one_of_each_kind() -> dict[str, Small]:
    return {name: banks()[name] for name in (*KIND_NAMES, *TASK_NAMES)}


TASK_NAMES = ("padim-lite of 3", "padim chosen of 3", "padim-compact of 3", "patchcore of 3", "patchcore-lite 4 bits of 3",
              "student of 3", "linear of 3", "centres of 3")  # fmt: skip
KIND_NAMES = ("padim-lite chosen", "padim chosen", "padim-compact", "patchcore", "patchcore-lite 4 bits, few rows",
              "student", "linear", "centres", "centres shifted")  # fmt: skip


def test_every_kind_opens_and_says_what_python_says() -> None:
    for name, small in every_kind(np.random.default_rng(7)).items():
        b = OpenBank(small.data)
        bank, header = b.bank, small.header
        assert b.status == "OK", name
        assert struct.pack("<I", bank.kind).decode() == header.kind and bank.nbytes == len(small.data)
        assert (bank.backbone_crc32, bank.generation) == (header.backbone_crc32, header.generation)
        assert bank.header_crc32 == read_bank(small.data).crc32
        assert (bank.input_h, bank.input_w) == header.input_size and (bank.grid_h, bank.grid_w) == header.grid_size
        assert ctypes.c_uint32.from_address(bank.thresholds).value == small.sections["THRS"][0]
        assert bank.taps == header.taps and (bank.tasks, bank.task_rows, bank.prototypes) == (1, None, None)
        assert bank.depth == small.embedding.depth == 12
        config = small.sections["CFG "].tolist()
        if header.kind.startswith("PAD"):
            assert [bank.values, bank.bits, bank.mode] == config[:3] and bank.rows == 0
        elif header.kind == "STFP":
            assert [bank.values, bank.bits, bank.shift] == config[:3] and bank.rows == 0
        elif header.kind == "LINR":
            assert [bank.values, 0, 0, 0] == config and bank.rows == 0
        elif header.kind == "CFAS":
            assert [bank.rows, bank.values, bank.shift, bank.bits] == config
        else:
            assert [bank.rows, bank.values, bank.subspaces, bank.bits] == config


def test_crc_is_zlibs() -> None:
    lib = OpenBank(banks()["patchcore"].data).lib
    rng = np.random.default_rng(0)
    for data in (b"", CHECK, b"\0", bytes(100), rng.bytes(1000)):
        for cut in (0, len(data) // 3, len(data)):
            crc = lib.tvad_crc32(lib.tvad_crc32(0, data[:cut], cut), data[cut:], len(data) - cut)
            assert crc & 0xFFFFFFFF == zlib.crc32(data)


@pytest.mark.parametrize("name", KIND_NAMES)
def test_any_changed_byte_is_refused_by_both(name: str) -> None:
    data = banks()[name].data
    b = OpenBank(data)
    for at in range(len(data)):
        value = data[at] ^ (1 << at % 8 if at % 3 else 0xFF)
        b.bytes[at] = value
        assert b.lib.tvad_open(b.bytes.ctypes.data, len(data), b.bank) != 0, at
        b.bytes[at] = data[at]
        with pytest.raises(InputError):
            read_bank(data[:at] + bytes([value]) + data[at + 1 :])
    assert b.lib.tvad_open(b.bytes.ctypes.data, len(data), b.bank) == 0


def test_cut_at_any_length_it_is_refused() -> None:
    data = banks()["padim-compact"].data
    b = OpenBank(data)
    for size in range(len(data)):
        assert STATUS[b.lib.tvad_open(b.bytes.ctypes.data, size, b.bank)] == "SIZE"
    assert b.lib.tvad_open(None, 0, b.bank) != 0


def test_a_slot_may_be_larger_than_the_bank() -> None:
    small = banks()["patchcore"]
    for behind in (b"\xff" * 4096, small.data, b"\0"):
        b = OpenBank(small.data + behind)
        assert b.status == "OK" and b.bank.nbytes == len(small.data)


def test_a_bank_must_lie_at_its_alignment() -> None:
    rng = np.random.default_rng(0)
    grid = (3, 4)
    for align in (16, 64, 4096):
        small = bank_of(rng, small_embedding(rng, grid, (5, 4, 3)), memory(rng, 5, 12), align=align)
        assert OpenBank(small.data).status == "OK"
        for shift in (1, 2, 4, 8, align // 2):
            assert OpenBank(small.data, shift=shift).status == "ALIGNMENT"
        assert OpenBank(small.data, shift=align).status == "OK"


def test_every_status_has_its_line() -> None:
    lib = OpenBank(banks()["patchcore"].data).lib
    lines = [lib.tvad_status_text(i).decode() for i in range(len(STATUS) + 1)]
    assert lines[0] == "ok" and lines[-1] == "unknown status" and len(set(lines)) == len(lines)


# -- forged banks: right CRCs, wrong fields ------------------------------------------------------------------------------


def forged(small: Small) -> dict[str, bytes]:
    cases = {**dict(of_header(small.data)), **dict(of_entries(small.data)), **dict(of_sections(small))}
    cases |= dict(of_tasks(small)) if small.tasks else {}
    return cases | (dict(of_grids(small)) if small.header.kind in ("CORE", "PQPC", "LINR") else {})


@pytest.mark.parametrize("name", [*KIND_NAMES, *TASK_NAMES])
def test_forged_banks_are_opened_or_refused_by_both_alike(name: str) -> None:
    small = banks()[name]
    opened, rng = 0, np.random.default_rng(5)
    for what, data in forged(small).items():
        b = OpenBank(data)
        assert (b.status == "OK") == python_accepts(data), f"{what}: C says {b.status}, Python does not agree"
        if b.status == "OK" and b.bank.grid_h * b.bank.grid_w < 100:
            shapes = np.ctypeslib.as_array((ctypes.c_int32 * (8 * b.bank.taps)).from_address(b.bank.tap_rows))
            shapes = shapes.reshape(-1, 8)[:, :3].tolist()
            if max(h * w * c for h, w, c in shapes) < 10_000:
                maps = [rng.integers(-128, 128, shape).astype(np.int8) for shape in shapes]
                scores, result = b.score(maps)
                expected, task = scores_of(data, maps)
                np.testing.assert_array_equal(scores, expected, err_msg=what)
                assert result.task == task, what
                opened += 1
    assert opened > 50  # some fields are free, and what opens is scored alike


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from([*KIND_NAMES, *TASK_NAMES]),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1) | st.integers(0, 300)),
        min_size=1, max_size=4,
    ),
)  # fmt: skip
def test_bytes_changed_anywhere_under_right_crcs(name: str, changes: list[tuple[float, int, int]]) -> None:
    data = bytearray(banks()[name].data)
    for where, width, value in changes:
        at = int(where * (len(data) - width)) // width * width
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    sealed = seal(bytes(data))
    assert (OpenBank(sealed).status == "OK") == python_accepts(sealed)


def test_codes_beyond_the_codebook_and_doubled_channels_are_refused() -> None:
    rng = np.random.default_rng(0)
    for rows, bits, subspaces in ((20, 8, 6), (9, 4, 6), (9, 4, 4)):
        small = bank_of(rng, small_embedding(rng, (2, 2), (5, 4, 3)), quantised(rng, rows, 12, subspaces, bits))
        codes, indices = small.sections["CODE"], small.sections["INDX"]
        beyond = np.full_like(codes, rows * 17 if bits == 4 else rows)
        for other in ({"CODE": beyond}, {"INDX": np.full_like(indices, indices[0])}):
            data = write_bank(small.header, {**small.sections, **other}, ())
            assert OpenBank(data).status == "FIELD" and not python_accepts(data)


def test_a_permutation_of_more_than_one_window_of_bits() -> None:
    """The C reader looks at 512 values at a time."""
    rng = np.random.default_rng(0)
    depth = 1200
    e = small_embedding(rng, (1, 1), (depth - 1, 1), sizes=((1, 1), (1, 1)))
    small = bank_of(rng, e, quantised(rng, 3, depth, 2, 8))
    assert OpenBank(small.data).status == "OK"
    for a, b in ((0, 1199), (511, 512), (600, 3)):
        indices = small.sections["INDX"].copy()
        indices[a] = indices[b]
        assert OpenBank(write_bank(small.header, {**small.sections, "INDX": indices}, ())).status == "FIELD"


def test_sixteen_taps_and_no_more() -> None:
    rng = np.random.default_rng(0)
    e = small_embedding(rng, (2, 2), (1,) * 16, sizes=((2, 2),) * 16)
    small = bank_of(rng, e, triangular(rng, (2, 2), 16, 16, 4, 0))
    b = OpenBank(small.data)
    assert b.status == "OK" and b.self_test() == "OK"
    with pytest.raises(InputError, match="1 to 16"):
        small_embedding(rng, (2, 2), (1,) * 17, sizes=((2, 2),) * 17)
    sections = {**small.sections, "TAPS": np.concatenate([small.sections["TAPS"]] * 2)}
    header = type(small.header)(**{**vars(small.header), "taps": 32})
    data = write_bank(header, sections, ())
    assert OpenBank(data).status == "SECTION" and not python_accepts(data)


def wide(depth: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Channels and sizes of 1x1 taps that make a vector of ``depth`` values."""
    channels = (4096,) * (depth // 4096) + ((depth % 4096,) if depth % 4096 else ())
    return channels, ((1, 1),) * len(channels)


@pytest.mark.parametrize(
    ("what", "most", "grid"),
    [("values of a PaDiM cell", 512, (1, 1)), ("values of a distance", 33025, (1, 1)),
     ("values of a vector", 65535, (1, 1)), ("grid cells by values", 65059, (1, 33000))],
)  # fmt: skip
def test_the_largest_that_fits_its_width(what: str, most: int, grid: tuple[int, int]) -> None:
    """At the limit both open it, one beyond both refuse. The last: a grid row of vectors passes 2 GiB."""
    rng = np.random.default_rng(0)
    for size, opens in ((most, True), (most + 1, False)):
        channels, sizes = wide(size if size <= 65535 else 65535)
        e = small_embedding(rng, grid, channels, sizes, pool=1)
        scorer: Scorer
        if what == "values of a distance":
            scorer = memory(rng, 1, size)
        elif what == "values of a PaDiM cell":
            scorer = triangular(rng, grid, size, size, 0, 0)
        else:
            scorer = triangular(rng, grid, min(size, 65535), 1, 0, 1)
        small = bank_of(rng, e, scorer, golden=0)
        data = small.data
        if size == 65536:
            taps = small.sections["TAPS"].copy()
            taps[-1, 2] += 1
            data = write_bank(small.header, {**small.sections, "TAPS": taps}, ())
        assert OpenBank(data).status == ("OK" if opens else "FIELD")
        assert python_accepts(data) == opens


@pytest.mark.parametrize(
    ("tag", "change", "words"),
    [
        ("LUT ", lambda a: a[:, :255], "LUT"),
        ("THRS", lambda a: a.astype(np.int32), "THRS is missing or no row of uint32"),
        ("TAPS", lambda a: a[:1], "TAPS: expected int32"),
        ("TEST", lambda a: a[:, :5], "TEST"),
        ("GOLD", lambda a: a + np.array([1, 0, 0], np.uint32), "a task or a cell that there is not"),
        ("GOLD", lambda a: a + np.array([0, 12, 0], np.uint32), "a task or a cell that there is not"),
        ("CHOL", lambda a: a.view(np.int8), "CHOL"),
        ("BIAS", lambda a: a + np.array([[0], [0], [60]], np.int32), "BIAS: direction 0 passes 32 bits"),
        ("CFG ", lambda a: np.array([12, 4, 1, 16], np.int32), "."),
    ],
)
def test_what_python_refuses_is_named(tag: str, change: object, words: str) -> None:
    small = banks()["padim-compact"]
    data = write_bank(small.header, {**small.sections, tag: change(small.sections[tag])}, ())  # type: ignore[operator]
    with pytest.raises(InputError, match=words):
        check_bank(read_bank(data))


def test_kind_and_configuration_must_agree() -> None:
    small = banks()["padim chosen"]
    header = type(small.header)(**{**vars(small.header), "kind": "PADC"})
    data = write_bank(header, small.sections, ())
    assert OpenBank(data).status == "FIELD"
    with pytest.raises(InputError, match="kind is PADC, but section CFG  describes a PADF"):
        check_bank(read_bank(data))


# -- under the sanitizers --------------------------------------------------------------------------------------------------


@functools.lru_cache
def sanitized(mains: tuple[Path, ...], flags: tuple[str, ...] = ()) -> Path:
    """A program with AddressSanitizer and UndefinedBehaviorSanitizer; skips where the compiler has none."""
    folder = Path(tempfile.mkdtemp(prefix="tvad-driver-"))
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = [compiler(), *SANITIZERS, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this C compiler has no AddressSanitizer (Debian: apt-get install libasan8 or libclang-rt-14-dev)")
    sources = [*map(str, mains), *(str(RUNTIME / f"{name}.c") for name in SOURCES)]
    command = [compiler(), *WARNINGS, "-D_POSIX_C_SOURCE=200112L", "-g", "-O1", *SANITIZERS, *flags, "-I", str(RUNTIME)]
    done = subprocess.run([*command, *sources, "-o", str(folder / "driver")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "driver"


def run_driver(flags: tuple[str, ...], cases: list[tuple[bytes, bytes]], folder: Path) -> list[list[int]]:
    """A line of numbers a case, (bank, tapped maps); see tests/scorer_driver.c."""
    path = folder / "cases.bin"
    path.write_bytes(b"".join(struct.pack("<II", len(bank), len(maps)) + bank + maps for bank, maps in cases))
    command = [str(sanitized((HERE / "scorer_driver.c",), flags)), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("flags", [(), DSP], ids=["plain", "dsp"])
def test_scores_are_equal_under_the_sanitizers(flags: tuple[str, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    cases, expected = [], []
    for round_ in range(4):
        grid = (int(rng.integers(1, 8)), int(rng.integers(1, 8)))
        for small in (*every_kind(rng, grid).values(), *every_kind_of_tasks(rng, round_ + 1, grid).values()):
            maps = small.maps(rng, extreme=round_ == 3)
            scores = small.expected(maps)
            place = int(scores.argmax())
            cases.append((small.data, b"".join(q.tobytes() for q in maps)))
            label = int(scores.max() >= small.threshold(maps))
            crc = zlib.crc32(scores.astype("<u4").tobytes())
            expected.append([0, 0, int(scores.max()), place // grid[1], place % grid[1], label, crc, small.task(maps)])
    assert run_driver(flags, cases, tmp_path) == expected


@pytest.mark.parametrize("flags", [(), DSP], ids=["plain", "dsp"])
def test_forged_banks_under_the_sanitizers(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Every forgery of every kind, scored where it opens: no read or write outside a block, no undefined behaviour."""
    rng = np.random.default_rng(12)
    cases = []
    for small in one_of_each_kind().values():
        maps = b"".join(q.tobytes() for q in small.maps(rng))
        cases += [(data, maps) for data in forged(small).values()]
        cases += [(small.data[:size], b"") for size in range(0, len(small.data), 7)]
    lines = run_driver(flags, cases, tmp_path)
    assert len(lines) == len(cases)
    assert sum(len(line) > 1 for line in lines) > 500  # that many were scored


def test_a_short_fuzz_without_a_fuzzer(tmp_path: Path) -> None:
    """The fuzz target on its seeds and some mutations of them; `make fuzz` takes ten minutes and a real fuzzer."""
    fuzz = RUNTIME.parent / "fuzz"
    program = sanitized((fuzz / "fuzz_bank.c", fuzz / "fuzz_main.c"))
    write_seeds(tmp_path)
    command = [str(program), "-n", "3000", *sorted(str(path) for path in tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(command) - 3} files, 3000 mutations, no finding\n"

"""The memory bank as one flat file, ``.tvb``: write it, check it, read it in place.

Flows in: a ``Header`` and named NumPy arrays (what a detector has fitted). Flows out: bytes that the firmware
reads from flash without parsing or copying, and in Python a ``Bank`` whose arrays are views of the file.
docs/SPEC.md is the format's home. In short, all little-endian:

    file    = header table padding section{section_count}    file_size bytes
    header  = 64 bytes, see _HEADER_FIELDS                    header_crc32 covers bytes 0..59 and the table
    table   = entry{section_count}                            32 bytes each, see _ENTRY
    section = values in C order, padding                      starts at a multiple of align
    padding = 0x00 up to the next multiple of align           there is no other gap

A CRC-32 (zlib's) or a rule covers every byte: a bank with any one byte changed is refused. Ideas from GGUF
(aligned, mapped), littlefs (CRC, revision count) and faiss (what a quantised index stores).
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tinyvad.errors import InputError
from tinyvad.files import write_bytes

MAGIC = b"TVB1"
VERSION = (1, 0)  # major: older readers must refuse; minor: they need not notice
MAX_SECTIONS = 64  # bounds the device's work: its search for a repeated tag is quadratic

KINDS = {
    "PADM": "PaDiM, diagonal covariance",
    "PADF": "PaDiM, full covariance",
    "PADC": "compact PaDiM: projected, full covariance as a 4-bit Cholesky factor",
    "CORE": "PatchCore, int8 memory bank",
    "PQPC": "PatchCore, product-quantised memory bank",
    "STFP": "student and teacher: cosine distances of pairs of maps",
    "LINR": "SimpleNet: the last linear layer of a discriminator",
    "CFAS": "CFA: distances of described patches to centres",
}
# A reader skips a tag that it doesn't know, unless it is flagged REQUIRED. New tags: here and in docs/SPEC.md
TAGS = {
    "CFG ": "numbers that the scorer needs, in an order fixed per kind",
    "TAPS": "tapped tensors: channel ranges and quantisation",
    "PROJ": "projection: chosen channels, a matrix, or one layer's weights",
    "CBK ": "product quantiser's codebooks",
    "CODE": "product quantiser's codes, one row a vector",
    "MEAN": "mean of every patch position",
    "IVAR": "inverse variance, or inverse deviation, of every patch position",
    "ICOV": "inverse covariance of every patch position",
    "CHOL": "factor of the inverse covariance of every patch position",
    "SCAL": "scales of other sections' values",
    "TABL": "lookup tables of the integer scorer",
    "BANK": "memory bank, one row a patch vector",
    "THRS": "threshold of every task",
    "TASK": "range of rows of every task",
    "PROT": "prototype of every task: an image belongs to the nearest",
    "LADR": "thresholds of every task once it is cut to fewer rows; the scorer never reads it",
    "LRN ": "what learning on needs: slot size, room and limits; the scorer never reads it",
    "BIAS": "what is added: to projected directions (with multiplier, shift), to a layer, to grid rows and columns",
    "INDX": "chosen channels of the embedding",
    "STEP": "scale and step of every tapped tensor, for tools; the firmware has them in TAPS",
    "LUT ": "the network's int8 input of every pixel value of every channel",
    "META": "UTF-8 JSON object for people and tools; the firmware never reads it",
    "TEST": "golden patch vectors, (n, D) int8: the input of the device's self-test",
    "GOLD": "what TEST must give, (n, 3) uint32: task, position, exact patch score",
}
# High nibble: 1 signed, 2 unsigned, 3 IEEE float; low nibble: bytes a value. The numbers are frozen.
DTYPES = {
    "i1": 0x11, "i2": 0x12, "i4": 0x14, "i8": 0x18, "f4": 0x34,
    "u1": 0x21, "u2": 0x22, "u4": 0x24, "u8": 0x28, "f8": 0x38,
}  # fmt: skip
ROUNDINGS = {"double": 1, "single": 2}
COLOURS = {"rgb": (1, 3)}  # name: (number, channels)
FLAG_UPDATABLE = FLAG_REQUIRED = 1  # bit 0 in the header, bit 0 in a section entry
Sections = Mapping[str, np.ndarray]

_HEADER_FIELDS = (  # (name, struct code), 64 bytes
    ("magic", "4s"), ("version_major", "H"), ("version_minor", "H"), ("header_size", "I"), ("file_size", "I"),
    ("section_count", "H"), ("section_entry_size", "H"), ("align", "I"),
    ("kind", "4s"), ("rounding", "H"), ("flags", "H"), ("backbone_crc32", "I"),
    ("input_h", "H"), ("input_w", "H"), ("grid_h", "H"), ("grid_w", "H"),
    ("taps", "B"), ("channels", "B"), ("colour", "B"), ("reserved_47", "B"),
    ("generation", "I"), ("payload_crc32", "I"), ("reserved_56", "I"), ("header_crc32", "I"),
)  # fmt: skip
_HEADER = struct.Struct("<" + "".join(code for _, code in _HEADER_FIELDS))
_ENTRY = struct.Struct("<4sBBHII3II")  # tag, dtype, ndim, flags, offset, nbytes, dim[3], crc32
_COUNT_AT, _GENERATION_AT = 16, 48  # section_count and generation within the header
_U32_MAX = 2**32 - 1
_REMEDY = "copy the file again, rebuild it, or use the tinyvad that wrote it"


@dataclass(frozen=True)
class Header:
    """What a bank says of itself.

    Attributes:
        kind: key of ``KINDS``.
        backbone_crc32: CRC-32 of the exact ``.tflite`` file whose features the bank was fitted on.
        input_size: (height, width) of the input image, pixels, 1..65535.
        grid_size: (height, width) of the score map, 1..65535.
        taps: number of tapped tensors, 1..255.
        channels: channels of the input image.
        colour: their order, key of ``COLOURS``.
        generation: revision, 0..2**32 - 1; of two slots the higher one wins (``newest``).
        rounding: the int8 kernels' requantisation, key of ``ROUNDINGS``.
        updatable: the device may write a successor of this bank into the other slot.
        align: sections start at multiples of it, bytes, a power of two 16..4096.
    """

    kind: str
    backbone_crc32: int
    input_size: tuple[int, int]
    grid_size: tuple[int, int]
    taps: int
    channels: int = 3
    colour: str = "rgb"
    generation: int = 0
    rounding: str = "double"
    updatable: bool = False
    align: int = 16


class Entry(NamedTuple):
    """One row of the section table; ``dtype`` is a key of ``DTYPES``, ``offset`` and ``nbytes`` are bytes."""

    tag: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    required: bool


@dataclass(frozen=True, eq=False)
class Bank:
    """A verified bank; its arrays are read-only views of the file.

    Attributes:
        sections: arrays by tag, in file order; sections with unknown tags are left out.
        entries: the section table, unknown tags too.
        crc32: header_crc32; it covers payload_crc32 too, so it names the bank, and a device has it for free.
    """

    name: str
    header: Header
    sections: Sections
    entries: tuple[Entry, ...]
    nbytes: int
    crc32: int

    @property
    def meta(self) -> dict[str, Any]:
        """The JSON object in META, {} without one; InputError if it is no JSON, which opening can't tell."""
        if "META" not in self.sections:
            return {}
        try:
            meta = json.loads(self.sections["META"].tobytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.name}: META is not JSON ({error}); rebuild the bank") from error
        _need(isinstance(meta, dict), self.name, "META", type(meta).__name__, "a JSON object")
        return meta

    def section_table(self) -> list[Entry]:
        """Every section in file order, unknown tags too."""
        return list(self.entries)


def write_bank(header: Header, sections: Sections, required: Iterable[str]) -> bytes:
    """Make a bank; the same input gives the same bytes.

    Args:
        sections: arrays by tag (keys of ``TAGS``, four characters), written in this order; of up to three
            dimensions, none of them 0; dtypes as in ``DTYPES``, of either byte order.
        required: tags that a reader must know, or else refuse the bank.

    Raises:
        InputError: one of these rules does not hold, or the bank would pass 4 GiB.
    """
    where, fix = "new bank", "change what the detector stores"
    _check_header(header, where, fix)
    count, flagged = len(sections), set(required)
    _need(1 <= count <= MAX_SECTIONS, where, "section_count", count, f"1 to {MAX_SECTIONS}", fix)
    _need(flagged <= set(sections), where, "required", sorted(flagged), f"among {list(sections)}", fix)
    placed: list[tuple[str, np.ndarray, str, int]] = []  # tag, array, dtype, offset
    table_end = end = _HEADER.size + _ENTRY.size * count
    for tag, value in sections.items():
        array = np.asarray(value)
        dtype = f"{array.dtype.kind}{array.dtype.itemsize}"
        _need(tag in TAGS, where, "tag", repr(tag), f"one of {list(TAGS)}", "add it to tinyvad.bank.TAGS")
        _need(dtype in DTYPES, where, f"{tag!r} dtype", array.dtype, f"one of {list(DTYPES)}", fix)
        fits = array.ndim <= 3 and array.size > 0
        _need(fits, where, f"{tag!r} shape", array.shape, "up to 3 dimensions, none of them 0", fix)
        offset = _round_up(end, header.align)
        end = offset + array.nbytes
        placed.append((tag, array, dtype, offset))
    file_size = _round_up(end, header.align)
    _need(file_size <= _U32_MAX, where, "file_size", file_size, f"at most {_U32_MAX}", fix)

    data = bytearray(file_size)
    for i, (tag, array, dtype, offset) in enumerate(placed):
        values = array.astype("<" + dtype, copy=False).tobytes()  # C order whatever the strides
        data[offset : offset + len(values)] = values
        dims = array.shape + (1,) * (3 - array.ndim)
        form = (DTYPES[dtype], array.ndim, FLAG_REQUIRED * (tag in flagged))
        row = _HEADER.size + _ENTRY.size * i
        _ENTRY.pack_into(data, row, tag.encode(), *form, offset, len(values), *dims, zlib.crc32(values))
    frame = (_HEADER.size, file_size, count, _ENTRY.size, header.align)
    flags, colour = FLAG_UPDATABLE * header.updatable, COLOURS[header.colour][0]
    what = (header.kind.encode(), ROUNDINGS[header.rounding], flags, header.backbone_crc32)
    image = (*header.input_size, *header.grid_size, header.taps, header.channels, colour, 0)
    crc = zlib.crc32(memoryview(data)[placed[0][3] :])
    _HEADER.pack_into(data, 0, MAGIC, *VERSION, *frame, *what, *image, header.generation, crc, 0, 0)
    struct.pack_into("<I", data, _HEADER.size - 4, _header_crc(memoryview(data), table_end))
    return bytes(data)


def save_bank(path: str | Path, header: Header, sections: Sections, required: Iterable[str]) -> None:
    """Write a bank to ``path``, whole or not at all (see ``write_bank`` and ``tinyvad.files``)."""
    write_bytes(path, write_bank(header, sections, required))


def open_bank(path: str | Path) -> Bank:
    """Map the bank at ``path`` into memory, verify all of it and give its arrays as views.

    Raises:
        InputError: the file can't be read or is no valid bank; names field, value and what was expected.
    """
    try:
        with Path(path).open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
        raise InputError(f"{path}: cannot be read as a bank ({error}); give a .tvb file") from error
    return _verify(memoryview(data), str(path))


def read_bank(buffer: bytes, name: str = "bank") -> Bank:
    """Verify a bank that is in memory already; ``name`` stands for the file in messages (see ``open_bank``)."""
    return _verify(memoryview(buffer).toreadonly(), name)


def newest(paths: Iterable[str | Path]) -> Path:
    """Of the slots at ``paths``, the one that verifies with the highest generation; of equals the first.

    Raises:
        InputError: none verifies; gives each one's reason.
    """
    found: list[tuple[int, Path]] = []
    reasons: list[str] = []
    for path in paths:
        try:
            found.append((open_bank(path).header.generation, Path(path)))
        except InputError as error:
            reasons.append(str(error))
    if not found:
        raise InputError("no slot holds a valid bank: " + (" | ".join(reasons) or "no slot was named"))
    return max(found, key=lambda slot: slot[0])[1]  # the first of equals


def restamp(data: bytes, generation: int) -> bytes:
    """The same bank with another generation, 0..2**32 - 1; only the header's generation and CRC change.

    Raises:
        InputError: ``data`` is no valid bank, or there is no such generation.
    """
    header = replace(read_bank(data).header, generation=generation)
    _check_header(header, "new bank", "use a generation that fits 32 bits")
    changed = bytearray(data)
    struct.pack_into("<I", changed, _GENERATION_AT, generation)
    table_end = _HEADER.size + _ENTRY.size * int.from_bytes(data[_COUNT_AT : _COUNT_AT + 2], "little")
    struct.pack_into("<I", changed, _HEADER.size - 4, _header_crc(memoryview(changed), table_end))
    return bytes(changed)


def pack_meta(meta: Mapping[str, Any]) -> np.ndarray:
    """JSON for META, (n,) uint8, keys sorted; InputError for what is no JSON value (NaN is none)."""
    try:
        text = json.dumps(dict(meta), sort_keys=True, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise InputError(f"META cannot be written as JSON ({error}); store plain values") from error
    return np.frombuffer(text, np.uint8)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Pack (..., n) integers in [-8, 7] into (..., ceil(n / 2)) uint8, low nibble first, every row on a byte."""
    values = np.asarray(values)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    _need(-8 <= low <= high <= 7, "4-bit values", "range", f"{low}..{high}", "-8..7", "clip or rescale them")
    nibbles = values.astype(np.int8).view(np.uint8) & 15
    pairs = np.pad(nibbles, [(0, 0)] * (values.ndim - 1) + [(0, values.shape[-1] % 2)])
    return pairs[..., 0::2] | pairs[..., 1::2] << 4


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Undo ``pack_nibbles``: (..., ceil(count / 2)) uint8 to (..., count) int8 in [-8, 7]."""
    packed = np.asarray(packed, np.uint8)
    row = packed.shape[-1]
    _need(row == (count + 1) // 2, "4-bit values", "bytes a row", row, (count + 1) // 2, "check count")
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * row)
    return (nibbles[..., :count] ^ 8).view(np.int8) - np.int8(8)  # extends the sign of bit 3


def _need(holds: bool, where: str, field: str, found: Any, expected: Any, remedy: str = _REMEDY) -> None:
    if not holds:
        if field.endswith("crc32") and isinstance(expected, int):
            found, expected = f"{found:#010x}", f"{expected:#010x}"
        raise InputError(f"{where}: {field} is {found}, expected {expected}; {remedy}")


def _round_up(value: int, align: int) -> int:
    return (value + align - 1) // align * align


def _header_crc(data: memoryview, table_end: int) -> int:
    return zlib.crc32(data[_HEADER.size : table_end], zlib.crc32(data[: _HEADER.size - 4]))


def _check_header(header: Header, where: str, *remedy: str) -> None:
    """Hold the rules for a header's values; the writer and the reader both come here."""
    channels = COLOURS.get(header.colour, (0, 0))[1]
    sizes = "(height, width), each 1 to 65535"
    for field, holds, expected in (
        ("align", header.align in [1 << n for n in range(4, 13)], "a power of two from 16 to 4096"),
        ("kind", header.kind in KINDS, f"one of {list(KINDS)}"),
        ("rounding", header.rounding in ROUNDINGS, f"one of {list(ROUNDINGS)}"),
        ("backbone_crc32", 0 <= header.backbone_crc32 <= _U32_MAX, f"0 to {_U32_MAX}"),
        ("input_size", all(1 <= size <= 65535 for size in header.input_size), sizes),
        ("grid_size", all(1 <= size <= 65535 for size in header.grid_size), sizes),
        ("taps", 1 <= header.taps <= 255, "1 to 255"),
        ("colour", header.colour in COLOURS, f"one of {list(COLOURS)}"),
        ("channels", header.channels == channels, f"{channels}, as colour is {header.colour}"),
        ("generation", 0 <= header.generation <= _U32_MAX, f"0 to {_U32_MAX}"),
    ):
        _need(holds, where, field, repr(getattr(header, field)), expected, *remedy)


def _verify(data: memoryview, where: str) -> Bank:
    """Check the whole file ``data`` against the rules of docs/SPEC.md, in its order."""
    size = len(data)
    _need(size >= _HEADER.size, where, "file size", f"{size} bytes", f"at least {_HEADER.size} (a header)")
    raw = dict(zip((name for name, _ in _HEADER_FIELDS), _HEADER.unpack_from(data)))
    count, align = raw["section_count"], raw["align"]
    table_end = _HEADER.size + _ENTRY.size * count
    most = min(MAX_SECTIONS, (size - _HEADER.size) // _ENTRY.size)
    for field, holds, expected in (
        ("magic", raw["magic"] == MAGIC, MAGIC),
        ("version_major", raw["version_major"] == VERSION[0], VERSION[0]),
        ("header_size", raw["header_size"] == _HEADER.size, _HEADER.size),
        ("section_entry_size", raw["section_entry_size"] == _ENTRY.size, _ENTRY.size),
        ("file_size", raw["file_size"] == size, f"{size}, the bytes there are"),
        ("section_count", 1 <= count <= most, f"1 to {most}"),
        ("header_crc32", raw["header_crc32"] == (crc := _header_crc(data, table_end)), crc),
        ("flags", raw["flags"] & ~FLAG_UPDATABLE == 0, "0 or 1 (updatable)"),
        ("reserved_47", raw["reserved_47"] == 0, 0),
        ("reserved_56", raw["reserved_56"] == 0, 0),
    ):
        _need(holds, where, field, raw[field], expected)
    roundings = {number: name for name, number in ROUNDINGS.items()}
    colours = {number: name for name, (number, _) in COLOURS.items()}
    header = Header(
        kind=raw["kind"].decode("latin-1"),
        input_size=(raw["input_h"], raw["input_w"]),
        grid_size=(raw["grid_h"], raw["grid_w"]),
        colour=colours.get(raw["colour"], f"number {raw['colour']}"),
        rounding=roundings.get(raw["rounding"], f"number {raw['rounding']}"),
        updatable=raw["flags"] == FLAG_UPDATABLE,
        **{name: raw[name] for name in ("backbone_crc32", "taps", "channels", "generation", "align")},
    )
    _check_header(header, where)
    entries: dict[str, Entry] = {}
    sections: dict[str, np.ndarray] = {}
    end, before = table_end, "the section table"
    for i in range(count):
        start = _round_up(end, align)
        entry = _entry(data, i, start, where)
        _need(entry.tag not in entries, where, f"section[{i}] tag", repr(entry.tag), "a tag only once")
        _need(not any(data[end:start]), where, f"padding after {before}", "not zero", 0)
        entries[entry.tag] = entry
        end, before = start + entry.nbytes, repr(entry.tag)
        if entry.tag in TAGS:
            sections[entry.tag] = np.frombuffer(data[start:end], "<" + entry.dtype).reshape(entry.shape)
    _need(size == _round_up(end, align), where, "file_size", size, f"{_round_up(end, align)}, the sections' end")
    _need(not any(data[end:]), where, f"padding after {before}", "not zero", 0)
    crc = zlib.crc32(data[_round_up(table_end, align) :])
    _need(raw["payload_crc32"] == crc, where, "payload_crc32", raw["payload_crc32"], crc)
    return Bank(where, header, MappingProxyType(sections), tuple(entries.values()), size, raw["header_crc32"])


def _entry(data: memoryview, i: int, start: int, where: str) -> Entry:
    """Check entry ``i`` of the table, whose section must begin at byte ``start``, and that section's CRC."""
    at = _HEADER.size + _ENTRY.size * i
    raw_tag, number, ndim, flags, offset, nbytes, *dims, crc = _ENTRY.unpack_from(data, at)
    tag = raw_tag.decode("latin-1")
    dtype = {code: name for name, code in DTYPES.items()}.get(number)
    size = math.prod(dims) * (number & 15)  # no overflow in Python; SPEC.md says how C avoids it
    room = max(0, len(data) - start)
    for field, found, holds, expected in (
        ("tag", raw_tag, all(32 <= byte < 127 for byte in raw_tag), "four printable ASCII characters"),
        ("flags", flags, flags & ~FLAG_REQUIRED == 0, "0 or 1 (required)"),
        ("tag", repr(tag), tag in TAGS or not flags, "a tag that this reader knows, as it is REQUIRED"),
        ("dtype", f"{number:#x}", dtype is not None, "one of " + ", ".join(map(hex, DTYPES.values()))),
        ("ndim", ndim, ndim <= 3, "at most 3"),
        ("dim", dims, min(dims) >= 1 and set(dims[ndim:]) <= {1}, f"at least 1, and 1 from dim[{ndim}] on"),
        ("nbytes", nbytes, nbytes == size, f"{size}, the product of dim and the dtype's bytes"),
        ("offset", offset, offset == start, f"{start}, the end of the part before rounded up to align"),
        ("nbytes", nbytes, nbytes <= room, f"at most {room}, what is left of the file"),
    ):
        _need(holds, where, f"section[{i}] {tag!r} {field}", found, expected)
    actual = zlib.crc32(data[start : start + nbytes])
    _need(crc == actual, where, f"section[{i}] {tag!r} crc32", crc, actual)
    return Entry(tag, str(dtype), tuple(dims[:ndim]), offset, nbytes, flags == FLAG_REQUIRED)

"""Banks with a fault and right CRC-32s: what a careless writer could make. No reader may trust a CRC alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from small_banks import Small

from tinyvad.bank import Header, write_bank

HEADER_FIELDS = {  # name: (offset, struct code); the CRCs are made right again
    "magic": (0, "I"), "version_major": (4, "H"), "version_minor": (6, "H"), "header_size": (8, "I"),
    "file_size": (12, "I"), "section_count": (16, "H"), "section_entry_size": (18, "H"), "align": (20, "I"),
    "kind": (24, "4s"), "rounding": (28, "H"), "flags": (30, "H"), "backbone_crc32": (32, "I"), "input_h": (36, "H"),
    "input_w": (38, "H"), "grid_h": (40, "H"), "grid_w": (42, "H"), "taps": (44, "B"), "channels": (45, "B"),
    "colour": (46, "B"), "reserved_47": (47, "B"), "generation": (48, "I"), "reserved_56": (56, "I"),
}  # fmt: skip
ENTRY_FIELDS = {
    "tag": (0, "4s"), "dtype": (4, "B"), "ndim": (5, "B"), "flags": (6, "H"), "offset": (8, "I"), "nbytes": (12, "I"),
    "dim0": (16, "I"), "dim1": (20, "I"), "dim2": (24, "I"),
}  # fmt: skip
KINDS = (b"PADM", b"PADF", b"PADC", b"CORE", b"PQPC", b"STFP", b"LINR", b"CFAS", b"XXXX")
TAGS = (
    b"META", b"IVAR", b"TASK", b"PROT", b"LADR", b"LRN ", b"ABCD", b"ABC~", b"ABC\x7f", b"ABC\x1f", b"ABC\xfe", b"BA\0K",
    b"TAPS",
)  # fmt: skip
DTYPES = (0x11, 0x12, 0x14, 0x18, 0x21, 0x22, 0x24, 0x28, 0x32, 0x34, 0x38, 0)


def seal(data: bytes) -> bytes:
    """The bytes with every CRC-32 made right that lies within them."""
    file = bytearray(data)
    (count, align), size = (*struct.unpack_from("<H", file, 16), *struct.unpack_from("<I", file, 20)), len(file)
    end = 64 + 32 * count
    if not 1 <= count <= 64 or end > size:
        return bytes(file)
    for i in range(count):
        offset, nbytes = struct.unpack_from("<II", file, 64 + 32 * i + 8)
        if offset + nbytes <= size:
            struct.pack_into("<I", file, 64 + 32 * i + 28, zlib.crc32(file[offset : offset + nbytes]))
    if 16 <= align <= 4096:
        struct.pack_into("<I", file, 52, zlib.crc32(file[-(-end // align) * align :]))
    struct.pack_into("<I", file, 60, zlib.crc32(file[64:end], zlib.crc32(file[:60])))
    return bytes(file)


def _values(code: str, old: int | bytes, choices: tuple[bytes, ...]) -> list[int | bytes]:
    if code == "4s":
        return [choice for choice in choices if choice != old]
    assert isinstance(old, int)
    bits = {"B": 8, "H": 16, "I": 32}[code]
    near = [0, 1, 2, 3, 16, 255, old + 1, old - 1, old * 2, old ^ 1 << (bits - 1), (1 << bits) - 1, (1 << bits) - 16]
    return sorted({value % (1 << bits) for value in near} - {old})


def of_header(data: bytes) -> Iterator[tuple[str, bytes]]:
    for name, (offset, code) in HEADER_FIELDS.items():
        (old,) = struct.unpack_from("<" + code, data, offset)
        for value in _values(code, old, KINDS):
            changed = bytearray(data)
            struct.pack_into("<" + code, changed, offset, value)
            yield f"header {name} = {value!r}", seal(bytes(changed))


def of_entries(data: bytes) -> Iterator[tuple[str, bytes]]:
    for i in range(struct.unpack_from("<H", data, 16)[0]):
        for name, (offset, code) in ENTRY_FIELDS.items():
            (old,) = struct.unpack_from("<" + code, data, 64 + 32 * i + offset)
            for value in _values(code, old, TAGS) if name != "dtype" else DTYPES:
                changed = bytearray(data)
                struct.pack_into("<" + code, changed, 64 + 32 * i + offset, value)
                yield f"entry {i} {name} = {value!r}", seal(bytes(changed))


def of_sections(small: Small) -> Iterator[tuple[str, bytes]]:
    """Sections that are missing, of another shape or dtype, or hold numbers at and beyond their ends."""
    sections = small.sections
    for tag, array in sections.items():
        yield f"no {tag}", _write(small, {k: v for k, v in sections.items() if k != tag})
        shorter, taller = array[:-1], np.concatenate([array, array[-1:]])
        for name, other in (
            ("shorter", shorter), ("taller", taller), ("flat", array.reshape(-1)), ("deeper", array[None]),
            ("float", array.astype(np.float32)), ("wider", array.astype(np.int64)),
            ("unsigned", array.astype(f"u{array.dtype.itemsize}")), ("signed", array.astype(f"i{array.dtype.itemsize}")),
        ):  # fmt: skip
            if 1 <= other.ndim <= 3 and other.size and (other.shape, other.dtype) != (array.shape, array.dtype):
                yield f"{name} {tag}", _write(small, {**sections, tag: other})
    for pool in (1, 2, 3, 4, 5, 6, 7, 9):
        taps = sections["TAPS"].copy()
        taps[:, 6] = pool
        yield f"pool {pool}", _write(small, {**sections, "TAPS": taps})
    ends = {
        "CFG ": (-1, 0, 1, 2, 3, 4, 5, 8, 11, 12, 13, 15, 16, 20, 21, 31, 32, 256, 300, 512, 513, 2**31 - 1, -(2**31)),
        "TAPS": (-129, -128, -33, -32, -31, -1, 0, 1, 2, 3, 5, 7, 8, 9, 30, 31, 127, 128, 4096, 4097, 2**31 - 1, -(2**31)),
        "BIAS": (-33, -32, -31, -1, 0, 1, 9, 10, 11, 30, 31, -(2**15), 2**15 - 1, 2**30, 2**31 - 1, -(2**31)),
        "INDX": (0, 1, 11, 12, 13, 255, 65535), "CODE": (0, 8, 9, 15, 16, 19, 20, 0x99, 0xF0, 255),
        "GOLD": (0, 1, 2, 3, 11, 12, 2**32 - 1), "THRS": (0, 2**32 - 1), "TABL": (0, 2**16, 2**16 + 1, 2**31, 2**32 - 1),
        "SCAL": (0, 255) if "SCAL" in sections and sections["SCAL"].dtype == np.uint8 else
                (0.0, -0.0, -1.0, 5e-324, -5e-324, np.inf, -np.inf, np.nan, 1.7e308),
        "TASK": (-(2**31), -1, 0, 1, 2, 3, 4, 6, 7, 9, 2**31 - 1),
        "PROT": (-(2**31), -(2**31) + 1, -127 * 12 - 1, -127 * 12, 0, 127 * 12, 127 * 12 + 1, 2**31 - 1),
        "LADR": (0, 1, 2, 50, 2**31, 2**32 - 1), "LRN ": (0, 1, 2**32 - 1),
    }  # fmt: skip
    for tag, values in ends.items():
        for place in range(min(sections[tag].size, 32)) if tag in sections else ():
            for value in values:
                changed = sections[tag].copy()
                if isinstance(value, int) and not np.iinfo(changed.dtype).min <= value <= np.iinfo(changed.dtype).max:
                    continue
                changed.flat[place] = value
                yield f"{tag} [{place}] = {value}", _write(small, {**sections, tag: changed})


def of_tasks(small: Small) -> Iterator[tuple[str, bytes]]:
    """A bank of several tasks whose rows are shared out in another way, and one of a single task with odd sections."""
    sections, kind = small.sections, small.header.kind
    task, prototypes = sections["TASK"], sections["PROT"]
    count = len(task)
    for a in range(count):
        for b in range(count):
            moved = task.copy()
            moved[a, 1] += 1
            moved[b, 1] -= 1
            yield f"a row from {b} to {a}, gaps", _write(small, {**sections, "TASK": moved})
            moved[:, 0] = np.cumsum([0, *moved[:-1, 1]])
            yield f"a row from {b} to {a}", _write(small, {**sections, "TASK": moved})
    swapped = {**sections, "TASK": task[::-1].copy(), "PROT": prototypes[::-1].copy()}
    yield "tasks in another order", _write(small, swapped)
    whole = int(task[:, 1].sum())
    for rows in (whole - 1, whole, whole + 1):
        one = {"TASK": np.array([[0, rows, 3, 0]], np.int32), "PROT": prototypes[:1], "THRS": sections["THRS"][:1],
               "LADR": np.array([[[9, 5]]], np.uint32)}  # fmt: skip
        kept = {tag: array for tag, array in {**sections, **one}.items() if tag in sections}
        if kind.startswith("PAD"):
            kept["TABL"] = sections["TABL"][: len(sections["TABL"]) // count]
        if kind == "PQPC":
            kept |= {tag: sections[tag][: len(sections[tag]) // count] for tag in ("INDX", "CBK ")}
        for gone in ((), ("GOLD", "TEST"), ("TASK", "GOLD", "TEST"), ("PROT", "GOLD", "TEST"),
                     ("TASK", "PROT", "GOLD", "TEST")):  # fmt: skip
            yield f"one task of {rows} rows, no {gone}", _write(small, {t: a for t, a in kept.items() if t not in gone})
    for tasks in (2, 255, 256, 300):
        extended = {**sections, "THRS": np.resize(sections["THRS"], tasks), "PROT": np.resize(prototypes, (tasks, 3))}
        extended["TASK"] = np.array([[t, 1, 0, 0] for t in range(tasks)], np.int32)
        if kind == "CORE":
            extended |= {"BANK": np.resize(sections["BANK"], (tasks, 12)), "CFG ": np.array([tasks, 12, 0, 8], np.int32)}
            extended["LADR"] = np.resize(sections["LADR"], (tasks, *sections["LADR"].shape[1:]))
        if kind == "PQPC":
            subspaces, bits = sections["CFG "][2:].tolist()
            extended |= {"CODE": np.resize(sections["CODE"], (tasks, *sections["CODE"].shape[1:])),
                         "CFG ": np.array([tasks, 12, subspaces, bits], np.int32),
                         "INDX": np.resize(sections["INDX"], 12 * tasks),
                         "CBK ": np.resize(sections["CBK "], (subspaces * tasks, *sections["CBK "].shape[1:]))}
            extended["LADR"] = np.resize(sections["LADR"], (tasks, *sections["LADR"].shape[1:]))
        yield f"{tasks} tasks", _write(small, extended)
    if kind == "PQPC":
        yield from _of_codebooks(small)


def _of_codebooks(small: Small) -> Iterator[tuple[str, bytes]]:
    """Codebooks and channel orders of too few, too many and other tasks; the last task's order is no permutation."""
    sections, count = small.sections, len(small.sections["TASK"])
    subspaces = int(sections["CFG "][2])
    for tasks in range(1, 2 * count + 1):
        for tag, each in (("INDX", 12), ("CBK ", subspaces)):
            resized = np.resize(sections[tag], (each * tasks, *sections[tag].shape[1:]))
            yield f"{tag} of {tasks} tasks", _write(small, {**sections, tag: resized})
    yield "INDX in rows", _write(small, {**sections, "INDX": sections["INDX"].reshape(count, 12)})
    yield "CBK in rows", _write(small, {**sections, "CBK ": sections["CBK "].reshape(count * subspaces, -1)})
    for at in range(0, 12 * count, 5):
        for other in (0, 12, 12 * (count - 1), 12 * count - 1):
            doubled, moved = sections["INDX"].copy(), sections["INDX"].copy()
            doubled[at] = doubled[other]
            moved[[at, other]] = moved[[other, at]]
            yield f"INDX [{at}] is that of {other}", _write(small, {**sections, "INDX": doubled})
            yield f"INDX [{at}] and {other} swapped", _write(small, {**sections, "INDX": moved})


def _write(small: Small, sections: dict[str, np.ndarray]) -> bytes:
    tags = ("LUT ", "TAPS", "THRS", *small.scorer.required)
    return write_bank(small.header, sections, [tag for tag in tags if tag in sections])


def of_grids(small: Small) -> Iterator[tuple[str, bytes]]:
    """A memory bank or a linear layer has no section of the grid's shape: any grid may stand in its header."""
    h = small.header
    for grid in ((1, 1), (1, 65535), (65535, 1), (65535, 65535), (2901, 2902), (700, 700), (300, 40), (2000, 2000)):
        header = Header(h.kind, h.backbone_crc32, h.input_size, grid, h.taps)
        yield f"grid {grid}", write_bank(header, small.sections, ("LUT ",))

"""The .tvb format against docs/SPEC.md.

``assemble`` builds banks from the SPEC's own offset tables, with a CRC written out bit by bit, and knows nothing of
tinyvad.bank: it makes the expected bytes, and forgeries whose CRCs are right although a field is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tinyvad import bank
from tinyvad.bank import (
    Header,
    newest,
    open_bank,
    pack_meta,
    pack_nibbles,
    read_bank,
    save_bank,
    unpack_nibbles,
    write_bank,
)
from tinyvad.errors import InputError

SPEC = (Path(__file__).resolve().parents[1] / "docs" / "SPEC.md").read_text(encoding="utf-8")
CHECK_VALUE = 0xCBF43926

HEADER = Header("CORE", CHECK_VALUE, (8, 8), (2, 1), taps=1, generation=1)
SECTIONS: dict[str, np.ndarray] = {
    "BANK": np.array([[1, 2, 3], [-1, -2, -3]], np.int8),
    "THRS": np.array([1000], np.uint32),
}
# The same bank in the SPEC's words; payloads as hex, so that no code of ours has made them.
FIELDS: dict[str, int | bytes] = {
    "magic": b"TVB1", "version_major": 1, "version_minor": 0, "header_size": 64, "section_count": 2,
    "section_entry_size": 32, "align": 16, "kind": b"CORE", "rounding": 1, "flags": 0, "backbone_crc32": CHECK_VALUE,
    "input_h": 8, "input_w": 8, "grid_h": 2, "grid_w": 1, "taps": 1, "channels": 3, "colour": 1, "reserved_47": 0,
    "generation": 1, "reserved_56": 0, "file_size": 160,
}  # fmt: skip
BANK_ENTRY: dict[str, int | bytes] = {
    "tag": b"BANK", "dtype": 0x11, "ndim": 2, "flags": 1, "offset": 128, "nbytes": 6, "dim0": 2, "dim1": 3, "dim2": 1,
}  # fmt: skip
THRS_ENTRY: dict[str, int | bytes] = {
    "tag": b"THRS", "dtype": 0x24, "ndim": 1, "flags": 0, "offset": 144, "nbytes": 4, "dim0": 1, "dim1": 1, "dim2": 1,
}  # fmt: skip
PAYLOAD = bytes.fromhex("010203fffefd" + "00" * 10 + "e8030000" + "00" * 12)


def crc32(data: bytes) -> int:
    """The CRC-32 of the SPEC, one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def layout(title: str) -> list[tuple[int, int, str]]:
    """(offset, size, field) of the SPEC's table under the heading ``title``."""
    section = SPEC.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    return [(int(a), int(b), c) for a, b, c in re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", section, re.M)]


def rows(first: str, second: str) -> dict[str, str]:
    """The SPEC's two-column table with these column heads."""
    body = SPEC.split(f"| {first} | {second} |", 1)[1].split("\n\n", 1)[0]
    return dict(re.findall(r"^\| `?([^|`]+?)`? \| ([^|]+?) \|", "\n".join(body.split("\n")[2:]), re.M))


def lay(title: str, values: Mapping[str, int | bytes]) -> bytes:
    data = b""
    for offset, size, field in layout(title):
        assert offset == len(data)
        value = values[field]
        data += value if isinstance(value, bytes) else value.to_bytes(size, "little")
    return data


def assemble(
    fields: Mapping[str, int | bytes] = {},
    entries: tuple[Mapping[str, int | bytes], ...] = (BANK_ENTRY, THRS_ENTRY),
    payload: bytes = PAYLOAD,
    table_pad: bytes = b"",
) -> bytes:
    """A bank from the SPEC's tables; every CRC that ``fields`` or ``entries`` don't give is right."""
    start = 64 + 32 * len(entries) + len(table_pad)
    table = b""
    for entry in entries:
        first = int(entry["offset"]) - start
        values = payload[max(first, 0) : max(first, 0) + int(entry["nbytes"])]
        table += lay("Section entry, 32 bytes", {"crc32": crc32(values), **entry})
    head = {**FIELDS, "payload_crc32": crc32(payload), "header_crc32": 0, **fields}
    first_60 = lay("Header, 64 bytes", head)[:60]
    head["header_crc32"] = fields.get("header_crc32", crc32(first_60 + table))
    return lay("Header, 64 bytes", head) + table + table_pad + payload


def refusal(data: bytes) -> str:
    """The message with which the reader refuses ``data``; one line that names the file."""
    with pytest.raises(InputError) as caught:
        read_bank(data, "some.tvb")
    message = str(caught.value)
    assert message.startswith("some.tvb: ") and "\n" not in message
    return message


def test_crc_of_the_spec_has_its_check_value() -> None:
    assert crc32(b"123456789") == CHECK_VALUE
    assert crc32(b"") == 0


def test_worked_example_is_what_the_writer_makes() -> None:
    dump = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){16})", SPEC.split("## Worked example")[1], re.M)
    assert [int(offset, 16) for offset, _ in dump] == list(range(0, 160, 16))
    expected = bytes.fromhex("".join(line for _, line in dump))
    assert assemble() == expected
    assert write_bank(HEADER, SECTIONS, ["BANK"]) == expected


def test_tables_of_the_spec_are_those_of_the_reader() -> None:
    assert rows("kind", "detector") == bank.KINDS
    assert rows("tag", "holds") == bank.TAGS  # a tag added to one and not to the other
    numbers = re.findall(r"^\| ([iuf]\d) \| (0x\w\w) \|", SPEC, re.M)
    assert {name: int(number, 16) for name, number in numbers} == bank.DTYPES
    assert sum(size for _, size, _ in layout("Header, 64 bytes")) == 64
    assert sum(size for _, size, _ in layout("Section entry, 32 bytes")) == 32


def test_reader_gives_back_what_the_spec_says() -> None:
    b = read_bank(assemble())
    assert b.header == HEADER
    assert list(b.sections) == ["BANK", "THRS"]
    np.testing.assert_array_equal(b.sections["BANK"], [[1, 2, 3], [-1, -2, -3]])
    np.testing.assert_array_equal(b.sections["THRS"], [1000])
    assert b.nbytes == 160
    assert b.crc32 == int.from_bytes(assemble()[60:64], "little")
    assert b.meta == {}
    assert [tuple(entry) for entry in b.section_table()] == [
        ("BANK", "i1", (2, 3), 128, 6, True),
        ("THRS", "u4", (1,), 144, 4, False),
    ]


DTYPE_NAMES = ["i1", "u1", "<i2", ">i2", "<u2", ">u2", "<i4", ">i4", "<u4", ">u4", "<i8", ">i8", "<u8", ">u8",
               "<f4", ">f4", "<f8", ">f8"]  # fmt: skip
ANY_ARRAY = st.sampled_from(DTYPE_NAMES).flatmap(
    lambda name: arrays.arrays(np.dtype(name), arrays.array_shapes(min_dims=0, max_dims=3, max_side=9))
)
U16 = st.integers(1, 65535)
U32 = st.integers(0, 2**32 - 1)
ANY_HEADER = st.builds(
    Header, kind=st.sampled_from(list(bank.KINDS)), backbone_crc32=U32, input_size=st.tuples(U16, U16),
    grid_size=st.tuples(U16, U16), taps=st.integers(1, 255), generation=U32,
    rounding=st.sampled_from(["double", "single"]), updatable=st.booleans(),
    align=st.sampled_from([16, 32, 64, 128, 256, 512, 1024, 2048, 4096]),
)  # fmt: skip
ANY_SECTIONS = st.lists(st.sampled_from(list(bank.TAGS)), min_size=1, max_size=6, unique=True).flatmap(
    lambda tags: st.tuples(*(st.tuples(st.just(tag), ANY_ARRAY, st.booleans()) for tag in tags))
)


@settings(max_examples=150, deadline=None)
@given(ANY_HEADER, ANY_SECTIONS)
def test_round_trip(header: Header, parts: tuple[tuple[str, np.ndarray, bool], ...]) -> None:
    sections = {tag: array for tag, array, _ in parts}
    required = [tag for tag, _, flag in parts if flag]
    data = write_bank(header, sections, required)
    b = read_bank(data)
    assert b.header == header
    assert list(b.sections) == list(sections)
    assert b.nbytes == len(data) and len(data) % header.align == 0
    for entry, (tag, array, flag) in zip(b.section_table(), parts, strict=True):
        assert (entry.tag, entry.shape, entry.required) == (tag, array.shape, flag)
        assert entry.offset % header.align == 0
        view = b.sections[tag]
        assert view.dtype == array.dtype.newbyteorder("<")
        assert view.tobytes() == array.astype(view.dtype).tobytes()  # NaN too
        assert data[entry.offset : entry.offset + entry.nbytes] == view.tobytes()


def test_same_content_gives_the_same_bytes(rng: np.random.Generator) -> None:
    plain = rng.integers(-100, 100, (4, 6, 5)).astype("<i2")
    data = write_bank(HEADER, {"MEAN": plain, "THRS": np.arange(3, dtype="u4")}, ["THRS", "MEAN"])
    for same in (plain.astype(">i2"), np.asfortranarray(plain), np.repeat(plain, 2, axis=1)[:, ::2]):
        assert write_bank(HEADER, {"MEAN": same, "THRS": np.arange(3, dtype="u4")}, {"MEAN", "THRS"}) == data
    swapped = write_bank(HEADER, {"THRS": np.arange(3, dtype="u4"), "MEAN": plain}, ["THRS", "MEAN"])
    assert [entry.tag for entry in read_bank(swapped).section_table()] == ["THRS", "MEAN"]


PADDED = write_bank(  # padding after the table, between sections and at the end; META, whose content is not checked
    Header("PADC", 7, (65535, 1), (3, 2), taps=255, generation=2**32 - 1, updatable=True, align=64),
    {"META": pack_meta({"a": 1}), "MEAN": np.full((2, 3), np.pi, np.float64)},
    ["MEAN"],
)


@pytest.mark.parametrize("data", [assemble(), PADDED], ids=["tiny", "padded"])
def test_every_changed_byte_is_refused(data: bytes) -> None:
    patterns = [1 << bit for bit in range(8)] + [0xFF, 0x55, 0x20, 0x81]
    for at in range(len(data)):
        for byte in {data[at] ^ pattern for pattern in patterns} | ({0, 0xFF} - {data[at]}):
            refusal(data[:at] + bytes([byte]) + data[at + 1 :])


@pytest.mark.parametrize("data", [assemble(), PADDED], ids=["tiny", "padded"])
def test_truncated_and_extended_files_are_refused(data: bytes) -> None:
    for size in range(len(data)):
        message = refusal(data[:size])
        assert "file size" in message or f"file_size is {len(data)}" in message
    for extra in (b"\0", b"\0" * 16, b"\0" * 64, b"\xff", data):
        assert f"file_size is {len(data)}, expected {len(data) + len(extra)}" in refusal(data + extra)


def swapped(at: int, value: bytes) -> bytes:
    return PAYLOAD[:at] + value + PAYLOAD[at + len(value) :]


NONE_ENTRY = {**THRS_ENTRY, "tag": b"ABCD"}
FORGERIES: dict[str, tuple[dict[str, Any], str]] = {
    # header fields
    "magic": ({"fields": {"magic": b"GGUF"}}, "magic is b'GGUF', expected b'TVB1'"),
    "major newer": ({"fields": {"version_major": 2}}, "version_major is 2, expected 1"),
    "major 0": ({"fields": {"version_major": 0}}, "version_major is 0, expected 1"),
    "header size": ({"fields": {"header_size": 96}}, "header_size is 96, expected 64"),
    "entry size": ({"fields": {"section_entry_size": 40}}, "section_entry_size is 40, expected 32"),
    "file size": ({"fields": {"file_size": 0xFFFFFFF0}}, "file_size is 4294967280, expected 160"),
    "count 0": ({"fields": {"section_count": 0}}, "section_count is 0, expected 1 to 3"),
    "count past end": ({"fields": {"section_count": 4}}, "section_count is 4, expected 1 to 3"),
    "count big": (
        {"fields": {"section_count": 65, "file_size": 64 + 65 * 32}, "payload": bytes(63 * 32)},
        "section_count is 65, expected 1 to 64",
    ),
    "header crc": ({"fields": {"header_crc32": 1}}, "header_crc32 is 0x00000001, expected 0x"),
    "align 0": ({"fields": {"align": 0}}, "align is 0, expected a power of two from 16 to 4096"),
    "align 8": ({"fields": {"align": 8}}, "align is 8, expected"),
    "align 24": ({"fields": {"align": 24}}, "align is 24, expected"),
    "align 8192": ({"fields": {"align": 8192}}, "align is 8192, expected"),
    "kind": ({"fields": {"kind": b"\nXY\xff"}}, "kind is '\\nXYÿ', expected one of ['PADM'"),
    "rounding": ({"fields": {"rounding": 3}}, "rounding is 'number 3', expected one of ['double', 'single']"),
    "flags": ({"fields": {"flags": 2}}, "flags is 2, expected 0 or 1"),
    "flags too": ({"fields": {"flags": 0x8001}}, "flags is 32769, expected 0 or 1"),
    "input": ({"fields": {"input_w": 0}}, "input_size is (8, 0), expected (height, width), each 1 to 65535"),
    "grid": ({"fields": {"grid_h": 0}}, "grid_size is (0, 1), expected"),
    "taps": ({"fields": {"taps": 0}}, "taps is 0, expected 1 to 255"),
    "channels": ({"fields": {"channels": 1}}, "channels is 1, expected 3"),
    "colour": ({"fields": {"colour": 9}}, "colour is 'number 9', expected one of ['rgb']"),
    "reserved byte": ({"fields": {"reserved_47": 1}}, "reserved_47 is 1, expected 0"),
    "reserved word": ({"fields": {"reserved_56": 1}}, "reserved_56 is 1, expected 0"),
    "payload crc": ({"fields": {"payload_crc32": 2}}, "payload_crc32 is 0x00000002, expected 0x"),
    # the first entry's fields
    "tag": ({"first": {"tag": b"BA\0K"}}, "tag is b'BA\\x00K', expected four printable ASCII"),
    "tag high": ({"first": {"tag": b"BAN\xfe"}}, "tag is b'BAN\\xfe', expected four printable ASCII"),
    "tag twice": ({"first": {"tag": b"THRS"}}, "section[1] tag is 'THRS', expected a tag only once"),
    "dtype": ({"first": {"dtype": 0x12 | 0x80}}, "section[0] 'BANK' dtype is 0x92, expected one of 0x11, "),
    "half": ({"first": {"dtype": 0x32}}, "section[0] 'BANK' dtype is 0x32, expected one of"),
    "ndim": ({"first": {"ndim": 4}}, "section[0] 'BANK' ndim is 4, expected at most 3"),
    "entry flags": ({"first": {"flags": 3}}, "section[0] 'BANK' flags is 3, expected 0 or 1"),
    "entry crc": ({"first": {"crc32": 3}}, "section[0] 'BANK' crc32 is 0x00000003, expected 0x"),
    "unknown required": ({"first": {"tag": b"ABCD"}}, "tag is 'ABCD', expected a tag that this reader knows"),
    "dim 0": ({"first": {"dim1": 0, "nbytes": 0}}, "section[0] 'BANK' dim is [2, 0, 1], expected at least 1"),
    "unused dim 0": ({"first": {"dim2": 0}}, "section[0] 'BANK' dim is [2, 3, 0], expected at least 1"),
    "unused dim 2": ({"first": {"ndim": 1}}, "dim is [2, 3, 1], expected at least 1, and 1 from dim[1] on"),
    "fewer bytes": ({"first": {"nbytes": 5}}, "section[0] 'BANK' nbytes is 5, expected 6"),
    "more bytes": ({"first": {"nbytes": 7}}, "section[0] 'BANK' nbytes is 7, expected 6"),
    "product over 32 bits": (
        {"first": {"dim0": 2**31, "dim1": 2, "nbytes": 0}},
        "section[0] 'BANK' nbytes is 0, expected 4294967296",
    ),
    "product over 32 bits, low part right": (
        {"first": {"dim0": 2**31 + 3, "dim1": 2, "nbytes": 6}},
        "section[0] 'BANK' nbytes is 6, expected 4294967302",
    ),
    "product over 64 bits": (
        {"first": {"ndim": 3, "dim0": 2**31, "dim1": 2**31, "dim2": 4, "nbytes": 0}},
        f"section[0] 'BANK' nbytes is 0, expected {2**64}",
    ),
    "past the end": (
        {"first": {"dim0": 33, "dim1": 1, "nbytes": 33}},
        "section[0] 'BANK' nbytes is 33, expected at most 32",
    ),
    "offset + nbytes over 32 bits": (
        {"first": {"dim0": 2**32 - 16, "dim1": 1, "nbytes": 2**32 - 16}},
        "section[0] 'BANK' nbytes is 4294967280, expected at most 32",
    ),
    "offset unaligned": ({"second": {"offset": 142}}, "section[1] 'THRS' offset is 142, expected 144"),
    "offset overlapping": ({"second": {"offset": 128}}, "section[1] 'THRS' offset is 128, expected 144"),
    "offset in the header": ({"first": {"offset": 0}}, "section[0] 'BANK' offset is 0, expected 128"),
    "offset in the table": ({"first": {"offset": 112}}, "section[0] 'BANK' offset is 112, expected 128"),
    "offset past the end": ({"second": {"offset": 160}}, "section[1] 'THRS' offset is 160, expected 144"),
    "offset huge": ({"second": {"offset": 2**32 - 16}}, "section[1] 'THRS' offset is 4294967280, expected 144"),
    "order": ({"first": {"offset": 144}, "second": {"offset": 128}}, "section[0] 'BANK' offset is 144, expected 128"),
    # the whole
    "padding between": ({"payload": swapped(6, b"\1")}, "padding after 'BANK' is not zero"),
    "padding between, last byte": ({"payload": swapped(15, b"\x80")}, "padding after 'BANK' is not zero"),
    "padding at the end": ({"payload": swapped(31, b"\xff")}, "padding after 'THRS' is not zero"),
    "spare block": (
        {"payload": PAYLOAD + bytes(16), "fields": {"file_size": 176}},
        "file_size is 176, expected 160, the sections' end",
    ),
    "end not aligned": (
        {"payload": PAYLOAD[:-8], "fields": {"file_size": 152}},
        "file_size is 152, expected 160, the sections' end",
    ),
    "no room for the second": (
        {"payload": PAYLOAD[:10], "fields": {"file_size": 138}},
        "section[1] 'THRS' nbytes is 4, expected at most 0",
    ),
    "padding after the table": (
        {"entries": ({**BANK_ENTRY},), "fields": {"section_count": 1, "align": 64, "file_size": 192},
         "payload": PAYLOAD[:6] + bytes(58), "table_pad": bytes(31) + b"\1"},
        "padding after the section table is not zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_bank_is_refused_by_the_fields_name(name: str) -> None:
    change, expected = FORGERIES[name]
    change = dict(change)
    first, second = change.pop("first", {}), change.pop("second", {})
    change.setdefault("entries", ({**BANK_ENTRY, **first}, {**THRS_ENTRY, **second}))
    assert expected in refusal(assemble(**change))


def test_padding_after_the_table_is_accepted_when_zero() -> None:
    fields = {"section_count": 1, "align": 64, "file_size": 192}
    b = read_bank(assemble(fields, (BANK_ENTRY,), PAYLOAD[:6] + bytes(58), table_pad=bytes(32)))
    np.testing.assert_array_equal(b.sections["BANK"], SECTIONS["BANK"])


def test_newer_minor_version_and_unknown_optional_section_are_accepted() -> None:
    b = read_bank(assemble({"version_minor": 9}, (BANK_ENTRY, NONE_ENTRY)))
    assert list(b.sections) == ["BANK"]
    assert [entry.tag for entry in b.section_table()] == ["BANK", "ABCD"]
    damaged = assemble({}, (BANK_ENTRY, {**NONE_ENTRY, "crc32": 0}))
    assert "section[1] 'ABCD' crc32" in refusal(damaged)  # skipped, but not unchecked


def test_scalars_and_sixty_four_sections() -> None:
    entries = tuple(
        {**THRS_ENTRY, "tag": f"T{i:03d}".encode(), "ndim": 0, "offset": 64 + 64 * 32 + 16 * i} for i in range(64)
    )
    data = assemble({"section_count": 64, "file_size": 64 + 64 * 48}, entries, bytes(64 * 16))
    assert {entry.shape for entry in read_bank(data).section_table()} == {()}


def test_extreme_values_survive() -> None:
    sections: dict[str, np.ndarray] = {
        "CFG ": np.array([2**64 - 1], np.uint64),
        "TASK": np.array([-(2**63)], np.int64),
        "SCAL": np.array([np.inf, -0.0, 5e-324]),
    }
    header = Header("PADF", 2**32 - 1, (65535, 65535), (65535, 65535), taps=255, generation=2**32 - 1, align=4096)
    b = read_bank(write_bank(header, sections, []))
    assert b.header == header and b.nbytes == 4 * 4096
    for tag, array in sections.items():
        assert b.sections[tag].tobytes() == array.tobytes()


def test_bank_over_4_gib_is_refused_before_it_is_made() -> None:
    huge = np.broadcast_to(np.int8(0), (2**32 - 96,))  # a bank of 2**32 bytes; the array takes no memory
    with pytest.raises(InputError, match=r"file_size is 4294967296, expected at most 4294967295"):
        write_bank(HEADER, {"BANK": huge}, [])


@pytest.mark.parametrize(
    ("sections", "required", "expected"),
    [
        ({}, [], "section_count is 0"),
        ({"BANK": np.zeros(3, np.int8)}, ["BANK", "MEAN"], "required is ['BANK', 'MEAN'], expected among ['BANK']"),
        ({"CFG": np.zeros(3, np.int8)}, [], "tag is 'CFG', expected one of ['CFG ', "),
        ({"BANK": np.zeros(3, np.float16)}, [], "'BANK' dtype is float16"),
        ({"BANK": np.zeros(3, bool)}, [], "'BANK' dtype is bool"),
        ({"BANK": np.array(["a"], object)}, [], "'BANK' dtype is object"),
        ({"BANK": np.zeros((0, 3), np.int8)}, [], "'BANK' shape is (0, 3)"),
        ({"BANK": np.zeros((1, 1, 1, 1), np.int8)}, [], "'BANK' shape is (1, 1, 1, 1)"),
    ],
)
def test_writer_refuses(sections: dict[str, np.ndarray], required: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        write_bank(HEADER, sections, required)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "XXXX"), ("kind", "ÄÄÄÄ"), ("rounding", "triple"), ("colour", "bgr"), ("channels", 1), ("taps", 0),
        ("taps", 256), ("align", 8), ("align", 48), ("align", 8192), ("generation", -1), ("generation", 2**32),
        ("backbone_crc32", 2**32), ("input_size", (0, 8)), ("grid_size", (1, 65536)),
    ],
)  # fmt: skip
def test_writer_refuses_header(field: str, value: object) -> None:
    header = Header(**{**HEADER.__dict__, field: value})
    with pytest.raises(InputError, match=re.escape(f"{field} is {value!r}, expected")):
        write_bank(header, SECTIONS, [])


def test_opened_bank_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bank.tvb"
    save_bank(path, HEADER, SECTIONS, ["BANK"])
    assert path.read_bytes() == assemble()
    b = open_bank(path)
    assert b.name == str(path)
    view = b.sections["BANK"]
    owner: Any = view
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert type(owner.obj).__name__ == "mmap"  # the file's pages, no copy
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 5
    with pytest.raises(TypeError):
        b.sections["BANK"] = view  # type: ignore[index]
    other = read_bank(bytearray(assemble()))  # type: ignore[arg-type]  # writable memory does as well
    assert not other.sections["BANK"].flags.writeable


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "empty.tvb").write_bytes(b"")
    for name in ("missing.tvb", "empty.tvb", "."):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            open_bank(tmp_path / name)
    (tmp_path / "damaged.tvb").write_bytes(assemble()[:-1] + b"\1")
    with pytest.raises(InputError, match=r"damaged\.tvb: padding after 'THRS'"):
        open_bank(tmp_path / "damaged.tvb")


def test_meta() -> None:
    meta = {"b": [1, 2.5, None], "a": {"ä": True}}
    packed = pack_meta(meta)
    assert packed.tobytes() == pack_meta({"a": meta["a"], "b": meta["b"]}).tobytes()
    assert read_bank(write_bank(HEADER, {"META": packed}, [])).meta == meta
    for text in (b"[1]", b"{", b"\xff", b"[" * 100_000):
        b = read_bank(write_bank(HEADER, {"META": np.frombuffer(text, np.uint8)}, []))
        with pytest.raises(InputError, match="bank: META is"):
            _ = b.meta
    for value in (float("nan"), {1, 2}):
        with pytest.raises(InputError, match="META cannot be written"):
            pack_meta({"x": value})


def test_nibbles_of_the_spec() -> None:
    np.testing.assert_array_equal(pack_nibbles(np.array([1, 2, -1, -8, 7])), [0x21, 0x8F, 0x07])
    np.testing.assert_array_equal(pack_nibbles(np.array([[1, 2, 3], [4, 5, 6]])), [[0x21, 0x03], [0x54, 0x06]])
    np.testing.assert_array_equal(unpack_nibbles(np.array([0x21, 0x8F, 0x07]), 5), [1, 2, -1, -8, 7])
    for bad in ([8], [-9]):
        with pytest.raises(InputError, match=r"expected -8\.\.7"):
            pack_nibbles(np.array(bad))
    with pytest.raises(InputError, match="bytes a row is 3, expected 2"):
        unpack_nibbles(np.zeros(3, np.uint8), 4)


@given(arrays.arrays(np.int8, arrays.array_shapes(max_dims=3, max_side=7), elements=st.integers(-8, 7)))
def test_nibbles_round_trip(values: np.ndarray) -> None:
    packed = pack_nibbles(values)
    assert packed.dtype == np.uint8 and packed.shape == (*values.shape[:-1], (values.shape[-1] + 1) // 2)
    unpacked = unpack_nibbles(packed, values.shape[-1])
    assert unpacked.dtype == np.int8
    np.testing.assert_array_equal(unpacked, values)


def test_newest_takes_the_highest_generation_that_verifies(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in ("a.tvb", "b.tvb", "c.tvb"))
    a.write_bytes(assemble({"generation": 7}))
    b.write_bytes(assemble({"generation": 0xFFFFFFFF}))
    c.write_bytes(assemble({"generation": 8})[:-1])
    assert newest([a, b, c]) == b
    assert newest([a, c]) == a
    assert newest([str(c), str(a)]) == a
    b.write_bytes(assemble({"generation": 7}))
    assert newest([a, b]) == a and newest([b, a]) == b
    with pytest.raises(InputError) as caught:
        newest([c, tmp_path / "missing.tvb"])
    message = str(caught.value)
    assert "\n" not in message
    assert f"{c}: file_size is 160, expected 159" in message and "missing.tvb: cannot be read" in message
    with pytest.raises(InputError, match="no slot was named"):
        newest([])


def test_power_cut_at_any_byte_of_an_update_loses_nothing(tmp_path: Path) -> None:
    current, other = tmp_path / "a.tvb", tmp_path / "b.tvb"
    current.write_bytes(assemble({"generation": 5}))
    old, new = assemble({"generation": 4}), assemble({"generation": 6})
    for erased in range(0, 161, 7):  # the erase of the older slot is cut
        other.write_bytes(b"\xff" * erased + old[erased:])
        assert newest([current, other]) == current
    flash = bytearray(b"\xff" * 160)
    for at in [*range(64, 160), *range(64)]:  # the SPEC's order: the header last
        other.write_bytes(flash)
        assert newest([current, other]) == current
        flash[at] = new[at]
    other.write_bytes(flash)
    assert newest([current, other]) == other

"""Which region each item gets, on small made-up chips and on presets; brute force says whether a fit exists."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvad.errors import CheckFailed
from tinyvad.firmware_sim.budget import Item, make_budget
from tinyvad.firmware_sim.memory import align
from tinyvad.firmware_sim.placement import place_items
from tinyvad.firmware_sim.targets import Span, load_target

KIB = 1024


def block(kind: str, size: int, base: int) -> Span:
    return Span((kind,), (kind,), base, size)


CHIP = [block("tcm", 64 * KIB, 0x2000_0000), block("sram", 256 * KIB, 0x2400_0000), block("psram", 4096 * KIB, 0x9000_0000)]


def regions(*items: tuple[str, int]) -> list[str]:
    return ["" if spot.span is None else CHIP[spot.span].name for spot in place_items(items, CHIP)]


def test_each_to_the_memory_that_suits_it() -> None:
    items = (("stack", 4 * KIB), ("arena", 150 * KIB), ("camera frame", 60 * KIB), ("application", 16 * KIB))
    assert regions(*items) == ["tcm", "sram", "sram", "sram"]


def test_slow_memory_is_for_frames_and_only_without_room() -> None:
    # the larger frame gives way to the arena, though it would fit alone
    assert regions(("arena", 150 * KIB), ("camera frame", 200 * KIB)) == ["sram", "psram"]
    assert regions(("arena", 150 * KIB), ("camera frame", 100 * KIB)) == ["sram", "sram"]
    assert regions(("arena", 300 * KIB), ("camera frame", 100 * KIB)) == ["psram", "sram"]


def test_a_preference_never_costs_a_fit() -> None:
    # SRAM is preferred for the arena, but only the tightly coupled memory leaves it to the frame
    assert regions(("arena", 60 * KIB), ("camera frame", 250 * KIB)) == ["tcm", "sram"]
    assert regions(("stack", 4 * KIB), ("scorer", 62 * KIB), ("arena", 252 * KIB)) == ["sram", "tcm", "sram"]
    assert regions(("arena", 5000 * KIB)) == [""]


sizes = st.lists(st.integers(1, 20), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(8, 40), min_size=1, max_size=3), sizes, st.sampled_from(["arena", "stack", "camera frame"]))
def test_places_never_overlap_and_one_or_two_items_fit_if_any_way_does(
    room: list[int], wanted: list[int], owner: str
) -> None:
    kinds = ("sram", "tcm", "psram")
    blocks = [Span((f"r{i}",), (kinds[i],), 0x1000 * i, 16 * size) for i, size in enumerate(room)]
    items = [(owner if i == 0 else f"item {i}", 16 * n) for i, n in enumerate(wanted)]
    spots = place_items(items, blocks)
    taken = []
    for (_, nbytes), spot in zip(items, spots, strict=True):
        if spot.span is not None and spot.address is not None:
            lies_in = blocks[spot.span]
            assert lies_in.base <= spot.address and spot.address + align(nbytes) <= lies_in.base + lies_in.size
            taken.append((spot.address, spot.address + align(nbytes)))
    for a, b in itertools.combinations(taken, 2):
        assert a[1] <= b[0] or b[1] <= a[0]
    if len(items) <= 2:
        ways = itertools.product(range(len(blocks)), repeat=len(items))
        fits = any(
            all(sum(n for (_, n), b in zip(items, way, strict=True) if b == i) <= one.size for i, one in enumerate(blocks))
            for way in ways
        )  # fmt: skip
        assert fits == all(spot.span is not None for spot in spots)


def test_budget_names_a_region_for_every_item() -> None:
    ram = [Item("arena", 300 * KIB, "exact"), Item("stack", 4 * KIB, "estimated"), Item("camera frame", 150 * KIB, "exact")]
    flash = [Item("bank.tvb", 160 * KIB, "exact"), Item("weights", 80 * KIB, "exact"), Item("code", 40 * KIB, "estimated")]
    budget = make_budget(load_target("stm32h743"), ram, flash)
    assert {item.owner: item.region for item in budget.ram} == {
        "arena": "AXI_SRAM", "camera frame": "AXI_SRAM", "stack": "DTCM"
    }  # fmt: skip
    assert [item.region for item in budget.flash] == ["FLASH"] * 3
    assert [item.owner for item in budget.flash] == ["bank.tvb", "weights", "code"]
    assert budget.flash[0].address is not None and budget.flash[0].address >= 0x0800_0000
    # PSRAM is taken by the frame only where the arena leaves no room
    for frame, region in ((150, "PSRAM"), (100, "SRAM1+SRAM2")):
        items = [Item("arena", 370 * KIB, "exact"), Item("camera frame", frame * KIB, "exact")]
        esp32 = load_target("esp32-s3")
        placed = {item.owner: item.region for item in make_budget(esp32, items, []).ram}
        assert placed == {"arena": "SRAM1+SRAM2", "camera frame": region}


def test_a_budget_that_does_not_fit_names_what_and_how_much() -> None:
    ram = [Item("arena", 400 * KIB, "exact"), Item("camera frame", 150 * KIB, "exact")]
    budget = make_budget(load_target("stm32f746"), ram, [])
    assert [item.region for item in budget.ram] == ["", "DTCM+SRAM"]
    assert budget.problems == ("arena 400 KiB > 320 KiB of RAM left in DTCM+SRAM on stm32f746",)
    with pytest.raises(CheckFailed, match="on stm32f746: use less"):
        budget.check("use less")

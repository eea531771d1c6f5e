"""What each runtime needs: bytes of model.c against the Arm compiler's, items that add up, tables that are complete."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tinyvad.errors import InputError
from tinyvad.export.c_model import model_header, model_source
from tinyvad.firmware_sim import runtimes
from tinyvad.firmware_sim.budget import COLUMNS, Item, frame_bytes, parse_frame
from tinyvad.firmware_sim.plans import plan
from tinyvad.firmware_sim.targets import list_targets, load_target
from tinyvad.graph.schedule import Schedule
from tinyvad.sizing import plan_network

ROOT = Path(__file__).resolve().parents[1]
BLANK = Schedule("inplace-dw", (), {}, 1024, 1000, 960, ())


def arm_compiler() -> str:
    found = shutil.which("arm-none-eabi-gcc")
    if found is None:
        pytest.skip("needs arm-none-eabi-gcc: `make firmware-tools` installs it")
    return found


@pytest.fixture(scope="module")
def network():
    from tinyvad.backbones.source import open_backbone

    return plan_network(open_backbone("phinet-mcu").graph_at(96))


def section_sizes(path: Path) -> dict[str, int]:
    """Sections of an object file that are kept, by name."""
    text = subprocess.run(["arm-none-eabi-size", "-A", path], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in text.splitlines() if line.startswith(".")]
    return {row[0]: int(row[1]) for row in rows}


def test_struct_sizes_are_the_compilers(tmp_path: Path) -> None:
    own = (runtimes.LAYER_BYTES, runtimes.STEP_BYTES, runtimes.MODEL_BYTES)
    sizes = dict(zip(("tvad_layer", "tvad_step", "struct tvad_model"), own))
    checks = "\n".join(f"typedef char check_{i}[sizeof({s}) == {n} ? 1 : -1];" for i, (s, n) in enumerate(sizes.items()))
    source = tmp_path / "sizes.c"
    source.write_text(f'#include "tvad_model.h"\n{checks}\n')
    command = [arm_compiler(), "-mcpu=cortex-m7", "-mthumb", "-fsyntax-only", "-I", ROOT / "export" / "runtime", source]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("strategy", ["layerwise", "patch"])
def test_model_flash_is_what_the_compiler_makes_of_model_c(network, strategy: str, tmp_path: Path) -> None:
    compiler = arm_compiler()
    grid = (6, 6)
    schedule = plan(network.graph, grid, strategy)
    (tmp_path / "model.c").write_text(model_source(network.graph, schedule, 0, grid))
    (tmp_path / "model.h").write_text(model_header(network.graph, schedule, 0))
    command = [compiler, "-mcpu=cortex-m7", "-mthumb", "-std=c99", "-O1", "-fdata-sections", "-I", tmp_path, "-I",
               ROOT / "export" / "runtime", "-c", tmp_path / "model.c", "-o", tmp_path / "model.o"]  # fmt: skip
    subprocess.run(command, check=True)
    sizes = section_sizes(tmp_path / "model.o")
    linked = sum(-(-n // 16) * 16 if ".layer_" in name else n for name, n in sizes.items() if name.startswith(".rodata"))
    own = runtimes.model_flash_bytes(network.graph, schedule)
    assert own.nbytes == linked
    weights = sum(-(-n // 16) * 16 for name, n in sizes.items() if name.endswith("_weights"))
    assert own.weights == weights


def test_model_flash_counts_steps(network) -> None:
    few, many = (plan(network.graph, (6, 6), strategy) for strategy in ("layerwise", "patch"))
    small, large = (runtimes.model_flash_bytes(network.graph, schedule) for schedule in (few, many))
    assert large.plan - small.plan == runtimes.STEP_BYTES * (len(many.steps) - len(few.steps))
    assert (small.weights, small.requantisation) == (large.weights, large.requantisation)


def totals(items: list[Item]) -> dict[str, int]:
    return {item.owner: item.nbytes for item in items}


def test_tinyvad_items() -> None:
    target = load_target("nrf52840")
    own = runtimes.core_figures(target)
    needs = runtimes.tinyvad_needs(BLANK, runtimes.ModelFlash(100, 20, 3), 5000, target, "10x10-rgb565")
    assert totals(needs.ram) == {
        "arena": 1024, "runtime stack": own["stack"], "static data": own["static"], "application stack": 4096,
        "application": 13312, "camera frame": 200,
    }  # fmt: skip
    assert totals(needs.flash) == {
        "weights": 100, "requantisation": 20, "layers and memory plan": 3, "bank.tvb": 5000, "runtime code": own["code"],
        "start-up": own["startup"], "application": 233472,
    }  # fmt: skip
    budget = needs.on(target)
    assert budget.problems == ()
    (arena_item,) = (item for item in budget.ram if item.owner == "arena")
    assert [(part.owner, part.nbytes, part.kind) for part in arena_item.parts] == [
        ("activations", 1000, "exact"), ("embedding and scorer", 24, "exact"),
    ]  # fmt: skip
    assert arena_item.region == "RAM"  # with its parts, it is placed whole
    for item in budget.to_dict()["ram"]:
        assert {"owner", "nbytes", "kind", "note", "region", "address"} <= set(item)  # keys of earlier versions


def test_tflm_items_add_up(network) -> None:
    needs = runtimes.tflm_needs(network.arena, network.file.size, 300, 5000, load_target("stm32h743"))
    first = needs.ram[0]
    assert first.owner == "arena"
    assert sum(part.nbytes for part in first.parts) == first.nbytes
    assert totals(needs.ram)["scorer"] == 300
    assert totals(needs.flash)["backbone.tflite"] == network.file.size
    facts = runtimes.arena_facts(network.arena)
    assert first.nbytes == facts["head_bytes"] + facts["tail_bytes"]
    assert facts["tail_bytes"] == sum(facts["tail"].values())


def test_plan_facts_have_the_keys_of_an_arena(network) -> None:
    facts = runtimes.plan_facts(BLANK)
    assert set(runtimes.arena_facts(network.arena)) <= set(facts)
    assert (facts["head_bytes"], facts["activation_bytes"], facts["tail_bytes"]) == (1024, 1000, 0)


def test_every_cortex_m_preset_has_a_measured_core() -> None:
    for target in list_targets():
        own = runtimes.core_figures(target)
        assert own["core"] == (target.core if target.core.startswith("cortex-m") else "default")
        assert own["kind"] in ("modelled", "estimated")
        assert all(own[key] > 0 for key in ("stack", "static", "code", "startup"))
        assert runtimes.packing_of(target) == ("mve" if target.isa.mve else "scalar")


def test_columns_are_known_names(network) -> None:
    target = load_target("stm32h743")
    model = runtimes.ModelFlash(1, 1, 1)
    for needs in (runtimes.tinyvad_needs(BLANK, model, 1, target), runtimes.tflm_needs(network.arena, 1, 1, 1, target)):
        leaves = [leaf for item in (*needs.ram, *needs.flash) for leaf in (item.parts or (item,))]
        assert {leaf.column for leaf in leaves} <= {"", *COLUMNS}


def test_frames() -> None:
    assert parse_frame("320x240-RGB565") == (240, 320, "rgb565")
    assert [frame_bytes(frame) for frame in (None, "320x240-rgb565", "4x2-rgb888", "4x2-grey")] == [0, 153_600, 24, 8]
    for bad in ("320x240", "0x240-grey", "320x240-bgr", "axb-grey", ""):
        with pytest.raises(InputError, match="write WIDTHxHEIGHT-FORMAT"):
            parse_frame(bad)


def test_flash_does_not_depend_on_the_numbers(network, rng: np.random.Generator) -> None:
    schedule = plan(network.graph, (6, 6), "layerwise")
    other = network.graph.copy(constants={
        name: rng.integers(-9, 9, array.shape).astype(array.dtype) for name, array in network.graph.constants.items()
    })  # fmt: skip
    assert runtimes.model_flash_bytes(other, schedule) == runtimes.model_flash_bytes(network.graph, schedule)

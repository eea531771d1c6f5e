"""Firmware of default builds on emulated chips: is every integer Python's, and is the memory plan what the linker gets?

    python benchmarks/firmware_table.py --data DIR --category bottle --category toothbrush --out benchmarks/results

Builds each category for each target, links its firmware within the target's regions, and runs it under QEMU with the
target's memory fenced, on test images, half of them defective. A row: tapped values and scores that differ from the exact
engine; RAM of the plan (arena, frame, stack and static data of the runtime) against the ELF's sections and the measured
stack; flash of the plan against the ELF's sections; instructions of one image. Reserves for an application are left out of
both sides. Needs the firmware tools (`make firmware-tools`).
"""

from __future__ import annotations

import argparse
import csv
import io
import tempfile
from pathlib import Path
from typing import Any

from tinyvad.build import build
from tinyvad.files import write_text
from tinyvad.firmware_sim.compare import compare_firmware
from tinyvad.firmware_sim.targets import load_target
from tinyvad.model import load
from tinyvad.project import Project
from tinyvad.verify import images_of

TARGETS = ("stm32f746", "stm32h743", "stm32f412", "nrf52840")
RAM_SECTIONS = (".arena", ".frame", ".data", ".bss")
FLASH_SECTIONS = (".vectors", ".model", ".bank", ".text", ".data")
COLUMNS = (
    "category", "target", "machine", "frame", "backbone", "image_size", "plan", "images", "values_compared",
    "differing_values", "differing_scores", "arena", "ram_planned", "ram_linked", "ram_off_percent", "flash_planned",
    "flash_linked", "flash_off_percent", "stack", "million_instructions", "image_AUROC",
)  # fmt: skip


def measure(data: Path, category: str, target_name: str, frame: str | None, n_images: int, folder: Path) -> dict[str, Any]:
    """One row."""
    project = Project(data=data, category=category, target=target_name, frame=frame, out=folder)
    report = build(project)[0].report
    model = load(folder)
    images = images_of(folder, data / category if (data / category).is_dir() else data, n_images)
    found = compare_firmware(folder, model, images, "firmware", load_target(target_name))
    sections, budget = found["sections"], report["budget"]
    ours = lambda items: sum(item["nbytes"] for item in items if not item["owner"].startswith("application"))  # noqa: E731
    planned = {"ram": ours(budget["ram"]), "flash": ours(budget["flash"])}
    linked = {
        "ram": sum(sections.get(name, 0) for name in RAM_SECTIONS) + found["stack_bytes"],
        "flash": sum(sections.get(name, 0) for name in FLASH_SECTIONS),
    }
    row = {
        "category": category, "target": target_name, "machine": found["machine"], "frame": frame or "",
        "backbone": report["backbone"]["name"], "image_size": report["preprocessing"]["height"],
        "plan": report["memory"]["strategy"], "images": len(images), "values_compared": found["values_compared"],
        "differing_values": sum(found["differing_values"].values()), "differing_scores": found["differing_grid_scores"],
        "arena": report["memory"]["head_bytes"], "stack": found["stack_bytes"],
        "million_instructions": round(found["instructions"] / 1e6, 1),
        "image_AUROC": round(report["metrics"]["image_AUROC"], 4) if report["metrics"] else "",
    }  # fmt: skip
    for kind in ("ram", "flash"):
        off = 100 * (planned[kind] - linked[kind]) / linked[kind]
        row |= {f"{kind}_planned": planned[kind], f"{kind}_linked": linked[kind], f"{kind}_off_percent": round(off, 2)}
    return row


def to_markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Firmware of default builds, run under QEMU with the target's memory fenced", "", f"    {command}", "",
        "| category | target (board) | network, px, plan | differing of values, scores | arena | RAM planned / linked + "
        "measured stack | flash planned / linked | M instr | image AUROC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        frame = f" with a {row['frame']} frame" if row["frame"] else ""
        lines.append(
            f"| {row['category']} | {row['target']} ({row['machine']}){frame} | {row['backbone']}, {row['image_size']}, "
            f"{row['plan']} | {row['differing_values']} of {int(row['values_compared']):,}, {row['differing_scores']} | "
            f"{int(row['arena']):,} | {int(row['ram_planned']):,} / {int(row['ram_linked']):,} "
            f"({float(row['ram_off_percent']):+.2f} %) | {int(row['flash_planned']):,} / {int(row['flash_linked']):,} "
            f"({float(row['flash_off_percent']):+.2f} %) | {row['million_instructions']} | {row['image_AUROC']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--category", action="append", required=True)
    parser.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--also", action="append", default=[], metavar="CATEGORY,TARGET[,FRAME]", help="one more row")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    wanted = [(c, t, None) for c in arguments.category for t in arguments.target or TARGETS]
    wanted += [(c, t, f[0] if f else None) for c, t, *f in (one.split(",") for one in arguments.also)]
    rows = []
    for category, target, frame in wanted:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(arguments.data, category, target, frame, arguments.images, Path(folder) / "build"))
        print(rows[-1], flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(arguments.out / "firmware.csv", text.getvalue())
    flags = " ".join([*(f"--category {c}" for c in arguments.category), *(f"--also {one}" for one in arguments.also)])
    command = f"python benchmarks/firmware_table.py --data DIR {flags} --out benchmarks/results"
    write_text(arguments.out / "firmware.md", to_markdown(rows, command))


if __name__ == "__main__":
    main()

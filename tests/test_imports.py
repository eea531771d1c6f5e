"""Who may import whom, top to bottom, never upwards; and what importing tinyvad may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"tinyvad": ROOT / "tinyvad", "tinyvad.export": ROOT / "export", "tinyvad.firmware_sim": ROOT / "firmware_sim"}
# rooms that share a line may import each other
LEVELS = [
    ("__main__",),
    ("cli",),
    ("build", "relearning"),
    ("choosing",),
    (
        "build_report", "sizing", "verify", "profiling", "sweep", "variants", "rehearsal", "inspection", "backbone_tables",
        "distill", "bench", "analysis",
    ),
    ("report",),
    ("firmware_sim",),
    ("calibration", "probing"),
    ("export",),
    ("evaluate",),
    ("model", "continual"),
    ("fitting", "fitting_trained"),
    ("detectors",),
    ("training",),
    ("embedding", "engines", "backbones"),
    ("demo", "project"),
    ("graph", "kernels", "bank", "slots", "images", "layouts", "resize", "synthetic", "metrics"),
    ("files",),
    ("errors", "version"),
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join((package, *(p for p in parts if p != "__init__"))), path))
    return found


def imported(name: str, path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_no_import_runs_upwards(name, path):
    if name == "tinyvad":
        return  # the facade: its imports are lazy
    own = name.split(".")[1]
    assert own in LEVEL, f"tinyvad.{own} has no level: add it to LEVELS"
    for other in imported(name, path):
        parts = other.split(".")
        if parts[0] == "tinyvad" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != own:
            assert LEVEL[parts[1]] >= LEVEL[own], f"{name} imports {other}, which lies above it"


@pytest.mark.parametrize(("statement", "forbidden"), [
    ("import tinyvad", ("torch", "tensorflow", "onnx", "onnxruntime", "numba", "numpy", "PIL")),
    ("import tinyvad.cli", ("torch", "tensorflow", "onnx", "onnxruntime", "numba", "numpy", "PIL")),
    ("import tinyvad.model", ("torch", "tensorflow", "onnx", "onnxruntime", "numba")),
])  # fmt: skip
def test_importing_stays_light(statement, forbidden):
    code = f"{statement}; import sys; print(' '.join(sorted(set(m.split('.')[0] for m in sys.modules))))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(forbidden) & set(loaded)

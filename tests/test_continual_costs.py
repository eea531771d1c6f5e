"""The published costs by formula, row by row; networks counted again; honest costs by closed form; the data's reader."""

from __future__ import annotations

import csv
import math

import pytest

from tinyvad.backbones import mcunet, mobilenet_v2, phinet
from tinyvad.continual import costs, paper_sizes, published
from tinyvad.errors import InputError
from tinyvad.graph.ir import Graph, node_macs


def allowed(system: str, backbone: str) -> float:
    return 0.02 if (system.lower().startswith("paste"), backbone) == (True, "MCUNet") else 0.01


def test_every_row_of_the_benchmark_is_within_one_percent():
    rows = costs.cost_table()
    assert len(rows) == 53  # 52 of the table, one of the running text
    for row in rows:
        limit = allowed(row["system"], row["backbone"])
        assert abs(row["gflops_deviation"]) <= limit and abs(row["mb_deviation"]) <= limit, row
        assert abs(row["computed_mb"] - row["published_mb"]) <= 0.04, row  # most to the last digit printed
    assert len(costs.cost_table("VisA")) == 46
    for row in costs.cost_table("VisA"):
        limit = allowed(row["system"], row["backbone"])
        assert abs(row["gflops_deviation"]) <= limit and abs(row["mb_deviation"]) <= limit, row


def test_no_replay_figures_of_the_text():
    for backbone, printed in (("DeiT Tiny", 36.52), ("ViT Base", 561.33)):
        assert costs.system_cost("Dinomaly cl 0", backbone, "published").mb == pytest.approx(printed, abs=0.01)


def test_the_papers_own_csv_row_by_row(shared):
    path = shared / "reference" / "published.csv"
    if not path.is_file():
        pytest.skip("needs ../shared/reference/published.csv, which is not here")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "benchmark"]
    compared = 0
    for row in rows:
        dataset = "MVTec AD" if row["dataset_protocol"].startswith("MVTec") else "VisA"
        metric = {"memory_mb": "mb"}.get(row["metric"], row["metric"])
        own = published.figures("edge", dataset, row["system"], row["backbone"], metric, "benchmark")
        assert [figure.value for figure in own] == [float(row["value"])], row
        if metric in ("mb", "gflops"):
            computed = getattr(costs.system_cost(row["system"], row["backbone"], "published"), metric)
            assert computed == pytest.approx(float(row["value"]), rel=allowed(row["system"], row["backbone"])), row
            compared += 1
    assert len(rows) == 392 and compared == 196


def test_every_other_figure_of_our_file_is_in_the_csv(shared):
    path = shared / "reference" / "published.csv"
    if not path.is_file():
        pytest.skip("needs ../shared/reference/published.csv, which is not here")
    with path.open(encoding="utf-8", newline="") as file:
        printed = {(row["table"], row["system"], row["backbone"], row["value"]) for row in csv.DictReader(file)}
    values = {(table, system, backbone, float(value)) for table, system, backbone, value in printed if _is_number(value)}
    for figure in published.figures():
        if figure.table not in ("benchmark", "running text"):
            assert (figure.table, figure.system, figure.backbone, figure.value) in values, figure


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def count(graph: Graph, last: str) -> tuple[int, int, int, int]:
    """MACs, parameters (no bias stands before a batch norm), channels and number of batch norms, up to ``last``."""
    macs = parameters = channels = norms = 0
    for node in graph.nodes:
        macs += node_macs(graph, node)
        if node.op in ("conv2d", "depthwise_conv2d", "fully_connected"):
            parameters += graph.constants[node.inputs[1]].size
        if node.op == "batch_norm":
            size = graph.constants[node.inputs[1]].size
            parameters, channels, norms = parameters + 2 * size, channels + size, norms + 1
        if node.output == last:
            return macs, parameters, channels, norms
    raise AssertionError(f"{last} is not in the graph")


@pytest.mark.parametrize(
    ("name", "make", "trunk", "taps"),
    [
        ("MobileNet", lambda: mobilenet_v2.build(1.0, 224), "features.6", ("features.3", "features.8", "features.14")),
        ("MCUNet", lambda: mcunet.build("in3", 224), "block5", ("block2", "block6", "block14")),
        ("PhiNet", lambda: phinet.build(1.2, 0.5, 6, 7, (4, 5, 7), 224), "block3", ("block4", "block5", "block6")),
    ],
)
def test_counts_are_those_of_the_networks(name, make, trunk, taps):
    graph, net = make(), costs.NETWORKS[name]
    assert count(graph, taps[-1]) == (net.macs, net.parameters, net.channels, net.norms)
    assert count(graph, trunk) == net.trunk
    shapes = [graph.tensors[tap].shape for tap in taps]
    assert tuple((shape[3], shape[1]) for shape in shapes) == net.taps
    assert net.padim_dims == net.dims // 4 and shapes[0][1] ** 2 == costs.POSITIONS


def test_counts_of_wide_resnet():
    macs, parameters, channels, norms = 3 * 64 * 49 * 112**2, 3 * 64 * 49 + 128, 64, 1
    inputs, side = 64, 56
    for blocks, width, outputs, stride in ((3, 128, 256, 1), (4, 256, 512, 2), (6, 512, 1024, 2)):
        for block in range(blocks):
            small = side // (stride if block == 0 else 1)
            macs += inputs * width * side**2 + (9 * width**2 + width * outputs) * small**2
            parameters += inputs * width + 9 * width**2 + width * outputs + 2 * (2 * width + outputs)
            channels, norms = channels + 2 * width + outputs, norms + 3
            if block == 0:  # the shortcut's own convolution
                macs += inputs * outputs * small**2
                parameters += inputs * outputs + 2 * outputs
                channels, norms = channels + outputs, norms + 1
            inputs, side = outputs, small
    net = costs.NETWORKS["WideResNet50"]
    assert (macs, parameters, channels, norms) == (net.macs, net.parameters, net.channels, net.norms)
    assert net.dims == 1792


def test_honest_costs_by_hand():
    net = costs.Network(1000, 100, 10, 2, ((8, 56), (4, 7)), 3)
    finish = 2 * 2 * (56 * 224 + 224**2) + 2 * 2 * 33 * 224**2
    lite = costs.padim(net, 5, "float32", full=False)
    assert lite.gflops * 1e9 == pytest.approx(2000 + 5 * 3136 * (3 + 6 + 6) + finish)
    assert lite.mb * 2**20 == pytest.approx(4 * (80 + 10) + 5 * 4 * 3136 * 6)
    full = costs.padim(net, 5, "int8", multi=False)
    assert full.mb * 2**20 == pytest.approx(80 + 80 + 3136 * (3 + 6 + 3) + 2048)  # docs/SPEC.md: MEAN, SCAL, CHOL, TABL
    plus = costs.patchcore(net, 5, 100, "int8", plus=True)
    assert plus.mb * 2**20 == pytest.approx(160 + 100 * 12 + 5 * 4 * 4)
    pool = 5 * (8 * 56 * 56 + 4 * 49)
    assert plus.gflops * 1e9 == pytest.approx(2000 + pool + 3136 * 20 * 26 + 4 * (49 + 15) + finish)


def test_what_honest_costs_show():
    rows = {(row["system"], row["backbone"]): row for row in costs.cost_table()}
    for (system, _), row in rows.items():
        assert row["int8_mib"] < row["float32_mib"] and row["gmacs"] > 0
        if system == "PaDiM cl multi":  # no inversion, half the bytes of float64 and of a symmetric matrix
            assert 2 * row["gmacs"] < row["published_gflops"] / 2
            assert row["float32_mib"] * 2**20 < row["published_mb"] * 1e6 / 3
        if system.startswith("PatchCore cl "):  # one backbone pass and one small blur: at most the published
            assert 2 * row["gmacs"] < row["published_gflops"]
    growth = [costs.system_cost("PaDiM cl multi", "MCUNet", "int8", tasks).mb for tasks in (1, 2, 3)]
    assert growth[2] - growth[1] == pytest.approx(growth[1] - growth[0])  # a task costs what the one before did
    constant = [costs.system_cost("PatchCore clpp 10k", "MCUNet", "float32", tasks) for tasks in (1, 10)]
    assert constant[1].mb == pytest.approx(constant[0].mb, rel=1e-3) and constant[1].gflops < constant[0].gflops / 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("UniAD", "MCUNet", "published"), "no cost formula for 'UniAD'"),
        (("CFA cl 40", "AlexNet", "published"), "AlexNet; there are MobileNet"),
        (("Dinomaly cl 40", "MCUNet", "int8"), "transformer MCUNet"),
        (("PaDiM cl uni", "MCUNet", "cheap"), "convention is 'cheap'"),
    ],
)
def test_wrong_names_are_told(arguments, words):
    with pytest.raises(InputError) as told:
        costs.system_cost(*arguments)
    assert words in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(InputError, match="no published costs for 'BTAD'"):
        costs.cost_table("BTAD")


def test_sizes_of_the_thesis_and_of_separate_models():
    rows = paper_sizes.size_table()
    assert len(rows) == 47
    for row in rows:
        if row["computed"] is None:
            assert row["system"] in ("PaDiM-Edge", "PaDiM-Lite") and row["note"]
        elif row["metric"] == "mmacs":
            assert abs(row["deviation"]) < 0.015, row  # the thesis counts a little more than convolutions
        else:
            assert row["computed"] == pytest.approx(row["published"], rel=0.006), row
    assert sum(row["computed"] is None for row in rows) == 6


def test_figures_are_found_by_their_fields():
    figure = published.figures("iuf", metric="image_fm_pct", system="PaDiM", protocol="3-3x4")
    assert [one.value for one in figure] == [22.6] and figure[0].dataset == "MVTec AD"
    biased = published.figures("edge", table="Table 1", metric="image_roc")
    assert [(one.system, one.value) for one in biased] == [("PaDiM CL (original)", 0.56), ("PaDiM CL (ours)", 0.9015)]
    assert not published.figures(system="no such")
    assert all(published.source_title(one.source) and one.value >= 0 for one in published.figures())
    with pytest.raises(InputError, match="no source 'x'"):
        published.source_title("x")

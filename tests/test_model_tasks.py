"""A build of several products: which one an image is taken for, what that changes, and how it is evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_build import images_of_task, tiny_build

from tinyvad.bank import open_bank, pack_meta, read_bank, write_bank
from tinyvad.cli import main
from tinyvad.detectors.bank_tasks import task_entries
from tinyvad.errors import InputError
from tinyvad.evaluate import evaluate, evaluate_tasks
from tinyvad.firmware_sim.compare import compare_firmware
from tinyvad.images import find_datasets
from tinyvad.model import load
from tinyvad.verify import bank_self_test, verify

NAMES = ["part 0", "part 1", "part 2"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build(tmp_path_factory.mktemp("three"), None, tasks=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the three products and one that nobody knows, four good and two odd images each."""
    rng = np.random.default_rng(11)
    root = tmp_path_factory.mktemp("data")
    for task, name in ((0, "part 0"), (2, "part 2"), (1, "stranger")):
        for folder, count in (("train/good", 2), ("test/good", 4), ("test/spot", 2)):
            path = root / name / folder
            path.mkdir(parents=True)
            for i, image in enumerate(images_of_task(rng, count, task)):
                if folder.endswith("spot"):
                    image[8:14, 8:14] = 255 - image[8:14, 8:14]
                Image.fromarray(image).save(path / f"{i}.png")
    return root


def images() -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(3)
    return np.concatenate([images_of_task(rng, 3, task) for task in range(3)]), [0] * 3 + [1] * 3 + [2] * 3


def test_every_image_is_scored_by_its_own_product(build: Path) -> None:
    model = load(build)
    pictures, tasks = images()
    thresholds = open_bank(build / "bank.tvb").sections["THRS"].tolist()
    assert model.task_names == NAMES and thresholds[1] == thresholds[0] // 2
    maps, found = model.grid_maps(pictures)
    assert found.tolist() == tasks
    embeddings = model.embedding.integer(model.taps(pictures))
    predictions = model.predict(list(pictures))
    assert isinstance(predictions, list)
    for i, (prediction, task) in enumerate(zip(predictions, tasks, strict=True)):
        expected = model.scorers.scorers[task].score(embeddings[i : i + 1])[0]
        np.testing.assert_array_equal(prediction.grid_map, expected)
        np.testing.assert_array_equal(maps[i], expected)
        assert prediction.task == NAMES[task]
        assert prediction.threshold == pytest.approx(np.sqrt(thresholds[task]) / 16)
        assert prediction.pred_label == int(expected.max() >= thresholds[task])
        np.testing.assert_array_equal(prediction.pred_mask, model.mask(expected, task))


def test_a_known_product_is_not_asked_for(build: Path) -> None:
    model = load(build)
    pictures, _ = images()
    embeddings = model.embedding.integer(model.taps(pictures))
    maps, found = model.grid_maps(pictures, "part 1")
    assert found.tolist() == [1] * 9
    np.testing.assert_array_equal(maps, model.scorers.scorers[1].score(embeddings))
    one = model.predict(pictures[0], task="part 2")
    assert not isinstance(one, list) and one.task == "part 2"
    with pytest.raises(InputError, match="no task 'part 9'; it has part 0, part 1, part 2"):
        model.predict(pictures[0], task="part 9")


def names_of(bank: Any) -> list[str]:
    return [entry["name"] for entry in task_entries(bank)]


def test_names_come_from_the_bank(build: Path) -> None:
    bank = open_bank(build / "bank.tvb")
    assert names_of(bank) == NAMES
    whole = bank.meta["tasks"]

    def other(meta: dict[str, Any], updatable: bool = False) -> Any:
        header = replace(bank.header, updatable=updatable)
        return read_bank(write_bank(header, {**bank.sections, "META": pack_meta(meta)}, ()))

    cases: list[Any] = [3, [{"name": "a"}, {"name": "b"}], [whole[0], whole[1], whole[0]], [{}, {}, {}], [*whole, whole[0]]]
    for tasks in cases:
        with pytest.raises(InputError, match="META does not describe its 3 tasks"):
            names_of(other({"tasks": tasks}))
    assert names_of(other({})) == ["task 1", "task 2", "task 3"]
    assert names_of(other({"task": "a"})) == ["a", "task 2", "task 3"]
    # what a device has added to a bank with one task, whose META it can't write
    assert names_of(other({"tasks": whole[:1]}, updatable=True)) == [NAMES[0], "task 2", "task 3"]
    called = {"tasks": [{**whole[0], "name": "task 3"}]}
    assert names_of(other(called, updatable=True)) == ["task 3", "task 2", "task 3 (3)"]
    for wrong in ([3, whole[0], whole[1]], [whole[0], None], [[]]):
        with pytest.raises(InputError, match="META does not describe its 3 tasks"):
            names_of(other({"tasks": wrong}, updatable=True))


def test_a_product_is_evaluated_by_its_own_threshold(build: Path, data: Path) -> None:
    model = load(build)
    datasets = {dataset.name: dataset for dataset in find_datasets(data, need_good=False)}
    result = evaluate(model, datasets["part 2"])
    assert result.metrics["threshold"] == model.task_threshold(2)
    assert result.metrics["routing_accuracy"] == 1 and {verdict.task for verdict in result.verdicts} == {"part 2"}
    flagged = [verdict for verdict in result.verdicts if verdict.sample.label == 0 and verdict.pred_label == 1]
    assert result.metrics["false_alarms"] == len(flagged)
    forced = evaluate(model, datasets["part 2"], task="part 0")
    assert forced.metrics["routing_accuracy"] is None and forced.metrics["threshold"] == model.threshold_score
    assert evaluate(model, datasets["stranger"]).metrics["routing_accuracy"] is None


def test_all_products_at_once(build: Path, data: Path) -> None:
    model = load(build)
    datasets = find_datasets(data, need_good=False)
    value, skipped = evaluate_tasks(model, datasets)
    assert list(value["tasks"]) == ["part 0", "part 2"] and value["not_evaluated"] == ["part 1"] and not skipped
    each = [evaluate(model, dataset).metrics for dataset in datasets if dataset.name != "stranger"]
    for key in ("image_AUROC", "image_F1Max", "threshold", "false_alarms"):
        assert value["mean"][key] == pytest.approx(np.mean([metrics[key] for metrics in each]))
    assert value["mean"]["pixel_AUROC"] is None
    assert value["routing_accuracy"] == 1
    assert evaluate_tasks(model, datasets, task="part 0")[0]["routing_accuracy"] is None
    with pytest.raises(InputError, match="no category is named like a task"):
        evaluate_tasks(model, [dataset for dataset in datasets if dataset.name == "stranger"])


def cli(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_the_command_line_names_the_product(build: Path, data: Path) -> None:
    value = json.loads(cli("eval", build, "--data", data, "--json").stdout)
    assert set(value["tasks"]) == {"part 0", "part 2"} and value["skipped"] == []
    text = cli("eval", build, "--data", data).stdout
    assert text.startswith("part 0: image_AUROC") and "mean of 2: " in text
    assert "100.0% of the images taken for their own product, no images of part 1" in text
    one = json.loads(cli("eval", build, "--data", data, "--category", "stranger", "--task", "part 1", "--json").stdout)
    assert one["threshold"] == load(build).task_threshold(1) and one["routing_accuracy"] is None
    alone = json.loads(cli("eval", build, "--data", data / "part 2", "--json").stdout)
    assert alone["routing_accuracy"] == 1
    picture = data / "part 2" / "test" / "good" / "0.png"
    assert json.loads(cli("predict", build, picture, "--json").stdout)["predictions"][0]["task"] == "part 2"
    assert cli("predict", build, picture).stdout.endswith(" part 2\n")


def test_a_build_of_one_product_says_what_it_said(tmp_path: Path, data: Path) -> None:
    build = tiny_build(tmp_path, None)
    picture = data / "part 0" / "test" / "good" / "0.png"
    assert len(cli("predict", build, picture).stdout.removeprefix(str(picture)).split()) == 3
    assert json.loads(cli("predict", build, picture, "--json").stdout)["predictions"][0]["task"] == "tiny"
    assert "routing_accuracy" not in json.loads(cli("eval", build, "--data", data / "part 0", "--json").stdout)


def test_verify_and_the_c_code_agree_on_several_products(build: Path) -> None:
    model = load(build)
    pictures, tasks = images()
    assert bank_self_test(model) == "passed"
    result = compare_firmware(build, model, pictures, "host")
    assert result["status"] == "equal", result
    assert verify(build, pictures, engines=["host"])["ok"]
    assert model.grid_maps(pictures)[1].tolist() == tasks

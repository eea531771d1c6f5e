"""The training loop. Oracles: a loss whose path is known in closed form, and the uninterrupted run."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("autograd")
import autograd.numpy as anp

from tinyvad.errors import CheckFailed, InputError
from tinyvad.graph.ir import Graph
from tinyvad.training import checkpoint as files
from tinyvad.training import loop
from tinyvad.training.items import ArrayItems
from tinyvad.training.loop import train
from tinyvad.training.network import Network
from tinyvad.training.recipe import Recipe

PLAIN = Recipe(learning_rate=0.5, momentum=0.0, weight_decay=0.0, batch=100, epochs=6)


class Mean:
    """Loss (w - x)^2 / 2: a full batch of mean m takes w to m + (1 - rate)^k (w - m). Statistics count the images seen."""

    method = "mean"
    trunk = targets = None

    def __init__(self, noise: float = 0.0, ballast: int = 0) -> None:
        self.network = Network(Graph("mean", [], [], [], {}, {}), {"w": np.zeros(1)}, {"seen.mean": np.zeros(1)})
        self.recipe = PLAIN
        self.noise, self.ballast = noise, ballast
        self.batches: list[list[float]] = []
        self.prepared = 0

    def prepare(self, items):
        self.prepared += 1

    def loss(self, parameters, statistics, batch, rng):
        (x,) = batch
        held = np.ones(self.ballast)
        value = anp.mean((parameters["w"] - x) ** 2) / 2 + 0 * held.sum()
        if rng is None:
            return value, statistics
        self.batches.append(x[:, 0].tolist())
        value = value + self.noise * rng.normal() * parameters["w"][0]
        return value, {"seen.mean": statistics["seen.mean"] + len(x)}

    def arrays(self):
        return {**self.network.parameters, **self.network.statistics}

    def restore(self, arrays):
        self.network = self.network.with_values({"w": arrays["w"]}, {"seen.mean": arrays["seen.mean"]})


class Keep:
    """A strategy that pulls w to what it was, and writes down what it is asked."""

    def __init__(self, strength: float = 0.0) -> None:
        self.strength, self.told = strength, []
        self.kept = {"w": np.zeros(1)}

    def begin_task(self, detector, items):
        self.told.append("begin")
        self.kept = dict(detector.network.parameters)

    def loss(self, detector, parameters, statistics, batch, rng):
        return detector.loss(parameters, statistics, batch, rng)

    def penalty(self, parameters):
        change = parameters["w"] - self.kept["w"]
        return float(self.strength * (change**2).sum() / 2), {"w": self.strength * change}

    def after_step(self, task_gradients, before, after):
        self.told.append((float(task_gradients["w"][0]), float(before["w"][0]), float(after["w"][0])))

    def end_task(self, detector, items):
        self.told.append("end")

    def arrays(self):
        return dict(self.kept)

    def restore(self, arrays):
        self.kept = dict(arrays)

    def nbytes(self):
        return 8


def items_of(*values: float) -> ArrayItems:
    return ArrayItems([np.array(values, np.float64)[:, None]])


def weight(network: Network) -> float:
    return float(network.parameters["w"][0])


def test_full_batches_follow_the_closed_form():
    detector = Mean()
    trained = train(detector, items_of(0.0, 1.0, 2.0), None, PLAIN)
    assert weight(trained.network) == pytest.approx(1 - 0.5**6)
    assert detector.network is trained.network
    variance = 2 / 3
    assert [epoch.loss for epoch in trained.history] == pytest.approx([(0.25**k + variance) / 2 for k in range(6)])
    assert (trained.best, trained.steps, trained.stopped, detector.prepared) == (5, 6, False, 1)
    assert trained.network.statistics["seen.mean"] == 18


def test_the_epoch_with_the_lowest_held_out_loss_is_kept():
    """w goes 0.5, 0.75, 0.875, ...: held-out images of mean 0.75 like the second epoch best, and two bad ones end it."""
    trained = train(Mean(), items_of(1.0), items_of(0.65, 0.85), replace(PLAIN, patience=2))
    assert weight(trained.network) == 0.75
    assert (trained.best, len(trained.history), trained.stopped) == (1, 4, True)
    expected = [((1 - 0.5**k - 0.75) ** 2 + 0.01) / 2 for k in range(1, 5)]
    assert [epoch.held_out for epoch in trained.history] == pytest.approx(expected)
    assert trained.network.statistics["seen.mean"] == 2


def test_what_is_held_out_never_changes_a_step():
    first, second = Mean(), Mean()
    train(first, items_of(*range(9)), items_of(5.0), replace(PLAIN, batch=2, patience=6))
    train(second, items_of(*range(9)), None, replace(PLAIN, batch=2))
    assert first.batches[:30] == second.batches[:30]


def test_batches_cover_every_image_once_an_epoch_by_the_seed_alone():
    def batches(seed: int) -> list[list[float]]:
        detector = Mean()
        train(detector, items_of(*range(11)), None, replace(PLAIN, batch=4, epochs=3, learning_rate=0.1, seed=seed))
        assert len(detector.batches) == 3 * 3 + 1  # one more to measure memory with
        return [detector.batches[0], *detector.batches[2:]]

    one = batches(1)
    for epoch in range(3):
        of_epoch = one[3 * epoch : 3 * epoch + 3]
        assert sorted(x for batch in of_epoch for x in batch) == list(range(11))
        assert sorted(map(len, of_epoch)) == [3, 4, 4]
    assert one[:3] != one[3:6]
    assert batches(1) == one
    assert batches(2) != one


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_images_are_enough(count):
    trained = train(Mean(), items_of(*[1.0] * count), items_of(1.0) if count == 4 else None, replace(PLAIN, batch=8))
    assert weight(trained.network) == pytest.approx(1 - 0.5**6)


def test_noise_and_replay_come_from_the_same_generator():
    class Old:
        def __init__(self, items):
            self.items = items

        old: ClassVar[list] = []
        composition, ratio = "concat", 0.5

        def compose(self, indices, rng):
            return [(self.items, indices), (items_of(50.0, 60.0), rng.integers(2, size=len(indices)))]

    def result(seed: int) -> tuple[float, list[list[float]]]:
        detector = Mean(noise=0.1)
        items = items_of(*range(6))
        recipe = replace(PLAIN, batch=3, learning_rate=0.1, seed=seed)
        return weight(train(detector, items, None, recipe, replay=Old(items)).network), detector.batches

    value, batches = result(0)
    assert all(len(batch) == 6 and set(batch[3:]) <= {50.0, 60.0} and max(batch[:3]) < 6 for batch in batches)
    assert result(0) == (value, batches)
    assert result(1)[0] != value


def test_a_strategys_penalty_joins_the_gradient_and_it_is_told_of_every_step():
    """Pulled with strength 1 to 0 and by the loss to 1, w stays at 1/2 once it is there: one step at rate 1/2."""
    detector, strategy = Mean(), Keep(1.0)
    trained = train(detector, items_of(1.0), None, replace(PLAIN, epochs=3), strategy=strategy)
    assert weight(trained.network) == 0.5
    assert strategy.told == ["begin", (-1.0, 0.0, 0.5), (-0.5, 0.5, 0.5), (-0.5, 0.5, 0.5), "end"]
    assert [epoch.loss for epoch in trained.history] == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize("stop", range(1, 13))
def test_a_training_that_was_killed_goes_on_to_the_same_bytes(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_STEPS", 3)
    recipe = replace(PLAIN, batch=2, learning_rate=0.1, momentum=0.9, epochs=3)

    def go(folder: Path, tell=None):
        folder.mkdir(exist_ok=True)
        detector = Mean(noise=0.1)
        trained = train(
            detector, items_of(*range(7)), items_of(3.0), recipe, strategy=Keep(0.3), checkpoint=folder / "c.npz", tell=tell
        )
        return {k: v.tobytes() for k, v in detector.arrays().items()}, trained.history, trained.steps, trained.best

    def interrupt(stage, done, total):
        if done == stop:
            raise KeyboardInterrupt

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", interrupt)
    assert go(tmp_path / "killed") == whole
    assert (tmp_path / "killed" / "c.npz").read_bytes() == (tmp_path / "whole" / "c.npz").read_bytes()
    assert go(tmp_path / "killed") == whole  # what is finished is not trained again
    names = [path.name for path in (tmp_path / "killed").iterdir()]
    assert names == ["c.npz"]


SCRIPT = """
import hashlib, sys
from dataclasses import replace
import numpy as np
from tinyvad.backbones.source import open_backbone
from tinyvad.detectors.student import Paste
from tinyvad.training import loop
from tinyvad.training.items import FrozenItems
loop.CHECKPOINT_STEPS = 2
images = np.random.default_rng(1).normal(size=(12, 32, 32, 3)).astype(np.float32)
detector = Paste(open_backbone("mcunet-in1").graph_at(32), shared="block1", seed=3)
items = FrozenItems(detector.trunk, detector.targets, images)
held_out = FrozenItems(detector.trunk, detector.targets, -images[:3])
recipe = replace(detector.recipe, batch=2, epochs=3)
def tell(stage, done, total):
    print("step", done, flush=True)
loop.train(detector, items, held_out, recipe, checkpoint=sys.argv[1], tell=tell)
digest = hashlib.sha256()
for name, array in sorted(detector.arrays().items()):
    digest.update(name.encode() + array.tobytes())
print("result", digest.hexdigest(), flush=True)
"""


def test_killing_the_process_does_not_change_the_result(tmp_path):
    def run(checkpoint: Path, kill_after: int | None) -> str:
        command = [sys.executable, "-c", SCRIPT, str(checkpoint)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for steps, line in enumerate(process.stdout, 1):
                if line.startswith("result"):
                    return line
                if steps == kill_after:
                    process.send_signal(signal.SIGKILL)
                    break
        return f"killed {process.wait()}"

    whole = run(tmp_path / "whole.npz", None)
    assert whole.startswith("result")
    assert run(tmp_path / "killed.npz", 5) == "killed -9"
    assert run(tmp_path / "killed.npz", 6) == "killed -9"
    assert run(tmp_path / "killed.npz", None) == whole


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "c.npz"
    train(Mean(), items_of(1.0, 2.0), None, PLAIN, checkpoint=path)
    for items, recipe in ((items_of(1.0, 3.0), PLAIN), (items_of(1.0, 2.0), replace(PLAIN, learning_rate=0.4))):
        with pytest.raises(InputError, match=r"c\.npz belongs to another training .*; delete it to start again"):
            train(Mean(), items, None, recipe, checkpoint=path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not really", b"plain text", None])
def test_a_damaged_checkpoint_is_one_line(data, tmp_path):
    path = tmp_path / "c.npz"
    train(Mean(), items_of(1.0), None, PLAIN, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-40] if data is None else data)
    with pytest.raises(InputError, match=r"c\.npz is damaged or no checkpoint of ours; delete it") as error:
        train(Mean(), items_of(1.0), None, PLAIN, checkpoint=path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_reads_back_as_written(tmp_path, rng):
    arrays = {"a:x/y": rng.normal(size=(2, 3)).astype(np.float32), "count": np.int64(3), "empty": np.zeros((0, 2))}
    files.save(tmp_path / "c", {"n": 1, "state": {"big": 1 << 120}}, arrays)
    facts, found = files.read(tmp_path / "c")
    assert facts == {"n": 1, "state": {"big": 1 << 120}}
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (np.asarray(a).dtype, np.shape(a), np.asarray(a).tobytes()) for n, a in arrays.items()
    }
    assert files.read(tmp_path / "nothing") is None


def test_what_diverges_is_one_line_with_a_remedy():
    message = r"training of mean diverged in epoch \d+, step \d+: .* learning rate below 1e\+30"
    with pytest.raises(CheckFailed, match=message) as error:
        train(Mean(), items_of(1.0), items_of(0.0), replace(PLAIN, learning_rate=1e30, epochs=100, patience=100))
    assert "\n" not in str(error.value)


def test_held_out_losses_that_are_no_numbers_are_told():
    with pytest.raises(CheckFailed, match="held-out loss"):
        train(Mean(), items_of(1.0), items_of(np.nan), PLAIN)


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch": 0}, "recipe: batch is 0"), ({"epochs": 0}, "recipe: epochs is 0"),
    ({"learning_rate": 0.0}, "learning_rate is 0"), ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"optimiser": "lion"}, "optimiser 'lion' is unknown"),
])  # fmt: skip
def test_recipes_that_make_no_sense_are_told(changes, message):
    with pytest.raises(InputError, match=message):
        train(Mean(), items_of(1.0), None, replace(PLAIN, **changes))


def test_nothing_to_train_on_is_told():
    with pytest.raises(InputError, match="no good images to train on"):
        train(Mean(), ArrayItems([np.zeros((0, 1))]), None, PLAIN)


def test_the_peak_of_a_step_is_measured():
    small, large = (train(Mean(ballast=n), items_of(1.0), None, PLAIN).peak_bytes for n in (0, 1 << 20))
    assert abs(large - small - (8 << 20)) < 1 << 18


def test_progress_counts_steps_and_tells_the_loss():
    told = []
    train(Mean(), items_of(1.0, 1.0), items_of(0.0), replace(PLAIN, batch=1, patience=1), tell=lambda *a: told.append(a))
    assert told[0] == ("training, loss 0.5000", 1, 12)
    assert [done for _, done, _ in told] == [1, 2, 3, 4, 12]
    assert told[-1][0] == "training, early stop"

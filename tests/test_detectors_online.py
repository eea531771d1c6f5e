"""Online learning in integers: what an image adds, what threshold follows, and the next bank that a device would write."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_banks import CHANNELS, DEPTH, Learnable, learnable, product

from tinyvad.bank import Bank, read_bank, restamp, write_bank
from tinyvad.detectors import check_bank
from tinyvad.detectors.coreset import farthest_first
from tinyvad.detectors.device_learning import DeviceLearner, learning_bytes
from tinyvad.detectors.online import (
    NO_ROWS,
    RECENT,
    online_update,
    online_update_reference,
    prequential_threshold,
    single_image_threshold,
)
from tinyvad.detectors.routing import prototype, signatures
from tinyvad.errors import CheckFailed, InputError

EVERYTHING = 10**9


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, D), (m, D) -> (n, m) int64."""
    difference = a[:, None].astype(np.int64) - b[None]
    return (difference * difference).sum(2)


def grow(rows: np.ndarray, images: list[np.ndarray], tau2: int, limit: int = EVERYTHING) -> np.ndarray:
    for patches in images:
        rows = np.concatenate([rows, patches[online_update(rows, patches, limit, tau2, EVERYTHING).added]])
    return rows


# -- one image -----------------------------------------------------------------------------------------------------------


def test_a_line_of_points_by_hand() -> None:
    line = np.array([[0], [3], [10], [4], [10]], np.int8)
    first = online_update(np.zeros((0, 1), np.int8), line, 3, 0, 100)
    assert first.added.tolist() == [0, 2, 3] and first.novelty == NO_ROWS
    assert first.radius == 1  # cell 1 is 1 away from cell 3
    second = online_update(line[[0]], line, 100, 9, 100)  # 3 lies within tau of 0, 4 does not
    assert second.added.tolist() == [2, 3] and second.novelty == 100 and second.radius == 1
    assert online_update(line[[0, 2]], line, 100, 0, 2).added.size == 0  # full
    assert online_update(line[[0, 2]], line, 100, 0, 3).added.tolist() == [3]
    assert online_update(line[[0]], line, 100, 100, 100).added.size == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_fast_form_is_the_reference(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    depth, span = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 2, 20, 127]))
    rows = rng.integers(-span, span + 1, (data.draw(st.integers(0, 9)), depth)).astype(np.int8)
    patches = rng.integers(-span, span + 1, (data.draw(st.integers(1, 30)), depth)).astype(np.int8)
    tau2 = data.draw(st.sampled_from([0, 1, span * span, depth * span * span, 2**32 - 1]))
    limit, capacity = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 15))
    fast = online_update(rows, patches, limit, tau2, capacity)
    slow = online_update_reference(rows, patches, limit, tau2, capacity)
    assert fast.added.tolist() == slow.added.tolist() and fast[1:] == slow[1:]
    assert fast.novelty == (squared(patches, rows).min(1).max() if len(rows) else NO_ROWS)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 5, 200, 4000]), st.integers(1, 20))
def test_one_image_into_an_empty_bank_is_farthest_first_cut_at_the_radius(seed: int, tau2: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    patches = rng.integers(-20, 20, (30, 4)).astype(np.int8)
    order, radii = farthest_first(patches, count, start=0)
    kept = 1 + int(np.argmax(radii <= tau2)) if (radii <= tau2).any() else len(order)
    update = online_update(patches[:0], patches, count, tau2, EVERYTHING)
    assert update.added.tolist() == order[:kept].tolist() and update.radius == radii[kept - 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 50, 400, 3000]))
def test_unlimited_it_covers_everything_and_keeps_its_distance(seed: int, tau2: int) -> None:
    rng = np.random.default_rng(seed)
    images = [rng.integers(-30, 31, (12, 3)).astype(np.int8) for _ in range(5)]
    rows = grow(np.zeros((0, 3), np.int8), images, tau2)
    assert squared(np.concatenate(images), rows).min(1).max() <= tau2
    apart = squared(rows, rows) + np.eye(len(rows), dtype=np.int64) * 10**9
    assert apart.min() > tau2
    np.testing.assert_array_equal(grow(rows, images, tau2), rows)  # every image a second time adds nothing


def test_the_largest_distance_is_below_no_rows() -> None:
    low, high = np.full((1, 33025), -128, np.int8), np.full((2, 33025), 127, np.int8)
    update = online_update(low, high, 5, 0, 10)
    assert update.novelty == 33025 * 255**2 < NO_ROWS and update.added.tolist() == [0]
    assert update.radius == 0 and online_update_reference(low, high, 5, 0, 10).novelty == update.novelty


@pytest.mark.parametrize(("rows", "patches"), [
    (np.zeros((0, 3), np.int8), np.zeros((0, 3), np.int8)),
    (np.zeros((1, 3), np.int8), np.zeros((2, 4), np.int8)),
    (np.zeros((1, 3), np.float32), np.zeros((2, 3), np.int8)),
    (np.zeros((1, 33026), np.int8), np.zeros((2, 33026), np.int8)),
])  # fmt: skip
def test_what_is_no_bank_or_no_image_is_told(rows: np.ndarray, patches: np.ndarray) -> None:
    for update in (online_update, online_update_reference):
        with pytest.raises(InputError, match="online update"):
            update(rows, patches, 1, 0, 1)


def test_thresholds_by_hand() -> None:
    assert prequential_threshold([5]) == 6
    assert prequential_threshold([NO_ROWS, 7]) == 8
    assert prequential_threshold([NO_ROWS, 7, 3]) == 8
    assert prequential_threshold([NO_ROWS, 900, 3, 5]) == 6
    assert prequential_threshold([1000, *[1] * 400, 9, *[2] * 63]) == 10
    assert prequential_threshold([1000, *[1] * 400, 9, *[2] * RECENT]) == 3
    assert single_image_threshold(11, 3, 4) == 6 and single_image_threshold(4, 3, 1) == 4
    assert single_image_threshold(4, 3, 30) == 31 and single_image_threshold(0, 0, 2**32 - 1) == 2**32 - 1


# -- the next bank -------------------------------------------------------------------------------------------------------


def learnt(made: Learnable, images: np.ndarray, task: int | None = None, **settings: int) -> tuple[DeviceLearner, Bank]:
    learner = DeviceLearner(made.bank, task, **settings)
    for image in images:
        learner.learn(image)
    bank = read_bank(learner.commit())
    check_bank(bank)
    return learner, bank


def task_parts(bank: Bank) -> list[np.ndarray]:
    return [bank.sections["BANK"][first : first + count] for first, count, _, _ in bank.sections["TASK"].tolist()]


def test_a_new_product_is_added() -> None:
    rng = np.random.default_rng(1)
    made, images = learnable(rng, rows=10), product(rng, (3, 4), 10)
    learner, bank = learnt(made, images)
    old = made.bank
    assert bank.header.generation == old.header.generation + 1 and bank.header.updatable
    rows, novelties = np.zeros((0, DEPTH), np.int8), []
    for image in images.reshape(10, -1, DEPTH):
        update = online_update_reference(rows, image, 4, 900, 20)  # 40 rows for two products
        rows = np.concatenate([rows, image[update.added]])
        novelties.append(update.novelty)
    assert len(rows) == 20  # it is full, and frozen
    parts = task_parts(bank)
    np.testing.assert_array_equal(parts[0], old.sections["BANK"])
    np.testing.assert_array_equal(parts[1], rows)
    assert bank.sections["TASK"].tolist() == [[0, 10, 3, 0], [10, 20, 10, 0]]
    assert bank.sections["THRS"].tolist() == [1000, 1 + max(novelties[5:])]
    total = signatures(images, CHANNELS[-1]).sum(0)
    np.testing.assert_array_equal(bank.sections["PROT"], [old.sections["PROT"][0], prototype(total, 10)])
    assert bank.sections["CFG "].tolist() == [30, DEPTH, 0, 8]
    for tag in ("LUT ", "TAPS", "STEP", "SCAL", "LRN ", "TEST", "META"):
        np.testing.assert_array_equal(bank.sections[tag], old.sections[tag])
    np.testing.assert_array_equal(bank.sections["LADR"][0], old.sections["LADR"][0])
    assert list(bank.sections) == list(old.sections)
    # rows 0, 4, 8 ... of images: 1, 2 and 4 are passed by the second image, 8 by the fourth, 16 by the sixth
    ladder = bank.sections["LADR"][1].tolist()
    assert ladder[0] == [20, 1 + max(novelties[5:])]
    assert [rows for rows, _ in ladder] == [20, 16, 8, 4, 4][: len(ladder)] and learner.task == 1
    assert ladder[1][1] == max(ladder[0][1], prequential_threshold(novelties[:5]))
    assert ladder[2][1] == max(ladder[1][1], prequential_threshold(novelties[:3]))
    assert ladder[3][1] == ladder[4][1] == max(ladder[2][1], prequential_threshold(novelties[:2]))


def test_a_product_that_there_is_learns_more() -> None:
    rng = np.random.default_rng(2)
    made, images = learnable(rng, tasks=2, rows=8), product(rng, (3, 4), 3)
    _, bank = learnt(made, images, task=0)
    old, parts = made.bank, task_parts(bank)
    np.testing.assert_array_equal(parts[0][:8], task_parts(old)[0])
    assert len(parts[0]) == 20 and len(parts[1]) == 8
    assert bank.sections["TASK"].tolist() == [[0, 20, 6, 0], [20, 8, 3, 0]]
    totals = old.sections["PROT"][0].astype(np.int64) * 3 + signatures(images, CHANNELS[-1]).sum(0)
    np.testing.assert_array_equal(bank.sections["PROT"][0], prototype(totals, 6))
    threshold = int(bank.sections["THRS"][0])
    assert threshold >= 1000
    own, before = bank.sections["LADR"][0].tolist(), old.sections["LADR"][0].tolist()
    assert own == [[20, threshold], *([rows, max(limit, threshold)] for rows, limit in before[:-1])]


def test_images_that_are_known_add_nothing() -> None:
    rng = np.random.default_rng(3)
    made, images = learnable(rng, rows=10, per_image=100, most_rows=100), product(rng, (3, 4), 3)
    _, bank = learnt(made, images)
    learner = DeviceLearner(bank, 1)
    assert [learner.learn(image).added.size for image in images] == [0, 0, 0]
    after = read_bank(learner.commit())
    for tag in ("BANK", "PROT", "LADR", "THRS"):
        np.testing.assert_array_equal(after.sections[tag], bank.sections[tag])
    assert after.sections["TASK"][1, 2] == 6


def test_the_others_give_way_and_take_the_thresholds_of_their_ladders() -> None:
    rng = np.random.default_rng(4)
    made = learnable(rng, tasks=2, rows=20, most_rows=40, per_image=5)
    _, bank = learnt(made, product(rng, (3, 4), 4))
    parts, old = task_parts(bank), task_parts(made.bank)
    assert [len(part) for part in parts] == [13, 13, 13]
    for t in (0, 1):
        np.testing.assert_array_equal(parts[t], old[t][:13])
    assert bank.sections["THRS"].tolist()[:2] == [2000, 2001]  # pairs 20, 10, 5 ...: 10 is the most not above 13
    np.testing.assert_array_equal(bank.sections["LADR"][:2], made.bank.sections["LADR"])
    gold = [squared(vector[None], parts[t]).min() for vector, t in zip(bank.sections["TEST"], bank.sections["GOLD"][:, 0])]
    assert bank.sections["GOLD"][:, 2].tolist() == gold
    assert bank.sections["GOLD"][:, :2].tolist() == made.bank.sections["GOLD"][:, :2].tolist()


def test_where_there_is_room_nobody_gives_way() -> None:
    rng = np.random.default_rng(5)
    made = learnable(rng, rows=30, most_rows=40, per_image=5)
    _, bank = learnt(made, product(rng, (3, 4), 2))
    assert [len(part) for part in task_parts(bank)] == [30, 10]
    assert bank.sections["THRS"][0] == 1000


def test_one_image_and_then_more() -> None:
    rng = np.random.default_rng(6)
    made, images = learnable(rng, tau2=100), product(rng, (3, 4), 2)
    learner, bank = learnt(made, images[:1])
    spread = int(squared(images[0].reshape(-1, DEPTH), images[0, :1, 0]).max())
    assert learner.spread == spread and bank.sections["THRS"][1] == 1 + max(spread // 2, learner.radius)
    assert (bank.sections["LADR"][1] == [4, bank.sections["THRS"][1]]).all()
    _, more = learnt(Learnable(learner.commit(), made.embedding), images[1:], task=1)
    assert more.sections["THRS"][1] >= bank.sections["THRS"][1] and more.header.generation == 9


def test_the_gate_leaves_out_what_is_too_new() -> None:
    rng = np.random.default_rng(7)
    made, images = learnable(rng, per_image=100, most_rows=100), product(rng, (3, 4), 4)
    odd = product(rng, (3, 4), 1)[0]
    novelty = DeviceLearner(made.bank, 0).learn(images[0]).novelty
    mixed = [images[0], images[1], odd, images[2], images[3]]
    gated = DeviceLearner(made.bank, gate=20_000)
    seen = [gated.learn(image).novelty for image in mixed]
    assert seen[0] == NO_ROWS and max(seen[1], *seen[3:]) <= 20_000 < seen[2] and novelty > 20_000
    assert (gated.images, gated.skipped) == (4, 1)
    plain = DeviceLearner(made.bank)
    for image in images:
        plain.learn(image)
    assert gated.commit() == plain.commit()


def test_a_long_session_needs_no_more_memory_and_looks_back_at_the_last_images() -> None:
    rng = np.random.default_rng(8)
    made = learnable(rng, per_image=1, most_rows=20)
    learner = DeviceLearner(made.bank, room=5)
    novelties = [learner.learn(image).novelty for image in product(rng, (3, 4), 300)]
    assert len(learner.added) == 5
    bank = read_bank(learner.commit())
    assert bank.sections["THRS"][1] == 1 + max(novelties[-RECENT:])


def test_what_can_not_be_learnt_is_told() -> None:
    rng = np.random.default_rng(9)
    made, image = learnable(rng, slot_bytes=2400, most_tasks=2), product(rng, (3, 4), 1)[0]
    full = learnable(rng, tasks=2, most_tasks=2, rows=4)
    with pytest.raises(CheckFailed, match="no room for task 3 in 2 tasks"):
        DeviceLearner(full.bank)
    with pytest.raises(CheckFailed, match="no room for task 3"):
        DeviceLearner(learnable(rng, tasks=2, rows=1, most_rows=2).bank)
    with pytest.raises(InputError, match="no task 1, it has 1"):
        DeviceLearner(made.bank, 1)
    with pytest.raises(InputError, match="for 0 rows"):
        DeviceLearner(made.bank, room=0)
    learner = DeviceLearner(made.bank)
    with pytest.raises(CheckFailed, match="no image was learnt"):
        learner.commit()
    with pytest.raises(InputError, match=r"expected int8\(3, 4, 12\)"):
        learner.learn(image[:2])
    learner.learn(image)
    size = len(learner.commit())
    for device in (size - 1, size // 32 * 32 - 1):
        with pytest.raises(CheckFailed, match=f"new bank {size} B > slot {device // 32 * 32} B"):
            learner.commit(device)
    promised = DeviceLearner(learnable(np.random.default_rng(9), slot_bytes=2048).bank)
    promised.learn(image)
    with pytest.raises(CheckFailed, match=f"new bank {size} B > slot 2048 B"):
        promised.commit(1 << 20)
    last = DeviceLearner(read_bank(restamp(made.data, 2**32 - 1)))
    last.learn(image)
    with pytest.raises(CheckFailed, match="no successor"):
        last.commit()
    for change, told in (({"per_image": 0}, "LRN lets an image add 0"), ({"most_rows": 0}, "of 0 rows")):
        with pytest.raises(InputError, match=told):
            DeviceLearner(learnable(rng, **change).bank)


def test_a_bank_that_was_not_made_for_it_is_told() -> None:
    made = learnable(np.random.default_rng(10))
    bank = made.bank
    with pytest.raises(InputError, match="updatable False"):
        DeviceLearner(rewritten(bank, updatable=False))
    for tag in ("LADR", "LRN "):
        with pytest.raises(InputError, match=f"without .*{tag}"):
            DeviceLearner(rewritten(bank, leave_out=(tag,)))
    with pytest.raises(InputError, match=r"without .*TASK.*PROT"):
        DeviceLearner(rewritten(bank, leave_out=("TASK", "PROT")))


def rewritten(bank: Bank, leave_out: tuple[str, ...] = (), updatable: bool = True) -> Bank:
    sections = {tag: array for tag, array in bank.sections.items() if tag not in leave_out}
    required = [entry.tag for entry in bank.entries if entry.required and entry.tag in sections]
    return read_bank(write_bank(replace(bank.header, updatable=updatable), sections, required))


def test_the_workspace_by_hand() -> None:
    # 12 cells: 48 B, less than a header and 15 entries; 3 channels of 8 B; 12 values of 2 B; 5 rows of 12 B
    assert learning_bytes(cells=12, depth=12, channels=3, sections=15, rows=5) == 544 + 32 + 32 + 60
    assert learning_bytes(cells=400, depth=80, channels=80, sections=15, rows=160) == 1600 + 640 + 320 + 12800

"""``tinyvad learn --watch``: a folder that grows in, generation after generation of a build out.

Images are looked for again and again. One is taken when two looks found it with the same size and time, so that a file that
is still being written is left alone; a generation is learnt for every full batch, or for what there is after a quiet time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tinyvad.continual.learn import Learner, Learnt
from tinyvad.errors import InputError
from tinyvad.images import find_datasets, list_images
from tinyvad.slots import Busy

BATCH = 8
QUIET_SECONDS = 5.0
POLL_SECONDS = 1.0


def images_to_learn(data: Path, task: str) -> list[Path]:
    """The good images in a folder of any layout that ``tinyvad build --data`` takes, sorted.

    Of a folder of several categories, the one that is called like the task.

    Raises:
        InputError: no images, no known layout, or several categories none of which is called like the task.
    """
    datasets = {dataset.name: dataset for dataset in find_datasets(data)}
    if len(datasets) > 1 and task not in datasets:
        raise InputError(f"{data} holds {', '.join(datasets)}, none called {task!r}; give the folder of one of them")
    chosen = datasets[task] if len(datasets) > 1 else next(iter(datasets.values()))
    return chosen.train_good


def watch(
    learner: Learner,
    data: Path,
    task: str,
    batch: int = BATCH,
    on_error: str = "skip",
    log: Callable[[Learnt], None] | None = None,
    poll: float = POLL_SECONDS,
    quiet: float = QUIET_SECONDS,
    stop: Callable[[], bool] | None = None,
) -> Learnt | None:
    """Learn the images that appear in a folder until interrupted (KeyboardInterrupt ends it cleanly) or ``stop()``.

    Args:
        data: the folder; it may still be empty. batch: images of a generation. log: is told every generation.
        poll, quiet: seconds between two looks, and without a new image before a part of a batch is learnt.

    Returns:
        The last generation, with all images of this watch; None if nothing was learnt.

    Raises:
        InputError: no such folder, or what ``Learner.learn`` raises. CheckFailed: the bank is full.
    """
    learner.check_name(task)
    if not data.is_dir():
        raise InputError(f"{data} is no folder; give one that may grow")
    last: Learnt | None = None
    seen: dict[Path, tuple[int, int]] = {}  # size and time at the look before
    done: dict[Path, tuple[int, int]] = {}
    since = time.monotonic()
    try:
        while True:
            look = _look(data, task)
            if any(path not in seen for path in look):
                since = time.monotonic()
            ready = [path for path, stamp in look.items() if seen.get(path) == stamp and done.get(path) != stamp]
            seen = look
            waited = time.monotonic() - since >= quiet
            while len(ready) >= batch or (ready and waited):
                now, ready = ready[:batch], ready[batch:]
                try:
                    found = learner.learn(task, now, on_error, need_new=False)
                except Busy:
                    break  # another learner is at work: next time
                done |= {path: look[path] for path in now}
                if last is not None:
                    images, known = found.images + last.images, found.known + last.known
                    new_task = last.new_task or found.new_task
                    found = replace(found, new_task=new_task, skipped=last.skipped + found.skipped)
                    found = replace(found, images=images, known=known)
                last = found
                if log is not None:
                    log(found)
            if stop is not None and stop():
                break
            time.sleep(poll)
    except KeyboardInterrupt:
        pass
    return last


def _look(data: Path, task: str) -> dict[Path, tuple[int, int]]:
    """Size and time of every image that may be learnt; none in a folder that has no images yet."""
    try:
        paths = images_to_learn(data, task)
    except InputError:
        try:
            list_images(data)
        except InputError:
            return {}
        raise
    found = {}
    for path in paths:
        try:
            facts = path.stat()
        except OSError:
            continue  # taken away again
        found[path] = (facts.st_size, facts.st_mtime_ns)
    return found

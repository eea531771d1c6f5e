"""The runner: the same files from one process, several, and a Dask cluster; a killed worker, a stopped run, a bad cell."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tinyvad.bench.run import TRIES, Done, Job, run
from tinyvad.errors import InputError

Told = list[tuple[str, int, int]]


def square(argument: dict[str, Any]) -> Done:
    """A job that squares a number; it leaves a file to show that it ran, and may wait, fail or die first."""
    number, folder = argument["number"], Path(argument["folder"])
    trace = folder / f"ran-{number}-{os.getpid()}-{time.monotonic_ns()}"
    trace.touch()
    if argument.get("fails"):
        raise InputError(f"{number}\ncan't be squared")
    if argument.get("dies") == "always" or (argument.get("dies") == "once" and len(runs(folder, number)) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(argument.get("seconds", 0))
    return Done({"square": number**2, "third": number / 3}, {"pid": os.getpid()})


def runs(folder: Path, number: int) -> list[Path]:
    return list(folder.glob(f"ran-{number}-*"))


def jobs(folder: Path, count: int, **special: Any) -> dict[str, Job]:
    """``special``: name -> extra arguments of that job."""
    folder.mkdir(exist_ok=True)
    names = [f"n{number}" for number in range(count)]
    return {
        name: (square, {"number": number, "folder": str(folder), **special.get(name, {})})
        for number, name in enumerate(names)
    }


def results(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.json") if ".seconds" not in path.name}


def quiet(stage: str, done: int, total: int) -> None:
    pass


def expected(count: int) -> dict[str, bytes]:
    return {
        f"n{n}.json": (json.dumps({"square": n**2, "third": n / 3}, indent=1) + "\n").encode() for n in range(count)
    }


def test_one_process_writes_every_cell_and_tells(tmp_path: Path) -> None:
    told: Told = []
    assert run(jobs(tmp_path / "t", 3), tmp_path / "out", 1, None, lambda *facts: told.append(facts)) == {}
    assert results(tmp_path / "out") == expected(3)
    assert told == [("cells", done, 3) for done in range(4)]
    seconds = json.loads((tmp_path / "out" / "n1.seconds.json").read_text())
    assert seconds == {"pid": os.getpid()}


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    run(jobs(tmp_path / "t", 2), tmp_path / "out", 1, None, quiet)
    told: Told = []
    run(jobs(tmp_path / "t", 4), tmp_path / "out", 1, None, lambda *facts: told.append(facts))
    assert told[0] == ("cells", 2, 4)
    assert [len(runs(tmp_path / "t", n)) for n in range(4)] == [1, 1, 1, 1]
    assert results(tmp_path / "out") == expected(4)


def test_a_cell_without_its_second_file_is_run_again(tmp_path: Path) -> None:
    """Seconds are written first: a run that was stopped between the two files has not done the cell."""
    run(jobs(tmp_path / "t", 1), tmp_path / "out", 1, None, quiet)
    (tmp_path / "out" / "n0.json").unlink()
    run(jobs(tmp_path / "t", 1), tmp_path / "out", 1, None, quiet)
    assert len(runs(tmp_path / "t", 0)) == 2
    assert results(tmp_path / "out") == expected(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_fails_costs_only_itself(tmp_path: Path, workers: int) -> None:
    problems = run(jobs(tmp_path / "t", 4, n1={"fails": True}), tmp_path / "out", workers, None, quiet)
    assert problems == {"n1": "1 can't be squared"}
    assert results(tmp_path / "out") == {name: data for name, data in expected(4).items() if name != "n1.json"}


def test_processes_give_the_same_files_and_survive_deaths(tmp_path: Path) -> None:
    """One cell kills its worker once, one always: the first is done by another process, the second is told."""
    special = {"n1": {"dies": "once"}, "n3": {"dies": "always"}}
    problems = run(jobs(tmp_path / "t", 5, **special), tmp_path / "out", 2, None, quiet)
    assert list(problems) == ["n3"]
    assert f"ended {TRIES} times, the last time with exit code -9" in problems["n3"]
    assert results(tmp_path / "out") == {name: data for name, data in expected(5).items() if name != "n3.json"}
    assert len(runs(tmp_path / "t", 1)) == 2
    assert len(runs(tmp_path / "t", 3)) == TRIES
    assert len(runs(tmp_path / "t", 0)) == 1


def test_a_process_killed_from_outside_costs_only_its_cell(tmp_path: Path) -> None:
    killed: list[int] = []

    def tell(stage: str, done: int, total: int) -> None:
        if done == 1 and not killed:
            victim = multiprocessing.active_children()[0]
            assert victim.pid is not None
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)

    assert run(jobs(tmp_path / "t", 6), tmp_path / "out", 2, None, tell) == {}
    assert killed
    assert results(tmp_path / "out") == expected(6)
    assert sum(len(runs(tmp_path / "t", n)) for n in range(6)) <= 7
    assert not multiprocessing.active_children()


def test_no_such_cluster(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match=r"--cluster nowhere://x: no Dask scheduler answers"):
        run(jobs(tmp_path / "t", 1), tmp_path / "out", 1, "nowhere://x", quiet)


def test_dask_gives_the_same_files_and_survives_a_killed_worker(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        killed: list[int] = []

        def tell(stage: str, done: int, total: int) -> None:
            if done == 2 and not killed:
                killed.append(next(iter(cluster.workers.values())).pid)
                os.kill(killed[0], signal.SIGKILL)

        special = {f"n{n}": {"seconds": 0.05} for n in range(8)} | {"n5": {"fails": True}}
        problems = run(jobs(tmp_path / "t", 8, **special), tmp_path / "out", 1, cluster.scheduler_address, tell)
    assert killed
    assert problems == {"n5": "5 can't be squared"}
    assert results(tmp_path / "out") == {name: data for name, data in expected(8).items() if name != "n5.json"}

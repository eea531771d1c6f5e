"""Many cells, anywhere: this process, several processes, or a Dask cluster; the same files whichever way.

Flows in: jobs by name (a picklable function and its argument) and a folder. Flows out: ``NAME.json`` and
``NAME.seconds.json`` a job, each renamed into place when it is whole. What is there already is not run again, so a stopped
run goes on where it was. A worker that dies costs the cell it was at, which another one runs again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from tinyvad.errors import InputError, TinyvadError
from tinyvad.files import write_text

TRIES = 3  # how often a cell may lose its worker
_ONE_AT_A_TIME = threading.Lock()
Tell = Callable[[str, int, int], None]
Job = tuple[Callable[[Any], "Done"], Any]


@dataclass(frozen=True)
class Done:
    """What a job gives: values, seconds, both for JSON; or what was wrong with it, in one line."""

    values: dict[str, Any]
    seconds: dict[str, Any]
    problem: str = ""


def run(jobs: Mapping[str, Job], folder: Path, workers: int, cluster: str | None, tell: Tell) -> dict[str, str]:
    """Run the jobs whose files are not in ``folder`` yet.

    Args:
        jobs: by the name of their files.
        workers: processes; 1 runs all in this one. cluster: address of a Dask scheduler, which then counts instead.
        tell: called with a stage, jobs done (those of earlier runs too), and jobs in all.

    Returns:
        What was wrong, by the name of the job that failed; the others are kept.

    Raises:
        InputError: no such cluster.
    """
    open_jobs = {name: job for name, job in jobs.items() if not (folder / f"{name}.json").exists()}
    done = len(jobs) - len(open_jobs)
    problems: dict[str, str] = {}
    tell("cells", done, len(jobs))
    if not open_jobs:
        return problems
    if cluster is not None:
        results = _on_cluster(open_jobs, cluster)
    elif workers > 1:
        results = _in_processes(open_jobs, min(workers, len(open_jobs)))
    else:
        results = ((name, alone(job)) for name, job in open_jobs.items())
    for name, result in results:
        if result.problem:
            problems[name] = result.problem
        else:
            write_text(folder / f"{name}.seconds.json", json.dumps(result.seconds, indent=1) + "\n")
            write_text(folder / f"{name}.json", json.dumps(result.values, indent=1) + "\n")  # last: it says "done"
        done += 1
        tell("cells", done, len(jobs))
    return problems


def alone(job: Job) -> Done:
    """Run a job, one at a time in this process; what a user can act on is told, not raised.

    One BLAS thread, so that sums have one order whatever the machine's number of cores. That limit is the process's: two
    jobs in two threads of a Dask worker would take it off each other.
    """
    function, argument = job
    try:
        with _ONE_AT_A_TIME, threadpool_limits(1, user_api="blas"):
            return function(argument)
    except TinyvadError as error:
        return Done({}, {}, " ".join(str(error).split()))
    except (OSError, MemoryError) as error:
        return Done({}, {}, _line(error))


def _on_cluster(jobs: Mapping[str, Job], address: str) -> Iterator[tuple[str, Done]]:
    """Results as they come in; the scheduler gives a lost worker's cells to others."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise InputError("--cluster needs Dask: pip install 'tinyvad[cluster]'") from error
    try:
        client = Client(address, timeout="30s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--cluster {address}: no Dask scheduler answers; start one with `dask scheduler`") from error
    with client, client.as_current():
        names = {client.submit(alone, job, key=f"tinyvad-{name}", pure=False): name for name, job in jobs.items()}
        for future in as_completed(list(names)):
            name = names.pop(future)
            lost = future.exception()
            yield name, future.result() if lost is None else Done({}, {}, f"on the cluster: {_line(lost)}")
            future.release()


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: str = ""


def _in_processes(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, Done]]:
    """Results as they come in; a process that dies is replaced, and its cell given out again."""
    waiting, tries = deque(jobs), dict.fromkeys(jobs, 0)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    team: list[_Worker] = []
    try:
        while waiting or any(worker.job for worker in team):
            while waiting and len(team) < workers:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                team.append(_Worker(process, ours))
            for worker in [worker for worker in team if waiting and not worker.job]:
                if waiting:
                    worker.job = waiting.popleft()
                    tries[worker.job] += 1
                    _send(worker.pipe, jobs[worker.job])
            ready = wait([worker.pipe for worker in team if worker.job])
            for worker in [worker for worker in team if worker.pipe in ready]:
                name, worker.job = worker.job, ""
                try:
                    result = worker.pipe.recv()
                except (EOFError, OSError):
                    team.remove(worker)
                    worker.process.join()
                    if tries[name] < TRIES:
                        waiting.append(name)
                        continue
                    how = f"its process ended {TRIES} times, the last time with exit code {worker.process.exitcode}"
                    result = Done({}, {}, f"{how}; use fewer --workers if memory is short")
                yield name, result
    finally:
        for worker in team:
            worker.pipe.close()  # an idle process ends at the end of its pipe
            worker.process.join(0 if worker.job else 5)
            if worker.process.is_alive():
                worker.process.terminate()


def _send(pipe: Connection, job: Job) -> None:
    with contextlib.suppress(OSError):  # the process is dead: reading from it will tell
        pipe.send(job)


def _serve(pipe: Connection) -> None:
    """A worker process: jobs in, results out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted terminal reaches all: the first process ends the others
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(alone(job))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

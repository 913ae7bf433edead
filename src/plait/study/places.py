"""Where trials run: in this process, in several, or on the machines of a Ray cluster.

Each place takes a list of jobs and gives records as they are done, in any order. Whatever the
place, a process loads the base once and keeps it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from plait.errors import PlaitError
from plait.study.bench import Bench
from plait.study.job import Job, Record
from plait.study.task import Task


class Place(Protocol):
    workers: int
    """How many jobs run at once."""

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """The records of `jobs`, each as soon as it is there."""

    def close(self) -> None:
        """End what was started; running trials are lost."""


class Here:
    """This process, one job after the other."""

    workers = 1

    def __init__(self, task: Task) -> None:
        self.bench = Bench(task)

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        for job in jobs:
            yield self.bench.run(job)

    def close(self) -> None:
        pass


class Processes:
    """Several processes of this machine, which share its cores evenly."""

    def __init__(self, task: Task, workers: int) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.workers = workers
        self.pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),  # torch's threads survive no fork
            initializer=_open_bench,
            initargs=(task, max(1, torch.get_num_threads() // workers)),
        )

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        from concurrent.futures import as_completed
        from concurrent.futures.process import BrokenProcessPool

        futures = [self.pool.submit(_run_in_process, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise PlaitError(
                "a process of the bake-off died (out of memory?); give the same command with fewer "
                "--processes: finished trials are kept."
            ) from None

    def close(self) -> None:
        children = list((getattr(self.pool, "_processes", None) or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for child in children:  # a trial that still runs is lost, as was said
            with contextlib.suppress(OSError):
                child.terminate()
        for child in children:
            child.join(5)


class OnRay:
    """Tasks on a Ray cluster: the one that RAY_ADDRESS names, else one of this machine alone.

    Every machine needs Plait, the base and the data under the same names.
    """

    def __init__(self, task: Task, workers: int | None = None, cpus: int | None = None) -> None:
        ray = import_ray()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        total = int(ray.cluster_resources().get("CPU", 1))
        cpus = cpus or max(1, total // (workers or total))
        self.ray, self.workers = ray, workers or max(1, total // cpus)
        self.task, self.name = ray.put(task), secrets.token_hex(8)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_run_on_ray)
        self.cpus = cpus

    def run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        pending = [self.remote.remote(self.name, self.task, job, self.cpus) for job in jobs]
        while pending:
            done, pending = self.ray.wait(pending)
            yield self.ray.get(done[0])

    def close(self) -> None:
        self.ray.shutdown()


_BENCH: dict[str, Bench] = {}
"""A worker's bench, by the bake-off that it serves (Ray's workers may see several)."""


def _open_bench(task: Task, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _BENCH[""] = Bench(task)


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for jobs for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_process(job: Job) -> Record:
    return _BENCH[""].run(job)


def _run_on_ray(name: str, task: Task, job: Job, threads: int) -> Record:
    if name not in _BENCH:
        torch.set_num_threads(threads)
        _BENCH.clear()  # one base in memory is enough
        _BENCH[name] = Bench(task)
    return _BENCH[name].run(job)


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise PlaitError(
            "spreading trials over machines needs ray; run `pip install 'plait[ray]'`, or stay on "
            "this machine (--processes)."
        ) from None
    return ray

"""Stages on a Ray cluster: one chain of Ray Data, the same stage code as here."""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from typing import Any

from kinema.config.errors import KinemaError
from kinema.curation.chain import only_waits
from kinema.curation.executor import Done, Task, is_bad
from kinema.curation.files import new_file
from kinema.curation.stage import Places, Stage
from kinema.media.stores import filesystem, is_url

WAVE = 100_000
"""Rows that are given to Ray at once: models are loaded anew for each wave."""
BLOCKS = 5000
"""Blocks of a wave at most: Ray takes some milliseconds for each. Smaller ones share the work out
better, and less is done again when Ray's own process dies."""
CALLS = 4
"""Calls of each thread in a row that a stage gets which asks an endpoint."""
FETCH_S = 0.25
"""Seconds between looks into the mailbox: what a killed driver loses at most, beside the batches
under way."""
LEAVING_S = 2.0
"""Seconds to wait for Ray Data to notice that a pass has ended."""
ROUNDS = 3
"""Times that rows are given to Ray again whose results were lost on the way (with the node that
held the mailbox)."""


class RayExecutor:
    """Ray Data's processes: CPU stages are Ray tasks, each stage with a model is a pool of actors,
    a stage that asks an endpoint one actor."""

    name = "ray"

    def __init__(self, address: str, *, cpus: int | None = None) -> None:
        """Start Ray or join a cluster.

        Args:
            address: `local` starts Ray on this machine and ends it in `close`; `auto` and
                `host:port` join a cluster that runs.
            cpus: CPUs of a local one; None: all.

        Raises:
            KinemaError: Ray is not installed, or there is no cluster at that address.
        """
        _prepare()
        try:
            import ray
            import ray.data
        except ImportError:
            raise KinemaError(
                "a cluster needs the package ray", hint="pip install 'kinema[ray]'"
            ) from None
        self._ours = not ray.is_initialized()
        if self._ours:
            _start(address, cpus)
        self._seen: set[str] = set()
        """Folders that all nodes have been asked about."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for name in ("ray.data", "ray.data._internal"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        resources = ray.cluster_resources()
        self._cpus = max(1, int(resources.get("CPU", 1)))
        self._gpus = int(resources.get("GPU", 0))

    def workers(self, stage: Stage) -> int:
        """See `Executor`: how many there are at most."""
        if stage.gpu:
            return max(1, self._gpus)
        return 1 if only_waits(stage) else self._cpus

    def close(self) -> None:
        """Leave the cluster; end it if it was started here."""
        import ray

        if self._ours and ray.is_initialized():
            ray.shutdown()

    def stream(
        self, stages: Sequence[Stage], tasks: Iterator[Task], places: Places
    ) -> Iterator[Done]:
        """See `Executor`.

        Raises:
            KinemaError: a node cannot read the run's folder, or has another version of Kinema.
        """
        while wave := list(islice(tasks, WAVE)):
            if places.out not in self._seen:
                _check_nodes(places)
                self._seen.add(places.out)
            for round_ in range(ROUNDS):
                open_ = {task.number: [n for n, parts in enumerate(task.todo) if parts]
                         for task in wave}  # fmt: skip
                for done in self._run(stages, wave, places):
                    asked = open_[done.number]
                    if done.stage not in asked:
                        continue  # of a batch that ran twice, as Ray's process died after it
                    asked.remove(done.stage)
                    if is_bad(done.result):
                        asked.clear()
                    yield done
                wave = [task for task in wave if open_[task.number]]
                if not wave:
                    break
                if round_ == ROUNDS - 1:
                    raise KinemaError(
                        f"Ray lost the results of {len(wave)} rows {ROUNDS} times",
                        hint="the same command goes on where it stopped",
                    )

    def _run(self, stages: Sequence[Stage], wave: Sequence[Task], places: Places) -> Iterator[Done]:
        """One pass of Ray Data over tasks."""
        import ray

        from kinema.curation.ray_worker import Mailbox

        kept = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        mailbox: Any = kept(Mailbox).remote()
        rows = self._dataset(stages, wave, places, mailbox)
        failures: list[BaseException] = []

        def pull() -> None:
            try:
                for _ in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
                    pass
            except BaseException as error:
                failures.append(error)

        puller = threading.Thread(target=pull, name="ray-data", daemon=True)
        puller.start()
        try:
            running = True
            while running:
                puller.join(FETCH_S)
                running = puller.is_alive()  # before the mailbox is looked into a last time
                letters, failure = ray.get(mailbox.fetch.remote())
                for letter in letters:
                    yield from pickle.loads(letter)  # noqa: S301 (of the run's own workers)
                if failure is not None:
                    raise pickle.loads(failure)  # noqa: S301
        finally:
            ray.kill(mailbox)  # what still runs ends when it wants to leave a letter
            puller.join(LEAVING_S)
        if failures:
            first = str(failures[0]).strip().splitlines()
            raise KinemaError(
                f"Ray gave up: {first[-1] if first else type(failures[0]).__name__}",
                hint="the same command goes on where it stopped",
            ) from failures[0]

    def _dataset(
        self, stages: Sequence[Stage], wave: Sequence[Task], places: Places, mailbox: Any
    ) -> Any:
        """The chain, not yet running."""
        import ray.data

        from kinema.curation.ray_worker import Server, serve, table_of

        # A later stage's batch is put together of several blocks.
        size = max(min(stage.batch for stage in stages), math.ceil(len(wave) / BLOCKS))
        blocks = [table_of(wave[first : first + size]) for first in range(0, len(wave), size)]
        rows: Any = ray.data.from_arrow(blocks)
        share = self._share(stages)
        # Ray runs batches again whose process died, and starts dead actors anew.
        for position, stage in enumerate(stages):
            if not (stage.gpu or only_waits(stage)):
                rows = rows.map_batches(
                    serve,
                    batch_size=stage.batch,
                    batch_format="pyarrow",
                    fn_args=(stage, places, position, mailbox),
                    num_cpus=1,
                )
                continue
            calls = CALLS * stage.threads if only_waits(stage) else 1
            rows = rows.map_batches(
                Server,
                batch_size=calls * stage.batch,
                batch_format="pyarrow",
                fn_constructor_args=(stage, places, position, mailbox, self._gpus > 0),
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.workers(stage)),
                **(share if stage.gpu else {"num_cpus": 0}),
            )
        return rows

    def _share(self, stages: Sequence[Stage]) -> dict[str, float]:
        """What an actor takes of the cluster: all stages with models run at once, so that they
        share GPUs where there are fewer than stages."""
        count = sum(stage.gpu for stage in stages)
        if self._gpus and count:
            return {"num_cpus": 0, "num_gpus": 1 / math.ceil(count / self._gpus)}
        return {"num_cpus": 0}


def _start(address: str, cpus: int | None) -> None:
    import ray

    # Its own log files have all of it; what goes wrong comes as an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        # Stages of the script at hand are found by its own way to modules.
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}}
        with _silence():
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, runtime_env=paths, **quiet
            )
        return
    try:
        _knock(address)
        with _silence():
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise KinemaError(
            f"there is no Ray cluster to join: {lines[0] if lines else type(error).__name__}",
            where=address,
            hint="start one with `ray start --head`, or use --ray local; this machine has to be "
            "one of the cluster, with the cluster's token in ~/.ray/auth_token if it has one",
        ) from None


def _prepare() -> None:
    """Set what Ray reads when it is imported."""
    if "ray" in sys.modules:
        return
    # A call that comes after `close` must not start another cluster.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # This machine's token for clusters: Ray itself takes it for `auto` and not for `host:port`.
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or os.path.exists(token):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def _silence() -> Iterator[None]:
    """Without what Ray's C++ writes to stderr as it starts: how it was told to write less."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _knock(address: str) -> None:
    """Find out in seconds that nobody answers at `host:port`: Ray itself takes five minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), 10).close()


def _check_nodes(places: Places) -> None:
    """Every node has this version of Kinema and sees the run's folder.

    Raises:
        KinemaError: one does not.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from kinema.curation.ray_worker import sees

    marker = f"{places.out}/.reach-{uuid.uuid4().hex}"
    with new_file(marker) as file:
        file.write_text(f"{time.time()}\n", encoding="utf-8")
    look = ray.remote(num_cpus=0, max_retries=3)(sees)
    try:
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            try:
                problem = ray.get(
                    look.options(scheduling_strategy=where).remote(marker, version("kinema"))
                )
            except Exception as error:
                lines = str(error).strip().splitlines()
                problem = f"it cannot run Kinema ({lines[-1] if lines else type(error).__name__})"
            if problem:
                raise KinemaError(
                    problem,
                    where=f"node {node['NodeManagerAddress']}",
                    hint="install Kinema on all nodes, and put inputs and OUT on a disk that all "
                    "of them share, or in a store (s3://...)",
                )
    finally:
        if is_url(marker):
            system, path = filesystem(marker)
            system.rm(path)
        else:
            os.unlink(marker)

"""Training runs in processes of their own, one or several, that start at once and can be killed.

    with started_run(config, tmp_path, "fsdp2") as run:
        run.wait_until(lambda said: "step 3/7" in said)
        run.kill()

They are forked off a server that has imported everything, for an import takes longer than a tiny run.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import yaml

from nsa_hf.recipes.training.config import RunConfig

PRELOADED = [
    "nsa_hf.recipes.training.loop",
    "nsa_hf.recipes.train",
    "accelerate",
    "datasets",
    "torch.distributed.fsdp",
    "peft",
]
ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
DEADLINE = 240  # seconds


class Run(NamedTuple):
    """The processes of one run, and the file with what they print."""

    processes: list[BaseProcess]
    log: Path

    def wait_until(self, happened: Callable[[str], bool]) -> None:
        """Until `happened`, which is given what they have printed, says yes, or they are done."""
        end = time.monotonic() + DEADLINE
        while not happened(said := self.log.read_text()) and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, f"too late: {said}"
            time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL to all, as a machine that loses its power."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self) -> str:
        """Waits until all are done, and gives what they printed."""
        for process in self.processes:
            process.join(DEADLINE)
        said = self.log.read_text()
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), said
        return said


def started_run(config: RunConfig, folder: Path, file: str | None = None) -> AbstractContextManager[Run]:
    """Starts a run in one process, or in two, as with recipes/accelerate/`file`.yaml; `folder` gets its log."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    environment = launcher_environment(file) if file else {}
    return started([str(path)], folder / "log", processes=2 if file else 1, environment=environment)


@contextmanager
def started(
    arguments: list[str],
    log: Path,
    *,
    program: str = "nsa_hf.recipes.train",
    processes: int = 1,
    environment: dict[str, str] | None = None,
) -> Iterator[Run]:
    """Starts `python -m program` with these arguments; what is still running at the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shared = {"ACCELERATE_USE_CPU": "true", **(environment or {})}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    log.write_text("")
    run = Run([], log)
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        process = context.Process(target=run_in_process, args=(program, arguments, log, {**shared, **own}))
        process.start()
        run.processes.append(process)
    try:
        yield run
    finally:
        run.kill()


def run_in_process(program: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What a started process does."""
    import torch

    main = importlib.import_module(program).main
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # of which the results depend
    sys.exit(main(arguments))


def launcher_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` with recipes/accelerate/`name`.yaml puts into the environment of two processes."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = ACCELERATE / f"{name}.yaml"
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "run"])
    environment = prepare_multi_gpu_env(launch._validate_launch_command(arguments)[0])
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])

"""Tests that several processes of one gloo group run together, as torchrun would start them.

To import torch takes longer than most of these tests. So all processes are forks of one that has
imported it. Those of `on_ranks` start when the first test needs them, and live from test to test;
those of `run_ranks` are for one script.
"""

import contextlib
import functools
import importlib.util
import inspect
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 180  # for one test, and to start the processes
# What they have in common: dynamo is imported where the first optimizer is made.
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo"]
LAST_WORDS_S = 5  # for the other ranks once one has failed; most often they wait for it


def forks() -> Any:
    """The context of multiprocessing that starts them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Fork:
    """A Python program in a process of its own, with the arguments and environment it is given.

    It is no new interpreter: it has pytest's sys.path, and torch is imported. The environment is
    set only then, so what Python reads as it starts (PYTHONPATH, PYTHONWARNINGS) and what torch
    reads as it is imported (most of TORCH_*) has no effect; OMP_NUM_THREADS is passed on to torch.
    Programs for which this matters are for `run_python` in files.py.
    """

    def __init__(self, script: Path, *arguments: object, log: Path, **environment: str) -> None:
        self.log = log  # what the program prints, and beside it what it says on standard error
        for file in (log, errors_beside(log)):
            file.touch()
        command = [str(part) for part in (script, *arguments)]
        given = command, log, os.getcwd(), {**os.environ, **environment}
        self.process = forks().Process(target=be_python, args=given)
        self.process.start()

    def output(self) -> str:
        """Standard output, once all went well."""
        (out,) = outputs([self])
        return out

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def outputs(running: Sequence[Fork]) -> list[str]:
    """Standard outputs, once all went well; or an error with what all have said.

    Once one has failed, the others are not waited for much longer.
    """
    deadline = time.monotonic() + LIMIT_S
    waiting = {fork.process.sentinel: fork.process for fork in running}
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for sentinel in ready:
            if waiting.pop(sentinel).exitcode != 0:
                deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
    codes = [fork.process.exitcode for fork in running]
    found = [] if any(codes) else [f"the time of {LIMIT_S} s is over"]
    for index, (fork, code) in enumerate(zip(running, codes, strict=True)):
        end = "has not ended" if code is None else f"ended with {code}"
        said = fork.log.read_text() + errors_beside(fork.log).read_text()
        found.append(f"process {index} {end}:\n{said}")
    assert codes == [0] * len(codes), "\n".join(found)
    return [fork.log.read_text() for fork in running]


def errors_beside(log: Path) -> Path:
    return log.with_suffix(".errors")


def be_python(command: list[str], log: Path, folder: str, environment: dict[str, str]) -> None:
    """In a new fork."""
    for stream, file in ((1, log), (2, errors_beside(log))):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def run_fork(code: str | Path, *arguments: object, **environment: str) -> str:
    """Standard output of a program, or of the text of one, once all went well.

    Of what it imports, torch is there already, and in it what optimizers and FSDP need.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = code if isinstance(code, Path) else Path(folder, "program.py")
        if not isinstance(code, Path):
            script.write_text(code)
        fork = Fork(script, *arguments, log=Path(folder, "out"), **environment)
        try:
            return fork.output()
        finally:
            fork.end()


def run_ranks(folder: Path, code: str, world: int) -> list[str]:
    """Standard outputs of so many processes, in one thread each.

    Their arguments are the rank, a file to meet in, and how many they are.
    """
    script = folder / "ranks.py"
    script.write_text(code)
    ranks = [
        Fork(script, rank, folder / "init", world, log=folder / f"{rank}.out", OMP_NUM_THREADS="1")
        for rank in range(world)
    ]
    try:
        return outputs(ranks)
    finally:  # one that failed leaves the others waiting
        for rank in ranks:
            rank.end()


def on_ranks(world: int) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Makes a test of a function that so many processes call, each with the same arguments.

    Those must be picklable. Where a rank raises, the test fails with the words of all that did.
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(run)
        def test(ranks: "Ranks", **given: Any) -> None:
            ranks.run(world, inspect.getfile(inspect.unwrap(run)), run.__name__, given)

        ours = inspect.Parameter("ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        asked = inspect.signature(run).parameters.values()
        test.__signature__ = inspect.Signature([ours, *asked])  # which pytest reads
        test.on_each_rank = run
        return test

    return decorate


class Ranks:
    """The groups of processes of one pytest process, by their size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups: dict[int, Group] = {}
        self.started = 0

    def run(self, world: int, file: str, name: str, given: dict[str, Any]) -> None:
        if world not in self.groups:
            self.started += 1
            self.groups[world] = Group(world, self.folder / f"init-{self.started}")
        errors = self.groups[world].call(file, name, given)
        if errors:  # the ranks may have stopped at different places, and would never meet again
            self.groups.pop(world).kill()
            pytest.fail("\n".join(errors), pytrace=False)

    def close(self) -> None:
        for group in self.groups.values():
            group.kill()


class Group:
    """Processes that wait for what to call."""

    def __init__(self, world: int, init: Path) -> None:
        context = forks()
        self.pipes, self.processes = [], []
        for rank in range(world):
            pipe, its_pipe = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, str(init), its_pipe), daemon=True
            )
            process.start()
            its_pipe.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def call(self, file: str, name: str, given: dict[str, Any]) -> list[str]:
        """What went wrong, an entry for each rank that has something to say."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # noticed below
                pipe.send((file, name, given))
        errors, deadline = [], time.monotonic() + LIMIT_S
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                errors.append(f"ranks {sorted(waiting.values())} did not end")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error = pipe.recv()
                except EOFError:
                    error = "the process has died"
                if error is not None:
                    errors.append(f"rank {rank}: {error}")
                    deadline = min(deadline, time.monotonic() + LAST_WORDS_S)
        return errors

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, world: int, init: str, pipe: Any) -> None:
    """What each process does: calls functions of test files, until it is killed."""
    described = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(number) for name, number in described.items()})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    while True:
        try:
            file, name, given = pipe.recv()
        except EOFError:  # pytest has gone; an ordinary exit would have gloo's threads abort
            os._exit(0)
        try:
            getattr(load(file), name).on_each_rank(**given)
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)


@functools.cache
def load(file: str) -> Any:
    """A test file as a module."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

"""Training that a signal ends while it saves. Run in a process without threads, which forks.

torch.distributed.checkpoint writes ``.metadata`` when all else is written, so that a folder without
it is no checkpoint.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # as making an optimizer does, in each fork if not here
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from support import sharded

STEPS = 3
# What a save does to its files, in the words of sys.addaudithook().
EVENTS = ("open", "os.mkdir", "os.remove", "os.rename")


def train(folder: Path, kill_at: int | None = None) -> dict[str, str]:
    """Goes on from the last checkpoint, saves after each step; the signal comes at that event."""
    made = sharded.make("everything", mesh=None)
    done = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if done > 0:
        model, optimizer = get_state_dict(*made)
        dcp.load(
            {"model": model, "optimizer": optimizer},
            checkpoint_id=folder / str(done),
            no_dist=True,
        )
        set_state_dict(*made, model_state_dict=model, optim_state_dict=optimizer)
    if kill_at is not None:
        kill_in_save(folder, kill_at)
    for step in range(done + 1, STEPS + 1):
        sharded.train(made, step)
        model, optimizer = get_state_dict(*made)
        dcp.save(
            {"model": model, "optimizer": optimizer},
            checkpoint_id=folder / str(step),
            no_dist=True,
        )
    return sharded.everything(made)


def kill_in_save(folder: Path, kill_at: int) -> None:
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def end_of_training(folder: Path, kill_at: int | None) -> dict[str, str] | None:
    """In a process of its own; None if it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(train(folder, kill_at), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0
    found: dict[str, str] = json.loads(text)
    return found


def kill_everywhere(base: str) -> None:
    """Prints at how many events trainings were killed, and at which of them one ended otherwise."""
    torch.set_num_threads(1)
    undisturbed = end_of_training(Path(base, "undisturbed"), kill_at=None)
    wrong = []
    for kill_at in itertools.count(1):
        folder = Path(base, f"killed at {kill_at}")
        if end_of_training(folder, kill_at) is not None:
            break  # there are not so many events
        if end_of_training(folder, kill_at=None) != undisturbed:
            wrong.append(kill_at)
    print(json.dumps({"killed": kill_at - 1, "wrong": wrong}))

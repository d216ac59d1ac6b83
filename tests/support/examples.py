"""The programs of examples/, run as a user does, but in a process that has imported most of it."""

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from support.files import ROOT

FOLDER = ROOT / "examples"


def run(name: str, *arguments: object) -> str:
    """What it prints."""
    printed = io.StringIO()
    with (
        _as_before(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
    ):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.syspath_prepend(str(FOLDER))
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


def run_in_group(name: str, *arguments: object) -> str:
    """The same as one process of a group that is there already, and stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(dist, "destroy_process_group", lambda *_: None)
        return run(name, *arguments)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Packages leave notes for their next start: in the environment, accelerate in its state."""
    environment = dict(os.environ)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)

"""A step captured in a CUDA graph as a contender: what is timed is the replay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from recipes import Groups, Make, NotComparableError, Step, device_type

WARM_UP_STEPS = 3  # on a side stream before the capture, as torch's notes on CUDA graphs ask for

Create = Callable[[Groups, str], torch.optim.Optimizer]


def captured(create: Create) -> Make:
    """Make the optimizer, capture one step and go back to the start, as if no step had been."""

    def make(groups: Groups, optimizer: str) -> Step:
        if device_type(groups) != "cuda":
            raise NotComparableError("runs on cuda only")
        params = [param for group in groups for param in group["params"]]
        before = [param.detach().clone() for param in params]
        stepped = create(groups, optimizer)
        _warm_up(stepped)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stepped.step()
        _rewind(stepped, params, before)

        def replay(_keep: object = stepped) -> None:  # its states must live as long as the graph
            graph.replay()

        return replay

    return make


def _warm_up(optimizer: torch.optim.Optimizer) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)


@torch.no_grad()
def _rewind(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], before: list[torch.Tensor]
) -> None:
    """In place, since the graph holds addresses. States start as zeros, step counts included."""
    for param, value in zip(params, before, strict=True):
        param.copy_(value)
        for entry in optimizer.state[param].values():
            if isinstance(entry, torch.Tensor):
                entry.zero_()

"""Ctrl-C in all places of this package's Python code, one after the other."""

import inspect
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusedopt

PACKAGE = str(Path(fusedopt.__file__).parent)


def interrupted_at(number: int, call: Callable[[], Any]) -> bool:
    """Call it, with a KeyboardInterrupt before the line, or at the return, of this number.

    Returns False if there were not so many.
    """
    left = number

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_flags & inspect.CO_GENERATOR:
            return None
        # No signal comes between the body of a `with` and its end.
        is_with = linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with ")
        if event in ("line", "return") and not is_with:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False

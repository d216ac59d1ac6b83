"""Several threads at once."""

import threading
from collections.abc import Callable


def run_in_threads(work: Callable[[int], None], count: int = 2) -> list[BaseException]:
    """Runs work(0), work(1) ... at once; what they raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def guarded(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors

"""Start of the processes that decode images, without running the user's script again.

Importing this module imports no large library, so that a command can start the server first.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from ...registry.machine import usable_cores

ROOM = __name__.rpartition(".")[0]
PRELOADED = [f"{ROOM}.worker_server"]

# With fewer images, starting workers takes longer than decoding in the calling process.
FEWEST_IMAGES = 1024
MOST_WORKERS = 32  # each holds some batches in shared memory

_starting = threading.Lock()
T = TypeVar("T")


def workers_for(num_workers: int | None, n_images: int | None) -> int:
    """The number of processes that decode: `num_workers`, or, where it is None, what the machine has.

    That is one for each core that the process may use but one, which runs the model; none on a single
    core, or for few images. None as `n_images` stands for a stream.
    """
    if num_workers is not None:
        return num_workers
    if n_images is not None and n_images < FEWEST_IMAGES:
        return 0
    return min(usable_cores() - 1, MOST_WORKERS)


def worker_context() -> BaseContext:
    """A context whose processes inherit nothing: a fork of a program with threads can deadlock.

    The first call starts the one server that forks all workers of this program. It imports what
    they need in the background, which takes some seconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver  # not everywhere

    forkserver.set_forkserver_preload(PRELOADED)
    # The server ignores Ctrl-C only after its imports; the mask is inherited.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return multiprocessing.get_context("forkserver")


@contextmanager
def main_left_out(task: Any) -> Iterator[bool]:
    """While workers are started that run `task`: whether they leave the program's `__main__` alone.

    multiprocessing lets each new process run the program's script again, under another name, since
    what it is sent may be defined there. Where nothing in `task` is, the script's imports cost
    seconds in each worker, and a script without ``if __name__ == "__main__":`` would start over.
    The `__main__` of a package is never run again: for the moment of starting, this one looks like
    such.
    """
    main = sys.modules["__main__"]
    with _starting:
        if refers_to_main(task):
            yield False
            return
        spec = getattr(main, "__spec__", None)
        main.__spec__ = ModuleSpec("__main__", None)
        try:
            yield True
        finally:
            main.__spec__ = spec


def made_apart(make: Callable[[], T], is_stopped: Callable[[], bool]) -> T | None:
    """What `make` returns, called in another thread; None as soon as `is_stopped`.

    The first worker waits for the imports of the server, in a call that no signal interrupts.
    """
    made: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="start of workers", daemon=True)
    thread.start()
    while thread.is_alive():
        if is_stopped():
            return None
        thread.join(0.1)
    if errors:
        raise errors[0]
    return made.pop()


def may_start_workers(task: Any) -> bool:
    """Whether workers can be sent `task` without running the work of the program's script again.

    They can where nothing in it is defined in the script, and where the script is a file with an
    ``if __name__ == "__main__":``.
    """
    if not refers_to_main(task):
        return True
    try:
        text = Path(sys.modules["__main__"].__file__ or "").read_text(encoding="utf-8")
    except (AttributeError, OSError, ValueError):  # standard input, a notebook
        return False
    return "__main__" in text


def refers_to_main(task: Any) -> bool:
    """Whether `task`, pickled, names anything that is defined in the program's `__main__`."""
    finder = _MainFinder(_Nowhere(), 5, buffer_callback=lambda _: None)  # arrays are not copied
    try:
        finder.dump(task)
    except Exception:  # starting the workers raises it again
        return True
    return finder.found


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _MainFinder(pickle.Pickler):
    found = False

    def persistent_id(self, obj: Any) -> None:
        """Called with everything that is pickled; None lets it be pickled as usual."""
        if getattr(obj, "__module__", None) == "__main__":
            self.found = True


@contextmanager
def stopped_are_killed(patience: float) -> Iterator[list[int | None]]:
    """Kill child processes that stay stopped (SIGSTOP) for `patience` seconds; gives their numbers.

    Such a one never ends by itself, and what waits for its answer has no time limit: a tensor that
    it has sent already is fetched from it. Without a /proc none is found.
    """
    killed: list[int | None] = []
    done = threading.Event()

    def watch() -> None:
        before: list[Any] = []
        while not done.wait(patience / 2):
            stopped = [child for child in multiprocessing.active_children() if _stopped(child)]
            for child in stopped:
                if child in before:
                    child.kill()
                    killed.append(child.pid)
            before = stopped

    threading.Thread(target=watch, name="stopped workers", daemon=True).start()
    try:
        yield killed
    finally:
        done.set()


def _stopped(child: Any) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def prepare_worker(_: int) -> None:
    """Prepare a worker process; called first in each."""
    import torch

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")  # about odd metadata of pictures, once from each worker
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End the worker when the main process ends; torch's own check sees only the fork server."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""A function run by several ranks: forks of this process, connected as torchrun connects processes."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 300.0


class RankError(Exception):
    """The tracebacks of the ranks that failed."""


def run_ranks(size: int, act: Callable[[], Any], folder: Path) -> list[Any]:
    """The results of `act` by rank; they are pickled.

    As torchrun does, the other ranks are ended once one has failed.

    Args:
        size: number of ranks.
        act: runs in each of them.
        folder: an empty or missing folder.

    Raises:
        RankError: a rank raised, or was killed.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = {_fork(rank, size, port, act, folder): rank for rank in range(size)}
    failed: list[str] = []
    end = time.monotonic() + LIMIT_S
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            rank = running.pop(pid)
            error = folder / f"{rank}.error"
            if status:
                failed.append(f"rank {rank}: {error.read_text() if error.exists() else 'killed'}")
        if time.monotonic() > end:
            failed.append("timeout")
        if failed:
            time.sleep(2)  # what the others do alone
            for other in running:
                os.kill(other, 9)
                os.waitpid(other, 0)
            raise RankError("\n".join(failed))
        time.sleep(0.02)
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(size)]


def _fork(rank: int, size: int, port: int, act: Callable[[], Any], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        (folder / f"{rank}.result").write_bytes(pickle.dumps(act()))
        status = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(status)

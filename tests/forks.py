"""Runs scripts in forks of one process that has imported the slow libraries, but nothing of ours.

A script sees what it would see in a new interpreter in which torch and the like are imported:
neither taxolens nor SAELens nor TransformerLens is. What a script does when a new interpreter starts
(its environment, `sys.path`, signals at start-up) is not tested this way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

SERVER = """
import atexit, gc, json, os, sys, traceback
import accelerate, datasets, pandas, plotly.graph_objects, pytest, scipy.stats, simple_parsing
import torch, torch._dynamo, transformers, wandb
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

gc.collect()
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
ours = {"taxolens", "sae_lens", "transformer_lens"} & {name.split(".")[0] for name in sys.modules}
assert not ours, ours
for descriptor, name in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
    os.dup2(os.open(name, os.O_RDWR), descriptor)
os.chdir(job["cwd"])
sys.argv = ["-c", *job["args"]]
status = 0
try:
    exec(compile(job["code"], "<script>", "exec"), {"__name__": "__main__"})
except SystemExit as stop:
    status = stop.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
except BaseException:
    traceback.print_exc()
    status = 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # to free the memory of all those libraries takes longer than most scripts
"""


class Forks:
    """One such process, started when the first script is run."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, code: str, *args: Any, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Run a script as `python -c code args` would.

        Args:
            code: the script; its indentation is removed.
            args: its arguments, as text.
            cwd: its working directory; None: that of the tests.

        Returns:
            its exit status (minus the number of the signal that ended it), stdout and stderr.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        with (
            tempfile.NamedTemporaryFile("r") as stdout,
            tempfile.NamedTemporaryFile("r") as stderr,
        ):
            job = {
                "code": textwrap.dedent(code),
                "args": [str(arg) for arg in args],
                "cwd": str(cwd or os.getcwd()),
                "stdout": stdout.name,
                "stderr": stderr.name,
            }
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            status = server.stdout.readline()
            assert status, "the process that forks has ended"
            return subprocess.CompletedProcess(args, int(status), stdout.read(), stderr.read())

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            assert self._server.stdin is not None and self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait()
            self._server.stdout.close()

"""Runs of `taxolens train` on a cluster with submitit (`pip install submitit`), one GPU each.

    python submit.py --preset dinov2-base-imagenet --output_path output/one
    python submit.py --studies studies.txt

When the time of a job ends or it is preempted, submitit sends it a signal and queues it again by
`checkpoint`; the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

LOGS = "slurm"


class Train:
    """One run; submitit pickles it, calls it on the node, and asks `checkpoint` how to go on."""

    def __call__(self, flags: list[str]) -> str:
        """Train in a process of its own, which gets the signals of the job."""
        command = [sys.executable, "-m", "taxolens", "train", *flags]
        self.process = subprocess.Popen([*command, "--resume_from_checkpoint", "auto"])
        if status := self.process.wait():
            raise RuntimeError(f"taxolens train ended with status {status}")
        return shlex.join(flags)

    def checkpoint(self, flags: list[str]) -> Any:
        """End the run, which writes a checkpoint, and queue the same call again."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self.process.wait()
        return DelayedSubmission(Train(), flags)


def main(args: list[str]) -> list[Any]:
    """Submit the runs; returns submitit's jobs."""
    import submitit

    if args[:1] == ["--studies"]:
        runs = [shlex.split(line) for line in Path(args[1]).read_text().splitlines() if line]
    else:
        runs = [args]
    executor = submitit.AutoExecutor(folder=LOGS)
    executor.update_parameters(
        name="taxolens",
        timeout_min=8 * 60,
        gpus_per_node=1,
        cpus_per_task=16,
        slurm_signal_delay_s=300,
    )
    jobs = executor.map_array(Train(), runs)
    print("\n".join(f"{job.job_id}: {shlex.join(run)}" for job, run in zip(jobs, runs)))
    return jobs


if __name__ == "__main__":
    main(sys.argv[1:])

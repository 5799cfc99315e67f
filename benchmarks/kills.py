"""Kills of every command at random moments: after the same command again, is every bit as it would be?

    python benchmarks/kills.py [--store]             # 100 kills, in two processes
    python benchmarks/kills.py --kills 20 --seed 1 --jobs train report
    python benchmarks/kills.py --write               # the stored table into docs/security.md

A case starts a command on a tiny model, ends it at a random moment, and starts the same command again,
up to `CHAIN` times; the last start is left alone. What it has written then is compared with what an
undisturbed run has written. A run is ended by SIGKILL, SIGTERM, SIGHUP or SIGINT, or its disk is full
from that moment on, which needs the right to mount (else these cases are left out). After a signal that
can be caught a command has to end within `GRACE` seconds, with exit code 1 and without a traceback;
on a full disk its message has to name a path there.

Commands run in forks of one process that has imported the libraries, so that no moment is spent on imports.
Done cases are in cases.jsonl of --output_path, and are not done again.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timing
import torch
from PIL import Image

PAGE = timing.ROOT / "docs" / "security.md"
CHAIN = 3  # kills of one run at most
GRACE = 10.0
HANG = 600.0  # seconds after which a run is lost
SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
FULL_DISK = "full disk"
DISK_BYTES = 128 << 20
CLASSES = tuple(f"{kind}_{i}" for kind in ("animal", "plant", "stone", "tool") for i in (0, 1))
N_IMAGES = {"train": 24, "validation": 4}  # a class
CASES = "cases.jsonl"
EVALUATORS = ("pair_depth", "lch_height", "parent_child", "monosemanticity")


class Job(NamedTuple):
    """A command, and how often it is drawn.

    Attributes:
        args: the arguments, in a working folder with the inputs of `make_inputs` beside it.
        before: the job whose working folder it starts from.
        weight: its share of the cases, in proportion.
    """

    args: list[str]
    before: str | None
    weight: float


class Run(NamedTuple):
    """A run of a command that was ended, or not, after `moment` seconds."""

    job: str
    how: str
    moment: float
    hit: bool
    code: int
    ended_in: float
    problem: str | None


def jobs(inputs: Path) -> dict[str, Job]:
    """Name -> job."""
    train = ["train", "--model_name", inputs / "model", "--dataset_path", inputs / "photos"]
    train += ["--split", "train", "--hook_names", "blocks.*.hook_resid_post", "--no_evaluate"]
    train += ["--architecture", "batchtopk", "--k", 4, "--d_sae", 48, "--lr", 0.001]
    train += ["--train_batch_size_tokens", 32, "--store_batch_size_prompts", 8]
    train += ["--n_batches_in_buffer", 6, "--normalize_activations", "expected_average_only_in"]
    train += ["--output_path", "output", "--log_to_wandb", "false", "--lr_warm_up_steps", 0]
    checkpoints = ["--n_checkpoints", 10, "--checkpoint_path", "checkpoints"]
    checkpoints += ["--checkpoint_id", "run", "--resume_from_checkpoint", "auto"]
    long = ["--tokens", "patch", "--training_tokens", 32 * 150]
    short = ["--tokens", "class", "--training_tokens", 32 * 20]
    cache = ["--use_cached_activations", "--cached_activations_path", "cache"]
    evaluate = ["evaluate", "output", "--taxonomy", inputs / "tree.csv", "--split", "validation"]
    evaluate += ["--n_permutations", 19, "--keep_activations", "--evaluators", *EVALUATORS]
    made = {
        "train": ([*train, *long, *checkpoints], None, 3.0),
        "train, prefetching": (
            [
                *train,
                *long,
                *checkpoints,
                "--prefetch_llm_batches",
                "true",
                "--keep_checkpoints",
                2,
            ],
            None,
            2.0,
        ),
        "train, 2 workers": ([*train, *short, *checkpoints, "--num_workers", 2], None, 0.4),
        "extraction": ([*train, *short, *checkpoints, *cache], None, 2.0),
        "evaluate": (evaluate, "train", 3.0),
        "report": (["report", "output"], "evaluate", 1.0),
    }
    return {name: Job([str(a) for a in args], *rest) for name, (args, *rest) in made.items()}


def make_inputs(folder: Path) -> None:
    """A vision transformer of random weights, pictures of noise told apart by colour, and a tree."""
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=16,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Dinov2Model(config).save_pretrained(folder / "model")
    size = {"height": 16, "width": 16}
    transformers.BitImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False
    ).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for split, n in N_IMAGES.items():
        for c, name in enumerate(CLASSES):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(n):
                noise = generator.integers(0, 90, (20, 20, 3)) + np.array([20 * c, 0, 150 - 20 * c])
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(place / f"{i}.png")
    edges = [f"{name.partition('_')[0]},{name}" for name in CLASSES]
    edges += [f"thing,{kind}" for kind in dict.fromkeys(n.partition("_")[0] for n in CLASSES)]
    (folder / "tree.csv").write_text("\n".join(["parent,child", *edges]))


def start(args: list[str], place: Path, log: Path, temporary: Path) -> int:
    """Start a command in a fork of this process, in a process group of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(place)
        for name in SIGNALS[1:]:  # nohup, and a shell's &, ignore some
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(out, descriptor)
        from taxolens.plugin import cli

        code = cli.main(args)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code (minus the number of the signal that ended it); None after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


class Lane:
    """One process that runs cases, one after the other, in a folder of its own."""

    def __init__(self, number: int, output: Path, every: dict[str, Job], seconds: dict[str, float]):
        self.number, self.output = number, output
        self.jobs, self.seconds = every, seconds
        self.folder = output / f"lane-{number}"
        self.disk = self.folder / "disk"
        self.temporary = self.folder / "tmp"
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (self.disk, self.temporary):
            folder.mkdir(parents=True)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[bool]:
        """A disk of `DISK_BYTES` in memory at `disk`; False where this user may not mount."""
        size = f"size={DISK_BYTES}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.disk], capture_output=True
        )
        try:
            yield done.returncode == 0
        finally:
            if done.returncode == 0:
                subprocess.run(["umount", "-l", self.disk], check=False)

    def case(self, number: int, seed: int, hows: tuple[str, ...]) -> list[Run]:
        """One case: a run ended again and again, and at last compared."""
        generator = np.random.default_rng([seed, self.number, number])
        weights = np.array([job.weight for job in self.jobs.values()])
        name = str(generator.choice(list(self.jobs), p=weights / weights.sum()))
        job = self.jobs[name]
        place = self.disk / f"case-{number}"
        if job.before is None:
            place.mkdir()
        else:
            shutil.copytree(self.output / "reference" / job.before, place)
        done: list[Run] = []
        for _ in range(int(generator.integers(1, CHAIN + 1))):
            how = str(generator.choice(hows))
            moment = float(generator.uniform(0, self.seconds[name]))
            done.append(self._ended(name, place, how, moment))
        problem = self._finished(name, place)
        if problem is None:
            shutil.rmtree(place)
        else:
            kept = self.output / f"lost-{self.number}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.move(place, kept)
            for log in self.temporary.glob("*.txt"):
                shutil.copy(log, kept)
            done[-1] = done[-1]._replace(problem=done[-1].problem or f"{problem} (see {kept})")
        return done

    def _ended(self, name: str, place: Path, how: str, moment: float) -> Run:
        log = self.temporary / "log.txt"  # not on the disk that is full
        log.unlink(missing_ok=True)
        pid = start(self.jobs[name].args, place, log, self.temporary)
        filler = self.disk / "filler"
        code = wait(pid, moment)
        hit = code is None
        began = time.monotonic()
        if hit and how == FULL_DISK:
            fill(filler)
            code = wait(pid, HANG)
        elif hit:
            os.kill(pid, getattr(signal, how))
            code = wait(pid, HANG)
        seconds = time.monotonic() - began
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        filler.unlink(missing_ok=True)
        said = log.read_text(errors="replace") if log.exists() else ""
        if hit and code == 0:  # it was over before it noticed
            hit = False
        problem = judge(how, code, seconds, said, place) if hit else None
        if problem:
            shutil.copy(log, self.output / f"fault-{self.number}-{place.name}-{time.time_ns()}.txt")
        return Run(name, how, moment, hit, -99 if code is None else code, seconds, problem)

    def _finished(self, name: str, place: Path) -> str | None:
        log = self.temporary / "log-last.txt"
        log.unlink(missing_ok=True)
        pid = start(self.jobs[name].args, place, log, self.temporary)
        code = wait(pid, HANG)
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "the last run hangs"
        if code:
            return f"the last run ends with {code}: {last_line(log.read_text(errors='replace'))}"
        differing = differences(
            content(self.output / "reference" / name, name), content(place, name)
        )
        return f"differs in {', '.join(differing[:5])}" if differing else None


def fill(path: Path) -> None:
    """Fill the disk of `path` to the last byte."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 8)):
            pass


def judge(how: str, code: int | None, seconds: float, said: str, place: Path) -> str | None:
    """What was wrong with how a command ended; None where nothing was."""
    if code is None:
        return f"{how}: it did not end in {HANG:.0f} seconds"
    if how == "SIGKILL":
        return None if code == -signal.SIGKILL else f"SIGKILL: exit code {code}"
    if "Traceback" in said:
        return f"{how}: a traceback"
    if how == FULL_DISK:
        names = str(place) in said or re.search(r"(checkpoints|output|cache)\S*", last_line(said))
        return None if names else f"{how}: no path in {last_line(said)!r}"
    if code == -getattr(signal, how):  # before the command has begun, or after its end
        return None
    if code != 1:
        return f"{how}: exit code {code}: {last_line(said)!r}"
    named = "interrupted" if how == "SIGINT" else how
    if not (named in last_line(said) or how in last_line(said)):
        return f"{how}: not named in {last_line(said)!r}"
    return None if seconds <= GRACE else f"{how}: it took {seconds:.1f} seconds to end"


def last_line(text: str) -> str:
    """The error, else the last line with text."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:600]


def content(place: Path, job: str) -> dict[str, bytes]:
    """File -> bytes of all that a job is for, without times, paths and what only helps to resume.

    The report has the seconds of the evaluation: it is compared where it is made from equal results.
    """
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        left_out = ("checkpoints/", "output/.", "cache/.")
        left_out += () if job == "report" else ("output/report.html",)
        if not path.is_file() or name.startswith(left_out) or path.name == "cache.json":
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            text = data.decode().replace(str(place), "PLACE")
            data = json.dumps(without_times(json.loads(text)), sort_keys=True).encode()
        found[name] = data
    return found


def without_times(value: Any) -> Any:
    """JSON without what two equal runs may differ in."""
    if isinstance(value, dict):
        left_out = ("created", "seconds", "resume_from_checkpoint", "checkpoint_path")
        return {k: without_times(v) for k, v in value.items() if k not in left_out}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """The names of files that are missing, too many, or of other bytes."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


def references(output: Path, every: dict[str, Job], chosen: Iterable[str]) -> dict[str, float]:
    """Run the chosen jobs, and those that they start from, undisturbed; name -> seconds."""
    needed = set(chosen)
    for name in reversed(every):  # a job comes after the one that it starts from
        if name in needed and (before := every[name].before):
            needed.add(before)
    file = output / "seconds.json"
    seconds = json.loads(file.read_text()) if file.exists() else {}
    temporary = output / "reference-tmp"
    temporary.mkdir(exist_ok=True)
    for name, job in every.items():
        if name in seconds or name not in needed:
            continue
        place = output / "reference" / name
        shutil.rmtree(place, ignore_errors=True)
        if job.before is None:
            place.mkdir(parents=True)
        else:
            shutil.copytree(output / "reference" / job.before, place)
        log = temporary / "log.txt"
        log.unlink(missing_ok=True)
        began = time.monotonic()
        code = wait(start(job.args, place, log, temporary), 600)
        if code != 0:
            raise SystemExit(f"{name}: undisturbed, it ends with {code}: {log.read_text()}")
        seconds[name] = time.monotonic() - began
        file.write_text(json.dumps(seconds))
    return seconds


def warm_up() -> None:
    """Import what the commands import; no thread is started, which a fork would lose."""
    import importlib
    import threading

    torch.set_num_threads(1)
    for name in (
        *("plugin.commands.train", "plugin.commands.train_flags", "plugin.commands.evaluate"),
        *("plugin.commands.report", "plugin.study.job", "plugin.evaluation.evaluate"),
        *("plugin.reporting.report", "plugin.reporting.compare", "plugin.reporting.metric_table"),
    ):
        importlib.import_module(f"taxolens.{name}")
    import pandas  # noqa: F401
    import plotly.graph_objects  # noqa: F401
    from transformers import AutoModel, Dinov2Model  # noqa: F401

    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(60)


def run_lane(lane: Lane, share: int, seed: int, done: list[Run], n_done: int) -> None:
    """Run cases until `share` kills are made."""
    number = n_done
    with lane.mounted() as full_disks:
        hows = (*("SIGKILL",) * 4, *("SIGTERM",) * 2, *SIGNALS[2:])
        hows += (FULL_DISK,) * 3 if full_disks else ()
        while sum(run.hit for run in done) < share:
            runs = lane.case(number, seed, hows)
            line = {"seed": seed, "lane": lane.number, "runs": [run._asdict() for run in runs]}
            with open(lane.output / CASES, "a") as file:
                file.write(json.dumps(line) + "\n")
            done += runs
            number += 1
            for run in runs:
                if run.problem is not None:
                    print(
                        f"{run.job}, {run.how} after {run.moment:.2f} s: {run.problem}", flush=True
                    )


def read_cases(output: Path, seed: int) -> dict[int, list[list[Run]]]:
    """Lane -> the runs of each of its cases."""
    found: dict[int, list[list[Run]]] = {}
    if (output / CASES).exists():
        for line in (output / CASES).read_text().splitlines():
            case = json.loads(line)
            if case["seed"] == seed:
                runs = [Run(**run) for run in case["runs"]]
                found.setdefault(case["lane"], []).append(runs)
    return found


def summary(runs: list[Run]) -> list[dict[str, Any]]:
    """For every job and way of ending: kills, how many had a fault, seconds until the end."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.hit:
            groups.setdefault((run.job, run.how), []).append(run)
    return [
        {
            "command": job,
            "ended_by": how,
            "kills": len(group),
            "faults": sum(run.problem is not None for run in group),
            "median_seconds": timing.rounded(statistics.median(run.ended_in for run in group)),
            "longest_seconds": timing.rounded(max(run.ended_in for run in group)),
        }
        for (job, how), group in sorted(groups.items())
    ]


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    groups = found["groups"]
    rows: list[Sequence[object]] = [
        (
            *(group[key] for key in ("command", "ended_by", "kills", "faults")),
            f"{group['median_seconds']:.1f}, {group['longest_seconds']:.1f}",
        )
        for group in groups
    ]
    rows.append(("all", "", sum(group["kills"] for group in groups), found["faults"], ""))
    disks = any(group["ended_by"] == FULL_DISK for group in groups)
    head = ("command", "ended by", "kills", "faults", "seconds to end: median, longest")
    return (
        f"{timing.table(head, rows)}\n\nSeed {found['seed']}, {found['seconds']:.0f} s in "
        f"{found['processes']} process(es){'' if disks else ', no disk was filled'}; "
        f"{timing.on_what(found)}."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the campaign and print its table; 1 where a case has a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--processes", type=int, default=2, help="cases at a time")
    parser.add_argument("--output_path", type=Path, default=Path("kills"))
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    if args.write:
        timing.show("kills", shown(timing.stored("kills")), PAGE)
        return 0
    output: Path = args.output_path.resolve()
    inputs = output / "inputs"
    if not (inputs / "tree.csv").exists():  # written last
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        make_inputs(inputs)
    began = time.monotonic()
    warm_up()
    every = jobs(inputs)
    if unknown := set(args.jobs or every) - set(every):
        parser.error(f"--jobs: {sorted(unknown)[0]!r} is none of {', '.join(every)}")
    chosen = {name: every[name] for name in args.jobs or every}
    seconds = references(output, every, chosen)
    done = read_cases(output, args.seed)
    children = []
    for number in range(args.processes):
        cases = done.get(number, [])
        share = args.kills // args.processes + (number < args.kills % args.processes)
        lane = Lane(number, output, chosen, seconds)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_lane(
                    lane, share, args.seed, [run for case in cases for run in case], len(cases)
                )
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    runs = [
        run for cases in read_cases(output, args.seed).values() for case in cases for run in case
    ]
    found = {
        "machine": timing.machine(),
        "seed": args.seed,
        "processes": args.processes,
        "seconds": round(time.monotonic() - began),
        "faults": sum(run.problem is not None for run in runs),
        "groups": summary(runs),
    }
    print(shown(found))
    if args.store:
        timing.store("kills", found)
        timing.show("kills", shown(found), PAGE)
    return int(any(codes) or found["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Start-up time of the command line, and time to the first batch from worker processes.

    python benchmarks/command_line.py [--rounds 7] [--results output/my_run]

Each line is the median over the rounds of the wall time of a new process, with that of an empty
Python program and of `import sae_lens` for comparison. For batches it is the median of
the time from making an `ImageLoader` of two workers to its first batch of 32 drawn pictures, in a new
process. With `--results`, a folder that has a results.json, `taxolens report` is timed too. Bars:
0.5 s for commands that need no model, 3 s for the first batch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = ("demo", "train", "evaluate", "report", "list", "completion")
AT_ONCE = [
    ["--help"],
    ["--version"],
    *([command, "--help"] for command in COMMANDS),
    ["tran"],
    ["evaluate"],
    ["train", "--no_such_flag"],
    ["train", "--preset", "laptop"],
    ["completion", "bash"],
    ["list", "presets"],
]
SHOWN = [["list", "taxonomies"], ["list", "evaluators"], ["list", "models"]]
ANSWERED, FIRST_BATCH = 0.5, 3.0

BATCHES = """
import time
from taxolens.hooks.images import ImageLoader, load_images
from taxolens.hooks.images.preprocess import PilPreprocess
from taxolens.plugin import demo_assets
images = load_images(str(demo_assets.dataset_path()), split="validation")
for pool in range(2):
    started = time.perf_counter()
    loader = ImageLoader(images, PilPreprocess(None, None), batch_size=32, num_workers=2)
    next(loader.batches(range(256)))
    print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    shown = [*SHOWN, *([["report", args.results, "--static"]] if args.results else [])]
    commands = {f"taxolens {' '.join(command)}": command for command in [*AT_ONCE, *shown]}
    if args.results:
        commands["taxolens report RUN --static"] = commands.pop(f"taxolens {' '.join(shown[-1])}")
    processes = {
        "python -c pass": ["-c", "pass"],
        "import taxolens": ["-c", "import taxolens"],
        **{name: ["-m", "taxolens", *command] for name, command in commands.items()},
        "import sae_lens": ["-c", "import sae_lens"],
    }
    seconds = {name: [] for name in processes}
    batches = {"first batch from workers": [], "first batch from a second pool": []}
    for _ in range(args.rounds):
        for name, process in processes.items():
            seconds[name].append(run(process)[0])
        for name, took in zip(batches, run(["-c", BATCHES])[1].split(), strict=True):
            batches[name].append(float(took))

    median = {name: statistics.median(took) for name, took in {**seconds, **batches}.items()}
    bars = {f"taxolens {' '.join(command)}": ANSWERED for command in AT_ONCE}
    bars |= dict.fromkeys(batches, FIRST_BATCH)
    if args.json:
        print(json.dumps({name: round(value, 3) for name, value in median.items()}))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}, {args.rounds} rounds")
    for name, value in median.items():
        bar = f"   bar {bars[name]} s" if name in bars else ""
        print(f"{name:<34} {value:6.2f} s{bar}")


def run(arguments: list[str]) -> tuple[float, str]:
    """Seconds that a new Python with these arguments takes, and its output."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode not in (0, 2):  # 2: wrong usage, which is asked for
        raise SystemExit(f"{arguments}: {done.stderr}")
    return took, done.stdout


if __name__ == "__main__":
    main()

"""Shared by the benchmarks of docs/performance.md: pictures, models, alternating rounds, stored results."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from taxolens.registry.machine import usable_cores
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "performance.md"
SIZE = (500, 375)  # of ImageNet's average photograph
CLASSES = 8
# width, blocks, heads, SwiGLU instead of an MLP
MODELS = {
    "tiny": (32, 2, 2, False),
    "Ti": (192, 12, 3, False),
    "S": (384, 12, 6, False),
    "B": (768, 12, 12, False),
    "g": (1536, 40, 24, True),
}


def draw(n: int, folder: Path) -> Path:
    """`n` JPEGs of 500 x 375 pixels in class folders: coloured clouds and sensor noise, about 70 kB each."""

    def one(index: int) -> None:
        generator = np.random.default_rng(index)
        clouds = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        pixels = np.asarray(clouds.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = pixels + 6 * generator.standard_normal(pixels.shape, dtype=np.float32)
        path = folder / f"class_{index % CLASSES}" / f"{index:06}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)

    for index in range(min(n, CLASSES)):
        (folder / f"class_{index}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(usable_cores()) as threads:  # Pillow and NumPy release the GIL
        list(threads.map(one, range(n)))
    return folder


def save_vit(size: str, folder: Path) -> Path:
    """A DINOv2 with random weights (of `MODELS`), 224 pixels, patches of 14, as Hugging Face saves it."""
    vit(size).save_pretrained(folder)
    square = {"height": 224, "width": 224}
    processor = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=square)
    processor.save_pretrained(folder)
    return folder


def vit(size: str) -> Dinov2Model:
    """The model of `save_vit`; its weights are drawn on the GPU where there is one, and are other ones there."""
    width, blocks, heads, swiglu = MODELS[size]
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        use_swiglu_ffn=swiglu,
        image_size=224,
        patch_size=14,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Dinov2Model._from_config(config, attn_implementation="sdpa").eval()


def alternate(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way in each round; every round runs each once, in turns of the order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock()
            ways[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> dict[str, float]:
    """Median, lowest and highest over the rounds of the time of `name` over that of `reference`."""
    found = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
    return {
        "median": rounded(statistics.median(found)),
        "lowest": rounded(min(found)),
        "highest": rounded(max(found)),
    }


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"^model name\s*: (.*)$", info.read_text(), flags=re.M)
        cpu = f"{names[0] if names else cpu}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }


def on_what(found: Mapping[str, Any]) -> str:
    """The machine of stored results in one line."""
    of = found["machine"]
    gpu = f", {of['gpu']}" if of["gpu"] else ""
    return (
        f"{of['cores']} core(s) of {of['cpu']}{gpu}, {of['threads']} thread(s), torch {of['torch']}"
    )


def flags(settings: Mapping[str, Any]) -> list[str]:
    """The settings as flags of a command of taxolens."""
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def stored(name: str) -> dict[str, Any]:
    """The results that `store` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def store(name: str, found: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write docs/results/NAME.json; without `indent` in one line."""
    separators = None if indent else (",", ":")
    text = json.dumps(found, indent=indent, separators=separators)
    (RESULTS / f"{name}.json").write_text(f"{text}\n")


def show(name: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between `<!-- NAME -->` and `<!-- /NAME -->` of a page.

    Raises:
        ValueError: the page has no such markers.
    """
    block = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
    before = page.read_text()
    if not block.search(before):
        raise ValueError(f"{page} has no markers <!-- {name} --> and <!-- /{name} -->")
    new = f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->"
    page.write_text(block.sub(lambda _: new, before))

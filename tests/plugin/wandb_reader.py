"""Read an offline W&B run back: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, HEADER = 32 * 1024, 7, 7  # ":W&B", magic, version | crc32, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> list[Any]:
    """Every record of a `.wandb` file, in the order in which it was logged."""
    data = path.read_bytes()
    assert data[:4] in (b"", b":W&B"), f"{path} is no W&B log"
    found, parts, at = [], [], FILE_HEADER
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # no header fits: the rest of the block is padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += HEADER
        if kind in (FULL, FIRST):
            parts = []
        if at + length > len(data):  # still being written
            break
        parts.append(data[at : at + length])
        at += length
        if kind in (FULL, LAST):
            found.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
    return found


def finished(file: Path, seconds: float = 20.0) -> list[Any]:
    """The records of a run up to its `exit`: W&B's own process may still be writing them."""
    deadline = time.monotonic() + seconds
    while True:
        found = records(file)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{file} has no end after {seconds} s"
        time.sleep(0.05)


class OfflineRun:
    """What one offline run holds: `history` rows, `summary`, `config`, and artifact names."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.rglob("*.wandb")
        self.records = finished(file)
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.artifacts: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}
        for record in self.records:
            match record.WhichOneof("record_type"):
                case "history":
                    self.history.append(_values(record.history.item))
                case "summary":
                    self.summary |= _values(record.summary.update)
                case "config":
                    self.config |= _values(record.config.update)
                case "run":
                    self.run = record.run
                    self.config |= _values(record.run.config.update)
                case "artifact":
                    self.artifacts[record.artifact.name] = record.artifact
                case "metric":
                    name = record.metric.name or record.metric.glob_name
                    self.metrics[name] = record.metric.step_metric

    def logged(self, key: str) -> list[Any]:
        """The values logged under `key`, oldest first."""
        return [row[key] for row in self.history if key in row]


def _values(items: Any) -> dict[str, Any]:
    """Items come one per leaf, each with the path of its keys."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found

"""Universal SAE (YorkUCVIL/UniversalSAE): one checkpoint for each model, statistics in a yaml.

Sources: `universal_sae/train.py` (the checkpoint), `uni_analysis.py` (activations are seen as
``(x - mean) / (std + 1e-5)``, both scalars), `uni_demo.py` (results/config.yaml).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import UnreadableError, read_yaml
from .overcomplete import convert_state
from .parts.checkpoint import Checkpoint, as_number, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts
from .parts.safe_pickle import fields_of

PATTERNS = ("*.yaml", "results/*.yaml", "checkpoints/*.yaml")
LEVELS_UP = 5
STD_EPS = 1e-5


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    content = checkpoint.content
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if isinstance(state, dict) and "dictionary._weights" in state:
        return "model_state_dict with dictionary._weights"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    source, model, said = _settings(checkpoint)
    if said.get("divide_norm"):
        raise ConfigError(
            "divide_norm", "SAELens cannot divide rows by their norm", given=True, allowed="false"
        )
    mean = scale = None
    if said.get("standardize", True):
        mean = facts.ask("mean", as_number(said.get("model_mean")), default=0.0)
        eps = facts.may("eps")
        scale = facts.ask("std", as_number(said.get("model_std")), default=1.0)
        scale += STD_EPS if eps is None else eps
    found = tensors_of(checkpoint.content["model_state_dict"])
    converted = convert_state(checkpoint, facts, found, "TopKSAE", said)
    converted.form = "one model of a Universal SAE, TopK"
    converted.mean, converted.scale = mean, scale
    if source:
        converted.metadata["universal_sae_model"] = model
        named = said.get("checkpoint_path")
        converted.notes.append(f"k, mean and std stand in {source.name}, for {named}")
    return converted


def _settings(checkpoint: Checkpoint) -> tuple[Path | None, str | None, dict[str, Any]]:
    """The yaml that names this file as a model's checkpoint_path, the model, and what it says.

    Files of several runs have one name: the yaml counts whose path ends like that of the file in most
    folders. None where several that say different things do.
    """
    folder = checkpoint.folder.resolve()
    path = folder / checkpoint.path.name
    best, found = 0, []
    for parent in [folder, *folder.parents][:LEVELS_UP]:
        for file in sorted(file for pattern in PATTERNS for file in parent.glob(pattern)):
            try:
                content = fields_of(read_yaml(file))
            except (OSError, UnreadableError):
                continue
            said = [fields_of(content.get(part)) for part in ("global", "sae_params")]
            for model, entry in fields_of(content.get("model_zoo")).items():
                entry = fields_of(entry)
                alike = _equal_ends(path, Path(str(entry.get("checkpoint_path"))))
                if alike > best:
                    best, found = alike, []
                if alike and alike == best:
                    found.append((file, str(model), {**said[0], **said[1], **entry}))
    facts = [(model, {**said, "checkpoint_path": None}) for _, model, said in found]
    if not found or any(other != facts[0] for other in facts):
        return None, None, {}
    return found[0]


def _equal_ends(path: Path, named: Path) -> int:
    """How many parts at their ends are equal: of RUN/MODEL/FILE those of FILE; 0 for the FILE of another RUN.

    A file that has been moved may lie in any folder but that of the same MODEL in another RUN.
    """
    pairs = zip(reversed(path.parts), reversed(named.parts), strict=False)
    alike = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(path.parts), len(named.parts))
    )
    return 0 if alike == 2 and len(named.parts) > 2 else alike


UNIVERSAL_SAE = make_loader(
    "universal_sae",
    recognises,
    convert,
    ("k", "std", "eps", "dictionary_normalization"),
    "a checkpoint of epoch and model_state_dict with dictionary._weights",
)

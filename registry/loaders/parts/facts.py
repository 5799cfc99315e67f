"""Facts about an SAE: those its file holds, those its user says, and which are still missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError
from ...files import parse_json, read_json


@dataclass(frozen=True)
class Fact:
    """Something a user may say. `parse` raises ValueError on what is not `allowed`."""

    parse: Callable[[Any], Any]
    allowed: str
    about: str


def shown(value: Any) -> str:
    """A short text of what a file holds, for messages. No container: its text can be endless."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge number"
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return str(value)[:80] if plain else f"a {type(value).__name__}"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def _whole(value: Any) -> int:
    number = int(value) if isinstance(value, str) else value
    if isinstance(number, bool) or number != int(number) or number < 1:
        raise ValueError
    return int(number)


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError
    return number


def _yes_or_no(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[_text(value).lower()]


def _one_of(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError
        return value

    return parse


def _vector(value: Any) -> Any:
    """A number, or a float64 tensor (d,) from a list, an array, JSON text or a file of one."""
    import numpy as np
    import torch

    from .checkpoint import as_tensor
    from .safe_pickle import load

    if isinstance(value, (str, Path)):
        text = str(value)
        if not Path(text).is_file():
            value = parse_json(text)
        elif text.endswith(".npy"):
            value = np.load(text, allow_pickle=False)
        elif text.endswith(".json"):
            value = read_json(text)
        else:
            value = load(text)
    if isinstance(value, list):
        value = torch.tensor(value, dtype=torch.float64)
    found = as_tensor(value)
    if found is None:
        raise ValueError
    found = found.to(torch.float64).squeeze()
    if found.ndim > 1 or not bool(torch.isfinite(found).all()):
        raise ValueError
    return float(found) if found.ndim == 0 else found


def _same(found: Any, given: Any) -> bool:
    import torch

    if isinstance(found, (bool, str)) or isinstance(given, (bool, str)):
        return found == given
    one, other = torch.as_tensor(found).double(), torch.as_tensor(given).double()
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6)


TOKENS = ("class", "patch", "register", "all", "mean_patch")
SAE_CLASSES = (
    *("TopKSAE", "BatchTopKSAE", "JumpSAE", "MpSAE", "RATopKSAE", "RAJumpSAE", "SAE"),
    *("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK"),
    *("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
)
ROW_NORMALIZATIONS = ("l2", "max_l2", "l1", "max_l1", "identity", "convex")

_VECTOR = "a number, a list of d_in numbers, or a .npy, .json or .pt file of them"
# What metadata say of the model beside its name, and no longer where another name is given.
OF_THE_MODEL = ("revision", "model_revision", "model_fingerprint", "model_from_pretrained_kwargs")
FACTS: dict[str, Fact] = {
    "model_name": Fact(_text, "a name that load_vision_model takes", "the model"),
    "hook_name": Fact(_text, "a hook point, e.g. blocks.9.hook_resid_post", "the hook point"),
    "tokens": Fact(_one_of(*TOKENS), ", ".join(TOKENS), "the tokens it was trained on"),
    "mean": Fact(_vector, _VECTOR, "what is subtracted from the activations before the SAE"),
    "scale": Fact(_positive, "a positive number", "what they are then divided by"),
    "std": Fact(_positive, "a positive number", "the standard deviation of the activations"),
    "eps": Fact(_number, "a number", "what is added to std; 1e-5 unless given"),
    "k": Fact(_whole, "a whole number from 1 to d_sae", "how many latents a row keeps"),
    "top_k": Fact(_whole, "a whole number", "of BatchTopK: latents a batch keeps in training"),
    "threshold": Fact(_number, "a number", "what a latent must reach"),
    "delta": Fact(_positive, "a positive number", "the longest row of Relax"),
    "sae_class": Fact(_one_of(*SAE_CLASSES), ", ".join(SAE_CLASSES), "its class over there"),
    "dictionary_normalization": Fact(
        _one_of(*ROW_NORMALIZATIONS), ", ".join(ROW_NORMALIZATIONS), "of the dictionary's rows"
    ),
    "subtract_b_dec": Fact(_yes_or_no, "true or false", "whether the encoder sees x - b_dec"),
    "activation": Fact(_text, "e.g. relu, topk, TopKReLU_64", "the activation function"),
    "normalize_activations": Fact(
        _one_of("none", "layer_norm", "constant_norm_rescale"),
        "none, layer_norm, constant_norm_rescale",
        "how each row of activations is normalised before the SAE",
    ),
    "normalize": Fact(_yes_or_no, "true or false", "whether each row is normalised"),
    "soft_cap": Fact(_number, "a number, 0 for none", "the soft cap of the latents"),
}
PLACE = ("model_name", "hook_name", "tokens")
"""Where it was trained. A user's word counts for more than the file's; latents do not need them."""
COMMON = (*PLACE, "mean", "scale")
ALIASES = {"model": "model_name", "hook": "hook_name", "class": "sae_class"}


def described(names: Iterable[str]) -> dict[str, str]:
    """`asks_for` of a loader: name -> what it is."""
    return {name: FACTS[name].about for name in (*COMMON, *names)}


class Facts:
    """What a user says about one file, compared with what the file holds.

    Args:
        where: the file, for messages.
        given: fact -> value, as Python values or as text of a command line.
        allowed: the facts that the loader asks for.
        known: fact -> value, as a table of published files has them.

    Raises:
        ConfigError: a fact that the loader does not ask for, or a value that cannot be.
    """

    def __init__(
        self,
        where: str,
        given: Mapping[str, Any],
        allowed: Iterable[str],
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self.where = where
        self.allowed = tuple(allowed)
        self.known = {name: self._parse(name, value) for name, value in (known or {}).items()}
        self.given: dict[str, Any] = {}
        for name, value in given.items():
            if value is not None:
                name = ALIASES.get(name, name)
                self.given[name] = self._parse(name, value)
        self._unused = set(self.given)
        self._missing: dict[str, str] = {}

    def _parse(self, name: str, value: Any) -> Any:
        if name not in self.allowed:
            raise ConfigError(
                name, f"{self.where} has no use for it", allowed=", ".join(self.allowed)
            )
        try:
            return FACTS[name].parse(value)
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError):
            raise ConfigError(
                name, "it cannot be that", given=shown(value), allowed=FACTS[name].allowed
            ) from None

    def _held(self, name: str, value: Any) -> Any:
        """What a file says of a fact, as that fact is."""
        if value is None or (isinstance(value, str) and name in PLACE and not value.strip()):
            return None
        # any class can stand in a file: which of them SAELens can say is the loader's to judge
        parse = _text if name == "sae_class" else FACTS[name].parse
        try:
            return parse(value)
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError):
            raise CheckpointError(
                f"{self.where}: {name}",
                "the file holds what it cannot be",
                given=shown(value),
                allowed=FACTS[name].allowed,
            ) from None

    def may(self, name: str, found: Any = None) -> Any:
        """What the file holds (`found`), else what is known of it or the user says, else None.

        Raises:
            ConfigError: two of them are there and differ; of the model, the hook point and the
                tokens the user's counts.
        """
        self._unused.discard(name)
        given, found = self.given.get(name), self._held(name, found)
        if (known := self.known.get(name)) is not None:
            if found is not None and not _same(found, known):
                raise ConfigError(
                    name,
                    f"{self.where} and the table of releases differ",
                    given=str(found)[:80],
                    allowed=f"{str(known)[:80]}; read the file by its path to trust the file",
                )
            found = known
        if given is None or name in PLACE:
            return found if given is None else given
        if found is not None and not _same(found, given):
            raise ConfigError(
                name, f"not what {self.where} holds", given=given, allowed=str(found)[:80]
            )
        return given

    def ask(self, name: str, found: Any = None, *, default: Any = None, why: str = "") -> Any:
        """As `may`; where it is nowhere, it is missing, and `default` goes on until `settle`."""
        value = self.may(name, found)
        if value is None:
            self._missing[name] = why
            return default
        return value

    def settle(self, unused: bool = False) -> None:
        """Raise ConfigError with one list of everything that is missing.

        With `unused`, also where something was given that this file has no use for.
        """
        if self._missing:
            lines = [
                f"--{name} ({FACTS[name].about}{', ' + why if why else ''}: {FACTS[name].allowed})"
                for name, why in self._missing.items()
            ]
            raise ConfigError(
                ", ".join(self._missing),
                f"not in {self.where}, and not given",
                allowed=f"{'; '.join(lines)}: flags of `taxolens convert`, or arguments of read_sae",
            )
        if unused and self._unused:
            names = ", ".join(sorted(self._unused))
            raise ConfigError(names, f"{self.where} has no use for it", allowed="leave it out")

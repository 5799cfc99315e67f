"""From the tensors of another library to a config and a state dict of SAELens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, TaxolensError
from ...table import Loader
from .checkpoint import Checkpoint
from .facts import PLACE, Facts, described
from .hub import download
from .releases import Lookups, PublishedSAE, find_published

PER_LATENT = ("b_enc", "threshold", "b_gate", "b_mag", "r_mag")
DTYPES = ("float32", "float64", "float16", "bfloat16")
AS_IT_IS = {"rescale_acts_by_decoder_norm": False}  # which SAELens's TopKTrainingSAE else has on
ENCODER_BIASES = {"b_enc": None, "b_gate": None, "b_mag": "r_mag"}


@dataclass
class Converted:
    """One SAE in SAELens's terms, before its inputs' normalisation is folded in.

    Args:
        architecture: a name of SAELens.
        form: what the file is, for people: ``"schema 4, TopK"``.
        tensors: by SAELens's names: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_dec (d_out),
            per latent (d_sae). A `b_enc` or `b_dec` that is left out is zero.
        settings: further fields of SAELens's config.
        metadata: further facts for the config's metadata.
        notes: what a user should know about the conversion.
        mean, scale: the SAE sees ``(x - mean) / scale``; None takes what the user says.
    """

    architecture: str
    form: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mean: Any = None
    scale: Any = None


def make_loader(
    name: str,
    recognises: Callable[[Checkpoint], str | None],
    convert: Callable[[Checkpoint, Facts], Converted],
    asks_for: Sequence[str],
    description: str,
) -> Loader:
    """A `Loader` whose disk reader runs `convert` and finishes what it returns."""

    def read(
        checkpoint: Checkpoint, facts: Facts, device: str, overrides: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            converted = convert(checkpoint, facts)
        except TaxolensError:
            raise
        except Exception as error:  # a file like no file of that library
            raise CheckpointError(
                str(checkpoint), f"not as {name} writes it ({type(error).__name__}: {error!s:.200})"
            ) from error
        return finish(name, checkpoint, facts, converted, device, overrides or {})

    def disk(
        path: str | Path,
        device: str = "cpu",
        cfg_overrides: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        checkpoint = Checkpoint.of(path)
        facts = Facts(f"{name} checkpoint {checkpoint}", given, described(asks_for))
        return read(checkpoint, facts, device, cfg_overrides)

    def huggingface(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> tuple[dict[str, Any], dict[str, Tensor], None]:
        published = find_published(folder_name)
        facts = Facts(str(published), given, described(asks_for), published.known)
        for fact, where in published.asks_for.items():
            facts.ask(fact, why=where)
        facts.settle()
        path, commit = download(published, force=force_download)
        dtype = {"dtype": (cfg_overrides or {}).get("dtype")}
        cfg, state = read(Checkpoint(path), facts, device, dtype)
        check_published(published, cfg)
        place = {"release": str(published), "repository": published.repository, "commit": commit}
        licence = {"licence": published.licence} if published.licence else {}
        return {**cfg, "metadata": {**cfg["metadata"], **place, **licence}}, state, None

    return Loader(
        name,
        disk=disk,
        huggingface=huggingface,
        releases=Lookups(name),
        description=description,
        recognises=recognises,
        asks_for=described(asks_for),
    )


def check_published(published: PublishedSAE, cfg: Mapping[str, Any]) -> None:
    """Check that the SAE has the sizes of the table.

    Raises:
        ConfigError: it has not.
    """
    for size in ("d_in", "d_sae"):
        known = published.shown.get(size, cfg[size])
        if cfg[size] != known:
            raise ConfigError(
                f"{published}: {size}",
                "not that of the table of releases",
                given=cfg[size],
                allowed=known,
            )


def finish(
    loader: str,
    checkpoint: Checkpoint,
    facts: Facts,
    converted: Converted,
    device: str,
    overrides: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Check shapes and numbers, fold the normalisation in, write the config.

    Returns:
        SAELens's config, and the tensors W_enc (d, m), W_dec (m, d), b_enc (m,), b_dec (d,) and others.

    Raises:
        ConfigError: missing facts, a wrong k, a normalisation that cannot be folded.
        CheckpointError: tensors that do not fit each other, or hold NaN or infinity.
    """
    mean = converted.mean if converted.mean is not None else facts.may("mean")
    scale = converted.scale if converted.scale is not None else facts.may("scale")
    place = {name: facts.may(name, converted.metadata.pop(name, None)) for name in PLACE}
    facts.settle(unused=True)
    settings = {
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        **converted.settings,
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in converted.tensors.items()}
    d_in, d_sae, d_out = _check(str(checkpoint), converted.architecture, tensors)
    if mean is not None or scale is not None:
        _fold(converted.architecture, tensors, settings, mean, 1.0 if scale is None else scale)
    k = settings.get("k", settings.get("max_iterations"))
    if k is not None and not 1 <= k <= d_sae:
        raise ConfigError("k", "more than there are latents", given=k, allowed=f"1 to {d_sae}")
    dtype = str(overrides.get("dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError("dtype", "unknown", given=dtype, allowed=", ".join(DTYPES))
    state = {
        name: tensor.to(getattr(torch, dtype)).contiguous().clone().to(device)
        for name, tensor in tensors.items()
    }
    if "transcoder" in converted.architecture:
        settings["d_out"] = d_out
    if converted.architecture == "topk":
        settings.update(AS_IT_IS)
    unknown = [name for name, value in place.items() if value is None]
    notes = list(converted.notes)
    if unknown:
        notes.append(f"not in the file, and not given: {', '.join(unknown)}")
    held = {**place, **{name: _plain(value) for name, value in converted.metadata.items()}}
    metadata = {
        "sae_lens_version": version("sae-lens"),
        "sae_lens_training_version": None,
        "converted_by": f"taxolens {version('taxolens')}",
        **{name: value for name, value in held.items() if value is not None},
        "source": loader,
        "source_format": f"{loader}: {converted.form}",
        "source_file": checkpoint.path.name,
        "given": {name: _plain(value) for name, value in facts.given.items()},
        "notes": notes,
    }
    cfg = {
        "architecture": converted.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        **settings,
        "dtype": dtype,
        "device": device,
        "metadata": metadata,
    }
    return {**cfg, **{k: v for k, v in overrides.items() if k != "dtype"}}, state


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: what a file says can be anything."""
    if isinstance(value, Tensor):
        return f"{value.numel()} numbers"
    if isinstance(value, list):
        return [item for item in value[:1000] if isinstance(item, (int, float))]
    return value if isinstance(value, (str, int, float, bool)) else None


def _check(where: str, architecture: str, tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    """(d_in, d_sae, d_out). Adds biases that are left out, as zeros."""
    decoder = tensors["W_dec"]
    per_latent = [tensors[name] for name in PER_LATENT if name in tensors]
    if decoder.ndim != 2 or any(tensor.ndim != 1 for tensor in per_latent):
        raise CheckpointError(
            where,
            "W_dec is no matrix, or a bias no vector",
            given={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        )
    # A matrix may be transposed, so that sizes come from the vectors where there are some.
    widths = [*decoder.shape, *(tensors["W_enc"].shape if "W_enc" in tensors else ())]
    d_sae = per_latent[0].numel() if per_latent else None
    d_out = tensors["b_dec"].numel() if "b_dec" in tensors else None
    if d_sae is None:
        d_sae = next((width for width in widths if width != d_out and d_out), decoder.shape[0])
    if d_out is None:
        d_out = next((width for width in widths if width != d_sae), d_sae)
    d_in = tensors["W_skip"].shape[-1] if "W_skip" in tensors else d_out
    if "transcoder" in architecture and "W_skip" not in tensors:
        d_in = tensors["W_enc"].shape[0]
    shapes = {
        "W_dec": (d_sae, d_out),
        "W_enc": (d_in, d_sae),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
        **dict.fromkeys(PER_LATENT, (d_sae,)),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            turned = (
                "transposed" if tuple(tensor.shape) == shapes[name][::-1] else "of another size"
            )
            raise CheckpointError(
                f"{where}: {name}",
                f"{turned}, beside the other tensors",
                given=tuple(tensor.shape),
                allowed=str(shapes[name]),
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}: {name}", "it holds NaN or infinity")
    tensors.setdefault("b_dec", torch.zeros(d_out, dtype=torch.float64))
    if architecture not in ("gated", "matching_pursuit"):
        tensors.setdefault("b_enc", torch.zeros(d_sae, dtype=torch.float64))
    return d_in, d_sae, d_out


def _fold(
    architecture: str, tensors: dict[str, Tensor], settings: dict[str, Any], mean: Any, scale: float
) -> None:
    """Make the SAE of ``(x - mean) / scale`` one of x, its reconstruction included.

    Encoder: ``W/s``, and without b_dec on the input ``b - mean W/s``; decoder: ``s W``,
    ``s b_dec + mean``.
    """
    tensors.update({name: tensor.to(torch.float64) for name, tensor in tensors.items()})
    mean = torch.as_tensor(0.0 if mean is None else mean, dtype=torch.float64)
    d_in = tensors["b_dec"].numel()
    if mean.ndim and mean.numel() != d_in:
        raise ConfigError("mean", "of another width", given=mean.numel(), allowed=f"{d_in} numbers")
    if settings["normalize_activations"] != "none" or "transcoder" in architecture:
        raise ConfigError(
            "mean, scale",
            f"they cannot be folded into an SAE that is a {architecture} with "
            f"normalize_activations {settings['normalize_activations']}",
            allowed="leave them out",
        )
    if architecture == "matching_pursuit":
        if scale != 1:
            raise ConfigError(
                "scale",
                "no scale can be folded into a matching pursuit, which has one matrix for both ways",
                given=scale,
                allowed="1",
            )
        settings["apply_b_dec_to_input"] = True
    else:
        tensors["W_enc"] = tensors["W_enc"] / scale
        if not settings["apply_b_dec_to_input"]:
            shift = mean.expand(d_in) @ tensors["W_enc"]
            for bias, gain in ENCODER_BIASES.items():
                if bias in tensors:
                    factor = tensors[gain].exp() if gain else 1.0
                    tensors[bias] = tensors[bias] - shift * factor
    tensors["W_dec"] = tensors["W_dec"] * scale
    tensors["b_dec"] = tensors["b_dec"] * scale + mean

"""An atlas: every published SAE of one model, evaluated in one pass over the images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...hooks.models.load import load_vision_model
from ...registry.errors import ConfigError, TaxolensError
from ...registry.loaders.parts.hub import model_of, published_in
from ...registry.loaders.parts.releases import releases
from ...registry.names import unknown_name_message
from ...registry.packaged import packaged
from ...registry.ranks import Ranks
from ..reporting.atlas_table import write_atlas
from ..reporting.results import Results
from .evaluate import check_saes, device_of, evaluate_run
from .forward import warn_of_other_weights
from .sae_folders import SAEFolder
from .sae_sources import check_complete, find_sources, override, unknown_of
from .settings import EvaluationSettings

logger = logging.getLogger(__name__)

OPEN_CLIP = "open-clip:"  # ViT-Prisma's mark of the models that it loads by open_clip


def published_saes(
    model_name: str, names: Sequence[str] | None = None, *, left_out: dict[str, str] | None = None
) -> list[str]:
    """The names, ``release:id``, of all published SAEs of a model, without their weights.

    Args:
        model_name: as `load_vision_model` takes it.
        names: releases to search; None searches all.
        left_out: gets what could not be searched, and SAEs whose model stands in no file that can be
            read without the weights, with the reason.

    Raises:
        ConfigError: no such release.
    """
    left_out = {} if left_out is None else left_out
    for name in names or ():
        if name not in releases():
            raise ConfigError(unknown_name_message("releases", name, list(releases())))
    saes, found = [], []
    for release in (releases()[name] for name in names or releases()):
        try:
            saes += published_in(release)
        except TaxolensError as error:
            left_out[f"{release.name}:*"] = str(error)
    for sae in saes:
        try:
            model = model_of(sae)
        except TaxolensError as error:
            left_out[str(sae)] = str(error)
            continue
        if model is None:
            left_out[str(sae)] = "its model is not known without its weights"
        elif model.removeprefix(OPEN_CLIP) == model_name.removeprefix(OPEN_CLIP):
            found.append(str(sae))
    return found


def atlas(
    model_name: str,
    settings: EvaluationSettings | None = None,
    *,
    releases: Sequence[str] | None = None,
    also: Sequence[str | Path] = (),
    override_model: Any = None,
    **options: Any,
) -> Results:
    """Evaluate every published SAE of a model, and write ``atlas.csv`` beside the results.

    An SAE that cannot be read, does not say where it was trained, or does not fit its hook point is left
    out with the reason. A second call with the same settings goes on where the first stopped.

    Args:
        model_name: as `load_vision_model` takes it; it counts for more than the name in the files.
        settings: see `evaluate_run`; output_path is needed.
        releases: to search; None searches all.
        also: further sources of SAEs of this model, such as runs.
        override_model: the loaded model.
        **options: fields of `EvaluationSettings`, in place of those of `settings`.

    Raises:
        ConfigError: no SAE is left, a setting is wrong, or output_path is not given.
    """
    model_name = packaged(model_name)
    settings = (settings or EvaluationSettings()).override(**options)
    if settings.output_path is None:
        raise ConfigError("output_path", "not given", allowed="a folder")
    if not also:  # before anything is downloaded
        check_complete([], dataset_path=settings.dataset_path, taxonomy=settings.taxonomy)
    left_out: dict[str, str] = {}
    sources = [*published_saes(model_name, releases, left_out=left_out), *also]
    for source in map(str, also):
        left_out.pop(source, None)
    saes = find_sources(sources, left_out=left_out) if sources else []
    saes = override(
        saes, model_name=model_name, tokens=settings.tokens, image_size=settings.image_size
    )
    model = override_model
    if saes and model is None:
        device = device_of(settings, Ranks.here())
        model = load_vision_model(
            model_name, device=device, trust_remote_code=settings.trust_remote_code
        )
        warn_of_other_weights(model, saes)
    fitting = [sae for sae in saes if _fits(sae, model, left_out)]
    for name, why in left_out.items():
        logger.warning("left out: %s: %s", name, why)
    if not fitting:
        raise ConfigError(
            "model_name",
            f"no SAE of it can be evaluated; {len(left_out)} are left out",
            given=model_name,
            allowed="a model of docs/releases.md, or SAEs given by `also`",
        )
    results = evaluate_run(
        fitting,
        replace(settings, model_name=None, hook_name=None, hook_head_index=None),
        override_model=model,
    )
    if Ranks.here().is_first:
        write_atlas(results, left_out)
    return results


def _fits(sae: SAEFolder, model: Any, left_out: dict[str, str]) -> bool:
    try:
        if unknown := unknown_of(sae):
            raise ConfigError(
                ", ".join(unknown),
                "not in the metadata",
                allowed="`taxolens convert`, which takes them",
            )
        check_saes([sae], model)
    except TaxolensError as error:
        left_out[str(sae.path)] = str(error)
        return False
    return True

"""sae-for-vlm (ExplainableML): dictionary_learning's files, the model and layer in a folder's name.

Sources: `sae_train.py` and `save_activations.py` (the folder's name), `models/clip.py` (what is
tapped: the output of `visual_projection`, or of block `layer` of the vision encoder). Latents are
those of dictionary_learning; the class is spelt MatroyshkaBatchTopKSAE.
"""

from __future__ import annotations

import re

from . import dictionary_learning
from .parts.checkpoint import Checkpoint
from .parts.convert import Converted, make_loader
from .parts.facts import Facts

RUN_FOLDER = re.compile(
    r"(?P<dataset>.+)_activations_(?P<model>[^_]+)_(?P<layer>-?\d+)_"
    r"(?P<point>post_projection|post_mlp_residual|post_mlp|in_mlp)_"
    r"(?P<kind>jumprelu|standard|batch_top_k|top_k|matroyshka_batch_top_k)_\d+_x\d+"
)
CLIP_PREFIX = {"clip": "openai/"}


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    if dictionary_learning.is_of_sae_for_vlm(checkpoint):
        return "a trainer's config with empty layer and lm_name"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    converted = dictionary_learning.convert(checkpoint, facts)
    run = next(
        (match for name in checkpoint.folders if (match := RUN_FOLDER.fullmatch(name))), None
    )
    if run is None:
        converted.notes.append("its folder has no name of sae-for-vlm, where the model stands")
        return converted
    model, layer, point = run["model"], int(run["layer"]), run["point"]
    converted.metadata.update(
        {
            "model_name": CLIP_PREFIX.get(model.partition("-")[0], "") + model,
            "attachment_point": point,
            "layer": layer,
            "source_dataset": run["dataset"],
        }
    )
    if point == "post_mlp_residual" and layer >= 0:
        converted.metadata["hook_name"] = f"blocks.{layer}.hook_resid_post"
    elif point == "post_projection":
        converted.notes.append("activations are image embeddings: the output of visual_projection")
    return converted


SAE_FOR_VLM = make_loader(
    "sae_for_vlm",
    recognises,
    convert,
    ("sae_class", "k", "threshold"),
    "dictionary_learning's files with empty layer and lm_name in config.json",
)

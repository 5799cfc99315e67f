"""taxolens: vision models in SAELens and TransformerLens, and their SAEs measured on a class tree.

Once taxolens and SAELens (or TransformerLens) are both imported, in either order, our SAE
architectures and vision models, and those of every installed plugin, are selectable by name there.
Importing taxolens alone imports neither of them: its names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from taxolens.plugin import moved, registration
from taxolens.registry.lazy import lazy_names

if TYPE_CHECKING:
    from taxolens.hooks.models.families import VisionFamily
    from taxolens.hooks.models.load import load_vision_model
    from taxolens.plugin.evaluation.evaluate import evaluate_run
    from taxolens.plugin.evaluation.settings import EvaluationSettings
    from taxolens.plugin.hookspecs import hookimpl
    from taxolens.plugin.manager import load_plugins
    from taxolens.plugin.reporting.report import write_report
    from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
    from taxolens.plugin.training.runner import (
        VisionMultiSAETrainingRunner,
        VisionSAETrainingRunner,
    )
    from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, Evaluator
    from taxolens.registry.loaders.parts.read import read_sae
    from taxolens.registry.presentation import Headline, NodeTable, Support
    from taxolens.registry.table import (
        ARCHITECTURES,
        EVALUATORS,
        LOADERS,
        TAXONOMIES,
        VISION_MODELS,
        Architecture,
        Loader,
        TaxonomySource,
    )
    from taxolens.registry.taxonomies import Taxonomy, load_taxonomy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "hooks.models.families": ["VisionFamily"],
        "hooks.models.load": ["load_vision_model"],
        "plugin.evaluation.evaluate": ["evaluate_run"],
        "plugin.evaluation.settings": ["EvaluationSettings"],
        "plugin.hookspecs": ["hookimpl"],
        "plugin.manager": ["load_plugins"],
        "plugin.reporting.report": ["write_report"],
        "plugin.training.config": ["VisionMultiSAERunnerConfig", "VisionSAERunnerConfig"],
        "plugin.training.runner": ["VisionMultiSAETrainingRunner", "VisionSAETrainingRunner"],
        "registry.evaluators.base": ["EvaluationBatch", "EvaluationContext", "Evaluator"],
        "registry.loaders.parts.read": ["read_sae"],
        "registry.presentation": ["Headline", "NodeTable", "Support"],
        "registry.table": [
            *("ARCHITECTURES", "EVALUATORS", "LOADERS", "TAXONOMIES", "VISION_MODELS"),
            *("Architecture", "Loader", "TaxonomySource"),
        ],
        "registry.taxonomies": ["Taxonomy", "load_taxonomy"],
    },
)

registration.start(manager="taxolens.plugin.manager")
moved.start()

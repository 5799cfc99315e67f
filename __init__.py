"""taxolens: what does a vision model know about the tree of things?

Importing it makes our SAE architectures, vision models, evaluators and taxonomies, and those of
every installed plugin, selectable by name in SAELens and TransformerLens.
"""

from taxolens.hooks.models.families import VisionFamily
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation.evaluate import EvaluationSettings, evaluate_run
from taxolens.plugin.hookspecs import hookimpl
from taxolens.plugin.manager import load_plugins
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.training.config import VisionMultiSAERunnerConfig, VisionSAERunnerConfig
from taxolens.plugin.training.runner import VisionMultiSAETrainingRunner, VisionSAETrainingRunner
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, Evaluator
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

load_plugins()

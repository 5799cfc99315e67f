"""A plugin as a third party would write it."""

from dataclasses import dataclass

import taxolens
from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.hooks.models.families.dinov2 import Dinov2Adapter
from taxolens.registry.evaluators.parts.accumulators import FiringRate


@dataclass
class ExampleTopKConfig(TopKTrainingSAEConfig):
    """TopK under another name; what it saves is SAELens's own `topk`."""

    @classmethod
    def architecture(cls) -> str:
        return "example_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class ExampleTopK(TopKTrainingSAE):
    pass


class ExampleFiringRate(taxolens.Evaluator):
    """The share of images on which a latent fires, on average."""

    name = "example_firing_rate"
    description = "mean share of images on which a latent fires"
    higher_is_better = {"mean": None}
    nulls = {
        "permuted_classes": "no class enters",
        "shuffled": "no label enters",
        "random": None,
        "neurons": None,
    }

    def __init__(self, context, options=None):
        super().__init__(context, options)
        self.rate = context.share(FiringRate)

    def compute(self, *, permutation=None, shuffled=False):
        return {"mean": float(self.rate.rate.mean())}


@taxolens.hookimpl
def register_architectures(register):
    register(taxolens.Architecture("example_topk", ExampleTopK, ExampleTopKConfig))


@taxolens.hookimpl
def register_vision_models(register):
    register(
        taxolens.VisionFamily(
            name="example_family",
            architectures=("ExampleModel",),
            adapter=Dinov2Adapter,
            description="a model built like DINOv2",
        )
    )


@taxolens.hookimpl
def register_evaluators(register):
    register(ExampleFiringRate)

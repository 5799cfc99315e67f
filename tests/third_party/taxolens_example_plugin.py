"""A plugin as a third party would write it."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import taxolens
from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.hooks.models.families.dinov2 import Dinov2Adapter
from taxolens.registry.evaluators.base import remembered
from taxolens.registry.evaluators.parts.accumulators import (
    ClassCounts,
    FiringHistogram,
    FiringRate,
)


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
    """The share of images on which a latent fires, on average over latents. It declares nothing
    of how it is shown: summaries show its first metric."""

    name = "example_firing_rate"
    description = "mean share of images on which a latent fires"
    higher_is_better = {"mean": None}
    nulls = {
        "permuted_classes": "no class enters",
        "shuffled": "no label enters",
        "random": None,
        "neurons": None,
    }
    invariant = label_free = frozenset({"mean"})

    def prepare(self):
        self.rate = self.context.share(FiringRate)

    def compute(self, *, permutation=None, shuffled=False):
        self._check_shuffled(shuffled)
        rate = self.rate.rate
        return {"mean": float(rate.mean()) if len(rate) else math.nan}

    def tables(self):
        latents = np.arange(len(self.rate.rate))
        return {"latents": pd.DataFrame({"latent": latents, "rate": self.rate.rate})}


class ExampleSiblings(taxolens.Evaluator):
    """Of two images of different classes on which a latent fires, how often their classes are siblings.

    Siblings have the same parent. The share is over all pairs of images, averaged over the latents
    that fire on two classes or more.
    """

    name = "example_siblings"
    description = "how often two classes of one latent are siblings in the tree"
    higher_is_better = {"latents": None, "sibling_share": True}
    invariant = frozenset({"latents"})

    headlines = (
        taxolens.Headline("sibling_share", "siblings", "pairs of classes with one parent", 50),
    )
    labels = {"sibling_share": "share of siblings among pairs of classes"}
    support = {"sibling_share": taxolens.Support("latents", "latents of two classes", least=5)}
    node_table = taxolens.NodeTable("classes", meaning="the F1 of the best latent for the class")

    def prepare(self):
        self.classes = self.context.share(ClassCounts)
        self.firings = self.context.share(FiringHistogram, survival=(1.0,))

    @remembered
    def shares(self, permutation=None, shuffled=False):
        """(m,) the share of each latent, NaN where it fires on fewer than two classes."""
        fired = self.firings.fired(shuffled).astype(float)  # (m, C)
        parent = self.taxonomy.primary_parent[self.taxonomy.class_nodes]
        if permutation is not None:
            parent = parent[permutation]  # class c takes the place of class permutation[c]
        families = fired @ (parent[:, None] == np.unique(parent))  # (m, families)
        same_class = (fired**2).sum(1)
        pairs = fired.sum(1) ** 2 - same_class
        siblings = (families**2).sum(1) - same_class
        return np.divide(siblings, pairs, out=np.full(len(fired), np.nan), where=pairs > 0)

    def compute(self, *, permutation=None, shuffled=False):
        share = self.shares(permutation, shuffled)
        share = share[np.isfinite(share)]
        mean = float(share.mean()) if len(share) else math.nan
        return {"latents": float(len(share)), "sibling_share": mean}

    def tables(self):
        """`classes`: of every latent that fires, the class it detects best on the fit half, and its
        F1 for it on the other."""
        fit, score = self.firings.fit().toarray(), self.firings.score()[:, 0].numpy()
        latent = np.flatnonzero(fit.any(1))
        own = f1(fit[latent], self.classes.fit()).argmax(1)
        scores = f1(score[latent], self.classes.score())[np.arange(len(own)), own]
        node = [self.taxonomy.nodes[v] for v in self.taxonomy.class_nodes[own]]
        table = {"latent": latent, "node": node, "f1": scores, "share": self.shares()[latent]}
        return {"classes": pd.DataFrame(table)}

    def figures(self):
        """`shares`: how the latents differ."""
        figure = go.Figure(go.Histogram(x=self.shares(), xbins={"start": 0, "size": 0.1}))
        figure.update_layout(xaxis_title="share of siblings", yaxis_title="latents")
        return {"shares": figure}

    def notes(self):
        silent = int((self.firings.fired().sum(1) == 0).sum())
        return [f"{silent} latents fire on no image."] if silent else []


def f1(fired, images):
    """(m, C) F1 of each latent as detector of each class, from how often it fires on each."""
    return 2 * fired / np.maximum(fired.sum(1, keepdims=True) + images, 1)


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
    register(ExampleSiblings)

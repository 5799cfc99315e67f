"""The built-in plugin: what taxolens itself registers, through the hooks of any other plugin.

Each name has the place of its entry, `module:attribute` in its folder, so that the names are listed
and one kind of entry is imported without the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import hookspecs
from .hookspecs import hookimpl

ARCHITECTURES = {
    "mp": "mp:MP",
    "omp": "omp:OMP",
    "top_afa": "top_afa:TOP_AFA",
    "archetypal_topk": "archetypal:ARCHETYPAL_TOPK",
    "archetypal_jumprelu": "archetypal:ARCHETYPAL_JUMPRELU",
    "nested_topk": "nested_topk:NESTED_TOPK",
    "random_matryoshka": "random_matryoshka:RANDOM_MATRYOSHKA",
    "tree": "tree:TREE",
    "hsae": "hsae:HSAE",
    "codebook": "codebook:CODEBOOK",
    "qlae": "qlae:QLAE",
    "simplicial": "simplicial:SIMPLICIAL",
}
EVALUATORS = {
    "lch_height": "lch_height:LCHHeight",
    "ontological_coverage": "ontological_coverage:OntologicalCoverage",
    "pair_depth": "pair_depth:PairDepth",
    "level_information": "level_information:LevelInformation",
    "parent_child": "parent_child:ParentChild",
    "matryoshka_depth": "matryoshka_depth:MatryoshkaDepth",
    "monosemanticity": "monosemanticity:Monosemanticity",
    "quasi_orthogonality": "quasi_orthogonality:QuasiOrthogonality",
    "taxonomic_autocorrelation": "taxonomic_autocorrelation:TaxonomicAutocorrelation",
    "hyperbolicity": "hyperbolicity:Hyperbolicity",
    "absorption": "absorption:Absorption",
    "feature_geometry": "feature_geometry:FeatureGeometry",
    "infomec": "infomec:InfoMEC",
    "tree_probe": "tree_probe:TreeProbe",
    "stability": "stability:Stability",
    "supervised_dictionary": "supervised_dictionary:SupervisedDictionary",
    "reconstruction": "reconstruction:Reconstruction",
    "detection": "detection:Detection",
    "latent_graph": "latent_graph:LatentGraph",
    "mistake_severity": "mistake_severity:MistakeSeverity",
    "cpcc": "cpcc:CPCC",
    "latent_dendrogram": "latent_dendrogram:LatentDendrogram",
    "meta_sae": "meta_sae:MetaSAE",
}
LOADERS = {
    "sae_lens": "sae_lens:SAE_LENS",
    "prisma": "prisma:PRISMA",
    "saev": "saev:SAEV",
    "overcomplete": "overcomplete:OVERCOMPLETE",
    "universal_sae": "universal_sae:UNIVERSAL_SAE",
    "dictionary_learning": "dictionary_learning:DICTIONARY_LEARNING",
    "sae_for_vlm": "sae_for_vlm:SAE_FOR_VLM",
    "msae": "msae:MSAE",
    "patchsae": "patchsae:PATCHSAE",
    "clip_scope": "clip_scope:CLIP_SCOPE",
}
TAXONOMIES = {
    "imagenet": "imagenet:IMAGENET",
    "cifar100": "cifar100:CIFAR100",
}


@hookimpl
def register_architectures(register: hookspecs.RegisterArchitecture) -> None:
    """Register the SAE architectures of ARCHITECTURES."""
    for entry in _entries("architectures", ARCHITECTURES):
        register(entry)


@hookimpl
def register_vision_models(register: hookspecs.RegisterVisionModel) -> None:
    """Register the model families of hooks/models/families."""
    from ..hooks.models.families import FAMILIES

    for family in FAMILIES:
        register(family)


@hookimpl
def register_evaluators(register: hookspecs.RegisterEvaluator) -> None:
    """Register the evaluators of EVALUATORS."""
    for entry in _entries("evaluators", EVALUATORS):
        register(entry)


@hookimpl
def register_taxonomies(register: hookspecs.RegisterTaxonomy) -> None:
    """Register the class trees of TAXONOMIES."""
    for entry in _entries("taxonomies", TAXONOMIES):
        register(entry)


@hookimpl
def register_loaders(register: hookspecs.RegisterLoader) -> None:
    """Register the loaders of LOADERS."""
    for entry in _entries("loaders", LOADERS):
        register(entry)


def _entries(folder: str, places: dict[str, str]) -> list[Any]:
    """The entries at `places`, all imported before the first is registered."""
    parts = [place.split(":") for place in places.values()]
    room = f"{__name__.partition('.')[0]}.registry.{folder}"
    return [getattr(import_module(f"{room}.{module}"), attribute) for module, attribute in parts]

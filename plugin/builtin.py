"""Everything that taxolens itself registers, through the same hooks as any other plugin."""

from __future__ import annotations

from ..hooks.models.families import FAMILIES
from ..registry.architectures.archetypal import ARCHETYPAL_JUMPRELU, ARCHETYPAL_TOPK
from ..registry.architectures.codebook import CODEBOOK
from ..registry.architectures.hsae import HSAE
from ..registry.architectures.mp import MP
from ..registry.architectures.nested_topk import NESTED_TOPK
from ..registry.architectures.omp import OMP
from ..registry.architectures.qlae import QLAE
from ..registry.architectures.random_matryoshka import RANDOM_MATRYOSHKA
from ..registry.architectures.simplicial import SIMPLICIAL
from ..registry.architectures.top_afa import TOP_AFA
from ..registry.architectures.tree import TREE
from ..registry.evaluators.absorption import Absorption
from ..registry.evaluators.detection import Detection
from ..registry.evaluators.feature_geometry import FeatureGeometry
from ..registry.evaluators.hyperbolicity import Hyperbolicity
from ..registry.evaluators.infomec import InfoMEC
from ..registry.evaluators.lch_height import LCHHeight
from ..registry.evaluators.level_information import LevelInformation
from ..registry.evaluators.matryoshka_depth import MatryoshkaDepth
from ..registry.evaluators.monosemanticity import Monosemanticity
from ..registry.evaluators.ontological_coverage import OntologicalCoverage
from ..registry.evaluators.pair_depth import PairDepth
from ..registry.evaluators.parent_child import ParentChild
from ..registry.evaluators.quasi_orthogonality import QuasiOrthogonality
from ..registry.evaluators.reconstruction import Reconstruction
from ..registry.evaluators.stability import Stability
from ..registry.evaluators.supervised_dictionary import SupervisedDictionary
from ..registry.evaluators.taxonomic_autocorrelation import TaxonomicAutocorrelation
from ..registry.evaluators.tree_probe import TreeProbe
from ..registry.taxonomies.cifar100 import CIFAR100
from ..registry.taxonomies.imagenet import IMAGENET
from . import hookspecs
from .hookspecs import hookimpl


@hookimpl
def register_vision_models(register: hookspecs.RegisterVisionModel) -> None:
    for family in FAMILIES:
        register(family)


@hookimpl
def register_architectures(register: hookspecs.RegisterArchitecture) -> None:
    register(MP)
    register(OMP)
    register(TOP_AFA)
    register(ARCHETYPAL_TOPK)
    register(ARCHETYPAL_JUMPRELU)
    register(NESTED_TOPK)
    register(RANDOM_MATRYOSHKA)
    register(TREE)
    register(HSAE)
    register(CODEBOOK)
    register(QLAE)
    register(SIMPLICIAL)


@hookimpl
def register_evaluators(register: hookspecs.RegisterEvaluator) -> None:
    register(LCHHeight)
    register(OntologicalCoverage)
    register(PairDepth)
    register(LevelInformation)
    register(ParentChild)
    register(MatryoshkaDepth)
    register(Monosemanticity)
    register(QuasiOrthogonality)
    register(TaxonomicAutocorrelation)
    register(Hyperbolicity)
    register(Absorption)
    register(FeatureGeometry)
    register(InfoMEC)
    register(TreeProbe)
    register(Stability)
    register(SupervisedDictionary)
    register(Reconstruction)
    register(Detection)


@hookimpl
def register_taxonomies(register: hookspecs.RegisterTaxonomy) -> None:
    register(IMAGENET)
    register(CIFAR100)

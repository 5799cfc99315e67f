"""CIFAR-100: 20 superclasses of 5 classes (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

from collections.abc import Sequence

from ..table import TaxonomySource
from .taxonomy import Taxonomy

SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
ROOT = "cifar100"
MISSPELT = {"cra": "crab"}  # the spelling of the Hugging Face copy of the data set


def cifar100(classes: Sequence[str] | None = None) -> Taxonomy:
    """The class tree of CIFAR-100, with two levels.

    Args:
        classes: fine label names in order, with spaces or underscores; None takes all 100 in
            alphabetical order, which is the order of the labels.

    Raises:
        ConfigError: a name is not a CIFAR-100 class.
    """
    edges = [(ROOT, group) for group in SUPERCLASSES]
    edges += [(group, c) for group, members in SUPERCLASSES.items() for c in members.split()]
    names = {node: node.replace("_", " ") for _, node in edges}
    if classes is not None:
        classes = [MISSPELT.get(c, c).replace(" ", "_") for c in classes]
    return Taxonomy.from_edges(edges, classes, names)


CIFAR100 = TaxonomySource(
    name="cifar100",
    load=cifar100,
    description="CIFAR-100's 20 superclasses of 5 classes",
    source="https://www.cs.toronto.edu/~kriz/cifar.html",
)

"""Registration in SAELens: its two architecture registries and its loaders.

SAELens is imported inside the functions, which are called at the end of its own import.
"""

from __future__ import annotations

from ..registry.errors import DuplicateNameError
from ..registry.table import Architecture, Loader


def check_architecture(entry: Architecture) -> None:
    """Refuse a name that SAELens itself, or another package, already uses.

    Raises:
        DuplicateNameError: the name is in use; the message names the class that has it.
    """
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    for registry, ours in (
        (SAE_TRAINING_CLASS_REGISTRY, entry.training_class),
        (SAE_CLASS_REGISTRY, entry.sae_class),
    ):
        if ours is None or entry.name not in registry:
            continue
        holder = registry[entry.name][0]
        if holder is not ours:
            raise DuplicateNameError(
                "architecture",
                f"in SAELens already, held by {holder.__module__}.{holder.__name__}",
                given=entry.name,
                allowed="another name",
            )


def add_architecture(entry: Architecture) -> None:
    """Make `entry` selectable in SAELens configs and loadable by `SAE.load_from_disk`.

    SAELens refuses to register a name twice, so a second call does nothing.
    """
    from sae_lens import registry

    if entry.name not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(
            entry.name, entry.training_class, entry.training_config_class
        )
    if not entry.sae_class or not entry.sae_config_class:
        return
    if entry.name not in registry.SAE_CLASS_REGISTRY:
        registry.register_sae_class(entry.name, entry.sae_class, entry.sae_config_class)


def add_loader(loader: Loader) -> None:
    """Make the loader's releases readable by `SAE.from_pretrained`.

    Raises:
        DuplicateNameError: when SAELens already has a loader or a release of that name.
    """
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    if loader.huggingface is None:
        return
    if NAMED_PRETRAINED_SAE_LOADERS.get(loader.name, loader.huggingface) is not loader.huggingface:
        raise DuplicateNameError(
            "loader", "in SAELens already", given=loader.name, allowed="another name"
        )
    directory = get_pretrained_saes_directory()
    taken = sorted(
        name for name, lookup in loader.releases.items() if directory.get(name, lookup) != lookup
    )
    if taken:
        raise DuplicateNameError(
            "releases", "in SAELens already", given=taken, allowed="other names"
        )
    NAMED_PRETRAINED_SAE_LOADERS[loader.name] = loader.huggingface
    directory.update(loader.releases)

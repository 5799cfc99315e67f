"""SAELens's checkpoints of a training run: weights beside the scaling of their inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...coerce import is_real
from ...files import UnreadableError, open_regular, read_json_object
from .checkpoint import SAE_LENS_FILES

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"


def is_training_checkpoint(path: str | Path) -> bool:
    """Whether a folder of an SAE is a checkpoint, whose weights want scaled inputs."""
    return (Path(path) / SCALER).exists()


@contextmanager
def as_inference_folder(path: str | Path, device: str = "cpu") -> Iterator[Path]:
    """A temporary folder with the SAE of a checkpoint for inference, for inputs as they come.

    The scaling of its inputs, or their whitening, is folded into its weights.

    Raises:
        UnreadableError: a factor that is no positive number, a whitening whose file is missing, or a
            file that is not regular.
    """
    from sae_lens.saes.sae import TrainingSAE
    from sae_lens.training.activation_scaler import ActivationScaler

    path = Path(path)
    for name in (*SAE_LENS_FILES, SCALER, WHITENING):
        if (path / name).exists():
            open_regular(path / name).close()
    # SAELens takes a whitening whose file is missing for none.
    if read_json_object(path / SCALER).get("has_whitening") and not (path / WHITENING).exists():
        raise UnreadableError(f"{WHITENING} is missing, which {SCALER} says is there")
    sae = TrainingSAE.load_from_disk(path, device=device)
    scaler = ActivationScaler()
    scaler.load(path / SCALER)
    if scaler.scaling_factor is not None:
        if not (is_real(scaler.scaling_factor) and scaler.scaling_factor > 0):
            raise UnreadableError(f"scaling_factor is {scaler.scaling_factor!r}")
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        yield Path(folder)

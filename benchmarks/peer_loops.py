"""The loops of `peers.py` that are not ours; each runs in a process of its own, without taxolens.

    python benchmarks/peer_loops.py by_hand '{"pictures": ..., "model": ..., "blocks": [0, 1], ...}'

`by_hand` is what a user of SAELens would write: a Hugging Face model with forward hooks, a DataLoader,
SAELens's SAETrainer for each SAE in turn. `overcomplete` trains the same way with that package's own
loop, on activations from the same hooks, since its models are downloaded. `saev` is version 0.1.0 of
the package index: shards on the disk, then its training; only its loader of models, which downloads,
is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset):  # type: ignore[type-arg]
    """The preprocessed pictures of a folder of class folders, float32 (3, 224, 224)."""

    def __init__(self, folder: str, processor: Any) -> None:
        self.paths = sorted(Path(folder).rglob("*.jpg"))
        self.processor = processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def activations(job: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Block -> (tokens, d) of all pictures, in the memory of the device."""
    from transformers import AutoModel
    from transformers.models.bit import BitImageProcessorPil

    model = AutoModel.from_pretrained(job["model"]).eval().to(job["device"])
    model.encoder.layer = model.encoder.layer[: max(job["blocks"]) + 1]  # nothing later is needed
    found: dict[int, list[torch.Tensor]] = {block: [] for block in job["blocks"]}

    def keep(block: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            is_class = job["tokens"] == "class"
            found[block].append(tokens[:, 0].clone() if is_class else tokens[:, 1:].flatten(0, 1))

        return hook

    for block in job["blocks"]:
        model.encoder.layer[block].register_forward_hook(keep(block))
    loader = DataLoader(
        Pictures(job["pictures"], BitImageProcessorPil.from_pretrained(job["model"])),
        batch_size=job["images_per_batch"],
        num_workers=job["num_workers"],
        pin_memory=job["device"] == "cuda",
    )
    with torch.no_grad():
        for pixels in loader:
            model(pixels.to(job["device"], non_blocking=True))
    return {block: torch.cat(tokens) for block, tokens in found.items()}


class Epoch:
    """The whole batches of (tokens, d), in a new order each time."""

    def __init__(self, tokens: torch.Tensor, size: int) -> None:
        self.tokens, self.size = tokens, size

    def __len__(self) -> int:
        return len(self.tokens) // self.size

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(self.tokens), device=self.tokens.device)
        for number in range(len(self)):
            yield self.tokens[order[number * self.size :][: self.size]]


def batches(tokens: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Batches of one epoch after the other, without end."""
    while True:
        yield from Epoch(tokens, size)


def by_hand(job: dict[str, Any]) -> None:
    """Train with SAELens's trainer."""
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    for block, tokens in activations(job).items():
        cfg = TopKTrainingSAEConfig(
            d_in=tokens.shape[1], d_sae=job["d_sae"], k=job["k"], device=job["device"]
        )
        settings = SAETrainerConfig(
            n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
            total_training_samples=job["steps"] * job["batch"], device=job["device"], autocast=False,
            lr=1e-3, lr_end=1e-3, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
            adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1,
            train_batch_size_samples=job["batch"], dead_feature_window=1000,
            feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        sae = TopKTrainingSAE(cfg)
        SAETrainer(settings, sae, batches(tokens, job["batch"])).fit()
        sae.save_inference_model(f"{job['output']}/{block}")


def overcomplete(job: dict[str, Any]) -> None:
    """Train with overcomplete's loop."""
    from overcomplete.sae import TopKSAE, train_sae  # pyright: ignore[reportMissingImports]

    def loss(x: Any, x_hat: Any, *_: Any) -> Any:
        return (x - x_hat).pow(2).mean()

    for block, tokens in activations(job).items():
        sae = TopKSAE(tokens.shape[1], job["d_sae"], top_k=job["k"], device=job["device"])
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
        loader = Epoch(tokens, job["batch"])
        epochs = max(1, round(job["steps"] / len(loader)))
        train_sae(
            sae, loader, loss, optimizer, nb_epochs=epochs, monitoring=0, device=job["device"]
        )
        Path(job["output"]).mkdir(parents=True, exist_ok=True)
        torch.save(sae.state_dict(), f"{job['output']}/{block}.pt")


def saev(job: dict[str, Any]) -> None:
    """Dump activations and train with saev 0.1.0."""
    import saev.activations as dumping  # pyright: ignore[reportMissingImports]
    from saev import config, nn, training  # pyright: ignore[reportMissingImports]
    from transformers import AutoModel

    class Model(torch.nn.Module):
        """The interface that saev wants of a model."""

        name = "random"

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(job["model"]).eval()
            self.model.encoder.layer = self.model.encoder.layer[: max(job["blocks"]) + 1]

        def get_residuals(self) -> Any:
            return self.model.encoder.layer

        def get_patches(self, n_patches_per_img: int) -> slice:
            return slice(n_patches_per_img + 1)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels).last_hidden_state

    is_class = job["tokens"] == "class"  # then no patch is written
    dumping.make_vit = lambda *_: Model()
    width = AutoModel.from_pretrained(job["model"]).config.hidden_size
    dump = config.Activations(
        data=config.ImageFolderDataset(root=job["pictures"]), dump_to=job["output"],
        vit_family="dinov2", vit_ckpt="random", vit_batch_size=job["images_per_batch"],
        n_workers=job["num_workers"], d_vit=width, vit_layers=job["blocks"],
        n_patches_per_img=0 if is_class else 256, device=job["device"],
    )  # fmt: skip
    dumping.worker_fn(dump)
    for block in job["blocks"]:
        data = config.DataLoad(
            shard_root=dumping.get_acts_dir(dump),
            patches="cls" if is_class else "patches", layer=block,
            scale_mean=False, scale_norm=False,
        )  # fmt: skip
        cfg = config.Train(
            # It starts the workers anew in each epoch, and an epoch of class tokens is short.
            data=data, n_workers=0 if is_class else job["num_workers"],
            n_patches=job["steps"] * job["batch"],
            sae=config.SparseAutoencoder(d_vit=width, exp_factor=job["d_sae"] // width),
            sae_batch_size=job["batch"], track=False, device=job["device"],
        )  # fmt: skip
        (sae,), *_ = training.train([cfg])
        nn.dump(f"{job['output']}/{block}/sae.pt", sae)


if __name__ == "__main__":
    torch.manual_seed(0)
    {"by_hand": by_hand, "overcomplete": overcomplete, "saev": saev}[sys.argv[1]](
        json.loads(sys.argv[2])
    )

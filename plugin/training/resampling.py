"""Resampling of dead latents: they start again at inputs that the SAE reconstructs badly.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling"
(https://transformer-circuits.pub/2023/monosemantic-features). Inputs are drawn with a probability
in proportion to the square of their loss; the decoder row becomes the input's direction, the encoder
column the same direction at .2 of the mean norm of the living columns; encoder bias 0, moments of
Adam 0; of JumpReLU, which the source does not have, the threshold its initial one. Deviations: inputs are
those of the batch at hand, dead is SAELens's count over `dead_feature_window`, decoder rows get the mean
norm of the living rows, and an input is taken as the encoder sees it: normalised where the SAE normalises
each input, and relative to b_dec where it subtracts that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from ...registry.errors import ConfigError

ENCODER_SCALE = 0.2


class Resampling:
    """Resampling of one SAE in training.

    Args:
        sae: the SAE.
        every: steps from one resampling to the next.
        seed: of the choice of inputs, with the number of the step.

    Raises:
        ConfigError: its encoder and decoder are not parameters of their own.
    """

    def __init__(self, sae: TrainingSAE[Any], every: int, seed: int) -> None:
        missing = {"W_dec", "W_enc", "b_enc"} - set(dict(sae.named_parameters()))
        if missing:
            raise ConfigError(
                "resample_every",
                f"not possible for {sae.cfg.architecture()}: it has no parameter {min(missing)}",
                given=every,
                allowed="an architecture with W_enc, b_enc and W_dec, or none",
            )
        self.every, self.seed = every, seed

    @torch.no_grad()
    def before_step(self, trainer: Any, batch: Tensor) -> int:
        """Resample where it is time to; return the number of latents that start again.

        Args:
            trainer: SAELens's trainer of the SAE.
            batch: (n, d) the inputs of the step that follows.
        """
        step, dead = trainer.n_training_steps, torch.nonzero(trainer.dead_neurons)[:, 0]
        living = torch.nonzero(~trainer.dead_neurons)[:, 0]
        if step == 0 or step % self.every or not len(dead) or not len(living):
            return 0
        sae: Any = trainer.sae
        x = trainer.activation_scaler.scale(batch.to(sae.device, sae.dtype))
        # Before the encoding, which sets anew, and the decoding, which ends, what this sets for an input.
        inputs = sae.run_time_activation_norm_fn_in(x)
        output = sae.decode(sae.encode(x))
        loss = (x - output).float().square().sum(-1)
        weight = loss.square().cpu().double().numpy()
        if not weight.sum() > 0:
            return 0
        generator = np.random.default_rng([self.seed, step])
        chosen = generator.choice(len(x), size=len(dead), p=weight / weight.sum())
        inputs = inputs[torch.from_numpy(chosen).to(x.device)]
        if getattr(sae.cfg, "apply_b_dec_to_input", False):
            inputs = inputs - sae.b_dec
        rows = torch.nn.functional.normalize(inputs, dim=-1)
        sae.W_dec[dead] = rows * sae.W_dec[living].norm(dim=1).mean()
        sae.W_enc[:, dead] = (ENCODER_SCALE * sae.W_enc[:, living].norm(dim=0).mean() * rows).T
        sae.b_enc[dead] = 0
        places: list[tuple[Tensor, Any]] = [
            (sae.W_dec, dead),
            (sae.W_enc, (slice(None), dead)),
            (sae.b_enc, dead),
        ]
        threshold = dict(sae.named_parameters()).get("threshold")
        start = getattr(sae.cfg, "jumprelu_init_threshold", None)
        if threshold is not None and start is not None:  # by which a latent of JumpReLU is dead
            threshold[dead] = start
            places.append((threshold, dead))
        for parameter, place in places:
            state = trainer.optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    state[moment][place] = 0
        trainer.n_forward_passes_since_fired[dead] = 0
        return len(dead)

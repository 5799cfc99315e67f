"""SAELens's `run_evals` on a vision model: a batch of images in the place of a batch of token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry.errors import ConfigError
from ...registry.files import why
from .forward import run_to_hooks
from .points import SPLIT_HEADS, as_tokens, check_images, resolve_hook_name
from .tokens import put_tokens, tokens_of


class ImageTokens(Tensor):
    """For each selected token of each image, (B, k) int64: the number of its image.

    It has the shape that `run_evals` expects of token ids. A vision model runs the images themselves;
    hooks and caches get the selected tokens alone.

    Attributes:
        pixel_values: (B, 3, H, W).
        tokens: one of `TOKEN_CHOICES`.
        labels: (B,) int64, classes of the model's head; or the error where there are none.
    """

    # operations give plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    pixel_values: Tensor
    tokens: str
    labels: Tensor | ConfigError

    @classmethod
    def of(
        cls,
        indices: Tensor,
        pixel_values: Tensor,
        tokens: str,
        tokens_per_image: int,
        labels: Tensor | ConfigError,
    ) -> ImageTokens:
        """`indices` (B,) repeated for each of so many tokens: (B, k)."""
        batch = indices[:, None].repeat(1, tokens_per_image).as_subclass(cls)
        batch.pixel_values, batch.tokens, batch.labels = pixel_values, tokens, labels
        return batch

    def logits_and_loss(self, model: Any, output: Any) -> tuple[Tensor, Any]:
        """Logits (B, k, classes) and cross-entropy (B, k) of an image, repeated for each token.

        Raises:
            ConfigError: the model has no logits.
        """
        if not isinstance(output, Tensor) or output.shape[1:] != (_n_classes(model),):
            problem = f"{model.cfg.model_name} gives no logits: without a head of classes there is no KL and no CE"
            allowed = "compute_kl=False and compute_ce_loss=False, or a model with a classifier"
            raise ConfigError("eval_config", problem, allowed=allowed)
        loss: Any = _NoLoss(self.labels)
        if isinstance(self.labels, Tensor):
            labels = self.labels.to(output.device)
            one = torch.nn.functional.cross_entropy(output, labels, reduction="none")
            loss = one[:, None].expand(-1, self.shape[1])
        return output[:, None].expand(-1, self.shape[1], -1), loss


class EvaluatesImages:
    """A vision model's forward pass on `ImageTokens`, and checks of plain images.

    Raises:
        ConfigError: the images have another number of channels than the model, or hold no patch.
    """

    def __call__(self, input: Any = None, *arguments: Any, **options: Any) -> Any:
        """As the model's forward; of `ImageTokens`, logits and loss."""
        if not isinstance(input, ImageTokens):
            check_images(self, input)  # type: ignore[arg-type]
            return super().__call__(input, *arguments, **options)  # type: ignore[misc]
        output = super().__call__(self._pixels(input))  # type: ignore[misc]
        return input.logits_and_loss(self, output)

    def run_with_hooks(
        self,
        input: Any = None,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        """As TransformerLens's; of `ImageTokens`, hooks are given the selected tokens."""
        if not isinstance(input, ImageTokens):
            check_images(self, input)  # type: ignore[arg-type]
            return super().run_with_hooks(input, fwd_hooks, bwd_hooks, **options)  # type: ignore[misc]
        hooks = [(name, _at_tokens(self, input.tokens, name, hook)) for name, hook in fwd_hooks]
        output = super().run_with_hooks(self._pixels(input), hooks, bwd_hooks)  # type: ignore[misc]
        return input.logits_and_loss(self, output)

    def run_with_cache(self, *arguments: Any, names_filter: Any = None, **options: Any) -> Any:
        """As TransformerLens's; of `ImageTokens`, no output and the selected tokens (B, k, d)."""
        images = arguments[0] if arguments else options.get("input")
        if not isinstance(images, ImageTokens):
            check_images(self, images)  # type: ignore[arg-type]
            return super().run_with_cache(*arguments, names_filter=names_filter, **options)  # type: ignore[misc]
        model: Any = self
        found = run_to_hooks(
            model,
            images.pixel_values,
            names_filter,
            reduce=lambda value: tokens_of(model, value, images.tokens),
        )
        for name, value in found.items():
            if _splits_heads(name):
                found[name] = value.unflatten(-1, (model.cfg.n_heads, -1))
            else:
                found[name] = value.as_subclass(_Joined)
        return None, found

    def _pixels(self, images: ImageTokens) -> Tensor:
        model: Any = self
        return images.pixel_values.to(device=model.cfg.device, dtype=model.cfg.dtype)


class _NoLoss:
    """In the place of a loss: the error is raised where torch uses it, and KL can do without."""

    def __init__(self, error: Any) -> None:
        self.error = error

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        found = [a for part in arguments for a in (part if isinstance(part, list) else [part])]
        raise next(a.error for a in found if isinstance(a, cls))


class _Joined(Tensor):
    """Activations (B, k, d) that `run_evals` does not take apart by heads: it would take a column for a head."""

    # operations give plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple) and type(index[-1]) is int:
            raise ConfigError(
                "hook_head_index",
                "run_evals knows heads by the name of the hook point",
                given=index[-1],
                allowed=f"none, or a hook point named {', '.join(SPLIT_HEADS)}",
            )
        return super().__getitem__(index)


def _splits_heads(name: str) -> bool:
    """Whether `run_evals` takes the heads at a hook point of this name apart, or joins them."""
    return any(split in name for split in SPLIT_HEADS)


def _at_tokens(model: Any, tokens: str, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that is given the selected tokens of an activation, and replaces these."""
    joined = None if _splits_heads(name) else model.points()[resolve_hook_name(model, name)]

    def at_tokens(activation: Tensor, hook_point: Any = None, **options: Any) -> Tensor:
        whole = as_tokens(activation, joined)
        own = tokens_of(model, whole, tokens)
        try:
            new = hook(own, hook=options.get("hook", hook_point))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"hook point {name}",
                f"the SAE cannot act on activations of shape {tuple(own.shape)}: {why(error)}",
                allowed=f"an SAE of that width, or of one head at a hook point named {', '.join(SPLIT_HEADS)}",
            ) from error
        return put_tokens(model, whole, tokens, new).reshape(activation.shape)

    return at_tokens


def _n_classes(model: Any) -> int | None:
    hf_model = model.original_model
    config = getattr(hf_model, "config", None)
    return getattr(config, "num_labels", None) or getattr(hf_model, "num_classes", None)


def labels_of(model: Any, class_names: Sequence[str], labels: Tensor) -> Tensor | ConfigError:
    """The classes of the model's head, (B,), of labels (B,) that mean `class_names`; or why not.

    Classes are matched by name, which one output alone may have; where the head's have no names
    (LABEL_0, ...) by number, if there are as many.
    """
    config = getattr(model.original_model, "config", None)
    heads: dict[int, str] = getattr(config, "id2label", None) or {}
    n_classes = len(heads) or _n_classes(model) or 0
    named = not all(name == f"LABEL_{i}" for i, name in heads.items())
    problem = f"CE needs the class of each image among the {n_classes} of {model.cfg.model_name}"
    if bool((labels < 0).any()):
        return ConfigError("eval_config", f"{problem}, and images have no label", allowed=WITHOUT)
    if not named:
        if len(class_names) != n_classes:
            problem = f"{problem}, which have no names, and the images have {len(class_names)}"
            return ConfigError("eval_config", problem, allowed=WITHOUT)
        return labels
    times = Counter(heads.values())
    numbers = {name: int(i) for i, name in heads.items() if times[name] == 1}
    if missing := [name for name in class_names if name not in numbers]:
        several = "the name of several" if missing[0] in times else "none"
        problem = f"{problem}, and {missing[0]!r} is {several} of them"
        return ConfigError("eval_config", problem, allowed=WITHOUT)
    return torch.tensor([numbers[name] for name in class_names])[labels]


WITHOUT = "compute_ce_loss=False, or images with the classes of the model's head"

"""Forward passes of a vision model with the activations at a hook point replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ...registry.errors import ConfigError
from ...registry.evaluators.base import InterventionResult
from ...registry.heads import columns_of
from ...registry.taxonomies.outputs import classes_of_outputs
from ...registry.taxonomies.taxonomy import Taxonomy
from ..images.dataset import ImageDataset
from ..images.preprocess import preprocess_for
from .bridge import VisionBridge
from .forward import run_to_hooks
from .points import as_tokens, firings, resolve_hook_name, taps
from .tapped import TappedModel
from .tokens import check_tokens, fixed_places, misplaced, put_tokens, tokens_of

Edit = Callable[[Tensor], Tensor]

KEPT_BYTES = 2**30
"""Upper limit of images, and of activations before a hook point, kept for the next edit."""


class Pictures:
    """Preprocessed images by their position in an evaluation set, decoded once while they fit.

    Args:
        images: the data set.
        rows: (n,) position -> index of the image in `images` (corrupt ones have no position).
        preprocess: as `preprocess_for` gives it.
    """

    def __init__(self, images: ImageDataset, rows: np.ndarray, preprocess: Any) -> None:
        self._images, self._rows, self._preprocess = images, rows, preprocess
        self._kept = _Kept()

    @classmethod
    def of(
        cls, model: TappedModel, images: ImageDataset, rows: np.ndarray, image_size: int | None
    ) -> Pictures:
        """As the model takes them."""
        return cls(images, rows, preprocess_for(model, image_size))

    def __call__(self, positions: Sequence[int]) -> Tensor:
        """(n, 3, H, W) float32."""
        return self._kept(positions, self._decode)

    def _decode(self, positions: Sequence[int]) -> Tensor:
        decoded = (self._images.decode(int(self._rows[position])) for position in positions)
        return torch.stack([torch.from_numpy(self._preprocess(image)) for image in decoded])


class ModelIntervention:
    """The `Intervention` of evaluators: a tapped model, images, and one hook point.

    The final embedding is what leaves the last norm, or the last block where the model has no such
    norm: the class token, without one the mean patch token. The chosen tokens are replaced as in
    `put_tokens`.

    After a block of a transformer family the model is run from there: what lies before does not
    depend on the edit. Untouched and edited runs take the same way, so that the identity as edit
    changes no bit.

    Args:
        model: put into evaluation mode.
        pictures: position in the evaluation set -> image.
        hook_name: where the activations are replaced; a `head_key` for those of one head.
        tokens: which of them, one of `TOKEN_CHOICES`.
        taxonomy: its classes are looked for among the model's outputs.
        batch_size: images in one forward pass.
        resume: False runs every pass from the pixels on.

    Attributes:
        logit_classes: (outputs,) the class of each output, −1 where none; None without a head, and
            where no output has a class.

    Raises:
        UnknownNameError, ConfigError: no such hook point or tokens, or a model whose last block
            is not known.
    """

    def __init__(
        self,
        model: TappedModel,
        pictures: Callable[[Sequence[int]], Tensor],
        hook_name: str,
        tokens: str,
        *,
        taxonomy: Taxonomy | None = None,
        batch_size: int = 64,
        resume: bool = True,
    ) -> None:
        self.model, self.tokens, self.batch_size = model.eval(), tokens, batch_size
        hook_name, self._columns = columns_of(hook_name)
        self.hook_name = resolve_hook_name(model, hook_name)
        check_tokens(model, tokens, self.hook_name)
        self._pictures = pictures
        self._embedding = _embedding_point(model)
        fixed = fixed_places(model, self._embedding)
        self._all_of_image = fixed == ()
        counted = tuple(range(model.cfg.n_prefix_tokens))
        if fixed and fixed != counted and not (model.cfg.has_class_token and fixed[0] == 0):
            raise misplaced(model, self._embedding, fixed)
        self._block = _block_before(model, self.hook_name) if resume else None
        self._pixel_shape: tuple[int, ...] | None = None
        self._width_first = False
        self._streams = _Kept()
        names = None if taxonomy is None else output_names(model)
        self.logit_classes: np.ndarray | None = None
        if taxonomy is not None and names is not None:
            classes = classes_of_outputs(taxonomy, names)
            self.logit_classes = classes if (classes >= 0).any() else None

    @torch.no_grad()
    def __call__(self, index: Tensor, edit: Edit | None = None) -> InterventionResult:
        """Run the images at positions `index` (n,); see `Intervention`. Results on the CPU.

        `edit` is given float32 (float64 of a model in float64) on the model's device, a batch at a
        time.
        """
        if not len(index):
            raise ConfigError("index", "no image", allowed="one or more")
        parts = [self._run(part.tolist(), edit) for part in index.cpu().split(self.batch_size)]
        logits = [part.logits for part in parts if part.logits is not None]
        embedding = torch.cat([part.embedding for part in parts])
        return InterventionResult(torch.cat(logits) if logits else None, embedding)

    def _run(self, positions: list[int], edit: Edit | None) -> InterventionResult:
        if self._block is not None and self._pixel_shape is None:
            self._try_resuming(positions[0])
        if self._block is None:
            with ExitStack() as stack:
                if edit is not None:
                    stack.enter_context(self._replacing(edit))
                return self._forward(self._pixels(positions))
        stream = self._streams(positions, self._until_block).to(self.model.cfg.device)
        if self._width_first:
            stream = stream.transpose(1, 2).contiguous().transpose(1, 2)
        if edit is not None:
            stream = self._edited(stream, edit)
        return self._resumed(stream)

    def _pixels(self, positions: Sequence[int]) -> Tensor:
        cfg = self.model.cfg
        return self._pictures(positions).to(device=cfg.device, dtype=cfg.dtype)

    def _forward(self, pixels: Tensor) -> InterventionResult:
        seen: dict[str, Tensor] = {}
        with taps(self.model, [self._embedding], seen.__setitem__):
            logits = _logits(self.model, pixels)
        return InterventionResult(
            None if logits is None else logits.float().cpu(),
            self._pooled(seen[self._embedding]).float().cpu(),
        )

    def _pooled(self, activation: Tensor) -> Tensor:
        cfg = self.model.cfg
        if activation.shape[1] > 1 and self._all_of_image:
            return activation.mean(1)
        if activation.shape[1] == 1 or cfg.has_class_token:
            return activation[:, 0]
        return activation[:, cfg.n_prefix_tokens :].mean(1)

    # The edit ----------------------------------------------------------------------------------

    @contextmanager
    def _replacing(self, edit: Edit) -> Iterator[None]:
        """Within, what passes the hook point is edited; of several passes, the last."""
        model, name = self.model, self.hook_name
        point, left = model.points()[name], firings(model)[name].times

        def replace(activation: Tensor, hook: Any) -> Tensor:
            nonlocal left
            left -= 1
            if left:
                return activation
            return self._edited(as_tokens(activation, point), edit).reshape(activation.shape)

        if not isinstance(point, HookPoint):
            problem = "an SAE is spliced in there"
            raise ConfigError(f"hook point {name!r}", problem, allowed="reset_saes() first")
        model.context_level += 1
        point.add_hook(replace, level=model.context_level)  # type: ignore[arg-type]
        try:
            yield
        finally:
            point.remove_hooks(dir="fwd", level=model.context_level)
            model.context_level -= 1

    def _edited(self, activation: Tensor, edit: Edit) -> Tensor:
        """(B, T, d) with the chosen tokens replaced."""
        chosen = tokens_of(self.model, activation, self.tokens, self._columns)
        given = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        new = edit(given.clone()).to(chosen)
        if new.shape != chosen.shape:
            raise ValueError(f"edit: given {tuple(chosen.shape)}, it returned {tuple(new.shape)}")
        return put_tokens(self.model, activation, self.tokens, new, self._columns)

    # From a block on ---------------------------------------------------------------------------

    def _until_block(self, positions: Sequence[int]) -> Tensor:
        found = run_to_hooks(self.model, self._pixels(positions), [self.hook_name])
        return found[self.hook_name].cpu()

    def _resumed(self, stream: Tensor) -> InterventionResult:
        """The rest of the model: embeddings and blocks up to the hook point are stood in for."""
        model: Any = self.model
        assert self._block is not None and self._pixel_shape is not None
        stand_ins = [model.embed, *(model.blocks[i] for i in range(self._block + 1))]
        pixels = stream.new_zeros(()).expand(len(stream), *self._pixel_shape)
        with ExitStack() as stack:
            for part in stand_ins:
                output = getattr(part, "output_of", lambda tokens: tokens)(stream)
                stack.enter_context(_standing_in(part.original_component, output))
            return self._forward(pixels)

    def _try_resuming(self, position: int) -> None:
        """Try it on one image; a model whose parts are called otherwise is run from the pixels."""
        pixels = self._pixels([position])
        self._pixel_shape = tuple(pixels.shape[1:])
        whole = self._forward(pixels)
        stream = run_to_hooks(self.model, pixels, [self.hook_name])[self.hook_name]
        # AIMv2's stream lies so in memory, and sums over the width round as they lie
        self._width_first = not stream.is_contiguous() and stream.transpose(1, 2).is_contiguous()
        try:
            same = _equal(self._resumed(stream), whole)
        except Exception:  # a plugin's family may do anything between its blocks
            same = False
        if not same:
            self._block = None


def output_names(model: TappedModel) -> list[str] | None:
    """The names of the outputs of the classification head; None without head or names."""
    cfg = model.cfg
    picture = torch.zeros(1, getattr(cfg, "n_channels", 3), *model.smallest_image)
    with torch.no_grad():
        logits = _logits(model, picture.to(device=cfg.device, dtype=cfg.dtype))
    if logits is None:
        return None
    module: Any = model.original_model
    by_number = getattr(getattr(module, "config", None), "id2label", None)
    if by_number:
        return [str(by_number.get(i, "")) for i in range(logits.shape[-1])]
    names = (getattr(module, "pretrained_cfg", None) or {}).get("label_names")  # timm
    return [str(name) for name in names] if names else None


def _logits(model: TappedModel, pixels: Tensor) -> Tensor | None:
    """(B, outputs) of the classification head, from one forward pass; None without."""
    outputs: list[Any] = []
    module: Any = model.original_model
    handle = module.register_forward_hook(lambda *given: outputs.append(given[-1]))
    try:
        with model.lean():
            model(pixels, return_type=None)
    finally:
        handle.remove()
    logits = getattr(outputs[-1], "logits", None)
    if isinstance(logits, Tensor):
        return logits if logits.ndim == 2 else None  # those of pixels or patches are no classes
    is_timms = isinstance(outputs[-1], Tensor) and outputs[-1].ndim == 2
    own = is_timms and getattr(module, "num_classes", 0) == outputs[-1].shape[1]
    return outputs[-1] if own else None


def _embedding_point(model: TappedModel) -> str:
    for name in ("ln_final.hook_out", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"):
        canonical = model.aliases.get(name, name)
        if canonical in firings(model):
            return canonical
    problem = "it has no list of blocks: its final embedding is not found"
    allowed = "a model with ln_final or blocks"
    raise ConfigError(model.cfg.model_name, problem, allowed=allowed)


def _block_before(model: TappedModel, hook_name: str) -> int | None:
    """The block that `hook_name` is the output of; None where it is something else."""
    if not isinstance(model, VisionBridge):
        return None
    for block in range(model.cfg.n_layers):
        if model.aliases.get(f"blocks.{block}.hook_resid_post") == hook_name:
            return block
    return None


@contextmanager
def _standing_in(module: nn.Module, output: Any) -> Iterator[None]:
    """Within, the module gives `output` whatever it is given."""
    module.__dict__["forward"] = lambda *arguments, **options: output
    try:
        yield
    finally:
        del module.__dict__["forward"]


def _equal(one: InterventionResult, other: InterventionResult) -> bool:
    pairs = [(one.embedding, other.embedding)]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits))
    return all(torch.equal(a, b) for a, b in pairs)


class _Kept:
    """Rows by position, made when first asked for, and kept as long as there is room."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}
        self._bytes = 0

    def __call__(self, positions: Sequence[int], make: Callable[[Sequence[int]], Tensor]) -> Tensor:
        missing = [p for p in dict.fromkeys(positions) if p not in self._rows]
        made = dict(zip(missing, make(missing))) if missing else {}
        rows = torch.stack([made[p] if p in made else self._rows[p] for p in positions])
        for position, row in made.items():
            if self._bytes + row.nbytes <= KEPT_BYTES:
                self._rows[position] = row.clone()  # a view would keep its whole batch
                self._bytes += row.nbytes
        return rows

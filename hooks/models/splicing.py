"""SAEs spliced into a tapped model, each at the tokens that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sae_lens.saes.sae import SAE
from torch import Tensor, nn

from ...registry.errors import ConfigError
from ...registry.heads import columns_of, key_of
from .points import as_tokens, hook_d_in, resolve_hook_name
from .rows import Rows, rows_of
from .tapped import TappedModel
from .tokens import ALL_COLUMNS, check_tokens, put_tokens, tokens_of


class SplicesAtTokens:
    """SAELens's methods for splicing; an SAE acts on the tokens that its metadata names.

    `tokens`, one of `TOKEN_CHOICES`, replaces those of the metadata ("all" where these name none).
    The SAE is given these tokens alone: its latents are (B, k, d_sae). The other tokens pass through
    unchanged. Of "mean_patch" the change of the mean is added to every patch (own definition).
    An SAE with a `hook_head_index` acts on that head alone.
    """

    _tokens_asked_for: str | None = None

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        *,
        tokens: str | None = None,
        **options: Any,
    ) -> None:
        """Splice `sae` in at the hook point that its metadata names, until `reset_saes`.

        Raises:
            UnknownNameError: the model has no such hook point (SAELens only logs it).
            ConfigError: the hook point never fires, or the model has no such tokens or head; or
                an SAE of another head is spliced in there, which SAELens would take out.
        """
        model: Any = self
        metadata = sae.cfg.metadata
        tokens = str(tokens or self._tokens_asked_for or metadata.tokens or "all")
        names = [n for n in (metadata.hook_name, metadata.hook_name_out) if n is not None]
        canonical = [resolve_hook_name(model, name) for name in names]
        for name in canonical:
            check_tokens(model, tokens, name)
        columns = self._columns(sae, canonical)
        before: Any = model.points()[canonical[-1]]
        super().add_sae(sae, use_error_term=use_error_term, **options)  # type: ignore[misc]
        spliced: Any = model.points()[canonical[-1]]
        spliced.tokens = tokens
        rows = rows_of(before)
        if rows is not None:
            spliced.hook_conversion = before.hook_conversion
        if tokens != "all" or columns != ALL_COLUMNS or rows is not None:
            at_tokens = _AtTokens(model, tokens, columns, rows)
            spliced.register_forward_pre_hook(at_tokens.before)
            spliced.register_forward_hook(at_tokens.after)
            if len(set(canonical)) > 1:  # a transcoder: the input was kept at another hook point
                keep = spliced.capture_input
                spliced.capture_input = lambda value: keep(at_tokens.chosen(value))

    def _columns(self, sae: SAE[Any], canonical: list[str]) -> slice:
        """The columns that the SAE acts on, checked."""
        model: Any = self
        head = sae.cfg.metadata.hook_head_index
        there = getattr(model.points()[canonical[-1]], "sae", None)
        other = None if there is None else there.cfg.metadata.hook_head_index
        if there is not None and there is not sae and (head, other) != (None, None):
            raise ConfigError(
                f"hook point {canonical[-1]!r}",
                f"an SAE is spliced in there (hook_head_index {other}), and only one can be",
                given=head,
                allowed="reset_saes() first, or an SAE of all heads",
            )
        if head is None:
            return ALL_COLUMNS
        if len(set(canonical)) > 1:
            problem = "a transcoder of one head cannot be spliced in"
            raise ConfigError("hook_head_index", problem, given=head, allowed="none")
        hook_name = str(sae.cfg.metadata.hook_name)
        width = hook_d_in(model, hook_name, head=head)
        if sae.cfg.d_in != width:
            problem = f"not the width of a head at {hook_name}"
            raise ConfigError("d_in", problem, given=sae.cfg.d_in, allowed=width)
        return columns_of(key_of(sae))[1]

    @contextmanager
    def saes(self, *arguments: Any, tokens: str | None = None, **options: Any) -> Iterator[Any]:
        """Within, SAEs are spliced in; arguments as SAELens's, and `tokens`."""
        with ExitStack() as stack:
            with self._asking_for(tokens):
                stack.enter_context(super().saes(*arguments, **options))  # type: ignore[misc]
            yield self

    def run_with_saes(self, *arguments: Any, tokens: str | None = None, **options: Any) -> Any:
        """One forward pass with SAEs; arguments as SAELens's, and `tokens`."""
        with self._asking_for(tokens):
            return super().run_with_saes(*arguments, **options)  # type: ignore[misc]

    def run_with_cache_with_saes(
        self, *arguments: Any, tokens: str | None = None, **options: Any
    ) -> Any:
        """The same with a cache; arguments as SAELens's, and `tokens`."""
        with self._asking_for(tokens):
            return super().run_with_cache_with_saes(*arguments, **options)  # type: ignore[misc]

    def run_with_hooks_with_saes(
        self, *arguments: Any, tokens: str | None = None, **options: Any
    ) -> Any:
        """The same with hooks; arguments as SAELens's, and `tokens`."""
        with self._asking_for(tokens):
            return super().run_with_hooks_with_saes(*arguments, **options)  # type: ignore[misc]

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        """An SAE that comes back acts on the tokens that it acted on before."""
        with self._asking_for(getattr(prev_wrapper, "tokens", None)):
            super()._reset_sae(act_name, prev_wrapper)  # type: ignore[misc]

    @contextmanager
    def _asking_for(self, tokens: str | None) -> Iterator[None]:
        before = self._tokens_asked_for
        self._tokens_asked_for = tokens or before
        try:
            yield
        finally:
            self._tokens_asked_for = before


class _AtTokens:
    """Torch's hooks around a spliced SAE: it is given the chosen tokens and columns, and replaces these."""

    def __init__(
        self, model: TappedModel, tokens: str, columns: slice, rows: Rows | None = None
    ) -> None:
        self._model, self._tokens, self._columns, self._rows = model, tokens, columns, rows
        self._whole: Tensor | None = None

    def chosen(self, activation: Tensor) -> Tensor:
        """(B, T, d) or (B, d) -> (B, k, d)."""
        if activation.ndim not in (2, 3):
            given, allowed = tuple(activation.shape), "activations (images, tokens, width)"
            raise ConfigError("hook_name", "activations of no tokens", given=given, allowed=allowed)
        return tokens_of(self._model, as_tokens(activation), self._tokens, self._columns)

    def before(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Torch's forward pre-hook."""
        whole = arguments[0] if self._rows is None else self._rows.fold(arguments[0])
        self._whole = whole
        return (self.chosen(whole),)

    def after(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Torch's forward hook."""
        whole, self._whole = self._whole, None
        assert whole is not None
        new = put_tokens(self._model, as_tokens(whole), self._tokens, output, self._columns)
        return new.reshape(whole.shape) if self._rows is None else self._rows.unfold(new)

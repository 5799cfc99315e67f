"""TransformerLens's methods that take names of hook points, with names that give nothing refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformer_lens.hook_points import HookPoint

from ...registry.errors import ConfigError, UnknownNameError
from .points import firings, resolve_hook_name, unknown_hook

SPLICED = ".hook_sae_"  # in the names of the hook points inside an SAE

Name = str | Callable[[str], bool]


class NamedHooks:
    """`add_hook`, `hooks`, `run_with_hooks` and `run_with_cache` of TransformerLens.

    Its own leave out a hook whose name does not exist, and one that never fires, without a message.
    These raise what `run_to_hooks` raises:

    Raises:
        UnknownNameError: there is no such hook point, or none that a filter accepts.
        ConfigError: it never fires, or an SAE is spliced in there.
    """

    def add_hook(self, name: Name, *arguments: Any, **options: Any) -> Any:
        """As TransformerLens's."""
        self._check_hooks([name])
        if isinstance(name, str):
            point, inside, rest = name.partition(SPLICED)
            model: Any = self
            name = model.aliases.get(point, point) + inside + rest
        return super().add_hook(name, *arguments, **options)  # type: ignore[misc]

    def hooks(
        self,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """As TransformerLens's."""
        hooks = list(fwd_hooks), list(bwd_hooks)
        self._check_hooks(name for name, _ in [*fwd_hooks, *bwd_hooks])
        return super().hooks(*hooks, *arguments, **options)  # type: ignore[misc]

    def run_with_hooks(
        self,
        input: Any = None,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        **options: Any,
    ) -> Any:
        """As TransformerLens's."""
        self._check_hooks(name for name, _ in [*fwd_hooks, *bwd_hooks])
        hooks = {"fwd_hooks": list(fwd_hooks), "bwd_hooks": list(bwd_hooks)}
        return super().run_with_hooks(input, **hooks, **options)  # type: ignore[misc]

    def run_with_cache(
        self,
        *arguments: Any,
        names_filter: Name | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """As TransformerLens's."""
        if names_filter is None:
            firings(self)  # type: ignore[arg-type]  # refuses a model that draws random numbers
        elif isinstance(names_filter, str) or callable(names_filter):
            self._check_hooks([names_filter])
        else:
            names_filter = list(names_filter)
            self._check_hooks(names_filter)
        return super().run_with_cache(*arguments, names_filter=names_filter, **options)  # type: ignore[misc]

    def _check_hooks(self, names: Iterable[Name]) -> None:
        for name in names:
            accepted = [name] if isinstance(name, str) else self._accepted(name)
            if not isinstance(name, str):  # of a filter's, one that fires is enough
                model: Any = self
                fired = firings(model)
                accepted.sort(
                    key=lambda n: model.aliases.get(n, n) not in fired and SPLICED not in n
                )
            self._check_hook(accepted[0])

    def _accepted(self, accepts: Callable[[str], bool]) -> list[str]:
        model: Any = self
        accepted = [name for name in model.hook_dict if accepts(name)]
        if not accepted:
            problem = "the filter accepts no hook point"
            allowed = f"names of {model.cfg.model_name} ({model.family})"
            raise ConfigError("hook_names", problem, allowed=allowed)
        return accepted

    def _check_hook(self, name: str) -> None:
        model: Any = self
        if SPLICED in name:
            if name not in model.hook_dict:
                raise UnknownNameError(unknown_hook(model, name))
            return
        point = model.points()[resolve_hook_name(model, name)]
        if not isinstance(point, HookPoint):
            problem = "an SAE is spliced in there"
            allowed = f"reset_saes() first, or {name}{SPLICED}input and others of the SAE"
            raise ConfigError(f"hook point {name!r}", problem, allowed=allowed)

"""The plugin host: hooks documented and tested, third parties welcome, nobody can break it."""

import inspect
import os
import subprocess
import sys
import types
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import taxolens
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.plugin import hookspecs, manager
from taxolens.registry.errors import DuplicateNameError
from taxolens.registry.presentation import Support
from taxolens.registry.table import Architecture, Loader, TaxonomySource
from temporary_plugins import temporary_plugins

ROOT = Path(__file__).resolve().parents[2]
HOOKS = [name for name, member in vars(hookspecs).items() if hasattr(member, "taxolens_spec")]


@pytest.fixture
def plugin() -> Iterator[Callable[..., None]]:
    """Registers module-like plugins, see `temporary_plugins`."""
    with temporary_plugins() as load:
        yield load


def test_there_are_five_hooks() -> None:
    assert set(HOOKS) == {
        "register_architectures",
        "register_vision_models",
        "register_evaluators",
        "register_taxonomies",
        "register_loaders",
    }


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_documented_typed_and_tested(hook: str) -> None:
    spec = getattr(hookspecs, hook)
    assert len(inspect.getdoc(spec) or "") > 60
    assert list(inspect.signature(spec).parameters) == ["register"]
    assert "register" in spec.__annotations__
    assert hook in (ROOT / "docs" / "plugins.md").read_text(), "name it in docs/plugins.md"
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert f"def test_{hook}" in tests, f"no test is named test_{hook}…"


def test_every_hook_has_a_registrar() -> None:
    assert set(manager._registrars("probe")) == set(HOOKS)


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook != "register_loaders"])
def test_builtins_use_the_public_hooks(hook: str) -> None:
    implementations = getattr(manager.pm.hook, hook).get_hookimpls()
    assert "taxolens" in {implementation.plugin_name for implementation in implementations}


def topk(name: str) -> Architecture:
    config = type(
        "Config", (TopKTrainingSAEConfig,), {"architecture": classmethod(lambda cls: name)}
    )
    return Architecture(name, type("SAE", (TopKTrainingSAE,), {}), config)


def test_register_architectures(plugin) -> None:
    plugin("mine", register_architectures=lambda register: register(topk("my_topk")))
    assert taxolens.ARCHITECTURES.plugin_of("my_topk") == "mine"
    assert (
        SAE_TRAINING_CLASS_REGISTRY["my_topk"][0]
        is taxolens.ARCHITECTURES["my_topk"].training_class
    )


def test_register_vision_models(plugin) -> None:
    family = types.SimpleNamespace(**{**vars(next(iter(taxolens.VISION_MODELS.values())))})
    family.name = "my_family"
    plugin("mine", register_vision_models=lambda register: register(family))
    assert taxolens.VISION_MODELS["my_family"] is family


def test_register_evaluators(plugin) -> None:
    evaluator = type("Mine", (next(iter(taxolens.EVALUATORS.values())),), {"name": "my_evaluator"})
    plugin("mine", register_evaluators=lambda register: register(evaluator))
    assert taxolens.EVALUATORS["my_evaluator"] is evaluator


def test_register_evaluators_refuses_what_is_none(plugin) -> None:
    with pytest.warns(UserWarning, match="'mine'.*ConfigError.*a subclass of taxolens.Evaluator"):
        plugin("mine", register_evaluators=lambda register: register(object()))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": None}, "name: no text"),
        ({"description": " "}, "description: no text"),
        ({"name": "", "description": 3}, "name and description: no text"),
        ({"higher_is_better": None}, "higher_is_better: no mapping"),
        ({"higher_is_better": {}}, "higher_is_better: no mapping"),
        ({"higher_is_better": {"m": "yes"}}, "higher_is_better: 'm' is not a metric"),
        ({"compute": abstractmethod(lambda self: {})}, "without compute"),
        ({"headlines": (taxolens.Headline("n", "n"),)}, "headline 'n': not known"),
        ({"labels": {"n": "n"}}, "label of 'n': not known"),
        ({"support": {"n": Support("m", "nodes")}}, "support of 'n': not known"),
        ({"nulls": {"chance": None}}, "null 'chance': not known"),
    ],
)
def test_an_evaluator_that_declares_too_little_is_refused_at_once(
    changes: dict[str, Any], problem: str, plugin
) -> None:
    fields = {
        "name": "my_evaluator",
        "description": "what it measures",
        "higher_is_better": {"m": True},
        "compute": lambda self, **_: {"m": 1.0},
    }
    good = type("Mine", (taxolens.Evaluator,), fields)
    bad = type("Mine", (taxolens.Evaluator,), fields | changes)
    with pytest.warns(UserWarning, match=f"'mine'.*ConfigError.*not an evaluator: {problem}"):
        plugin("mine", register_evaluators=lambda register: register(bad))
    plugin("good", register_evaluators=lambda register: register(good))
    assert taxolens.EVALUATORS["my_evaluator"] is good


def test_an_evaluator_without_declarations_is_refused_at_once(plugin) -> None:
    bare = type("Mine", (taxolens.Evaluator,), {"name": "bare", "compute": lambda self: {}})
    with pytest.warns(UserWarning, match="not an evaluator: description: no text"):
        plugin("mine", register_evaluators=lambda register: register(bare))


def test_register_taxonomies(plugin) -> None:
    tree = taxolens.Taxonomy.from_edges([("root", "a"), ("root", "b")])
    source = TaxonomySource("my_tree", lambda classes: tree)
    plugin("mine", register_taxonomies=lambda register: register(source))
    assert taxolens.load_taxonomy("my_tree").classes == tree.classes


def test_register_loaders(plugin) -> None:
    plugin("mine", register_loaders=lambda register: register(Loader("my_files", disk=dict)))
    assert taxolens.LOADERS["my_files"].disk is dict


def test_loading_twice_changes_nothing(plugin) -> None:
    calls: list[int] = []
    plugin("mine", register_loaders=lambda register: calls.append(1))
    manager.load_plugins()
    taxolens.load_plugins()
    assert calls == [1]


def test_a_duplicate_is_named_and_skipped(plugin) -> None:
    plugin("first", register_architectures=lambda register: register(topk("my_topk")))
    held = taxolens.ARCHITECTURES["my_topk"]
    with pytest.warns(
        UserWarning, match="skips the plugin 'second'.*'first'.*'second'; given 'my_topk'"
    ):
        plugin("second", register_architectures=lambda register: register(held))
    assert taxolens.ARCHITECTURES["my_topk"] is held


def test_an_architecture_of_sae_lens_cannot_be_taken(plugin) -> None:
    with pytest.warns(UserWarning, match="in SAELens already, held by sae_lens.*given 'topk'"):
        plugin("mine", register_architectures=lambda register: register(topk("topk")))
    with pytest.raises(DuplicateNameError):
        manager._registrars("mine")["register_architectures"](topk("topk"))


def test_a_hook_that_raises_is_named_and_skipped(plugin) -> None:
    def broken(register) -> None:
        raise RuntimeError("no such weather")

    with pytest.warns(UserWarning, match="'storm': RuntimeError: no such weather"):
        plugin("storm", register_loaders=broken)
    plugin("calm", register_loaders=lambda register: register(Loader("calm")))
    assert "calm" in taxolens.LOADERS


def test_a_real_package_plugs_in_without_touching_us(tmp_path: Path) -> None:
    """Install the example package, a broken one and a blocked one, and look from a new process."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    source = tmp_path / "source"
    source.mkdir()
    for file in ("pyproject.toml", "taxolens_example_plugin.py"):
        (source / file).write_text((ROOT / "tests" / "third_party" / file).read_text())
    site = tmp_path / "site"
    subprocess.run([*install, "--target", str(site), str(source)], check=True)
    for name in ("broken", "blocked"):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[taxolens]\n{name} = no_such_module_{name}\n")
    look = """if True:
        import sys, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import taxolens
            assert "example_firing_rate" in taxolens.EVALUATORS  # the first look loads plugins
        skipped = [str(w.message) for w in caught if "taxolens skips" in str(w.message)]
        assert len(skipped) == 1 and "'broken'" in skipped[0], skipped
        assert "sae_lens" in sys.modules, "the example plugin imports it"
        from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
        assert "example_topk" in SAE_TRAINING_CLASS_REGISTRY
        assert taxolens.ARCHITECTURES.plugin_of("example_topk") == "example_plugin"
        assert "example_family" in taxolens.VISION_MODELS
        assert {"example_firing_rate", "example_siblings"} < set(taxolens.EVALUATORS)
        print("all there")
    """
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", look],
        env={**os.environ, "PYTHONPATH": path, "TAXOLENS_BLOCK_PLUGINS": "blocked, other"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip().endswith("all there"), done.stderr[-2000:]

"""Whatever is imported first, all is registered once taxolens and SAELens are both there.

Each scenario needs a process in which neither was imported: see `forks`.
"""

import ast
import pickle
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forks import Forks
from taxolens.plugin import builtin, registration
from taxolens.plugin.training.config import VisionSAERunnerConfig
from taxolens.registry.architectures.codebook import CODEBOOK

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
def check_sae_lens():
    import sae_lens, taxolens
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    from taxolens.plugin import builtin
    assert set(builtin.ARCHITECTURES) <= set(SAE_TRAINING_CLASS_REGISTRY)
    assert set(builtin.ARCHITECTURES) <= set(taxolens.ARCHITECTURES)
    assert "codebook" in SAE_CLASS_REGISTRY

def check_transformer_lens():
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.utilities.architectures import VISION_MODEL_ARCHITECTURES
    adapter = SUPPORTED_ARCHITECTURES["Dinov2Model"]
    assert adapter.__module__ == "taxolens.hooks.models.families.dinov2"
    assert "Dinov2Model" in VISION_MODEL_ARCHITECTURES

def loaded(*names):
    import sys
    return [name for name in names if name in sys.modules]
"""

THIRD_PARTY = """
import sys
sys.path.insert(0, {site!r})
"""

THIRD_PARTY_CHECK = """
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
assert "example_topk" in SAE_TRAINING_CLASS_REGISTRY
import taxolens
assert taxolens.ARCHITECTURES.plugin_of("example_topk") == "example_plugin"
assert "example_family" in taxolens.VISION_MODELS
assert "example_firing_rate" in taxolens.EVALUATORS
check_sae_lens(); check_transformer_lens()
"""

SCENARIOS = {
    "only taxolens": """
import taxolens
assert "evaluate_run" in dir(taxolens) and "evaluate_run" in taxolens.__all__
assert loaded("sae_lens", "transformer_lens", "taxolens.plugin.manager") == []
assert "imagenet" in taxolens.TAXONOMIES and "lch_height" in taxolens.EVALUATORS
assert len(taxolens.LOADERS) == len(taxolens.LOADERS)
assert loaded("sae_lens", "transformer_lens") == []
try:
    taxolens.no_such_name
except AttributeError as error:
    assert str(error) == "module 'taxolens' has no attribute 'no_such_name'"
else:
    raise AssertionError
""",
    "taxolens, then sae_lens": """
import taxolens
import sae_lens
check_sae_lens(); check_transformer_lens()
assert type(sae_lens.SAE.load_from_disk({saved!r})).__module__ == "taxolens.registry.architectures.codebook"
""",
    "sae_lens, then taxolens": """
import sae_lens
import taxolens
check_sae_lens(); check_transformer_lens()
assert type(sae_lens.SAE.load_from_disk({saved!r})).__module__ == "taxolens.registry.architectures.codebook"
""",
    "transformer_lens alone, after taxolens": """
import taxolens
import transformer_lens
check_transformer_lens()
assert loaded("sae_lens") == []
assert "dinov2" in taxolens.VISION_MODELS
import sae_lens
check_sae_lens()
""",
    "transformer_lens alone, before taxolens": """
import transformer_lens
import taxolens
check_transformer_lens()
assert loaded("sae_lens") == []
""",
    "a table that needs a library": """
import taxolens
assert "dinov2" in taxolens.VISION_MODELS
assert loaded("sae_lens") == []
assert "mp" in taxolens.ARCHITECTURES
check_sae_lens(); check_transformer_lens()
""",
    "load_plugins": """
import taxolens
taxolens.load_plugins()
check_sae_lens(); check_transformer_lens()
""",
    "unpickling": """
import pickle
config, entry = pickle.loads(bytes.fromhex({pickled!r}))
assert config.__name__ == "VisionSAERunnerConfig" and entry.name == "codebook"
check_sae_lens(); check_transformer_lens()
""",
    "probing for sae_lens": """
import taxolens
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
spec = find_spec("sae_lens")
assert type(spec.loader) is SourceFileLoader and spec.loader.get_source("sae_lens")
assert find_spec("sae_lens.registry") is not None  # which imports the package
check_sae_lens(); check_transformer_lens()
import sae_lens
assert "exec_module" not in vars(sae_lens.__spec__.loader)
""",
    "without garbage collection": """
import gc, taxolens
gc.collect()
before = sum(each["collections"] for each in gc.get_stats())
import sae_lens, transformer_lens
assert sum(each["collections"] for each in gc.get_stats()) - before < 20  # else hundreds
assert gc.isenabled()
""",
    "reloading": """
import importlib, taxolens, transformer_lens
importlib.reload(transformer_lens)
importlib.reload(taxolens)
check_transformer_lens()
import sae_lens
check_sae_lens()
import sys
assert len([f for f in sys.meta_path if type(f).__module__.startswith("taxolens")]) == 2
""",
    "an import that fails": """
import sys, taxolens, traceback, pathlib, tempfile
stub = pathlib.Path(tempfile.mkdtemp())
(stub / "sae_lens").mkdir()
(stub / "sae_lens" / "__init__.py").write_text("import transformer_lens\\nraise OSError('no disk')")
sys.path.insert(0, str(stub))
try:
    import sae_lens
except OSError as error:
    text = "".join(traceback.format_exception(error))
    assert text.endswith("OSError: no disk\\n") and "# the library's own import" in text, text
else:
    raise AssertionError
assert loaded("sae_lens", "taxolens.registry.architectures.mp") == []
check_transformer_lens()
sys.path.remove(str(stub)); sys.path_importer_cache.clear()
import sae_lens
check_sae_lens()
""",
    "an error of ours": """
import taxolens, warnings
from taxolens.plugin import builtin
builtin.ARCHITECTURES["broken"] = "no_such_module:BROKEN"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sae_lens
found = [str(w.message) for w in caught if "taxolens" in str(w.message)]
assert len(found) == 1, found
assert found[0].startswith("taxolens could not register with sae_lens: ModuleNotFoundError"), found
for attempt in range(2):
    try:
        len(taxolens.ARCHITECTURES)
    except ModuleNotFoundError as error:
        assert "no_such_module" in str(error)
    else:
        raise AssertionError
del builtin.ARCHITECTURES["broken"]
assert "mp" in taxolens.ARCHITECTURES
check_sae_lens(); check_transformer_lens()
""",
    "taxolens, while another thread imports sae_lens": """
import sys, threading, time
thread = threading.Thread(target=lambda: __import__("sae_lens"), daemon=True)
thread.start()
while "sae_lens" not in sys.modules:
    time.sleep(0.001)
import taxolens
assert sys.modules["sae_lens"].__spec__._initializing
thread.join()
deadline = time.monotonic() + 60
while time.monotonic() < deadline:  # that thread does not wait for the registration
    try:
        check_sae_lens(); check_transformer_lens()
        break
    except (AssertionError, KeyError):
        time.sleep(0.05)
check_sae_lens(); check_transformer_lens()
""",
    "threads": """
import threading, time
errors = []
def attempt(code):
    try:
        start.wait()
        exec(code, {{}})
    except BaseException as error:
        errors.append((code, repr(error)))
use = "; from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as r; assert 'mp' in r"
codes = [  # each begins with sae_lens: a part of it, or transformer_lens, two threads cannot import
    "import taxolens, sae_lens" + use,
    "import taxolens, sae_lens" + use,
    "import taxolens; assert 'mp' in taxolens.ARCHITECTURES" + use,
    "import taxolens; assert 'lch_height' in taxolens.EVALUATORS",
    "import taxolens; assert 'cifar100' in taxolens.TAXONOMIES",
    "import taxolens, sae_lens" + use,
    "import taxolens; assert len(taxolens.LOADERS) >= 0",
]
start = threading.Barrier(len(codes))
threads = [threading.Thread(target=attempt, args=(code,), daemon=True) for code in codes]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(120)
assert not any(thread.is_alive() for thread in threads), "deadlock"
assert errors == [], errors
check_sae_lens(); check_transformer_lens()
""",
}
PLUGIN_ORDERS = {
    "a plugin, tables first": "import taxolens; len(taxolens.EVALUATORS); import sae_lens",
    "a plugin, taxolens first": "import taxolens; import sae_lens",
    "a plugin, sae_lens first": "import sae_lens; import taxolens",
    "a plugin, transformer_lens first": "import taxolens; import transformer_lens; import sae_lens",
    # Imported by hand it is in the middle of that when plugins are loaded: the next look finds it.
    "a plugin, itself first": "import taxolens_example_plugin, taxolens; len(taxolens.EVALUATORS)",
}
FIRST_IMPORTS = [
    "taxolens.registry.architectures.mp",
    "taxolens.registry.architectures.parts.forest",
    "taxolens.hooks.models.families.dinov2",
    "taxolens.hooks.models.bridge",
    "taxolens.hooks.models.hooked_module",
    "taxolens.plugin.sae_lens_bridge",
    "taxolens.plugin.transformer_lens_bridge",
    "taxolens.plugin.manager",
]


def shown_names(package: str) -> dict[str, str]:
    """What a type checker sees in a package (`if TYPE_CHECKING`): name -> its module."""
    found = {}
    for node in ast.walk(ast.parse(Path(import_module(package).__file__ or "").read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                place = f"{package}.{line.module}" if line.level else str(line.module)
                found |= {alias.name: place for alias in line.names}
    return found


# One of every module that the names of `taxolens` come from.
FIRST_NAMES = list({place: name for name, place in shown_names("taxolens").items()}.values())


def lazy_packages() -> list[str]:
    files = [ROOT / "__init__.py", *ROOT.glob("[hpr]*/**/__init__.py")]
    relative = [
        path.parent.relative_to(ROOT).parts for path in files if "lazy_names(" in path.read_text()
    ]
    return [".".join(["taxolens", *parts]) for parts in relative]


def test_lazy_packages_are_found() -> None:
    assert {"taxolens", "taxolens.hooks.images", "taxolens.plugin.study"} <= set(lazy_packages())


@pytest.mark.parametrize("package", lazy_packages())
def test_lazy_names_exist_and_type_checkers_see_the_same(package: str) -> None:
    module, shown = import_module(package), shown_names(package)
    for name, place in shown.items():
        assert getattr(module, name) is getattr(import_module(place), name)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(shown) <= set(module.__all__) <= set(dir(module))
    if package == "taxolens":
        assert set(shown) == set(module.__all__)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> script."""
    saved = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = CODEBOOK.training_config_class(d_in=4, d_sae=8, k=2)
    CODEBOOK.training_class(config).save_inference_model(saved)
    site = tmp_path_factory.mktemp("site")
    source = ROOT / "tests" / "third_party" / "taxolens_example_plugin.py"
    (site / source.name).write_text(source.read_text())
    info = site / "taxolens_example_plugin-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: taxolens-example-plugin\nVersion: 0.1\n"
    )
    (info / "entry_points.txt").write_text("[taxolens]\nexample_plugin = taxolens_example_plugin\n")
    given = {
        "saved": str(saved),
        "pickled": pickle.dumps([VisionSAERunnerConfig, CODEBOOK]).hex(),
        "site": str(site),
    }
    scenarios = {name: CHECK + code.format(**given) for name, code in SCENARIOS.items()}
    for name, code in PLUGIN_ORDERS.items():
        scenarios[name] = "\n".join([CHECK, THIRD_PARTY.format(**given), code, THIRD_PARTY_CHECK])
    for module in FIRST_IMPORTS:
        scenarios[module] = f"{CHECK}\nimport {module}\ncheck_sae_lens()\ncheck_transformer_lens()"
    for name in FIRST_NAMES:
        scenarios[name] = f"{CHECK}\nfrom taxolens import {name}\ncheck_sae_lens()"
    return scenarios


@pytest.mark.parametrize(
    "scenario",
    [
        *SCENARIOS,
        *PLUGIN_ORDERS,
        *FIRST_IMPORTS,
        *FIRST_NAMES,
    ],
)
def test_scenario(forks: Forks, scenarios: dict[str, str], scenario: str) -> None:
    done = forks.run(scenarios[scenario])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_every_library_has_a_table() -> None:
    assert sorted(registration.LIBRARIES) == ["sae_lens", "transformer_lens"]
    assert set(registration.TABLES) == {
        name for name in vars(builtin) if name.startswith("reg")
    } | {"register_loaders"}

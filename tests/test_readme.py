"""README: its plugin is run, and its example and make targets exist; `test_docs.py` checks the rest."""

import re
import types
from pathlib import Path

import pytest
import taxolens

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_plugin_registers_and_measures() -> None:
    (source,) = [block for block in python_blocks() if "hookimpl" in block]
    module = types.ModuleType("readme_plugin")
    exec(source, vars(module))
    registered: list[type[taxolens.Evaluator]] = []
    module.register_evaluators(registered.append)
    taxonomy = taxolens.Taxonomy.from_edges([("thing", "cat"), ("thing", "dog")])
    context = taxolens.EvaluationContext(taxonomy=taxonomy, n_images=2, d_in=1, d_sae=2)
    evaluator = registered[0](context)
    import torch

    labels = torch.tensor([0, 1])
    batch = taxolens.EvaluationBatch(
        x=torch.zeros(2, 1),
        z=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        labels=labels,
        shuffled_labels=labels,
        index=labels,
        is_fit=torch.tensor([True, False]),
    )
    context.update(batch)
    assert evaluator.compute() == {"mean": 0.5}


def test_the_example_names_what_exists() -> None:
    (source,) = [block for block in python_blocks() if "runner.run()" in block]
    compile(source, "README.md", "exec")
    for name in re.findall(r"taxolens\.(\w+)", source):
        assert hasattr(taxolens, name), name
    fields = set(re.findall(r"(\w+)=", source.split("VisionSAERunnerConfig(")[1].split("))\n")[0]))
    known = {*taxolens.VisionSAERunnerConfig.__dataclass_fields__, "d_in", "d_sae", "k"}
    assert fields <= known, fields - known


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)

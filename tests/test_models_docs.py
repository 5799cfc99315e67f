"""docs/models.md: its section on splicing is run, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the section's blocks define, in one namespace."""
    section = PAGE.split("## Splicing, ablating and steering\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("docs"))
        for block in blocks:
            exec(block, names)
    assert len(blocks) == 3
    return names


def by_hand(ran: dict[str, Any], change: Any) -> torch.Tensor:
    """The logits of Hugging Face's model with the class token after the third block changed."""
    from taxolens.plugin import demo_assets
    from transformers import AutoModelForImageClassification

    plain = AutoModelForImageClassification.from_pretrained(demo_assets.model_path()).eval()

    def hook(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([change(output[:, :1]), output[:, 1:]], dim=1)

    plain.dinov2.encoder.layer[2].register_forward_hook(hook)
    with torch.no_grad():
        return plain(ran["pixels"]).logits


def test_splicing_changes_the_class_token_alone(ran: dict[str, Any]) -> None:
    sae = ran["sae"]
    assert sae.cfg.metadata.tokens == "class"
    torch.testing.assert_close(ran["clean"], by_hand(ran, lambda x: x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ran["spliced"], by_hand(ran, sae), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ran["spliced"], ran["clean"], atol=1e-2)
    assert not torch.allclose(ran["after"][:, 0], ran["before"][:, 0], atol=1e-2)


@pytest.mark.parametrize("edit", ["ablated", "steered"])
def test_one_latent_changes_by_what_was_asked(ran: dict[str, Any], edit: str) -> None:
    sae, latent = ran["sae"], ran["latent"]

    def change(x: torch.Tensor) -> torch.Tensor:
        own = sae.encode(x)[..., latent : latent + 1]
        by = -own if edit == "ablated" else torch.full_like(own, 5)
        return x + by * sae.W_dec[latent]

    assert not torch.allclose(ran[edit], ran["clean"], atol=1e-2)
    torch.testing.assert_close(ran[edit], by_hand(ran, change), rtol=1e-3, atol=1e-3)

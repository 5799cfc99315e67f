"""Every vision model class of the installed transformers, and a model of each family of timm, on trial.

    python benchmarks/conformance.py run [--only REGEX] [--output FILE]
    python benchmarks/conformance.py write

`run` builds each class tiny from its config with random weights, saves it, and takes it through taxolens:
load, hook points, token counts at two sizes, equality with transformers' own hidden states and output, and
three steps of training at its last block. Each model passes, or is refused in one sentence; anything else
is a fault. Results are stored in docs/results/conformance.json. `write` writes the table of docs/models.md,
between the markers `<!-- conformance -->` and `<!-- /conformance -->`, from that file. Where timm cannot be
imported, its models are left out.

A vision model class is one that transformers exports, whose main input is `pixel_values`, that takes no
other input by force and that has a config of its own; beside these the models of two towers, of which
taxolens takes the vision tower.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
STORED = ROOT / "docs" / "results" / "conformance.json"
PAGE = ROOT / "docs" / "models.md"
BLOCK = re.compile(r"<!-- conformance -->\n.*?<!-- /conformance -->", re.DOTALL)
IMAGE_SIZE = 64
LARGEST = 70_000_000  # parameters of a model that is tried
STEPS, BATCH = 3, 16

WIDTH = re.compile(
    r"((hidden|embed|embedding|neck_hidden|fusion_hidden|head_hidden|decoder_hidden|output|mask_feature"
    r"|feature|intermediate|ffn|mlp|projection|bottleneck)_(size|dim|channels)|d_model|.*_ffn_dim"
    r"|.*_hidden_size|.*_intermediate_size|dim_feedforward)$"
)
WIDTHS = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "neck_hidden_sizes")
HEADS = re.compile(r"((num|n)_.*heads|.*_attention_heads|num_heads)$")
LAYERS = re.compile(r"((num|n)_.*layers|.*_layers|depth)$")
SIDES = re.compile(r"(image_size|pretrain_image_size|input_size)$")
MASKED = ("ForPreTraining", "ForMaskedImageModeling")
SKIPPED = re.compile(r"Timm|TextModel$")  # timm's are rows of their own
MOST_PARAMETERS = 150_000_000  # of timm's models, which have no tiny configs
SMALLER: dict[str, dict[str, Any]] = {
    # timm's module -> what its smallest model is created with: a few blocks, or images at which all its
    # activations together take less than 7 GB
    "deepseek_vit": {"depth": 2, "pretrained_cfg_overlay": {"input_size": (3, 224, 224)}},
    "gemma4_vit": {"depth": 2, "pretrained_cfg_overlay": {"input_size": (3, 192, 192)}},
    **{
        module: {"pretrained_cfg_overlay": {"input_size": (3, side, side)}}
        for module, side in (("hieradet_sam2", 256), ("nasnet", 192), ("qwen3_vit", 256))
    },
}
SMALL = re.compile(r"atto|femto|pico|nano|micro|mini|tiny|xx?s|_[smt]\d*(_|$)|small|18|_?0(_|$)")
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # config class -> fields, where the rules above do not give a model that can be run
    "BeitConfig": {
        "out_indices": [1, 2, 3, 4],
        "out_features": [f"stage{i}" for i in range(1, 5)],
        "num_hidden_layers": 4,
    },
    "EfficientNetConfig": {"hidden_dim": 384},  # a product of the other widths
    "HieraConfig": {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}


# Building ------------------------------------------------------------------------------------------


def model_classes(only: str = ".*") -> dict[str, list[type[Any]]]:
    """Name of the config class -> the vision model classes of matching names that have this config."""
    found: dict[str, list[type[Any]]] = {}
    for name, module in sorted(transformers._class_to_module.items()):
        if "modeling_" not in module or not re.fullmatch(only, name):
            continue
        kind = getattr(transformers, name)
        if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
            continue
        if kind.config_class is None or name.endswith("PreTrainedModel") or SKIPPED.search(name):
            continue
        if _takes_images_alone(kind) or _has_two_towers(kind):
            found.setdefault(kind.config_class.__name__, []).append(kind)
    return found


def _takes_images_alone(kind: type[Any]) -> bool:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    forced = {p.name for p in parameters if p.default is p.empty and p.kind in (0, 1)}
    return kind.main_input_name == "pixel_values" and forced <= {"pixel_values"}


def _has_two_towers(kind: type[Any]) -> bool:
    towers = {"vision_config", "text_config"} <= {*kind.config_class.sub_configs}
    return towers and hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")


def tiny_config(config_class: type[Any], *, widths: bool = True, layers: bool = True) -> Any:
    """The default config with fewer and narrower layers, for images of 64 pixels."""
    fields = config_class().to_dict()
    _shrink(fields, widths=widths, layers=layers)
    fields |= EXCEPTIONS.get(config_class.__name__, {})
    return config_class.from_dict(fields)


def _shrink(fields: dict[str, Any], *, widths: bool, layers: bool) -> None:
    n_features = len(fields.get("out_indices") or fields.get("out_features") or ())
    if layers and n_features:
        fields["out_indices"] = list(range(1, n_features + 1))
        fields["out_features"] = [f"stage{i}" for i in fields["out_indices"]]
    for name, value in fields.items():
        if isinstance(value, dict) and value.get("model_type") == "timm_backbone":
            fields[name] = resnet(value["out_indices"])
        elif isinstance(value, dict) and "archirecture" in value:  # EdgeTAM's default, misspelt
            value["architecture"] = value.pop("archirecture")
        elif isinstance(value, dict) and not name.startswith(("id2label", "label2id")):
            _shrink(value, widths=widths, layers=layers)
        elif SIDES.match(name) and value:
            fields[name] = _each(value, lambda _, v: min(v, IMAGE_SIZE))
        elif name == "image_embedding_size":
            fields[name] = IMAGE_SIZE // 16
        elif name == "window_size":
            fields[name] = _each(value, lambda _, v: min(v, 2))
        elif name == "patch_size":
            fields[name] = _each(value, lambda _, v: min(v, 16))
        elif widths and WIDTH.match(name):
            fields[name] = _each(value, lambda _, v: min(v, 32))
        elif widths and HEADS.match(name):
            fields[name] = _each(value, lambda _, v: min(v, 2))
        elif widths and name in WIDTHS:
            fields[name] = _each(value, lambda i, v: min(v, 16 * (i + 1)))
        elif layers and (LAYERS.match(name) or name == "depths"):
            fields[name] = _each(value, lambda _, v: min(v, max(2, n_features)))
        elif layers and name in ("width_coefficient", "depth_coefficient"):
            fields[name] = 0.3


def resnet(stages: list[int]) -> dict[str, Any]:
    """The config of a tiny backbone, in the place of one of timm."""
    fields = {"hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "embedding_size": 16}
    return transformers.ResNetConfig(**fields, out_indices=stages).to_dict()


def _each(value: Any, change: Callable[[int, int], int]) -> Any:
    if isinstance(value, list | tuple):
        return [change(i, v) if type(v) is int else v for i, v in enumerate(value)]
    return change(0, value) if type(value) is int else value


def built(kind: type[Any]) -> nn.Module:
    """A model of the class, as small as its config allows, in evaluation mode.

    Raises:
        Exception: what the last attempt raised; all that can be built, but run on no images, is
            given back nevertheless.
    """
    kept, reason = None, None
    for widths, layers in ((True, True), (True, False), (False, True), (False, False)):
        try:
            config = tiny_config(kind.config_class, widths=widths, layers=layers)
            with torch.device("meta"):
                n_parameters = sum(p.numel() for p in kind(config).parameters())
            if n_parameters > LARGEST:
                reason = reason or ValueError(f"{n_parameters:,} parameters")
                continue
            torch.manual_seed(0)
            model = kind(config).eval()
            with torch.no_grad():
                for parameter in filter(
                    torch.numel, model.parameters()
                ):  # nothing stays zero (LayerScale, biases)
                    fan_in = parameter.numel() / len(parameter) if parameter.ndim > 1 else 9
                    parameter.add_(torch.randn_like(parameter), alpha=0.3 / math.sqrt(fan_in))
        except Exception as error:
            reason = reason or error
            continue
        kept = kept or model
        with contextlib.suppress(Exception), torch.no_grad():
            tower(model)(pictures(size_of(model)))
            return model
    if kept is None:
        raise reason or ValueError("cannot be built")
    return kept


def tower(model: nn.Module) -> Any:
    """What taxolens taps of a model: of two towers the vision tower, of masked ones the encoder."""
    if type(model).__name__.endswith(MASKED) and hasattr(model, "decoder"):
        return model.base_model
    from taxolens.hooks.models.towers import tower_of

    return tower_of(model) or model


def size_of(model: Any) -> tuple[int, int]:
    """The image size in the config of a model or of its vision part; 64 where there is none."""
    waiting = [model.config.to_dict()]
    for fields in waiting:
        size = fields.get("image_size")
        if size:
            return (size, size) if isinstance(size, int) else (size[0], size[1])
        waiting += [v for k, v in fields.items() if isinstance(v, dict) and "text" not in k]
    return 224, 224


def pictures(size: tuple[int, int], n: int = 2, channels: int = 3) -> Tensor:
    """Noise (n, channels, height, width)."""
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(1))


# Trial ---------------------------------------------------------------------------------------------


def trial(name: str, plain: Any, make: Callable[[], Any]) -> dict[str, Any]:
    """One row: what taxolens makes of a model.

    Args:
        name: of the class.
        plain: the model as its own library has it.
        make: loads the same model with taxolens.
    """
    from taxolens.hooks.models.points import firings
    from taxolens.registry.errors import TaxolensError

    row: dict[str, Any] = {"model": name, "family": None, "hook_points": None, "tokens": []}
    try:
        model = make()
        row["family"] = model.family
        fired = firings(model)
        row["hook_points"] = len(fired)
        row["refused_points"] = len(getattr(model, "refused", {}))
        row |= _compared(model, plain, list(fired))
        _trained(model, row.pop("hook"))
    except TaxolensError as error:
        return row | {"verdict": "refused", "reason": sentence(error, name)}
    except Fault as fault:
        return row | {"verdict": "FAULT", "reason": str(fault)}
    except Exception as error:
        return row | {
            "verdict": "FAULT",
            "reason": f"{type(error).__name__}: {sentence(error, name)}",
        }
    return row | {"verdict": "passes"}


class Fault(Exception):
    """A wrong number or shape."""


def sentence(error: Exception, name: str) -> str:
    """The message on one line, without the folder that the model was saved in."""
    text = " ".join(str(error).split())
    return re.sub(rf"[^\s'\"]*/{re.escape(name)}\b", name, text)


def _compared(model: Any, plain: Any, names: list[str]) -> dict[str, Any]:
    """Activations against transformers' own; shapes against what taxolens says of them."""
    from taxolens.hooks.models.layout import other_sizes
    from taxolens.hooks.models.load import hook_d_in, hook_n_tokens, run_to_hooks
    from taxolens.hooks.models.tokens import tokens_per_image

    size = tuple(model.cfg.image_size)
    images = pictures(size, channels=model.cfg.n_channels)
    activations = run_to_hooks(model, images, names)
    for point, value in activations.items():
        expected = (2, hook_n_tokens(model, point), hook_d_in(model, point, size))
        if value.ndim == 3 and tuple(value.shape) != expected:
            raise Fault(f"{point} has {tuple(value.shape)} for {expected}")
    blocks = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    blocks = [point for point in blocks if model.aliases.get(point, point) in activations]
    tokens = [p for p in names if activations[p].ndim == 3 and activations[p].shape[1] > 1]
    hook = blocks[-1] if blocks else (tokens or names)[-1]
    sizes: list[int] = []
    for tried in (size, *other_sizes(size)):
        taken = pictures(tried, channels=model.cfg.n_channels)
        with torch.no_grad():
            try:
                own(plain, taken)
            except Exception:  # it takes one size alone
                continue
        value = run_to_hooks(model, taken, [hook])[hook]
        said = {hook_n_tokens(model, hook, tried), tokens_per_image(model, "all", tried, hook)}
        if {value.shape[1]} != said or len(value) != 2:
            raise Fault(f"{hook} has {tuple(value.shape)} where {said} tokens were counted")
        sizes.append(value.shape[1])
        if len(sizes) == 2:
            break
    with torch.no_grad():
        output = own(plain, images)
        if not _equal(model(images), _main(output)):
            raise Fault("the output is not that of the model itself")
    states = _hidden_states(output)
    found = [state for state in states if _is_among(state, activations.values())]
    if blocks and states and not found:
        raise Fault("none of the hidden states is at a hook point")
    row = {"tokens": sizes, "hidden_states": [len(found), len(states)], "hook": hook}
    if model.cfg.n_layers and not blocks:
        last = model.aliases.get(name := f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", name)
        why = getattr(model, "refused", {}).get(last, "they never fire")
        row["reason"] = f"but at its blocks, where hook points are refused: {why}"
    return row


def own(plain: Any, images: Tensor) -> Any:
    """The output of the library's own model, with its hidden states where it gives them."""
    options: dict[str, Any] = {}
    if type(plain).__name__ == "ViTMAEModel":  # unmasked, and in order
        plain.config.mask_ratio = 0.0
        n_patches = images[0, 0].numel() // plain.config.patch_size**2
        options["noise"] = torch.arange(n_patches).float().repeat(len(images), 1)
    parameters = inspect.signature(plain.forward).parameters
    if "interpolate_pos_encoding" in parameters and tuple(images.shape[-2:]) != size_of(plain):
        options["interpolate_pos_encoding"] = True
    if hasattr(plain, "config"):
        with contextlib.suppress(TypeError, ValueError):  # where it has no such option
            return plain(images, output_hidden_states=True, **options)
    return plain(images, **options)


def _main(output: Any) -> Any:
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    return output[0] if isinstance(output, tuple) else output


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, dict):  # of a head that has no logits
        return any(_equal(one, value) for value in other.values() if isinstance(value, Tensor))
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    return _close(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding: to 1e-4 of the largest value."""
    if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
        return False
    one, other = one.nan_to_num().double(), other.nan_to_num().double()
    scale = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, 0.0, 1e-4 * scale)


def _hidden_states(output: Any) -> list[Tensor]:
    states: list[Tensor] = []
    for name in ("hidden_states", "encoder_hidden_states", "vision_hidden_states"):
        found = getattr(output, name, None)
        if isinstance(found, tuple | list):
            states += [state for state in found if isinstance(state, Tensor)]
    return states


def _is_among(state: Tensor, activations: Any) -> bool:
    """Whether a hidden state, with its positions joined, is one of the activations."""
    forms = [state]
    if state.ndim == 4:
        forms = [state.flatten(2).mT, state.flatten(1, 2)]
    return any(_close(value, form) for form in forms for value in activations)


def _trained(model: Any, hook: str) -> None:
    """Three steps of an SAE at the hook point, on pictures of noise."""
    import datasets
    import numpy as np
    from PIL import Image
    from sae_lens import LoggingConfig, TopKTrainingSAEConfig
    from taxolens import VisionSAERunnerConfig, VisionSAETrainingRunner
    from taxolens.hooks.models.load import hook_d_in
    from taxolens.hooks.models.tokens import tokens_per_image
    from taxolens.registry.errors import ConfigError

    draw = np.random.default_rng(0)
    noise = [Image.fromarray(draw.integers(0, 256, (40, 40, 3)).astype("uint8")) for _ in range(16)]
    columns = {"image": noise, "label": [0] * 8 + [1] * 8}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    height, width = model.cfg.image_size
    size = height if height == width else None
    d_in = hook_d_in(model, hook, model.cfg.image_size)
    tokens = "patch"
    try:
        tokens_per_image(model, tokens, model.cfg.image_size, hook)
    except ConfigError:  # none with the prefix tokens of the model
        tokens = "all"
    cfg = VisionSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=2 * d_in, k=2),
        model_name=model.cfg.model_name,
        dataset_path="noise",
        hook_name=hook,
        tokens=tokens,
        image_size=size,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=4,
        n_batches_in_buffer=2,
        n_batches_for_norm_estimate=2,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    images = datasets.Dataset.from_dict(columns, features=features)
    sae = VisionSAETrainingRunner(cfg, override_model=model, override_dataset=images).run()
    if not all(p.isfinite().all() for p in sae.parameters()):
        raise Fault("the trained SAE is not finite")


# Running -------------------------------------------------------------------------------------------


def of_transformers(only: str) -> Iterator[dict[str, Any]]:
    """The rows of transformers."""
    from taxolens.hooks.models.load import from_module, load_vision_model
    from taxolens.registry.errors import ConfigError

    for config_name, kinds in model_classes(only).items():
        for kind in kinds:
            name = kind.__name__
            try:
                plain = built(kind)
            except Exception as error:
                reason = f"{type(error).__name__}: {sentence(error, name).split('. ')[0]}"
                yield {
                    "model": name,
                    "config": config_name,
                    "verdict": "not built",
                    "reason": reason,
                }
                continue

            def make(plain: Any = plain, name: str = name) -> Any:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / name
                    plain.save_pretrained(path)
                    try:
                        return load_vision_model(path)
                    except ConfigError as error:  # a part of a model, that has no checkpoints
                        if "its config cannot be read" not in str(error):
                            raise
                return from_module(plain, model_name=name)

            yield {**trial(name, tower(plain), make), "config": config_name}


def of_timm(only: str) -> Iterator[dict[str, Any]]:
    """The rows of timm: of each of its modules a model with few parameters."""
    try:
        import timm  # type: ignore[import-not-found]  # an extra
    except ImportError:
        return
    from taxolens.hooks.models.load import from_module

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names or not re.fullmatch(only, f"timm: {module}"):
            continue
        few = [name for name in names if SMALL.search(name)][:6] or names[:6]
        options = SMALLER.get(module, {})
        with torch.device("meta"):
            models = {name: timm.create_model(name, **options) for name in few}
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        name = min(sizes, key=sizes.__getitem__)
        if sizes[name] > MOST_PARAMETERS:
            reason = f"its smallest model has {sizes[name]:,} parameters"
            config = f"timm: {module}"
            yield {"model": name, "config": config, "verdict": "not built", "reason": reason}
            continue
        torch.manual_seed(0)
        plain = timm.create_model(name, **options).eval()
        torch.manual_seed(0)
        again = timm.create_model(name, **options).eval()
        row = trial(name, plain, lambda again=again: from_module(again))
        yield {**row, "config": f"timm: {module}"}


def run(only: str = ".*") -> list[dict[str, Any]]:
    """All rows, in the order of their configs."""
    rows = []
    for rows_of in (of_transformers, of_timm):
        start = time.perf_counter()
        for row in rows_of(only):
            seconds, start = time.perf_counter() - start, time.perf_counter()
            print(
                f"{seconds:6.1f} s",
                row["model"],
                row["verdict"],
                row.get("reason", ""),
                file=sys.__stdout__,
                flush=True,
            )
            rows.append(row)
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, libraries print and log nothing."""
    sink, verbosity = io.StringIO(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(sink),
            contextlib.redirect_stdout(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(verbosity)


# Table ---------------------------------------------------------------------------------------------


def table(stored: dict[str, Any]) -> str:
    """The table of docs/models.md."""
    rows = stored["models"]
    counts = {
        v: sum(row["verdict"] == v for row in rows)
        for v in ("passes", "refused", "FAULT", "not built")
    }
    summary = (
        f"transformers {stored['transformers']}, timm {stored['timm'] or 'not installed'}: of {len(rows)} classes "
        f"{counts['passes']} pass, {counts['refused']} are refused, {counts['FAULT']} are at fault; "
        f"{counts['not built']} could not be built tiny from their config."
    )
    lines = [
        "| model | family | hook points | tokens | hidden states | verdict |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join([summary, "", *lines])


def _cells(row: dict[str, Any]) -> list[str]:
    verdict = row["verdict"] + (f": {row['reason']}" if row.get("reason") else "")
    found, of = row.get("hidden_states") or (0, 0)
    points = row.get("hook_points")
    return [
        row["model"],
        row.get("family") or "–",
        "–" if points is None else str(points),
        ", ".join(map(str, row.get("tokens") or ())) or "–",
        f"{found} of {of}" if of else "–",
        verdict.replace("|", "/").replace("<", "‹").replace(">", "›"),
    ]


def write(text: str, stored: dict[str, Any]) -> str:
    """A page with its table made again from the stored rows."""
    made = f"<!-- conformance -->\n\n{table(stored)}\n\n<!-- /conformance -->"
    return BLOCK.sub(lambda _: made, text)


def stored_text(stored: dict[str, Any]) -> str:
    """The rows as JSON, each on one line."""
    head = json.dumps({**stored, "models": []})[:-2]
    return head + "\n" + ",\n".join(map(json.dumps, stored["models"])) + "\n]}\n"


def versions() -> dict[str, str | None]:
    """Of the libraries whose models were tried; None where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"transformers": transformers.__version__, "timm": None}
    with contextlib.suppress(PackageNotFoundError):
        found["timm"] = version("timm")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "--only",
        default=".*",
        help="a regular expression of class names, or of 'timm: module', whose rows replace those stored",
    )
    running.add_argument("--output", default=str(STORED))
    commands.add_parser("write")
    args = parser.parse_args()
    if args.command == "run":
        torch.set_num_threads(1)
        with quiet():
            rows = run(args.only)
        file = Path(args.output)
        file.parent.mkdir(exist_ok=True)
        if args.only != ".*" and file.exists():
            kept = {row["model"]: row for row in json.loads(file.read_text())["models"]}
            rows = [*(kept | {row["model"]: row for row in rows}).values()]
        file.write_text(stored_text({**versions(), "models": rows}))
    if args.command == "write":
        PAGE.write_text(write(PAGE.read_text(), json.loads(STORED.read_text())))


if __name__ == "__main__":
    main()

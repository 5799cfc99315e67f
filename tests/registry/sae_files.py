"""SAE files in the layouts of other libraries, with the latents that those libraries give.

Each maker writes what the library's own save function writes (keys, forms, names of files and
folders) and states the library's arithmetic in a few lines of torch, apart from our readers.
"""

import gzip
import json
import pickle
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

D_IN, D_SAE, ROWS = 12, 40, 24
CLIP_B = "openai/clip-vit-base-patch16"


@dataclass
class SAEFile:
    """A file, what a user must say beside it, and what it gives for `x` (ROWS, D_IN)."""

    path: Path
    x: Tensor
    z: Tensor
    x_hat: Tensor
    loader: str
    architecture: str
    given: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)


class Numbers:
    """Weights whose latents fire at about a quarter of the rows, never near a threshold or a tie."""

    def __init__(self, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randn(ROWS, D_IN, generator=g) * 2 + 0.5
        self.enc = torch.randn(D_IN, D_SAE, generator=g) / D_IN**0.5
        self.dec = torch.randn(D_SAE, D_IN, generator=g)
        self.b_enc = torch.randn(D_SAE, generator=g) * 0.3 - 0.5
        self.b_dec = torch.randn(D_IN, generator=g) * 0.4
        self.threshold = torch.rand(D_SAE, generator=g) * 0.5 + 0.1
        self.gate, self.mag, self.r_mag = torch.randn(3, D_SAE, generator=g) * 0.3
        self.points = torch.randn(17, D_IN, generator=g)
        self.mix = torch.randn(D_SAE, 17, generator=g)
        self.relax = torch.randn(D_SAE, D_IN, generator=g)
        self.mean = torch.randn(D_IN, generator=g)


def topk(pre: Tensor, k: int) -> Tensor:
    values, places = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, places, values)


def layer_norm(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    mu = x.mean(dim=-1, keepdim=True)
    std = (x - mu).std(dim=-1, keepdim=True)
    return (x - mu) / (std + 1e-5), lambda y: y * std + mu


def constant_norm(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return x * factor, lambda y: y / factor


NORMALIZATIONS = {
    "batch": lambda x: (x, lambda y: y),  # which Prisma has not
    "none": lambda x: (x, lambda y: y),
    "layer_norm": layer_norm,
    "constant_norm_rescale": constant_norm,
}


@contextmanager
def module(name: str, **members):
    """A module that exists while something of it is pickled."""
    parts = name.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    made = {n: types.ModuleType(n) for n in names}
    sys.modules.update(made)
    for key, value in members.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made[name], key, value)
    try:
        yield
    finally:
        for n in names:
            del sys.modules[n]


def config_class() -> type:
    return type("Config", (), {"__init__": lambda self, **fields: self.__dict__.update(fields)})


# -- ViT-Prisma ---------------------------------------------------------------------------------------

PRISMA_CFG = {
    "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "hook_point_head_index": None,
    "context_size": 50,
    "use_patches_only": False,
    "cls_token_only": True,
    "d_in": D_IN,
    "expansion_factor": 4,
    "is_transcoder": False,
    "out_hook_point_layer": 9,
    "layer_out_subtype": "hook_mlp_out",
    "architecture": "standard",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "_device": "cuda",
    "dataset_path": "/data/imagenet",
}
PRISMA_FACTS = {"hook_name": "blocks.9.hook_resid_post", "tokens": "class", "context_size": 50}


def prisma(folder: Path, kind: str, activation: str, normalize: str | None, form: str) -> SAEFile:
    n = Numbers(1)
    x, undo = NORMALIZATIONS[normalize or "layer_norm"](n.x)
    state = {"W_enc": n.enc, "W_dec": n.dec, "b_enc": n.b_enc, "b_dec": n.b_dec}
    x = x - n.b_dec
    if kind == "gated":
        state |= {"b_gate": n.gate, "b_mag": n.mag, "r_mag": n.r_mag}
        on = (x @ n.enc + n.gate > 0).float()
        z = on * (x @ (n.enc * n.r_mag.exp()) + n.mag).relu()
    else:
        pre = x @ n.enc + n.b_enc
        z = pre.relu() if activation == "relu" else topk(pre, 5).relu()
    cfg = {**PRISMA_CFG, "architecture": kind, "activation_fn_str": activation}
    cfg["activation_fn_kwargs"] = {"k": 5} if activation == "topk" else {}
    if normalize is not None:
        cfg["normalize_activations"] = normalize
    path = _write_prisma(folder, cfg, state, form)
    architecture = kind if activation == "relu" else "topk"
    return SAEFile(
        path, n.x, z, undo(z @ n.dec + n.b_dec), "prisma", architecture, {}, PRISMA_FACTS
    )


def _write_prisma(folder: Path, cfg: dict, state: dict, form: str) -> Path:
    if form == "hub":
        (folder / "config.json").write_text(json.dumps(cfg))
        torch.save(torch.rand(D_SAE), folder / "n_images_2600_log_feature_sparsity.pt")
        torch.save(state, folder / "n_images_2600.pt")
        return folder
    if form == "legacy":
        path = folder / "final.pt"
        old = {k: cfg[k] for k in ("model_name", "hook_point_layer") if k in cfg}
        old |= {"hook_point": "blocks.9.hook_resid_post", "dtype": torch.float32}
        old |= {k: v for k, v in cfg.items() if k == "normalize_activations"}
        torch.save({"config": old, "autoencoder": {"state_dict": state}}, path)
        return path
    kind = config_class()
    with module("vit_prisma.sae.config", VisionModelSAERunnerConfig=kind):
        content = {"cfg": kind(**cfg), "state_dict": state}
        path = folder / f"n_images_2600{form}"
        if form == ".pt":
            torch.save(content, path)
        elif form == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            path.write_bytes(gzip.compress(pickle.dumps(content)))
    return path


def prisma_legacy(folder: Path) -> SAEFile:
    made = prisma(folder, "standard", "relu", "none", "legacy")
    made.metadata = {"hook_name": "blocks.9.hook_resid_post"}
    return made


def prisma_transcoder(folder: Path, skip: bool, d_out: int = D_IN) -> SAEFile:
    n = Numbers(2)
    decoder, b_out = torch.randn(D_SAE, d_out), torch.randn(d_out)
    state = {"W_enc": n.enc, "W_dec": decoder, "b_enc": n.b_enc, "b_dec": n.b_dec}
    state["b_dec_out"] = b_out
    z = ((n.x - n.b_dec) @ n.enc + n.b_enc).relu()
    x_hat = z @ decoder + b_out
    if skip:
        state["W_skip"] = torch.randn(D_IN, D_IN)
        x_hat = x_hat + n.x @ state["W_skip"].T
    cfg = {**PRISMA_CFG, "is_transcoder": True, "normalize_activations": "none"}
    path = _write_prisma(folder, cfg, state, "hub")
    architecture = "skip_transcoder" if skip else "transcoder"
    facts = {**PRISMA_FACTS, "hook_name_out": "blocks.9.hook_mlp_out"}
    return SAEFile(path, n.x, z, x_hat, "prisma", architecture, {}, facts)


# -- saev ---------------------------------------------------------------------------------------------


def saev(folder: Path, header: dict, *, subtract: bool, act: str = "relu", **given) -> SAEFile:
    n = Numbers(3)
    state = {"W_enc": n.enc, "b_enc": n.b_enc, "W_dec": n.dec, "b_dec": n.b_dec}
    x = n.x
    if "scale" in given:
        x = (x - torch.as_tensor(given["mean"])) / given["scale"]
    pre = (x - n.b_dec if subtract else x) @ n.enc + n.b_enc
    z, architecture = pre.relu(), "standard"
    if act == "topk":
        z, architecture = topk(pre, 5), "topk"
    elif act == "threshold":
        state["activation.threshold"] = torch.tensor(0.7)
        z, architecture = torch.where(pre > 0.7, pre, 0.0), "jumprelu"
    elif act == "no threshold yet":
        state["activation.threshold"] = torch.tensor(-0.1)
        architecture = "jumprelu"
    path = folder / "sae.pt"
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    x_hat = z @ n.dec + n.b_dec
    if "scale" in given:
        x_hat = x_hat * given["scale"] + torch.as_tensor(given["mean"])
    return SAEFile(path, n.x, z, x_hat, "saev", architecture, given)


def saev_header(schema: int, activation: str | None, commit: str = "abcdef0", **cfg) -> dict:
    cfg = {"d_model": D_IN, "d_sae": D_SAE, **cfg}
    if activation is not None:
        cfg["activation"] = {"cls": activation, "params": {"top_k": 5} if "K" in activation else {}}
    return {"schema": schema, "cfg": cfg, "commit": commit, "lib": "0.0"}


OLD_SAEV = {"d_vit": D_IN, "exp_factor": 4, "sparsity_coeff": 4e-4, "ghost_grads": False, "seed": 0}


# -- overcomplete -------------------------------------------------------------------------------------


def normalize_l2(x):
    return x / (x.norm(p=2, dim=1, keepdim=True) + 1e-8)


def overcomplete_state(
    n: Numbers, kind: str, batch_norm: bool = False
) -> tuple[dict, Tensor, Tensor]:
    """State dict, dictionary (D_SAE, D_IN) and pre-activations (ROWS, D_SAE)."""
    state = {"encoder.final_block.0.weight": n.enc.T.contiguous()}
    state["encoder.final_block.0.bias"] = n.b_enc
    pre = n.x @ n.enc + n.b_enc
    if batch_norm:
        for name, value in (
            ("weight", n.threshold + 0.5),
            ("bias", n.gate),
            ("running_mean", n.mag),
        ):
            state[f"encoder.final_block.1.{name}"] = value
        state["encoder.final_block.1.running_var"] = n.r_mag.exp()
        state["encoder.final_block.1.num_batches_tracked"] = torch.tensor(7)
        pre = (pre - n.mag) / (n.r_mag.exp() + 1e-5).sqrt() * (n.threshold + 0.5) + n.gate
    if kind.startswith("RA"):
        state |= {"dictionary.W": n.mix, "dictionary.C": n.points, "dictionary.Relax": n.relax}
        rows = n.mix.relu() / (n.mix.relu().sum(dim=1, keepdim=True) + 1e-8)
        relax = n.relax * (0.9 / n.relax.norm(dim=1, keepdim=True)).clamp(max=1)
        dictionary = (rows @ n.points + relax) * torch.tensor(0.3).exp()
        state["dictionary.multiplier"] = torch.tensor(0.3)
    else:
        state |= {"dictionary._weights": n.dec, "dictionary.multiplier": torch.tensor(-0.2)}
        dictionary = normalize_l2(n.dec) * torch.tensor(-0.2).exp()
    if "Jump" in kind:
        state["thresholds"] = n.threshold.log()
    if kind == "MpSAE":
        state = {name: value for name, value in state.items() if not name.startswith("encoder")}
    return state, dictionary, pre


def overcomplete_latents(n: Numbers, kind: str, dictionary: Tensor, pre: Tensor) -> Tensor:
    if kind in ("TopKSAE", "RATopKSAE"):
        return topk(pre.relu(), 5)
    if kind == "BatchTopKSAE":
        return pre.relu() * (pre.relu() >= 0.75)
    if "Jump" in kind:
        return pre.relu() * (pre.relu() >= n.threshold.log().exp())
    z, rest = torch.zeros(ROWS, D_SAE), n.x.clone()
    for _ in range(5):
        value, place = (rest @ dictionary.T).max(dim=1)
        step = nn.functional.one_hot(place, D_SAE) * value[:, None]
        z, rest = z + step, rest - step @ dictionary
    return z


OVERCOMPLETE_GIVEN = {
    "TopKSAE": {"sae_class": "TopKSAE", "k": 5, "dictionary_normalization": "l2"},
    "BatchTopKSAE": {
        "sae_class": "BatchTopKSAE",
        "threshold": 0.75,
        "top_k": 120,
        "dictionary_normalization": "l2",
    },
    "JumpSAE": {"dictionary_normalization": "l2"},
    "MpSAE": {"sae_class": "MpSAE", "k": 5, "dictionary_normalization": "l2"},
    "RATopKSAE": {"k": 5, "delta": 0.9},
    "RAJumpSAE": {"delta": 0.9, "dictionary_normalization": "convex"},
}
OVERCOMPLETE_ARCHITECTURES = {"TopKSAE": "topk", "RATopKSAE": "topk", "MpSAE": "matching_pursuit"}


def overcomplete(folder: Path, kind: str, *, batch_norm: bool = False) -> SAEFile:
    n = Numbers(4)
    state, dictionary, pre = overcomplete_state(n, kind, batch_norm)
    path = folder / "state_dict.pth"
    torch.save(state, path)
    z = overcomplete_latents(n, kind, dictionary, pre)
    architecture = OVERCOMPLETE_ARCHITECTURES.get(kind, "jumprelu")
    given = OVERCOMPLETE_GIVEN[kind]
    return SAEFile(path, n.x, z, z @ dictionary, "overcomplete", architecture, given)


def overcomplete_module(folder: Path, kind: str, *, batch_norm: bool = False) -> SAEFile:
    """`torch.save(sae)` in evaluation mode, as overcomplete's own tests save."""
    made = overcomplete(folder, kind, batch_norm=batch_norm)
    n = Numbers(4)
    state, dictionary, _ = overcomplete_state(n, kind, batch_norm)
    classes = {name: type(name, (nn.Module,), {}) for name in ("MLPEncoder", "IdentityEncoder")}
    layer_name = "RelaxedArchetypalDictionary" if kind.startswith("RA") else "DictionaryLayer"
    layer_class, sae_class = type(layer_name, (nn.Module,), {}), type(kind, (nn.Module,), {})
    sae, layer = sae_class(), layer_class()
    for name, value in state.items():
        if name.startswith("dictionary."):
            layer.register_buffer(name.split(".")[1], value)
    layer.__dict__.update(_fused_dictionary=dictionary, delta=0.9, normalization=normalize_l2)
    if kind == "MpSAE":
        sae.encoder = classes["IdentityEncoder"]()
    else:
        sae.encoder = classes["MLPEncoder"]()
        norm = nn.BatchNorm1d(D_SAE) if batch_norm else nn.Identity()
        sae.encoder.final_block = nn.Sequential(nn.Linear(D_IN, D_SAE), norm)
        sae.encoder.final_activation = nn.ReLU()
        own = {k[8:]: v for k, v in state.items() if k.startswith("encoder.")}
        sae.encoder.load_state_dict(own)
    sae.dictionary = layer
    if "thresholds" in state:
        sae.thresholds = nn.Parameter(state["thresholds"])
    attributes = {"TopKSAE": {"top_k": 5}, "RATopKSAE": {"top_k": 5}, "MpSAE": {"k": 5}}
    attributes["BatchTopKSAE"] = {"top_k": 120, "running_threshold": torch.tensor(0.75)}
    sae.__dict__.update(attributes.get(kind, {}))
    sae.eval()
    made.path = folder / "sae.pth"
    members = {**classes, layer_name: layer_class, kind: sae_class, "normalize_l2": normalize_l2}
    with module("overcomplete.sae.all_of_it", **members):
        torch.save(sae, made.path)
    made.given = {}
    return made


# -- Universal SAE ------------------------------------------------------------------------------------


def universal_sae(folder: Path, *, with_yaml: bool = True) -> SAEFile:
    n = Numbers(5)
    mean, std = -0.03, 2.2
    raw = n.x.clone()
    n.x = (raw - mean) / (std + 1e-5)
    state, _, pre = overcomplete_state(n, "TopKSAE", batch_norm=True)
    del state["dictionary.multiplier"]
    path = folder / "weights" / "run_of_three" / "SigLIP" / "uni_SigLIP_checkpoint_29.pth"
    path.parent.mkdir(parents=True)
    content = {"epoch": 29, "model_state_dict": state, "learning_rate": 3e-4}
    torch.save({**content, "optimizer_state_dict": {"state": {0: {"step": 1}}}}, path)
    if with_yaml:
        zoo = {
            "SigLIP": {"checkpoint_path": str(path), "model_mean": mean, "model_std": std},
            "ViT": {"checkpoint_path": "elsewhere/uni_ViT_checkpoint_29.pth", "model_mean": 9.0},
        }
        said = {"global": {"standardize": True, "divide_norm": False}, "model_zoo": zoo}
        said["sae_params"] = {"top_k": 5, "dictionary_normalization": "l2"}
        (folder / "results").mkdir()
        (folder / "results" / "config.yaml").write_text(yaml.safe_dump(said))
    z = topk(pre.relu(), 5)
    x_hat = z @ normalize_l2(n.dec) * (std + 1e-5) + mean
    given = {"k": 5, "mean": mean, "std": std, "dictionary_normalization": "l2"}
    return SAEFile(path, raw, z, x_hat, "universal_sae", "topk", {} if with_yaml else given)


# -- dictionary_learning and sae-for-vlm --------------------------------------------------------------


def dictionary_learning(
    folder: Path, kind: str, *, interrupted: bool = False, vlm: bool = False, config: bool = True
) -> SAEFile:
    n = Numbers(6)
    linear = {"encoder.weight": n.enc.T, "encoder.bias": n.b_enc, "decoder.weight": n.dec.T.clone()}
    raw = {"W_enc": n.enc, "b_enc": n.b_enc, "W_dec": n.dec, "b_dec": n.b_dec}
    counts = {"k": torch.tensor(5, dtype=torch.int32), "threshold": torch.tensor(0.6)}
    factor = 3.0 if interrupted else 1.0
    b_enc, b_dec, threshold = n.b_enc * factor, n.b_dec * factor, 0.6 * factor
    pre = (n.x - b_dec) @ n.enc + b_enc
    architecture, decoder = "jumprelu", n.dec
    name = {"MatryoshkaBatchTopKSAE": "MatroyshkaBatchTopKSAE"}.get(kind, kind) if vlm else kind
    if kind == "AutoEncoder":
        norms = n.dec.norm(dim=1)
        state = {"bias": n.b_dec, **linear}
        z, architecture, decoder = pre.relu() * norms, "standard", n.dec / norms[:, None]
    elif kind == "AutoEncoderNew":
        state = {**linear, "decoder.bias": n.b_dec}
        z, architecture = (n.x @ n.enc + b_enc).relu(), "standard"
    elif kind == "AutoEncoderTopK":
        state, z, architecture = {"b_dec": n.b_dec, **counts, **linear}, topk(pre.relu(), 5), "topk"
    elif kind == "BatchTopKSAE":
        state, z = {"b_dec": n.b_dec, **counts, **linear}, pre.relu() * (pre.relu() > threshold)
    elif kind == "MatryoshkaBatchTopKSAE":
        state = {**raw, **counts, "group_sizes": torch.tensor([10, 10, 20])}
        z = pre.relu() * (pre.relu() > threshold)
    elif kind == "JumpReluAutoEncoder":
        state, pre = {**raw, "threshold": n.threshold}, n.x @ n.enc + b_enc
        z = (pre * (pre > n.threshold * factor)).relu()
    else:
        state = {"decoder_bias": n.b_dec, "r_mag": n.r_mag, "gate_bias": n.gate, "mag_bias": n.mag}
        state |= {"encoder.weight": n.enc.T, "decoder.weight": n.dec.T}
        hidden = (n.x - b_dec) @ n.enc
        z = (hidden + n.gate * factor > 0) * (n.r_mag.exp() * hidden + n.mag * factor).relu()
        architecture = "gated"
    trainer = {"dict_class": name, "trainer_class": "Trainer", "activation_dim": D_IN}
    trainer |= {"dict_size": D_SAE, "layer": 9, "lm_name": CLIP_B, "submodule_name": None}
    if "TopK" in kind:
        trainer["k"] = 5
    facts = {"model_name": CLIP_B, "layer": 9}
    if vlm:
        trainer |= {"layer": "", "lm_name": "", "submodule_name": ""}
        run = "inat_train_activations_clip-vit-large-patch14-336_11_post_mlp_residual"
        sae = {"AutoEncoder": "standard", "AutoEncoderTopK": "top_k", "BatchTopKSAE": "batch_top_k"}
        folder = folder / f"{run}_{sae.get(kind, 'matroyshka_batch_top_k')}_5_x4"
        facts = {"model_name": "openai/clip-vit-large-patch14-336"}
        facts |= {"hook_name": "blocks.11.hook_resid_post", "layer": 11}
    folder = folder / "trainer_0"
    (folder / "checkpoints").mkdir(parents=True)
    if config:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        torch.save(state, folder / "checkpoints" / "ae_600.pt")
    content = state
    if interrupted:
        content = {
            "step": 100,
            "ae": state,
            "optimizer": {},
            "config": trainer,
            "norm_factor": factor,
        }
    torch.save(content, folder / "ae.pt")
    loader = "sae_for_vlm" if vlm else "dictionary_learning"
    x_hat = z @ decoder + b_dec
    return SAEFile(folder, n.x, z, x_hat, loader, architecture, {}, facts if config else {})


# -- MSAE ---------------------------------------------------------------------------------------------


def msae(folder: Path, activation: str, *, tied: bool = False, name: str | None = None) -> SAEFile:
    n = Numbers(7)
    s = 0.37
    model = {"pre_bias": n.b_dec, "encoder": n.enc, "latent_bias": n.b_enc, "decoder": n.dec}
    model["latents_activation_frequency"] = torch.zeros(D_SAE, dtype=torch.int64)
    decoder = n.dec
    if tied:
        decoder = model.pop("encoder").T
        model["encoder"] = n.enc
        del model["decoder"]
    pre = ((n.x - n.mean) * s - n.b_dec) @ n.enc + n.b_enc
    z, architecture = pre.relu(), "standard"
    if activation.startswith("TopK"):
        z, architecture = topk(pre, 5).relu(), "topk"
    elif activation.startswith("JumpReLU"):
        model["activation.log_threshold"] = n.threshold.log()
        z, architecture = pre.relu() * (pre.relu() > n.threshold.log().exp()), "jumprelu"
    content = {"model": model, "mean_center": n.mean, "scaling_factor": s}
    content["target_norm"] = np.float64(D_IN**0.5)
    name = (
        name
        or f"{D_SAE}_{D_IN}_{activation}_{tied}_False_0.0_cc3m_ViT-L~14_train_image_9_{D_IN}.pth"
    )
    path = folder / name
    torch.save(content, path)
    x_hat = (z @ decoder + n.b_dec) / s + n.mean
    facts = {"source_dataset": f"cc3m_ViT-L~14_train_image_9_{D_IN}"}
    return SAEFile(path, n.x, z, x_hat, "msae", architecture, {}, facts if "cc3m" in name else {})


# -- PatchSAE, ConceptScope, HugoFry ------------------------------------------------------------------


def patchsae(folder: Path, library: str, key: str = "cfg") -> SAEFile:
    n = Numbers(8)
    prefix, token, expected = {
        "patchsae": ("src.", None, "all"),
        "conceptscope": ("src.", "exclude", "patch"),
        "hugofry": ("", True, "class"),
    }[library]
    state = {"W_enc": n.enc, "b_enc": n.b_enc, "W_dec": n.dec, "b_dec": n.b_dec}
    cfg = {"model_name": CLIP_B, "block_layer": -2, "module_name": "resid", "class_token": token}
    cfg |= {"d_in": D_IN, "d_sae": D_SAE, "device": torch.device("cuda"), "dtype": torch.float32}
    path = folder / "checkpoints" / "3zih0tpa" / "final_sparse_autoencoder_openai"
    path.mkdir(parents=True)
    path = path / "clip-vit-base-patch16_-2_resid_40.pt"
    kind = config_class()
    with module(f"{prefix}sae_training.config", ViTSAERunnerConfig=kind):
        torch.save({key: kind(**cfg), "state_dict": state}, path)
    z = ((n.x - n.b_dec) @ n.enc + n.b_enc).relu()
    facts = {"model_name": CLIP_B, "hook_name": "blocks.10.hook_resid_post", "tokens": expected}
    return SAEFile(path, n.x, z, z @ n.dec + n.b_dec, "patchsae", "standard", {}, facts)


# -- CLIP-Scope ---------------------------------------------------------------------------------------


def clip_scope(folder: Path, *, with_k: bool = True) -> SAEFile:
    n = Numbers(9)
    state = {"pre_b": n.b_dec, "enc": n.enc, "dec": n.dec.T.contiguous().T}
    path = folder / "22_resid" / "1200013184.pt"
    path.parent.mkdir()
    content = {"model_state_dict": state, "d_in": D_IN, "n_features": D_SAE}
    torch.save({**content, "k": 5} if with_k else content, path)
    z = topk((n.x - n.b_dec) @ n.enc, 5)
    facts = {"model_name": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"}
    facts["hook_name"] = "blocks.22.hook_resid_post"
    given = {} if with_k else {"k": 5}
    return SAEFile(path, n.x, z, z @ n.dec + n.b_dec, "clip_scope", "topk", given, facts)


# -- SAELens, and its fork SAE-V ------------------------------------------------------------------------


def sae_v(folder: Path) -> SAEFile:
    """A folder as SAELens 3 wrote it."""
    from safetensors.torch import save_file

    n = Numbers(10)
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
    cfg |= {"device": "cuda", "model_name": "llava", "hook_name": "blocks.16.hook_resid_post"}
    cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "hook_layer": 16}
    cfg |= {"apply_b_dec_to_input": False, "finetuning_scaling_factor": False}
    cfg |= {"normalize_activations": "none", "sae_lens_training_version": "3.20.0"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    state = {"W_enc": n.enc, "b_enc": n.b_enc, "W_dec": n.dec, "b_dec": n.b_dec}
    save_file(state, folder / "sae_weights.safetensors")
    z = topk(n.x @ n.enc + n.b_enc, 5).relu()
    facts = {"model_name": "llava", "hook_name": "blocks.16.hook_resid_post"}
    return SAEFile(folder, n.x, z, z @ n.dec + n.b_dec, "sae_lens", "topk", {}, facts)


_schema = saev_header
FILES: dict[str, Callable[[Path], SAEFile]] = {
    "prisma relu": lambda f: prisma(f, "standard", "relu", "none", "hub"),
    "prisma relu, nothing said of normalisation": lambda f: prisma(f, "standard", "relu", None, ".pt"),
    "prisma topk, layer_norm": lambda f: prisma(f, "standard", "topk", "layer_norm", ".pkl.gz"),
    "prisma topk, constant norm": lambda f: prisma(f, "standard", "topk", "constant_norm_rescale", ".pkl"),
    "prisma gated": lambda f: prisma(f, "gated", "relu", "layer_norm", "hub"),
    "prisma gated, constant norm": lambda f: prisma(f, "gated", "relu", "constant_norm_rescale", ".pt"),
    "prisma legacy": prisma_legacy,
    "prisma transcoder": lambda f: prisma_transcoder(f, False, 7),
    "prisma skip transcoder": lambda f: prisma_transcoder(f, True),
    "saev without schema": lambda f: saev(f, OLD_SAEV, subtract=True),
    "saev schema 1 before": lambda f: saev(
        f, _schema(1, None) | {"cls": "Relu"}, subtract=True, subtract_b_dec=True
    ),
    "saev schema 1 after": lambda f: saev(
        f, _schema(1, None, top_k=5) | {"cls": "TopK"}, subtract=False, act="topk", subtract_b_dec="false"
    ),
    "saev schema 1, form B": lambda f: saev(
        f, _schema(1, "TopK") | {"cls": "SparseAutoencoderConfig"}, subtract=False, act="topk",
        subtract_b_dec=False,
    ),
    "saev schema 2": lambda f: saev(f, _schema(2, "Relu"), subtract=False),
    "saev schema 3": lambda f: saev(f, _schema(3, "BatchTopK"), subtract=False, act="topk"),
    "saev schema 4": lambda f: saev(f, _schema(4, "BatchTopK"), subtract=False, act="threshold"),
    "saev schema 4, early": lambda f: saev(f, _schema(4, "BatchTopK"), subtract=False, act="topk"),
    "saev schema 5": lambda f: saev(f, _schema(5, "BatchTopK"), subtract=False, act="no threshold yet"),
    "saev schema 5, normalised": lambda f: saev(
        f, _schema(5, "TopK"), subtract=False, act="topk", mean=[0.5] * D_IN, scale=2.0
    ),
    "saev without schema, normalised": lambda f: saev(f, OLD_SAEV, subtract=True, mean=0.25, scale=2.0),
    **{f"overcomplete {k}": lambda f, k=k: overcomplete(f, k) for k in OVERCOMPLETE_GIVEN},
    **{f"overcomplete {k}, module": lambda f, k=k: overcomplete_module(f, k) for k in OVERCOMPLETE_GIVEN},
    "overcomplete mlp_bn_1": lambda f: overcomplete(f, "TopKSAE", batch_norm=True),
    "overcomplete mlp_bn_1, module": lambda f: overcomplete_module(f, "TopKSAE", batch_norm=True),
    "universal_sae": universal_sae,
    "universal_sae without its yaml": lambda f: universal_sae(f, with_yaml=False),
    **{
        f"dictionary_learning {k}": lambda f, k=k: dictionary_learning(f, k)
        for k in (
            *("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"),
            *("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"),
        )
    },
    **{
        f"dictionary_learning {k}, interrupted": lambda f, k=k: dictionary_learning(f, k, interrupted=True)
        for k in ("BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder")
    },
    **{
        f"dictionary_learning {k} without config": lambda f, k=k: dictionary_learning(f, k, config=False)
        for k in ("AutoEncoder", "JumpReluAutoEncoder", "GatedAutoEncoder", "MatryoshkaBatchTopKSAE")
    },
    **{
        f"sae_for_vlm {k}": lambda f, k=k: dictionary_learning(f, k, vlm=True)
        for k in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
    },
    "msae ReLU": lambda f: msae(f, "ReLU_003"),
    "msae ReLU, tied": lambda f: msae(f, "ReLU_003", tied=True),
    "msae TopKReLU": lambda f: msae(f, "TopKReLU_5"),
    "msae Matryoshka": lambda f: msae(f, "TopKReLU_5_RW"),
    "msae TopK": lambda f: msae(f, "TopK_5"),
    "msae JumpReLU": lambda f: msae(f, "JumpReLU_40_003"),
    "patchsae": lambda f: patchsae(f, "patchsae"),
    "conceptscope": lambda f: patchsae(f, "conceptscope", "config"),
    "hugofry": lambda f: patchsae(f, "hugofry"),
    "clip_scope": clip_scope,
    "clip_scope without k": lambda f: clip_scope(f, with_k=False),
    "sae_v": sae_v,
}  # fmt: skip

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from taxolens.hooks.images.preprocess import (
    PilPreprocess,
    ProcessorPreprocess,
    center_crop,
    preprocess_for,
    timm_preprocessing,
)
from taxolens.hooks.models.load import from_module
from taxolens.hooks.models.tokens import input_size
from taxolens.registry.errors import ConfigError
from tiny_images import noise
from tiny_models import tiny_model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

# as DINOv2's, CLIP's, ... checkpoints set them, at a size that tests can afford
SMALL = {"height": 42, "width": 42}
PROCESSORS = {
    "dinov2": lambda: BitImageProcessorPil(size={"shortest_edge": 48}, crop_size=SMALL),
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=SMALL),
    "siglip": lambda: SiglipImageProcessorPil(size=SMALL),
    "vit": lambda: ViTImageProcessorPil(size=SMALL),
    "deit": lambda: DeiTImageProcessorPil(size={"height": 48, "width": 48}, crop_size=SMALL),
    "crop larger": lambda: BitImageProcessorPil(size={"shortest_edge": 31}, crop_size=SMALL),
    "no mean": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": 42}, crop_size=SMALL, do_normalize=False
    ),
    "nearest": lambda: ViTImageProcessorPil(size=SMALL, resample=0),
    "lanczos": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": 42}, crop_size=SMALL, resample=1
    ),
    "no rescaling": lambda: ViTImageProcessorPil(size=SMALL, do_rescale=False),
}
SIZES = ((60, 40), (40, 61), (42, 42), (9, 57), (3, 1))


def model(processor=None, config=None, image_size=30):
    cfg = SimpleNamespace(image_size=image_size)
    return SimpleNamespace(processor=processor, preprocessor_config=config, cfg=cfg)


def theirs(processor, image, **options):
    return processor(image, return_tensors="np", **options)["pixel_values"][0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_equal_the_processors_to_the_bit(name):
    processor = PROCESSORS[name]()
    ours = preprocess_for(model(processor))
    assert isinstance(ours, PilPreprocess)
    for i, size in enumerate(SIZES):
        image = noise(i, size)
        pixels = ours(image)
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels, theirs(processor, image))


def test_a_processor_with_steps_of_its_own_is_called_as_it_is():
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 32})
    ours = preprocess_for(model(processor))
    assert isinstance(ours, ProcessorPreprocess)
    image = noise(0, (60, 40))
    assert np.array_equal(ours(image), theirs(processor, image))
    again = pickle.loads(pickle.dumps(ours))
    assert np.array_equal(again(image), ours(image))
    assert ours.describe()["crop_pct"] == 0.875


@pytest.mark.parametrize("name", PROCESSORS)
def test_image_size_overrides_the_processors(name):
    processor = PROCESSORS[name]()
    ours = preprocess_for(model(processor), image_size=28)
    assert ours(noise(1, (60, 40))).shape == (3, 28, 28)
    assert ours.describe() != preprocess_for(model(processor)).describe()


def test_image_size_keeps_the_proportion_of_resize_and_crop():
    ours = preprocess_for(model(PROCESSORS["dinov2"]()), image_size=84)
    assert (ours.size, ours.crop) == (96, (84, 84))  # as 48 to 42
    convnext = ConvNextImageProcessorPil(size={"shortest_edge": 32})
    assert preprocess_for(model(convnext), 64)(noise(1, (60, 40))).shape == (3, 64, 64)


def test_from_a_config_alone():
    processor = PROCESSORS["dinov2"]()
    image = noise(2, (60, 40))
    ours = preprocess_for(model(config=processor.to_dict()))
    assert np.array_equal(ours(image), theirs(processor, image))


@pytest.mark.parametrize("name", PROCESSORS)
def test_from_a_config_alone_as_the_processor(name):
    """Falsy values are values: resample 0 is nearest, do_normalize false is false."""
    processor, image = PROCESSORS[name](), noise(2, (60, 40))
    ours = preprocess_for(model(config=processor.to_dict()))
    assert np.array_equal(ours(image), theirs(processor, image))


def test_null_is_the_default_and_zero_is_not():
    config = {"size": SMALL, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    assert PilPreprocess.from_config({**config, "resample": None}).resample == 2
    assert PilPreprocess.from_config({**config, "resample": 0}).resample == 0
    assert PilPreprocess.from_config({**config, "rescale_factor": None}).rescale == 1 / 255
    with pytest.raises(ConfigError, match="rescale: not possible"):  # every pixel would be 0
        PilPreprocess.from_config({**config, "rescale_factor": 0})
    with pytest.raises(ConfigError, match=r"resample of .*given 9; allowed: 0 \(nearest\), 1"):
        PilPreprocess.from_config({**config, "resample": 9})


class LikeTorchvision(ConvNextImageProcessorPil):
    """A processor of another backend, as `AutoImageProcessor` gives where torchvision is installed."""

    backend = "torchvision"


@pytest.mark.parametrize("image_size", [None, 48])
def test_processors_of_another_backend_are_called_as_they_are(image_size):
    processor, image = LikeTorchvision(size={"shortest_edge": 32}), noise(0, (60, 40))
    ours = preprocess_for(model(processor), image_size)
    size = {} if image_size is None else {"size": {"shortest_edge": image_size}}
    assert isinstance(ours, ProcessorPreprocess)
    assert ours(image).shape == (3, image_size or 32, image_size or 32)
    assert np.array_equal(ours(image), theirs(processor, image, **size))


@pytest.mark.parametrize("step", ["resize", "center_crop", "normalize", "process_image"])
def test_a_processor_with_one_step_of_its_own_is_called_as_it_is(step):
    def changed(self, *arguments, **options):
        return getattr(CLIPImageProcessorPil, step)(self, *arguments, **options) * 1

    plain = CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=SMALL)
    assert isinstance(preprocess_for(model(plain)), PilPreprocess)
    own = type("Own", (CLIPImageProcessorPil,), {step: changed})
    processor = own(size={"shortest_edge": 42}, crop_size=SMALL)
    assert isinstance(preprocess_for(model(processor)), ProcessorPreprocess)
    plain.__dict__[step] = None
    assert isinstance(preprocess_for(model(plain)), ProcessorPreprocess)


def halves(image):
    """A transform, as torchvision's and timm's are: an image -> (3, H, W)."""
    return torch.full((3, 20, 24), 0.5)


def test_any_transform_is_called_as_it_is():
    ours = preprocess_for(model(halves))
    assert ours(noise(0)).shape == (3, 20, 24) and (ours(noise(0)) == 0.5).all()
    assert "halves" in str(ours.describe())
    hooked = from_module(tiny_model("resnet"), processor=halves)
    assert input_size(hooked) == (20, 24)
    with pytest.raises(ConfigError, match="image_size: the size that the model's processor gives"):
        preprocess_for(model(halves), 32)


# timm ---------------------------------------------------------------------------------------------


def timms(image, size, crop_pct, mode, resample, mean, std):
    """`transforms_imagenet_eval` of timm 1.0, with torchvision's arithmetic, on Pillow."""
    height, width = size
    scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if mode == "center" and scaled[0] == scaled[1]:
        short, long = sorted(image.size)
        longer = int(scaled[0] * long / short)
        target = (longer, scaled[0]) if image.width <= image.height else (scaled[0], longer)
    elif mode == "squash":
        target = scaled
    else:
        ratios = image.height / scaled[0], image.width / scaled[1]
        ratio = max(ratios) if mode == "border" else min(ratios)
        target = round(image.height / ratio), round(image.width / ratio)
    image = image.resize(target[::-1], resample)
    fill = tuple(round(255 * m) for m in mean) if mode == "border" else (0, 0, 0)
    missing = [max(0, want - have) for want, have in zip((width, height), image.size)]
    padded = Image.new("RGB", (image.width + missing[0], image.height + missing[1]), fill)
    padded.paste(image, (missing[0] // 2, missing[1] // 2))
    top = round((padded.height - height) / 2.0)
    left = round((padded.width - width) / 2.0)
    pixels = np.asarray(padded.crop((left, top, left + width, top + height)), dtype=np.float32)
    return ((pixels / 255 - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (32, 48), (48, 30)])
@pytest.mark.parametrize("crop_pct", [0.95, 0.875, 0.9, 1.0])
def test_timms_evaluation_transform(mode, size, crop_pct):
    config = {"input_size": (3, *size), "crop_pct": crop_pct, "crop_mode": mode}
    ours = preprocess_for(model(config=timm_preprocessing({"pretrained_cfg": config})))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for i, shape in enumerate([(60, 40), (41, 63), (32, 32), (35, 34)]):
        image = noise(i, shape)
        expected = timms(image, size, crop_pct, mode, 3, mean, std)
        np.testing.assert_allclose(ours(image), expected, atol=1e-5)


def test_resnet50_a1_is_cropped_as_timm_does():
    """224 at 0.95: resized to 235, a margin of 11; timm's crop begins at pixel 6, not 5."""
    config = {"input_size": (3, 224, 224), "crop_pct": 0.95, "mean": (0, 0, 0), "std": (1, 1, 1)}
    ours = preprocess_for(model(config=timm_preprocessing(config)))
    columns = np.tile(np.arange(235, dtype=np.uint8)[None, :, None], (235, 1, 3))
    found = ours(Image.fromarray(columns))
    assert np.allclose(found[0, 0] * 255, np.arange(6, 230), atol=1e-3)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_interpolations_of_timm(name):
    config = {"input_size": (3, 32, 32), "interpolation": name, "crop_pct": None, "mean": None}
    ours = preprocess_for(model(config=timm_preprocessing(config)))
    image, number = noise(0, (60, 40)), int(getattr(Image.Resampling, name.upper()))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = timms(image, (32, 32), 0.875, "center", number, mean, std)
    np.testing.assert_allclose(ours(image), expected, atol=1e-5)


def test_image_size_of_timm_is_that_of_its_transform():
    config = {"input_size": (3, 224, 224), "crop_pct": 0.95, "mean": (0, 0, 0), "std": (1, 1, 1)}
    ours, image = preprocess_for(model(config=timm_preprocessing(config)), 33), noise(0, (60, 40))
    expected = timms(image, (33, 33), 0.95, "center", 3, (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(ours(image), expected, atol=1e-5)


def test_what_timm_does_not_have():
    with pytest.raises(ConfigError, match="interpolation of timm: not known; given 'cubic'"):
        timm_preprocessing({"interpolation": "cubic"})
    with pytest.raises(ConfigError, match="crop_mode of timm: not known; given 'middle'"):
        timm_preprocessing({"crop_mode": "middle"})


def test_old_configs_give_sizes_as_numbers():
    crop = {"size": 48, "crop_size": 42, "do_center_crop": True, "resample": 3}
    assert PilPreprocess.from_config(crop).size == 48
    assert PilPreprocess.from_config(crop).crop == (42, 42)
    assert PilPreprocess.from_config({"size": 42}).size == (42, 42)
    assert PilPreprocess.from_config({"size": [40, 42]}).size == (40, 42)
    with pytest.raises(ConfigError, match=r"size of .*\{'longest_edge': 9\}"):
        PilPreprocess.from_config({"size": {"longest_edge": 9}})


def test_dinov3_resizes_in_floating_point():
    config = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": SMALL,
        "resample": 2,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    ours = preprocess_for(model(config=config))
    image = noise(3, (60, 50))
    channels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
    resized = np.stack(
        [
            np.asarray(Image.fromarray(c).resize((42, 42), Image.Resampling.BILINEAR))
            for c in channels
        ]
    )
    mean, std = (np.float32(config[k]).reshape(3, 1, 1) for k in ("image_mean", "image_std"))
    assert np.allclose(ours(image), (resized - mean) / std, atol=1e-5)
    rounded = preprocess_for(model(config={**config, "image_processor_type": "ViT"}))
    assert not np.allclose(ours(image), rounded(image), atol=1e-4)
    nearest = preprocess_for(model(config={**config, "resample": 0}))(image)
    expected = np.stack(
        [c[np.arange(42) * 50 // 42][:, np.arange(42) * 60 // 42] for c in channels]
    )
    assert np.allclose(nearest, (expected - mean) / std, atol=1e-5)
    with pytest.raises(ConfigError, match=r"resample of .*given 1; allowed: 0 \(nearest\), 2"):
        preprocess_for(model(config={**config, "resample": 1}))


def test_without_any_processor_imagenets_preprocessing(caplog):
    ours = preprocess_for(model(image_size=(30, 30)))
    assert ours(noise(4, (60, 50))).shape == (3, 30, 30)
    assert "no image processor" in caplog.text
    white = ours(Image.new("RGB", (50, 50), "white"))
    assert white[:, 0, 0] == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


def test_without_any_processor_of_a_model_whose_images_are_no_squares():
    preprocess = preprocess_for(model(image_size=(30, 63)))
    image = noise(1, (120, 100))
    resized = image.resize((86, 72), resample=Image.Resampling.BICUBIC)  # 63 / 224 of 256
    expected = np.asarray(resized)[21:51, 11:74] / 255
    found = preprocess(image) * np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    found = found + np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    np.testing.assert_allclose(found, np.moveaxis(expected, -1, 0), atol=1e-5)


def test_picklable_with_its_tables():
    ours = preprocess_for(model(PROCESSORS["clip"]()))
    image = noise(5)
    before = ours(image)
    assert np.array_equal(pickle.loads(pickle.dumps(ours))(image), before)


def test_image_size_is_checked():
    with pytest.raises(ConfigError, match="image_size: too small; given 0"):
        preprocess_for(model(PROCESSORS["vit"]()), image_size=0)


def test_center_crop_pads_like_transformers():
    pixels = torch.arange(3 * 3 * 2).reshape(3, 3, 2).numpy()
    cropped = center_crop(pixels, (6, 2))
    assert cropped.shape == (3, 6, 2)
    assert np.array_equal(cropped[:, 2:5], pixels)  # the odd row of padding comes first
    assert not cropped[:, :2].any() and not cropped[:, 5].any()

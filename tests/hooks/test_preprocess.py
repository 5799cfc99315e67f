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
)
from taxolens.registry.errors import ConfigError
from tiny_images import noise
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


def test_without_any_processor_imagenets_preprocessing(caplog):
    ours = preprocess_for(model(image_size=(30, 30)))
    assert ours(noise(4, (60, 50))).shape == (3, 30, 30)
    assert "no image processor" in caplog.text
    white = ours(Image.new("RGB", (50, 50), "white"))
    assert white[:, 0, 0] == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


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

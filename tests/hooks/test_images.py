import io
import logging
import multiprocessing
import threading

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from taxolens.hooks.images.dataset import ImageDataset, load_images
from taxolens.hooks.images.decode import decode_rgb
from taxolens.hooks.images.loader import ImageLoader, worker_context
from taxolens.hooks.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, PilPreprocess
from taxolens.registry.errors import ConfigError, CorruptImageError, DataError
from tiny_images import class_folders, encoded, hf_dataset, plain

worker_context()  # its server takes long to start: let it while other tests run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_cache"))


def reds(images):
    return [images.decode(i).getpixel((0, 0))[0] for i in range(len(images))]


# -- decoding -----------------------------------------------------------------------------------


def corner(data):
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_grey_is_repeated_over_the_channels():
    assert corner(encoded(Image.new("L", (3, 3), 90))) == (90, 90, 90)


def test_the_format_of_telephones_is_read_upright_where_its_extra_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((32, 48, 3), dtype=np.uint8)
    pixels[:, :24] = (200, 30, 30)  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left half is the top
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(
        tmp_path / "cat" / "1.HEIC", "HEIF", quality=95, exif=exif.tobytes()
    )
    images = load_images(tmp_path)
    assert images.class_names == ["cat"] and len(images) == 1
    found = images.decode(0)
    assert (found.mode, found.size) == ("RGB", (32, 48))
    assert np.abs(np.asarray(found)[4, 16].astype(int) - (200, 30, 30)).max() < 12
    assert np.asarray(found)[44, 16].max() < 12
    data = (tmp_path / "cat" / "1.HEIC").read_bytes()
    with pytest.raises(ValueError, match="exceed max_image_pixels=100"):
        decode_rgb(data, max_pixels=100)
    with pytest.raises(ValueError):
        decode_rgb(data[: len(data) // 2])
    see_through = Image.fromarray(np.zeros((32, 32, 4), dtype=np.uint8), "RGBA")
    see_through.save(tmp_path / "alpha.heif", "HEIF", quality=95)
    assert min(corner((tmp_path / "alpha.heif").read_bytes())) > 245, "onto white"
    assert heif.is_supported(tmp_path / "alpha.heif")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    image = decode_rgb(encoded(Image.fromarray(values), kind))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]


def test_floating_point_grey_in_the_unit_range_or_in_bytes():
    unit = np.array([[0.0, 0.2, 1.0]], dtype=np.float32)
    assert np.asarray(decode_rgb(encoded(Image.fromarray(unit), "TIFF")))[0, :, 1].tolist() == [
        *(0, 51, 255)
    ]
    byte = np.array([[0.0, 51.0, 300.0]], dtype=np.float32)
    assert np.asarray(decode_rgb(encoded(Image.fromarray(byte), "TIFF")))[0, :, 1].tolist() == [
        *(0, 51, 255)
    ]


def test_cmyk_jpeg():
    red, green, blue = corner(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 250 and green < 5 and blue < 5


def test_alpha_is_composited_onto_white():
    assert corner(encoded(Image.new("RGBA", (3, 3), (200, 0, 0, 0)))) == (255, 255, 255)
    assert corner(encoded(Image.new("RGBA", (3, 3), (200, 0, 0, 255)))) == (200, 0, 0)
    assert corner(encoded(Image.new("LA", (3, 3), (0, 0)))) == (255, 255, 255)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (3, 3), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert corner(encoded(image)) == (0, 0, 255)
    assert corner(encoded(image, transparency=1)) == (255, 255, 255)
    assert corner(encoded(image, transparency=0)) == (0, 0, 255)
    assert corner(encoded(image, "GIF", transparency=1)) == (255, 255, 255)


def test_exif_rotation():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    upright = decode_rgb(encoded(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "cannot identify"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "(?i)truncated"),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "(?i)truncated|broken"),
    ],
)
def test_damaged_bytes_say_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode_rgb(data)


# -- where images come from ---------------------------------------------------------------------


def test_class_folders(tmp_path):
    class_folders(tmp_path, {"cat": [40, 30], "ant": [10]})
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    images = load_images(tmp_path)
    assert images.class_names == ["ant", "cat"]
    assert images.labels.tolist() == [0, 1, 1]
    assert images.labels.dtype == np.int64
    assert reds(images) == [10, 30, 40]
    assert images.source(2) == "cat/040.png"


def test_nested_class_folders_are_called_after_the_innermost_folder(tmp_path):
    class_folders(tmp_path, {"animal/dog": [1], "animal/other": [2], "thing/other": [3]})
    images = load_images(tmp_path)
    assert images.class_names == ["animal/other", "dog", "thing/other"]
    assert reds(images) == [2, 1, 3]


def test_class_folders_below_split_folders(tmp_path):
    class_folders(tmp_path, {"train/cat": [1, 2], "train/dog": [3], "val/cat": [4]})
    assert reds(load_images(tmp_path, split="train")) == [1, 2, 3]
    assert reds(load_images(tmp_path, split="validation")) == [4]
    assert reds(load_images(tmp_path, split="train[:2]")) == [1, 2]
    with pytest.raises(ConfigError, match=r"given 'test'; allowed: train, validation, val"):
        load_images(tmp_path, split="test")


def test_class_folders_without_splits_are_train(tmp_path):
    class_folders(tmp_path, {"train": [1], "bus": [2]})  # a train, the vehicle
    assert load_images(tmp_path).class_names == ["bus", "train"]
    with pytest.raises(ConfigError, match="no such split; given 'validation'; allowed: train"):
        load_images(tmp_path, split="validation")


def test_a_folder_of_images_alone_has_no_labels(tmp_path):
    class_folders(tmp_path, {".": [7, 8]})
    images = load_images(tmp_path)
    assert reds(images) == [7, 8]
    assert images.labels.tolist() == [-1, -1]
    with pytest.raises(ConfigError, match="in no class folder, and no file names"):
        images.require_labels()


def test_folder_with_split_files_and_the_hub_call(tmp_path):
    hf_dataset(6).to_parquet(tmp_path / "train.parquet")
    hf_dataset(2).to_parquet(tmp_path / "validation.parquet")
    images = load_images(tmp_path)
    assert images.class_names == ["ant", "bee", "cat"]
    assert reds(images) == [0, 10, 20, 30, 40, 50]
    assert len(load_images(tmp_path, split="validation")) == 2
    assert len(load_images(tmp_path, split="train[:50%]")) == 3
    with pytest.raises(ConfigError, match=r"split='nope'.*\['train', 'validation'\]"):
        load_images(tmp_path, split="nope")
    with pytest.raises(ConfigError, match=r"split='nope'.*\['train', 'validation'\]"):
        load_images(tmp_path, split="nope", streaming=True)


def test_repository_with_a_card_and_configurations(tmp_path):
    hf_dataset(6).to_parquet(tmp_path / "small.parquet")
    hf_dataset(9).to_parquet(tmp_path / "large.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: small\n  data_files: [{split: train, path: small.parquet}]\n"
        "- config_name: large\n  data_files: [{split: train, path: large.parquet}]\n---\n"
    )
    assert len(load_images(tmp_path, name="small")) == 6
    assert len(load_images(tmp_path, name="large")) == 9
    with pytest.raises(ConfigError, match="Config name is missing"):
        load_images(tmp_path)
    with pytest.raises(ConfigError, match="name='huge'"):
        load_images(tmp_path, name="huge")


def test_image_folder_with_metadata(tmp_path):
    class_folders(tmp_path, {".": [7, 8]})
    (tmp_path / "metadata.csv").write_text("file_name,label\n007.png,dog\n008.png,cat\n")
    images = load_images(tmp_path)
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [1, 0]
    assert reds(images) == [7, 8]


def test_files_and_patterns_know_their_split(tmp_path):
    hf_dataset(4).to_parquet(tmp_path / "train-0.parquet")
    hf_dataset(5).to_parquet(tmp_path / "train-1.parquet")
    hf_dataset(2).to_parquet(tmp_path / "val.parquet")
    assert len(load_images(tmp_path / "train-1.parquet")) == 5
    assert len(load_images(tmp_path / "*.parquet")) == 9
    assert len(load_images(tmp_path / "*.parquet", split="validation")) == 2
    with pytest.raises(ConfigError, match="validation"):
        load_images(tmp_path / "train-0.parquet", split="validation")
    with pytest.raises(ConfigError, match="no file matches"):
        load_images(tmp_path / "*.arrow")


def test_saved_to_disk(tmp_path):
    both = datasets.DatasetDict({"train": hf_dataset(6), "test": hf_dataset(2)})
    both.save_to_disk(tmp_path / "both")
    hf_dataset(4).save_to_disk(tmp_path / "one")
    assert len(load_images(tmp_path / "both", split="test")) == 2
    assert reds(load_images(tmp_path / "one", split="train[1:3]")) == [10, 20]
    with pytest.raises(ConfigError, match="allowed: train, test"):
        load_images(tmp_path / "both", split="validation")
    assert len(load_images(both, split="test")) == 2


def test_formats_and_transforms_of_a_dataset_are_left_aside():
    data = hf_dataset(6)
    expected = [0, 10, 20, 30, 40, 50]
    transformed = data.with_transform(lambda rows: {"image": ["changed" for _ in rows["image"]]})
    for changed in (data.with_format("torch"), data.with_format("numpy"), transformed):
        images = load_images(changed)
        assert reds(images) == expected and images.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert images.fingerprint == load_images(data).fingerprint
    for changed in (data.to_iterable_dataset().with_format("torch"), data.to_iterable_dataset()):
        assert [raw.label for raw in load_images(changed).stream()] == [0, 1, 2, 0, 1, 2]


def test_streamed_datasets_by_split():
    splits = {"train": hf_dataset(6), "test": hf_dataset(2)}
    streams = datasets.IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()})
    assert [raw.label for raw in load_images(streams, split="test").stream()] == [0, 1]
    for split in ("validation", "train[:2]"):
        with pytest.raises(ConfigError, match=r"no such split; .*allowed: train, test"):
            load_images(streams, split=split)


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no such file or folder;"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=rf"\(did you mean '{tmp_path / 'empty'}'\?\); given"):
        load_images(tmp_path / "emtpy")
    with pytest.raises(DataError, match="no images found"):
        load_images(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"files of kind \.txt"):
        load_images(tmp_path / "notes.txt")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read"):
        load_images(tmp_path / "torn.parquet")


def test_an_empty_dataset():
    with pytest.raises(DataError, match="dataset: no images"):
        load_images(hf_dataset(0))


# -- columns ------------------------------------------------------------------------------------


def test_columns_are_found_without_declared_features(tmp_path):
    table = pa.table(
        {
            "img": [encoded(plain(i)) for i in range(4)],
            "synset": ["n02", "n01", None, "n02"],
            "note": ["a", "b", "c", "d"],
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    images = load_images(tmp_path / "data.parquet")
    assert (images.image_column, images.label_column) == ("img", "synset")
    assert images.class_names == ["n01", "n02"]
    assert images.labels.tolist() == [1, 0, -1, 1]
    assert reds(images) == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"1 of 4 images have no label.*image 2"):
        images.require_labels()


def test_whole_numbers_without_names_become_text():
    data = hf_dataset(4).cast_column("label", datasets.Value("int64"))
    data = data.remove_columns("label").add_column("label", [10, 9, 9, 200])
    images = load_images(data)
    assert images.class_names == ["9", "10", "200"]
    assert images.labels.tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        ([3, -1, 0, -1], ["0", "3"], [1, -1, 0, -1]),
        (["b", "", "a", None], ["a", "b"], [1, -1, 0, -1]),
        ([True, False, None, True], ["False", "True"], [1, 0, -1, 1]),
    ],
)
def test_labels_that_stand_for_no_class(values, names, labels):
    data = hf_dataset(4).remove_columns("label").add_column("label", values)
    images = load_images(data)
    assert images.class_names == names
    assert images.labels.tolist() == labels
    with pytest.raises(DataError, match=f"{labels.count(-1)} of 4 images have no label"):
        images.require_labels()


def test_paths_as_text_when_named(tmp_path):
    plain(77).save(tmp_path / "a.png")
    data = datasets.Dataset.from_dict({"file": [str(tmp_path / "a.png")], "label": ["x"]})
    with pytest.raises(
        ConfigError, match=r"no column holds images; .*allowed: one of file \(string\), "
    ):
        load_images(data)
    assert reds(load_images(data, image_column="file")) == [77]


def test_ambiguous_and_missing_columns():
    data = hf_dataset(3)
    right = datasets.Dataset.from_dict({"right": data["image"]})
    twice = datasets.concatenate_datasets([data.rename_column("image", "left"), right], axis=1)
    with pytest.raises(ConfigError, match=r"several columns hold images \(left, right\)"):
        load_images(twice)
    assert load_images(twice, image_column="right").image_column == "right"
    with pytest.raises(
        ConfigError,
        match=r"image_column: .*'pic'; allowed: one of image \(Image\), label \(ClassLabel\)",
    ):
        load_images(data, image_column="pic")
    with pytest.raises(ConfigError, match="label_column: no such column; given 'kind'"):
        load_images(data, label_column="kind")
    fine = data.rename_column("label", "fine_label")
    both = fine.add_column("coarse_label", [0, 0, 1], feature=datasets.ClassLabel(num_classes=2))
    with pytest.raises(
        ConfigError, match=r"several columns hold labels \(fine_label, coarse_label\)"
    ):
        load_images(both)
    assert load_images(both, label_column="coarse_label").class_names == ["0", "1"]


def test_a_label_column_of_lists_is_refused():
    data = hf_dataset(2).remove_columns("label").add_column("label", [[1, 2], [3]])
    with pytest.raises(ConfigError, match="one whole number or text"):
        load_images(data, label_column="label")
    assert load_images(data).label_column is None


# -- subsets, identity, streaming ---------------------------------------------------------------


def test_as_many_of_each_class_by_a_fixed_seed():
    data = hf_dataset(20).select([*range(19), 0])  # 8, 6 and 6 of the classes
    whole = load_images(data, max_images=17)
    for n in (1, 3, 6, 99):
        few = whole.of_each_class(n)
        assert np.bincount(few.labels).tolist() == [min(n, c) for c in np.bincount(whole.labels)]
        assert few.labels.tolist() == [red // 10 % 3 for red in reds(few)]
        rows = few._rows.tolist()
        assert rows == sorted(set(rows)) and set(rows) <= set(whole._rows.tolist())
        assert rows == whole.of_each_class(n)._rows.tolist()
        assert set(rows) <= set(whole.of_each_class(n + 1)._rows.tolist())
    assert load_images(data).of_each_class(2).fingerprint != load_images(data).fingerprint
    assert reds(load_images(data).of_each_class(2)) != reds(load_images(data))[:6]


def test_max_images_takes_the_start_of_a_seeded_permutation():
    data = hf_dataset(20)
    few, more = load_images(data, max_images=5), load_images(data, max_images=9)
    assert len(few) == 5 and len(few.labels) == 5
    assert reds(few) == sorted(reds(few)) and set(reds(few)) < set(reds(more))
    assert few.labels.tolist() == [red // 10 % 3 for red in reds(few)]
    assert len(load_images(data, max_images=99)) == 20
    with pytest.raises(ConfigError, match="max_images: too small; given 0"):
        load_images(data, max_images=0)


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    tree = {"cat": [1, 2], "dog": [3]}
    one = load_images(class_folders(tmp_path / "one", tree)).fingerprint
    assert one == load_images(class_folders(tmp_path / "two", tree)).fingerprint
    changed = load_images(class_folders(tmp_path / "three", {"cat": [1, 2], "dog": [4]}))
    renamed = load_images(class_folders(tmp_path / "four", {"cat": [1, 2], "cow": [3]}))
    assert len({one, changed.fingerprint, renamed.fingerprint}) == 3


def test_streaming(tmp_path):
    hf_dataset(12).to_parquet(tmp_path / "train.parquet")
    images = load_images(tmp_path, streaming=True)
    assert images.is_streaming and images.class_names == ["ant", "bee", "cat"]
    plain_order = list(images.stream())
    assert [raw.index for raw in plain_order] == list(range(12))
    assert [raw.path for raw in plain_order] == [f"{i}.png" for i in range(12)]
    assert [raw.label for raw in plain_order] == [0, 1, 2] * 4

    def order(**options):
        return [raw.path for raw in images.stream(shuffle_buffer=4, **options)]

    first = order(seed=3, epoch=0)
    assert first == order(seed=3, epoch=0)
    assert sorted(first) == sorted(raw.path for raw in plain_order)
    assert len({tuple(first), tuple(order(seed=3, epoch=1)), tuple(order(seed=4, epoch=0))}) == 3
    assert order(seed=3, epoch=0, skip=5) == first[5:]
    assert len(list(load_images(tmp_path, streaming=True, max_images=5).stream())) == 5
    with pytest.raises(TypeError, match="streaming"):
        len(images)
    with pytest.raises(ConfigError, match="given True; allowed: False"):
        images.decode(0)
    assert images.fingerprint == load_images(tmp_path, streaming=True).fingerprint


def test_streaming_without_declared_features():
    def examples():
        for i in range(3):
            yield {"jpg": encoded(plain(i)), "cls": i}

    images = load_images(datasets.IterableDataset.from_generator(examples))
    assert (images.image_column, images.label_column) == ("jpg", "cls")
    assert [raw.label for raw in images.stream()] == [0, 1, 2]


# -- the loader ---------------------------------------------------------------------------------


red_pixels = PilPreprocess(size=None, crop=(3, 3), rescale=None)


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1)])
def test_a_picture_of_one_row_is_not_resized(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}: sides of more than 200:1"):
        decode_rgb(encoded(Image.new("RGB", size)))


def test_corrupt_images_are_named(tmp_path):
    images = load_images(hf_dataset(3, corrupt=[1]))
    with pytest.raises(CorruptImageError, match=r"image 1 .1\.png. cannot be read: cannot id") as e:
        images.decode(1)
    assert e.value.index == 1
    folder = load_images(class_folders(tmp_path, {"cat": [1]}))
    (tmp_path / "cat" / "001.png").unlink()
    with pytest.raises(CorruptImageError, match=r"cat/001\.png.*cannot be opened"):
        folder.decode(0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_keeps_order_skips_and_names_corrupt_images(num_workers, caplog):
    images = load_images(hf_dataset(100, corrupt=[3, 11]))
    loader = ImageLoader(
        images, red_pixels, batch_size=4, num_workers=num_workers, max_corrupt_share=0.05
    )
    wanted = [5, 3, 2, 9, 11, 8, 7, 0, 1]
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        batches = list(loader.batches(wanted))
        again = list(loader.batches(iter(wanted)))
    assert torch.equal(before, torch.get_rng_state())
    assert [b.indices.tolist() for b in batches] == [[5, 2, 9], [8, 7, 0], [1]]
    assert batches[0].pixel_values.dtype == torch.float32
    assert batches[0].pixel_values[:, 0, 0, 0].tolist() == [50.0, 20.0, 90.0]
    assert batches[0].labels.tolist() == [2, 2, 0]
    assert torch.equal(again[1].pixel_values, batches[1].pixel_values)
    assert sorted(loader.failures) == [3, 11]
    assert loader.failures[3].startswith("3.png: cannot identify")
    messages = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
    assert len(messages) == 2 and "image 3 (3.png)" in messages[0]
    assert not multiprocessing.active_children() or num_workers == 0


def test_loader_in_a_background_thread_with_workers():
    images = load_images(hf_dataset(24))
    loader = ImageLoader(images, red_pixels, batch_size=5, num_workers=2)
    batches = []
    thread = threading.Thread(target=lambda: batches.extend(loader.batches(range(24))))
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(24))


def test_groups_keep_their_borders():
    loader = ImageLoader(load_images(hf_dataset(6, corrupt=[2])), red_pixels, batch_size=9)
    batches = list(loader.grouped([[0, 1], [2], [3, 4, 5]]))
    assert [b.indices.tolist() for b in batches] == [[0, 1], [], [3, 4, 5]]
    assert batches[1].failures[0][:2] == (2, "2.png")


def test_too_many_corrupt_images_stop_the_work():
    images = load_images(hf_dataset(50, corrupt=range(0, 50, 10)))
    loader = ImageLoader(images, red_pixels, batch_size=8, max_corrupt_share=0.05)
    with pytest.raises(
        DataError,
        match=r"max_corrupt_share: .*image 0 \(0\.png: cannot.*given 0\.05; allowed: .* larger share",
    ):
        list(loader.batches(range(50)))
    assert loader.n_processed >= 20
    allowed = ImageLoader(images, red_pixels, batch_size=8, max_corrupt_share=0.1)
    assert sum(len(b) for b in allowed.batches(range(50))) == 45


def test_a_single_corrupt_image_of_few_is_left_out_unless_none_is_allowed():
    def read(corrupt, share=0.01):
        images = load_images(hf_dataset(40, corrupt=corrupt))
        loader = ImageLoader(images, red_pixels, batch_size=8, max_corrupt_share=share)
        return sum(len(batch) for batch in loader.batches(range(40)))

    assert read([3]) == 39
    for corrupt, share in (([3, 30], 0.01), ([3], 0.0)):
        with pytest.raises(DataError, match="larger share"):
            read(corrupt, share)


def test_one_early_corrupt_image_does_not_stop_a_long_run():
    images = load_images(hf_dataset(150, corrupt=[0]))
    loader = ImageLoader(images, red_pixels, batch_size=10, max_corrupt_share=0.01)
    assert sum(len(b) for b in loader.batches(range(150))) == 149


def test_a_stream_of_corrupt_images_stops_although_its_length_is_unknown(tmp_path):
    hf_dataset(60, corrupt=range(0, 60, 2)).to_parquet(tmp_path / "train.parquet")
    images = load_images(tmp_path, streaming=True)
    loader = ImageLoader(images, red_pixels, batch_size=8)
    with pytest.raises(DataError, match="are corrupt"):
        list(loader.batches(images.stream()))
    assert loader.n_processed == 24


def test_different_shapes_are_explained(tmp_path):
    plain(1, (8, 8)).save(tmp_path / "a.png")
    plain(2, (9, 8)).save(tmp_path / "b.png")

    def as_it_is(image):
        return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)

    with pytest.raises(ConfigError, match=r"image_size.*different shapes"):
        list(ImageLoader(load_images(tmp_path), as_it_is, batch_size=2).batches([0, 1]))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"max_corrupt_share": 1.5}]
)
def test_loader_options_are_checked(options):
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}: .*given {value}"):
        ImageLoader(load_images(hf_dataset(2)), red_pixels, **{"batch_size": 1, **options})


def test_repr_says_what_it_is():
    assert repr(ImageDataset(hf_dataset(3), name="x")) == "ImageDataset('x', 3 images, 3 classes)"


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # there is no GPU
@pytest.mark.parametrize(
    "preprocess",
    [
        PilPreprocess(24, (20, 20), mean=IMAGENET_MEAN, std=IMAGENET_STD),
        PilPreprocess((20, 28), None, resample=3, mean=(0.5,) * 3, std=(0.5,) * 3),
        PilPreprocess(None, (40, 40), rescale=None),
        PilPreprocess(None, None, rescale=1 / 127.5),
    ],
    ids=str,
)
def test_pixels_that_go_to_a_gpu_in_8_bits_are_equal_to_the_bit(preprocess):
    images = load_images(hf_dataset(6, corrupt=[2]))
    settings = {"batch_size": 4, "max_corrupt_share": 1.0}
    here = list(ImageLoader(images, preprocess, **settings).batches(range(6)))
    there = list(ImageLoader(images, preprocess, pin_memory=True, **settings).batches(range(6)))
    for one, other in zip(here, there, strict=True):
        assert (one.pixel_values.dtype, other.pixel_values.dtype) == (torch.float32, torch.uint8)
        assert one.tables is None
        assert torch.equal(one.on(torch.device("cpu")), other.on(torch.device("cpu")))
        assert torch.equal(one.indices, other.indices)


def black(image: Image.Image) -> np.ndarray:
    return np.zeros((3, 2, 2), dtype=np.float32)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("preprocess", [black, PilPreprocess(20, (20, 20), resize_rescaled=True)])
def test_preprocessing_without_a_table_stays_in_floating_point(preprocess):
    loader = ImageLoader(load_images(hf_dataset(3)), preprocess, batch_size=3, pin_memory=True)
    (batch,) = loader.batches(range(3))
    assert batch.tables is None and batch.on(torch.device("cpu")).dtype == torch.float32


def jpeg(width: int, height: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("edge", "size"),
    [
        (None, (500, 376)),
        (377, (500, 376)),  # neither edge may be shorter
        (188, (250, 188)),
        (189, (500, 376)),
        (94, (125, 94)),
        (1, (63, 47)),  # an eighth, rounded up
    ],
)
def test_jpegs_are_decoded_at_a_reduced_size_where_asked(edge, size):
    assert decode_rgb(jpeg(500, 376), jpeg_edge=edge).size == size
    assert decode_rgb(jpeg(500, 376, "PNG"), jpeg_edge=edge).size == (500, 376)


def test_a_reduced_size_is_part_of_what_the_images_are():
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpeg(64, 64), "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    plain, reduced = load_images(rows), load_images(rows, jpeg_edge=16)
    assert plain.fingerprint == load_images(rows, jpeg_edge=None).fingerprint
    assert len({plain.fingerprint, reduced.fingerprint, load_images(rows, jpeg_edge=8).fingerprint}) == 3  # fmt: skip
    settings = {"batch_size": 1, "num_workers": 0}
    shapes = [
        next(ImageLoader(images, PilPreprocess(None, None), **settings).batches([0])).pixel_values.shape
        for images in (plain, reduced, reduced.limited(1))
    ]  # fmt: skip
    assert shapes == [(1, 3, 64, 64), (1, 3, 16, 16), (1, 3, 16, 16)]
    with pytest.raises(ConfigError, match="jpeg_edge: too small; given 0; allowed: 1 or more"):
        load_images(rows, jpeg_edge=0)

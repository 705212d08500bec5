"""images.py: pictures become pixels, and boxes text, each against a reference written out by hand."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hub import InputError
from images import BadImage, ImageSpec, format_box, open_image, pad_box, parse_box, to_pixels, unpad_box


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.fixture
def rgb():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))


def test_every_mode_opens_as_rgb(rgb, tmp_path):
    grey, palette = rgb.convert("L"), rgb.convert("P")
    opened = {mode: open_image(saved(image, tmp_path / f"{mode}.{kind}")) for mode, image, kind in [
        ("L", grey, "png"), ("P", palette, "png"), ("1", rgb.convert("1"), "png"),
        ("CMYK", rgb.convert("CMYK"), "tiff")]}
    assert all(image.mode == "RGB" and image.size == (20, 12) for image in opened.values())
    assert np.array_equal(opened["L"], np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    assert np.array_equal(opened["P"], palette.convert("RGB"))
    assert np.array_equal(opened["CMYK"], rgb)                       # PIL's RGB to CMYK and back loses nothing


def test_transparency_is_seen_on_white(rgb, tmp_path):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:, :10] = 0
    rgba = Image.merge("RGBA", [*rgb.split(), Image.fromarray(alpha)])
    pixels = np.asarray(open_image(saved(rgba, tmp_path / "rgba.png")))
    assert (pixels[:, :10] == 255).all() and np.array_equal(pixels[:, 10:], np.asarray(rgb)[:, 10:])
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert np.asarray(open_image(saved(palette, tmp_path / "p.png", transparency=1))).min() == 255


def test_sixteen_bits_become_eight(tmp_path):
    values = (np.arange(256, dtype=np.uint16) * 256 + 77).reshape(16, 16)
    for kind in ("png", "tiff"):
        path = saved(Image.fromarray(values), tmp_path / f"deep.{kind}")
        assert np.array_equal(np.asarray(open_image(path))[..., 0], np.arange(256).reshape(16, 16))


def test_floats_are_refused_since_their_white_is_not_known(tmp_path):
    path = saved(Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)), tmp_path / "floats.tiff")
    with pytest.raises(BadImage, match=r"floats\.tiff: not a readable image \(BadImage: its pixels are floats"):
        open_image(path)


@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)), (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
    (8, lambda a: np.rot90(a))])
def test_exif_orientation_is_applied(rgb, tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(rgb, tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(path), upright(np.asarray(rgb)))
    assert torch.equal(to_pixels(Image.open(path), ImageSpec(20)), to_pixels(open_image(path), ImageSpec(20)))


def test_unreadable_exif_is_no_reason_to_lose_a_picture(rgb, tmp_path):
    assert open_image(saved(rgb, tmp_path / "broken.jpg", exif=b"Exif\0\0MM garbage")).size == (20, 12)


def test_of_an_animation_the_first_frame_is_seen(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("gif", "png", "webp"):
        path = saved(red, tmp_path / f"moving.{kind}", save_all=True, append_images=[blue])
        assert Image.open(path).n_frames == 2
        assert np.asarray(open_image(path))[0, 0, 0] > 250


def test_a_picture_that_cannot_be_used_is_named_in_one_line(rgb, tmp_path, monkeypatch):
    whole = saved(rgb.resize((200, 200)), tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    saved(rgb.resize((300, 300)), tmp_path / "bomb.png")
    (tmp_path / "folder.jpg").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60000)            # 90000 pixels: where PIL itself only warns
    for name in ("truncated.jpg", "text.jpg", "empty.png", "bomb.png", "folder.jpg", "missing.jpg"):
        with pytest.raises(BadImage) as error:
            open_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(BadImage, match="bomb.png: has more than 0 million pixels: make it smaller"):
        open_image(tmp_path / "bomb.png")
    assert open_image(tmp_path / "whole.jpg").size == (200, 200)
    assert open_image(io.BytesIO(whole)).size == (200, 200)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_needle_is_refused_before_it_fills_the_memory(mode):
    with pytest.raises(BadImage, match="1x60000 is too elongated"):          # padded: 3.6e9 pixels; cropped: 336 x 20e6
        to_pixels(Image.new("RGB", (1, 60000)), ImageSpec(336, mode))
    assert to_pixels(Image.new("RGB", (1, 60000)), ImageSpec(336, "stretch")).shape == (3, 336, 336)


@pytest.mark.parametrize("array", (np.zeros((8, 8, 3)), np.zeros((3, 8, 9), np.uint8), np.zeros((8, 8), np.uint8), "a.png"), ids=lambda _: "")
def test_what_is_no_picture_is_refused(array):
    with pytest.raises(InputError, match="a picture should be PIL's, or a uint8 array"):
        to_pixels(array, ImageSpec(8))


def test_pixels_are_those_recorded_from_transformers():
    """Recorded by make_data_fixtures.py; test_data_live.py compares with transformers itself, on photographs too."""
    recorded = load_file(Path(__file__).parent / "fixtures" / "pixels.safetensors")
    specs = {"clip": ImageSpec(32, "crop"), "siglip": ImageSpec(32, "stretch"),
             "dinov2": ImageSpec(32, "crop", resize_to=37), "llava": ImageSpec(32, "pad")}
    for name, theirs in recorded.items():
        picture, processor = name.split(".")
        if processor in specs:
            assert torch.equal(to_pixels(recorded[f"{picture}.input"].numpy(), specs[processor]), theirs), name


MEAN = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("config, expected", [
    # as published: openai/clip-vit-large-patch14-336, openai/clip-vit-base-patch16, facebook/dinov2-base,
    # google/siglip-so400m-patch14-384
    ({"crop_size": 336, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3,
      "size": 336}, (336, "crop", 3, None)),
    ({"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "image_processor_type": "CLIPImageProcessor",
      "size": {"shortest_edge": 224}}, (224, "crop", 3, None)),
    ({"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "image_processor_type": "BitImageProcessor",
      "resample": 3, "size": {"shortest_edge": 256}}, (224, "crop", 3, 256)),
    ({"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": {"height": 384, "width": 384}},
     (384, "stretch", 3, None)),
    # google/vit-base-patch16-224, facebook/vit-mae-base, facebook/deit-base-distilled-patch16-224,
    # llava-hf/llava-1.5-7b-hf
    ({"image_processor_type": "ViTImageProcessor", "resample": 2, "size": {"height": 224, "width": 224}},
     (224, "stretch", 2, None)),
    ({"feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 224}, (224, "stretch", 2, None)),
    ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224}, (224, "stretch", 2, None)),
    ({"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3,
      "size": 256}, (224, "stretch", 3, 256)),
    ({"crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_pad": True, "resample": 3,
      "image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 336}}, (336, "pad", 3, None)),
])
def test_preprocessing_is_read_from_published_configs(config, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | MEAN))
    spec = ImageSpec.from_folder(tmp_path)
    assert (spec.size, spec.mode, spec.resample, spec.resize_to) == expected
    assert spec.mean == (0.5, 0.4, 0.3) and spec.std == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(spec.config()))
    assert ImageSpec.from_folder(tmp_path) == spec


@pytest.mark.parametrize("config", [{}, {"size": 224}, [1], {"size": {"longest_edge": 3}, **MEAN},
                                    {"size": {"height": 224, "width": 448}, **MEAN}])
def test_a_preprocessing_that_cannot_be_followed_is_an_error(config, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="preprocessor_config.json: (not the description|only square|should hold)"):
        ImageSpec.from_folder(tmp_path)


# --- boxes ---

@pytest.mark.parametrize("width, height", [(640, 480), (333, 500), (64, 64), (7, 1000)])
def test_boxes_move_with_the_padding_and_back(width, height):
    """A white rectangle is found in the padded picture where pad_box says, and unpad_box leads back to its pixels."""
    box = [width // 4, height // 4, width // 2 + 1, height // 2 + 1]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1]:box[3], box[0]:box[2]] = 255
    side = max(width, height)
    white = (to_pixels(pixels, ImageSpec(side)) == 255).all(0).nonzero()     # (white pixels, 2): y, x
    (top, left), (bottom, right) = white.min(0).values.tolist(), (white.max(0).values + 1).tolist()
    padded = pad_box(box, width, height)
    assert np.allclose(np.array(padded) * side, [left, top, right, bottom])
    assert np.allclose(unpad_box(padded, width, height), box)


def test_boxes_are_text_and_text_is_boxes():
    assert format_box([0.39, 0.48301, 0.8836, 1]) == "[0.390,0.483,0.884,1.000]"
    assert format_box([0, 0.5, 1, 1], decimals=2) == "[0.00,0.50,1.00,1.00]"
    assert parse_box("It is at [0.390,0.483,0.884,0.866].") == [0.39, 0.483, 0.884, 0.866]
    assert parse_box("[ 0, .5, 1., 1.25 ] or [1,1,1,1]") == [0, 0.5, 1, 1.25]
    for text in ("", "no", "[0.1,0.2,0.3]", "[0.1,0.2,0.3,x]", "0.1,0.2,0.3,0.4", "[nan,0,0,0]", "[1,2,3,4,5]"):
        assert parse_box(text) is None

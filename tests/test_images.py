"""common/images.py: images become pixels and boxes become text, as written out by hand here."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image
from safetensors.torch import load_file

from common import anyres, images
from common.images import BadImage, ImageSpec, open_image, prepare, read_image, to_pixels
from connector import Tower, make_connector


def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.fixture
def rgb():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))


def test_images_of_every_mode_open_as_rgb(rgb, tmp_path):
    for mode in ("L", "P", "1", "CMYK"):
        converted = rgb.convert(mode)
        opened = open_image(saved(converted, tmp_path / "image.tiff"))
        assert np.array_equal(opened, converted.convert("RGB")), mode
    # transparent parts are white
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:, :10] = 0
    rgba = Image.merge("RGBA", [*rgb.split(), Image.fromarray(alpha)])
    pixels = np.asarray(open_image(saved(rgba, tmp_path / "rgba.png")))
    assert (pixels[:, :10] == 255).all()
    assert np.array_equal(pixels[:, 10:], np.asarray(rgb)[:, 10:])


def test_exif_orientation_is_applied_and_damaged_exif_is_not(rgb, tmp_path):
    array = np.asarray(rgb)
    upright = [array, array[:, ::-1], array[::-1, ::-1], array[::-1], array.swapaxes(0, 1)]
    upright += [np.rot90(array, -1), array[::-1, ::-1].swapaxes(0, 1), np.rot90(array)]
    for orientation, expected in enumerate(upright, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("turned.png", "turned.tiff"):
            path = saved(rgb, tmp_path / name, exif=exif)
            assert np.array_equal(open_image(path), expected), (orientation, name)
            # turned once, though an opened image is converted again
            pixels = prepare(path, ImageSpec(8, "stretch"), 4).pixels[0]
            assert torch.equal(pixels, to_pixels(expected, ImageSpec(8, "stretch")))
    plain = open_image(saved(rgb, tmp_path / "plain.jpg"))
    damaged = open_image(saved(rgb, tmp_path / "damaged.jpg", exif=b"Exif\0\0damaged"))
    assert np.array_equal(plain, damaged)


def test_an_image_that_cannot_be_used_is_named_in_one_line(rgb, tmp_path, monkeypatch):
    whole = saved(rgb.resize((200, 200)), tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    # a format that is not opened, whatever the name is
    saved(rgb, tmp_path / "ppm.jpg", format="ppm")
    saved(rgb.resize((300, 300)), tmp_path / "bomb.png")
    saved(Image.fromarray(np.zeros((8, 8), np.float32)), tmp_path / "floats.tiff")
    saved(Image.fromarray(np.zeros((8, 8), np.uint16)), tmp_path / "deep.png")
    needle = Image.new("RGB", (1, 60000))
    for mode in ("pad", "crop"):
        with pytest.raises(BadImage, match="1x60000"):
            to_pixels(needle, ImageSpec(336, mode))
    # bomb.png has 90,000 pixels: where PIL itself only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60000)
    for name in "truncated.jpg text.jpg bomb.png floats.tiff deep.png ppm.jpg none.jpg".split():
        with pytest.raises(BadImage) as error:
            open_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_an_image_is_read_from_a_url(rgb, tmp_path):
    path = saved(rgb, tmp_path / "a.png")

    class Handler(SimpleHTTPRequestHandler):
        def parse_request(self):
            # as Wikimedia, which refuses the default User-Agent of requests
            return super().parse_request() and "nanoMLLM" in self.headers["User-Agent"]

    handler = partial(Handler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        assert np.array_equal(read_image(url + "a.png"), read_image(str(path)))
        with refused("none.png"):
            read_image(url + "none.png")
        server.shutdown()


def test_pixels_equal_those_recorded_from_transformers():
    expected = load_file(ROOT / "tests" / "fixtures" / "pixels.safetensors")
    specs = {"clip": ImageSpec(32, "crop"), "dinov2": ImageSpec(32, "crop", resize_to=37)}
    specs |= {"siglip": ImageSpec(32, "stretch"), "llava": ImageSpec(32, "pad")}
    for name, theirs in expected.items():
        image, processor = name.split(".")
        if processor in specs:
            ours = to_pixels(expected[f"{image}.input"].numpy(), specs[processor])
            assert torch.equal(ours, theirs), name


# --- AnyRes, as LLaVA-NeXT's and the Dense Connector's code computes it ---

ANYRES = json.loads((ROOT / "tests" / "fixtures" / "anyres.json").read_text())


def spec_of(cases):
    return ImageSpec(cases["R"], "anyres", pinpoints=tuple(map(tuple, cases["pinpoints"])))


def test_anyres_chooses_canvas_and_number_of_tokens_as_the_authors_do():
    for cases in ANYRES["counts"]:
        spec, M = spec_of(cases), cases["side"] ** 2 + 1
        for size, canvas, _, tokens in cases["cases"]:
            assert list(anyres.best_canvas(size, spec.pinpoints)) == canvas
            assert len(anyres.order(size, spec, M)) == tokens
    assert spec_of(ANYRES["counts"][0]) == ImageSpec(336, "anyres")
    for size in ((3000, 20), (20, 3000)):
        with pytest.raises(BadImage, match="elongated"):
            prepare(Image.new("RGB", size), ImageSpec(336, "anyres"), 577)


def test_anyres_cuts_tiles_and_orders_tokens_as_the_authors_do():
    cases = ANYRES["orders"]
    spec, R = spec_of(cases), cases["R"]
    for size, (w, h), box, order in cases["cases"]:
        rows = [4 if token is None else 5 * token[0] + 2 * token[1] + token[2] for token in order]
        image = Image.effect_noise(size, 90).convert("RGB")
        if None not in order:
            with pytest.raises(BadImage):
                prepare(image, spec, 5)
            continue
        prepared = prepare(image, spec, 5)
        assert prepared.rows.tolist() == rows
        whole, *tiles = prepared.pixels.permute(0, 2, 3, 1).numpy()
        assert np.array_equal(whole, image.resize((R, R), 3))
        canvas = np.zeros((h, w, 3), np.uint8)
        left, top, right, bottom = box
        canvas[top:bottom, left:right] = image.resize((right - left, bottom - top), 3)
        lines = np.array(tiles).reshape(h // R, w // R, R, R, 3).swapaxes(1, 2)
        assert np.array_equal(lines.reshape(h, w, 3), canvas)


def test_connectors_see_each_tile_on_its_own():
    layer, tile, patch, channel = np.ogrid[:25, :4, 1:5, :2]
    values = (31 * layer + 17 * tile + 7 * patch + 3 * channel) % 23 - 11
    states = torch.tensor(values / 8).float()
    rows = anyres.order(ANYRES["dense"]["size"], spec_of(ANYRES["orders"]), 5)
    for name in ("dci", "sci"):
        connector = make_connector(name, [Tower(24, 2, 4)], 6)
        anyres.add_newline(connector, 6)
        connector.mm_projector = torch.nn.Identity()
        torch.nn.init.constant_(connector.image_newline, -1)
        # one layer, or the mean over a range
        hidden = [states[torch.tensor(x)].reshape(-1, 4, 4, 2).mean(0) for x in connector.layers[0]]
        visual = connector([hidden])
        expected = ANYRES["dense"][name]
        assert torch.allclose(visual[:, :-1], torch.tensor(expected["features"]))
        assert torch.allclose(visual.flatten(0, 1)[rows], torch.tensor(expected["sequence"]))
    with refused("sti"):
        anyres.add_newline(make_connector("sti", [Tower(24, 2, 16)], 6), 6)


# --- preprocessor_config.json ---

# published files -> the fields of ImageSpec, with other statistics
PUBLISHED = json.loads((ROOT / "tests" / "fixtures" / "preprocessors.json").read_text())


def test_published_preprocessing_is_read_and_written_and_others_are_an_error(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    with refused(path.name):
        ImageSpec.from_folder(tmp_path)
    for release, published in PUBLISHED.items():
        path.write_text(json.dumps(published["config"]))
        spec = ImageSpec.from_folder(tmp_path)
        assert json.loads(json.dumps(vars(spec))) == published["spec"], release
        path.write_text(json.dumps(spec.config()))
        assert ImageSpec.from_folder(tmp_path) == spec
    # as transformers 5 writes it
    path.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": spec.config()}))
    assert ImageSpec.from_folder(tmp_path) == spec
    not_square = PUBLISHED["google/siglip"]["config"] | {"size": {"height": 224, "width": 448}}
    for config in ({}, {"size": 224}, [1], not_square):
        path.write_text(json.dumps(config))
        with refused(path.name):
            ImageSpec.from_folder(tmp_path)


def test_boxes_move_with_the_padding_are_text_and_iou_is_the_shared_area():
    # 25 columns or rows on both sides
    for size, padded in (((50, 100), [0.25, 0, 0.75, 1]), ((100, 50), [0, 0.25, 1, 0.75])):
        assert images.pad_box([0, 0, *size], *size) == pytest.approx(padded)
        assert images.unpad_box(padded, *size) == pytest.approx([0, 0, *size])
    assert images.format_box([0.39, 0.48301, 0.8836, 1]) == "[0.390,0.483,0.884,1.000]"
    two = "[ 0, .5, 1., 1.25 ] or [[1,1,1,-1]"
    assert images.parse_boxes(two) == [[0, 0.5, 1, 1.25], [1, 1, 1, -1]]
    assert images.parse_box(two) == [0, 0.5, 1, 1.25]
    for text in ("", "[0.1,0.2,0.3]", "[0.1,0.2,0.3,x]", "[nan,0,0,0]", "[1,2,3,4,5]"):
        assert images.parse_box(text) is None
    assert images.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert images.iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    # a reversed box has no area
    assert images.iou((0, 0, 1, 1), (2, 2, 3, 3)) == images.iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0

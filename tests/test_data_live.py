"""data.py against transformers itself, where it is installed: the same pixels as from every processor."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from images import ImageSpec, open_image, to_pixels, to_rgb
from make_data_fixtures import picture

IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
PROCESSORS = {
    "clip-336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336),
    "siglip-384": SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    "dinov2-256-224": BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=224, **IMAGENET),
    "vit-224": ViTImageProcessorPil(),
    "deit-256-224": DeiTImageProcessorPil(**IMAGENET),
    "llava-336": LlavaImageProcessorPil(size={"shortest_edge": 336}, crop_size=336, do_pad=True)}


def pictures(real):
    photographs = [Image.open(path) for path in sorted((real / "images").iterdir())[:6]]
    sizes = (333, 500), (501, 334), (64, 64), (337, 336), (200, 1), (1, 90), (700, 30)
    made = [Image.fromarray(picture(height, width, seed=height)) for height, width in sizes]
    modes = [made[0].convert("L"), made[0].convert("P"), made[1].convert("CMYK"), made[2].convert("LA"),
             Image.merge("RGBA", [*made[0].split(), made[0].split()[0]])]
    return photographs + made + modes


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers_pil_processor(name, real, tmp_path):
    processor = PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    spec = ImageSpec.from_folder(tmp_path)
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    for image in pictures(real):
        rgb = to_rgb(image) if name in ("vit-224", "deit-256-224") else image    # these two leave the mode alone
        raw = processor(rgb, do_rescale=False, do_normalize=False)["pixel_values"][0]
        ours, theirs = to_pixels(image, spec), torch.from_numpy(np.asarray(raw))
        assert ours.dtype == theirs.dtype == torch.uint8
        assert torch.equal(ours, theirs), (image.mode, image.size)
        normalised = torch.from_numpy(np.asarray(processor(rgb)["pixel_values"][0]))
        assert ((ours / 255 - mean) / std - normalised).abs().max() < 1e-6       # float32 rounding of values up to 2.7


def test_padding_is_llavas_expand2square_before_clips_processor(real):
    """LLaVA's own code, by hand: the square is padded in PIL, then CLIP's processor resizes and crops it."""
    processor = PROCESSORS["clip-336"]
    for path in sorted((real / "images").iterdir())[::15]:
        image = open_image(path)
        width, height = image.size
        colour = tuple(int(x * 255) for x in processor.image_mean)
        if width > height:
            square = Image.new(image.mode, (width, width), colour)
            square.paste(image, (0, (width - height) // 2))
        else:
            square = Image.new(image.mode, (height, height), colour)
            square.paste(image, ((height - width) // 2, 0))
        theirs = processor(square, do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert torch.equal(to_pixels(image, ImageSpec(336)), torch.from_numpy(np.asarray(theirs)))


@pytest.mark.parametrize("spec", [ImageSpec(224), ImageSpec(224, "crop", resize_to=256), ImageSpec(64, "stretch")])
def test_transformers_reads_the_preprocessing_that_we_save(spec, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(spec.config()))
    processor, image = LlavaImageProcessorPil.from_pretrained(tmp_path), Image.fromarray(picture(97, 131, 0))
    theirs = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert torch.equal(to_pixels(image, spec), torch.from_numpy(np.asarray(theirs)))
    assert np.allclose(processor.image_mean, spec.mean)

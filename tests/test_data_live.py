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


BOTH = dict(do_normalize=True, do_resize=True)
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
OPENAI = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
# preprocessor_config.json as it lies beside the releases: the files of 2021 give numbers, name no kind, or leave defaults out
RELEASES = {
    "openai/clip-vit-large-patch14-336": (CLIPImageProcessorPil, BOTH | OPENAI | dict(
        crop_size=336, do_center_crop=True, feature_extractor_type="CLIPFeatureExtractor", resample=3, size=336)),
    "laion/CLIP-ViT-H-14": (CLIPImageProcessorPil, BOTH | OPENAI | dict(
        crop_size=224, do_center_crop=True, feature_extractor_type="CLIPFeatureExtractor", resample=3, size=224)),
    "google/siglip-so400m-patch14-384": (SiglipImageProcessorPil, BOTH | HALF | dict(
        do_rescale=True, image_processor_type="SiglipImageProcessor", resample=3, size=dict(height=384, width=384))),
    "google/siglip2-so400m-patch14-384": (SiglipImageProcessorPil, BOTH | HALF | dict(
        do_convert_rgb=None, do_rescale=True, image_processor_type="SiglipImageProcessor", resample=2,
        size=dict(height=384, width=384))),
    "facebook/dinov2-large": (BitImageProcessorPil, BOTH | IMAGENET | dict(
        crop_size=dict(height=224, width=224), do_center_crop=True, do_convert_rgb=True, do_rescale=True,
        image_processor_type="BitImageProcessor", resample=3, size=dict(shortest_edge=256))),
    "google/vit-base-patch16-224": (ViTImageProcessorPil, BOTH | HALF | dict(size=224)),
    "facebook/vit-mae-large": (ViTImageProcessorPil, BOTH | IMAGENET | dict(size=224)),
    "facebook/deit-base-patch16-224": (DeiTImageProcessorPil, BOTH | IMAGENET | dict(
        crop_size=224, do_center_crop=True, feature_extractor_type="DeiTFeatureExtractor", resample=3, size=256))}


@pytest.mark.parametrize("release", RELEASES)
def test_pixels_are_those_that_the_release_asks_for(release, tmp_path):
    kind, stated = RELEASES[release]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    processor, spec = kind.from_pretrained(tmp_path), ImageSpec.from_folder(tmp_path)
    for height, width in ((333, 500), (400, 300), (90, 91)):
        image = Image.fromarray(picture(height, width, seed=height))
        theirs = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert torch.equal(to_pixels(image, spec), torch.from_numpy(np.asarray(theirs)))
    assert np.allclose(processor.image_mean, spec.mean) and np.allclose(processor.image_std, spec.std)


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

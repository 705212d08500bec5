"""Writes fixtures/pixels.safetensors: small synthetic pictures, and what transformers' PIL processors make of them.

    pip install -r requirements-dev.txt && python tests/make_data_fixtures.py

`<picture>.input` is uint8 (H, W, 3); `<picture>.<processor>` is uint8 (3, R, R), before scaling and normalisation.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PIXELS_ONLY = dict(do_rescale=False, do_normalize=False)
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, **PIXELS_ONLY),
    "siglip": SiglipImageProcessorPil(size={"height": 32, "width": 32}, **PIXELS_ONLY),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 37}, crop_size=32, **PIXELS_ONLY),
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=32, do_pad=True, **PIXELS_ONLY)}


def picture(height, width, seed):
    """Waves and noise: smooth parts, edges and saturated pixels."""
    y, x, channel = np.mgrid[0:height, 0:width, 0:3]
    waves = 128 + 90 * np.sin(x / 5 + channel) + 90 * np.cos(y / 3 - channel * x / 40)
    return np.clip(waves + np.random.default_rng(seed).normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    tensors = {}
    for name, (height, width) in {"wide": (41, 75), "tall": (90, 33), "line": (50, 1), "small": (9, 12)}.items():
        pixels = picture(height, width, seed=height)
        tensors[f"{name}.input"] = torch.from_numpy(pixels)
        for processor, process in PROCESSORS.items():
            made = np.asarray(process(Image.fromarray(pixels))["pixel_values"][0])
            assert made.dtype == np.uint8
            tensors[f"{name}.{processor}"] = torch.from_numpy(made).contiguous()
    save_file(tensors, Path(__file__).parent / "fixtures" / "pixels.safetensors")

"""Write fixtures/pixels.safetensors: small synthetic images and what transformers makes of them.

    pip install -r requirements-dev.txt && python tests/make_data_fixtures.py

`<image>.input` is uint8 (H, W, 3). `<image>.<processor>` is uint8 (3, R, R): what its PIL processor
makes of it before scaling and normalization.
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
    "llava": LlavaImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=32, do_pad=True, **PIXELS_ONLY
    ),
}


def draw(height, width, seed):
    """Draw waves and noise: smooth parts, edges and saturated pixels."""
    y, x, channel = np.mgrid[0:height, 0:width, 0:3]
    waves = 128 + 90 * np.sin(x / 5 + channel) + 90 * np.cos(y / 3 - channel * x / 40)
    noise = np.random.default_rng(seed).normal(0, 20, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def main():
    tensors, sizes = {}, {"wide": (41, 75), "tall": (90, 33), "line": (50, 1), "small": (9, 12)}
    for name, (height, width) in sizes.items():
        pixels = draw(height, width, seed=height)
        tensors[f"{name}.input"] = torch.from_numpy(pixels)
        for processor, process in PROCESSORS.items():
            made = np.asarray(process(Image.fromarray(pixels))["pixel_values"][0])
            tensors[f"{name}.{processor}"] = torch.from_numpy(made).contiguous()
    save_file(tensors, Path(__file__).parent / "fixtures" / "pixels.safetensors")


if __name__ == "__main__":
    main()

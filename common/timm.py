"""Read configs in timm's layout: DeiT III (timm/deit3_*), ConvNeXt-L (timm/convnext_large*).

config.json there names an architecture. `model_args` holds what differs from it, and
`pretrained_cfg` the pixel statistics. Paper: arXiv 2204.07118.
"""

import re

from common.errors import InputError
from common.layouts import FILE

SIZES = FILE["deit3_sizes"]


def read(config, folder):
    """Translate timm's config.json -> Hugging Face's keys, (mean, std). Raises InputError."""
    architecture = str(config["architecture"])
    pixels = config.get("pretrained_cfg") or {}
    statistics = pixels.get("mean"), pixels.get("std")
    if architecture.startswith("convnext_large"):
        # its sizes are the defaults of convnext.ConvNeXtConfig
        return {"model_type": "convnext"}, statistics
    found = re.match(r"deit3_([a-z]+)_patch(\d+)_(\d+)", architecture)
    if not found or found[1] not in SIZES:
        raise InputError(
            f"{folder}: architecture {architecture!r}: only deit3_* and convnext_large* are read"
        )
    width, depth, heads = SIZES[found[1]]
    changed = config.get("model_args") or {}
    width = changed.get("embed_dim", width)
    translated = {
        "hidden_size": width,
        "num_hidden_layers": changed.get("depth", depth),
        "num_attention_heads": changed.get("num_heads", heads),
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-6,
        "image_size": changed.get("img_size", int(found[3])),
        "patch_size": changed.get("patch_size", int(found[2])),
        "model_type": "deit3",
        "id2label": range(config.get("num_classes", 1000)),
    }
    return translated, statistics

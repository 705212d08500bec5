"""ConvNeXt: Mini-Gemini's second tower, which sees an image in more pixels than CLIP.

Papers: "A ConvNet for the 2020s" (arXiv 2201.03545); Mini-Gemini (arXiv 2403.18814). Checkpoint:
timm/convnext_large_mlp.clip_laion2b_ft_soup_320, which is OpenCLIP's convnext_large_d_320 as
safetensors. It is here and not at the top because only this one connector, mgm, reads it.

    pixels (B, 3, R, R) uint8
      | stem: patches of 4 x 4, one linear layer, LayerNorm
    (B, 192, R/4, R/4)
      | stage 1: 3 blocks, x + gamma · MLP(LayerNorm(7 x 7 convolution of each channel))
      | stages 2 to 4: 3, 27 and 3 blocks, each stage with half the side and twice the channels
    (B, 192, R/4, R/4), (B, 384, R/8, R/8), (B, 768, R/16, R/16), (B, 1536, R/32, R/32)
      | resized to the first map's side, concatenated along the channels
    hidden[4] (B, N, 2880), N = (R/4)², the only hidden state

Two sizes of one image: pixels have the side R that ConvNeXt is to see, 768 in the paper. CLIP
resizes them to its own 336 after they are normalized, bilinearly (PretrainedTower.read_pixels).
Mini-Gemini-HD has R = 1536. CLIP then sees the image whole and in 2 x 2 crops, and so the map is
cut (common.grid.views).
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import InputError
from common.grid import views
from common.images import Normalize
from common.layouts import CONVNEXT
from common.pretrained import PretrainedTower
from vit import MLP


@dataclass
class ConvNeXtConfig:
    """The keys of config.json; the defaults are ConvNeXt-L in Mini-Gemini."""

    depths: list = (3, 3, 27, 3)  # blocks of each stage
    hidden_sizes: list = (192, 384, 768, 1536)
    image_size: int = 768  # R
    patch_size: int = 4  # pixels, on a side, of a position of the first map
    layer_norm_eps: float = 1e-6
    model_type: str = "convnext"

    @property
    def hidden_size(self):
        return sum(self.hidden_sizes)

    @property
    def num_hidden_layers(self):
        return len(self.depths)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: (B, D, H, W) -> (B, D, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Mix the positions of each channel, then the channels of each position: (B, D, H, W)."""

    def __init__(self, width, eps):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, 4 * width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, H, W, D)
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


def stage(in_width, width, depth, eps):
    """Halve the side, then the blocks. in_width: None for the first stage, which halves nothing."""
    downsample = nn.Identity()
    if in_width:
        norm, conv = ChannelNorm(in_width, eps=eps), nn.Conv2d(in_width, width, 2, stride=2)
        downsample = nn.Sequential(norm, conv)
    blocks = nn.Sequential(*(Block(width, eps) for _ in range(depth)))
    return nn.Sequential(OrderedDict(downsample=downsample, blocks=blocks))


class ConvNeXt(PretrainedTower):
    """ConvNeXt without its head: uint8 (B, 3, R, R) -> [(B, N, D)], all maps as one."""

    num_prefix_tokens = 0
    config_class = ConvNeXtConfig
    layouts = CONVNEXT
    any_resolution = True

    def __init__(self, config, mean=None, std=None):
        super().__init__()
        self.config = config
        widths, eps = config.hidden_sizes, config.layer_norm_eps
        self.normalize = Normalize(*self.statistics(mean, std))
        P = config.patch_size
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], P, stride=P), ChannelNorm(widths[0], eps))
        shapes = zip([None, *widths], widths, config.depths, strict=False)
        self.stages = nn.ModuleList(stage(*shape, eps) for shape in shapes)

    def forward(self, pixels, layers=None):
        """Compute the maps of all stages -> [(B, N, D)]. Raises InputError.

        In Mini-Gemini-HD the batch has five entries an image: see common.grid.views.
        """
        if layers not in (None, [len(self.stages)]):
            raise InputError(f"ConvNeXt has only hidden[{len(self.stages)}], not {layers}")
        x = self.stem(self.read_pixels(pixels, self.stem[0].weight.dtype))
        side, maps = x.shape[-2:], []
        for stage in self.stages:
            x = stage(x)
            maps.append(F.interpolate(x.float(), side, mode="bilinear").to(x.dtype))
        x = views(torch.cat(maps, dim=1), self.crops)  # (B, D, R/4, R/4)
        return [x.flatten(2).transpose(1, 2)]

    def freeze_above(self, deepest):
        """Freeze nothing: the hidden state depends on every stage."""

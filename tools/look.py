"""Draw what vision towers and LLM compute from an image, as one PNG sheet.

    python -m tools.look --scene=3                              a test scene of the toy world
    python -m tools.look --image=photo.jpg --prompt='Where is the dog?'    a file or a URL
    python -m tools.look --model=llava-hf/llava-1.5-7b-hf --image=photo.jpg
    python -m tools.look --vision=weights/clip,weights/dinov2   towers without an LLM

    pixels (1, 3, R, R) uint8
      | each tower       hidden[0..L] (N, D)  -> principal_colors -> (N, 3)   a color a patch
      | its last block   attention (H, S, S)  -> the class token's row        (H, N)
    prompt and answer, embedded (1, T, C)
      | the LLM          attention (H, T, T)  -> rows that predict a box, columns of the image

The colors are DINOv2's (arXiv 2304.07193, figure 1): patches with similar features have similar
colors. The paper computes the components on several images and without the background. Here they
are those of one image, so compare colors within a panel only. The class token's attention is DINO's
figure (arXiv 2104.14294). Registers are shown, too: without them there are bright spots (arXiv
2309.16588). The bars are COMM's layer weights (arXiv 2310.08825). Attention shows where values come
from, not why an answer is what it is.
"""

import math
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import cli
from common.cli import option
from common.draw import COLORS, MARGIN, TRUE_COLOR, check_name, panel, save_image
from common.errors import InputError
from common.hub import dtype_to_answer, locate, read_config
from common.images import ImageSpec, parse_boxes, read_image, to_pixels
from dialogue import IMAGE
from interop.load import load_to_answer
from mllm import TOWERS, import_class
from toy.scenes import test_scene

# The sheet, in pixels.
WIDTH, EDGE, GAP = 1400, 28, 12
INK, FAINT, USED = "#1a1a1a", "#777777", "#0b62d6"
LEGEND = (
    "Bright is strong attention, within one panel.",
    "Patches with similar features have similar colors, within one panel.",
    "hidden[0] enters the first block, hidden[i] is the output of block i.",
    "Under a question: the attention of the LLM during its answer, mean over heads and tokens;",
    "%: the share that goes to the image, the rest goes to text.",
    "Blue: layers that the connector reads.",
)


@dataclass
class Config:
    image: str = option("", "file or URL; default: a test scene of the toy world")
    scene: int = option(0, "which scene")
    prompt: str = option("", "default: where the scene's objects are, or a description")
    model: str = option("", "folder or hub id; default: the newest under out/")
    vision: list[str] = option([], "towers to draw instead of a model: folders or hub ids")
    out: str = option("out/look.png", "the sheet")
    max_new_tokens: int = option(64, "longest answer")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


# ---- features as colors --------------------------------------------------------------------------


def principal_colors(features, before=None):
    """Turn patch features (N, D) into RGB (N, 3): their principal components.

    Colors are from 0 to 1. The share of the variance is returned, too. The sign of a component is
    arbitrary. It follows the colors of the layer `before` (N, 3), or else makes the few unusual
    patches bright. Each component is scaled from its 2nd to its 98th percentile, because of
    outliers.
    """
    features = features.double()
    U, S, _ = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    scores = (U * S)[:, :3]  # (N, 3)
    reference = scores**2 if before is None else before - before.mean(dim=0)
    scores = scores * (scores * reference).sum(dim=0).sign()
    low, high = scores.quantile(scores.new_tensor([0.02, 0.98]), dim=0)
    # A constant component stays dark: scaling it would show rounding errors.
    colors = (scores - low) / (high - low).clamp(min=1e-6 * features.norm())
    share = S[:3].square().sum() / S.square().sum()
    return colors.clamp(0, 1).float(), share.item()


# ---- attention -----------------------------------------------------------------------------------


@contextmanager
def recorded_attention(modules):
    """Record the attention weights of modules in a list, (B, H, T, T) float32.

    scaled_dot_product_attention never stores its softmax, so compute it once more.
    """
    recorded = []

    def sdpa(q, k, v, attn_mask=None, is_causal=False, **options):
        # H / G query heads share each key head.
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q.float() @ keys.float().mT / math.sqrt(q.shape[-1])
        if is_causal:
            attn_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        recorded.append(scores.softmax(dim=-1).cpu())
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)

    for module in modules:
        module.sdpa = sdpa
    try:
        yield recorded
    finally:
        for module in modules:
            del module.sdpa


@torch.no_grad()
def look_through(tower, pixels):
    """Run a tower on pixels uint8 (3, R, R).

    -> all hidden states of the patches, (N, D) each, and the last block's attention from the prefix
    tokens, (prefix, H, S).
    """
    prefix = tower.num_prefix_tokens
    device = next(tower.parameters()).device
    with recorded_attention([tower.blocks[-1].attn]) as recorded:
        hidden = tower(pixels[None].to(device))
    attention = recorded[0][0, :, :prefix].transpose(0, 1)
    return [x[0, prefix:].float().cpu() for x in hidden], attention


@torch.no_grad()
def look_back(model, image, question, answer, blocks):
    """Return the attention to an image's tokens, (blocks, answer, M), mean over heads.

    answer: token ids. Row t predicts token t + 1, so the row of an id is that of the token before.
    """
    pixels, prompt = model.prompt([image], [(question, None)])
    device = model.llm.embed_tokens.weight.device
    tokens = torch.tensor([prompt + answer], device=device)  # (1, T)
    with recorded_attention([model.llm.layers[i].self_attn for i in blocks]) as recorded:
        model.llm(embeds=model.embed(tokens, pixels.to(device)), hidden_only=True)
    rows = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
    is_image = (tokens[0] == IMAGE).cpu()
    return torch.stack([x[0].mean(dim=0)[rows][:, is_image] for x in recorded])


# ---- drawing -------------------------------------------------------------------------------------


def write(draw, position, text, size=13, color=INK):
    """Write one line of at most 90 characters and return where it ends."""
    font, text = ImageFont.load_default(size=size), textwrap.shorten(text, 90, placeholder="...")
    draw.text(position, text, color, font)
    return position[0] + draw.textlength(text, font)


def mosaic(values, side, resample=Image.Resampling.NEAREST):
    """Draw a square grid, (N,) or (N, 3) from 0 to 1, as an image of this side."""
    grid = math.isqrt(len(values))
    values = values.reshape(grid, grid, -1).squeeze(-1) * 255
    return Image.fromarray(values.round().byte().numpy()).resize((side, side), resample)


def heatmap(image, weights, side):
    """Draw attention to patches, (N,), over the image; the top 1% are brightest."""
    weights = (weights / weights.quantile(0.99).clamp(min=1e-12)).clamp(0, 1)
    light = mosaic(weights, side, Image.Resampling.BICUBIC)
    light = ImageOps.colorize(light, "#160b39", "#fdf3a5", mid="#e0463f")
    gray = ImageOps.grayscale(image.resize((side, side), Image.Resampling.BICUBIC))
    return Image.blend(gray.convert("RGB"), light, 0.7)


def show(pixels):
    """Turn pixels uint8 (3, R, R) into a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def with_boxes(image, boxes, side):
    """Draw boxes [(color, box)] in an image whose longer side becomes `side`."""
    drawn = panel(image, boxes, [], side)
    return ImageOps.crop(drawn, MARGIN)


def section(title, note, panels, side):
    """Arrange panels [(image, caption, color)] of width `side` under a title."""
    columns = (WIDTH - 2 * EDGE + GAP) // (side + GAP)
    height = max(image.height for image, _, _ in panels) + 30
    rows = math.ceil(len(panels) / columns)
    canvas = Image.new("RGB", (WIDTH, 50 + rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    end = write(draw, (EDGE, 14), title, 19)
    write(draw, (end + 14, 18), note, 15, FAINT)
    for i, (image, caption, color) in enumerate(panels):
        x, y = EDGE + i % columns * (side + GAP), 46 + i // columns * height
        canvas.paste(image, (x, y))
        write(draw, (x, y + height - 26), caption, 13, color)
    return canvas


def header(image, boxes, title, legend, side=280):
    """Draw the image with all boxes, and the text at its right."""
    canvas, left = Image.new("RGB", (WIDTH, side + 50), "white"), EDGE + side + 28
    canvas.paste(with_boxes(image, boxes, side), (EDGE, EDGE))
    draw = ImageDraw.Draw(canvas)
    write(draw, (left, EDGE), title, 26)
    font = ImageFont.load_default(size=16)
    draw.multiline_text((left, EDGE + 70), "\n".join(legend), INK, font, spacing=12)
    return canvas


def bars(layers, weights, side):
    """Draw a tower's layer weights (n,), and a line at 1/n, where all of them started."""
    canvas, step, floor = Image.new("RGB", (side, 150), "white"), side / len(layers), 128
    draw, scale = ImageDraw.Draw(canvas), 100 / weights.max().item()
    for i, layer in enumerate(layers):
        top = floor - scale * weights[i].item()
        draw.rectangle((i * step, top, (i + 0.75) * step, floor), "#9cc3f5")
        write(draw, (i * step, floor + 4), str(layer))
    start = floor - scale / len(layers)
    draw.line([(0, start), (side, start)], USED)
    return canvas


# ---- the sheet -----------------------------------------------------------------------------------


def tower_sections(tower, pixels, used, side):
    """Draw a tower's hidden states (`used`: by the connector) and its class token."""
    name, image = tower_name(tower), show(pixels)
    hidden, attention = look_through(tower, pixels)
    panels, colors = [], None
    for i, features in enumerate(hidden):
        colors, share = principal_colors(features, colors)
        caption = f"hidden[{i}] · {share:.0%}"
        panels.append((mosaic(colors, side), caption, USED if i in used else INK))
    note = "red, green, blue: the first three principal components; %: their share of the variance"
    sections = [section(f"{name}: patches as colors", note, panels, side)]
    if not len(attention):
        return sections
    maps = [("class token, mean", attention[0].mean(dim=0))]
    maps += [(f"prefix token {i}, mean", x.mean(dim=0)) for i, x in enumerate(attention) if i]
    maps += [(f"head {i + 1}", x) for i, x in enumerate(attention[0])]
    panels = []
    for caption, weights in maps:
        weights = weights[len(attention) :]
        panels.append((heatmap(image, weights, side), f"{caption} · {weights.sum():.0%}", INK))
    note = f"block {len(tower.blocks)}, the last; %: the share that goes to the patches"
    sections.append(section(f"{name}: attention of the class token", note, panels, side))
    return sections


def answer_section(model, image, question, truth, colors, config, side):
    """Ask a question -> a section with the attention during the answer, and the boxes."""
    seen, depth = show(to_pixels(image, model.spec)), len(model.llm.layers)
    num_patches = (model.spec.size // model.vision[0].config.patch_size) ** 2
    count = min((WIDTH - 2 * EDGE + GAP) // (side + GAP) - 1, depth)
    blocks = [(i + 1) * depth // count - 1 for i in range(count)]
    ids = [token.item() for token in model.stream([image], [question], config.max_new_tokens)]
    answer = model.text(ids)
    print(f"{question}  {answer}")
    boxes = [(TRUE_COLOR, truth)] if truth else []
    boxes += zip(colors, parse_boxes(answer), strict=False)
    panels = [(with_boxes(image, boxes, side), "solid: answer, dashed: true", INK)]
    attention = look_back(model, image, question, ids, blocks)  # (blocks, ids, M)
    # The last id is the end token. The further tokens of `sti` have no place in the grid.
    attention = attention[:, : max(1, len(ids) - 1)].mean(dim=1)
    for block, weights in zip(blocks, attention, strict=True):
        caption = f"block {block + 1} · {weights.sum():.0%}"
        panels.append((heatmap(seen, weights[:num_patches], side), caption, INK))
    return section(question, answer, panels, side), boxes


def tower_name(tower):
    return type(tower).__name__.removesuffix("Vision")


def layers_read(layers):
    """Flatten a connector's layers: ints, and ranges whose mean is read."""
    return {i for x in layers for i in (x if isinstance(x, range) else [x])}


def make_sheet(image, title, questions, config, model=None, towers=()):
    """Draw a model, or towers; questions: [(question, true box or None)]."""
    towers = model.vision if model else towers
    deepest = max(len(tower.blocks) for tower in towers)
    columns = max(5, min(9, deepest + 1))
    side = (WIDTH - 2 * EDGE + GAP) // columns - GAP
    boxes, sections = [], []
    for i, (question, truth) in enumerate(questions):
        colors = COLORS[i:]
        drawn, new_boxes = answer_section(model, image, question, truth, colors, config, side)
        sections.append(drawn)
        boxes += new_boxes
    for i, tower in enumerate(towers):
        spec = model.spec if model else ImageSpec(tower.config.image_size)
        used = layers_read(model.connector.layers[i]) if model else ()
        sections += tower_sections(tower, to_pixels(image, spec), used, side)
    if hasattr(model and model.connector, "layer_weights"):
        panels, half = [], (WIDTH - 2 * EDGE - GAP) // 2
        weights = model.connector.layer_weights()
        for tower, layers, share in zip(towers, model.connector.layers, weights, strict=True):
            chart = bars(layers, share.detach().float().cpu(), half)
            panels.append((chart, f"hidden[i] of {tower_name(tower)}", FAINT))
        sections.append(section("COMM: layer weights", "line: equal weights", panels, half))
    sections.insert(0, header(image, boxes, title, LEGEND if model else LEGEND[:3]))
    sheet = Image.new("RGB", (WIDTH, sum(x.height for x in sections)), "white")
    y = 0
    for drawn in sections:
        sheet.paste(drawn, (0, y))
        y += drawn.height
    return sheet


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.scene < 0:
        raise InputError(f"--scene={config.scene}: must be 0 or more")
    check_name(config.out)
    if config.image:
        image, title = read_image(config.image), config.image
        questions = [("Describe the image.", None)]
    else:
        objects, image = test_scene(config.scene)
        title = f"test scene {config.scene}"
        questions = [(f"Where is the {x.name}?", x.box) for x in objects[:3]]
    if config.prompt:
        questions = [(config.prompt, None)]
    device, towers, model, name = cli.pick_device(config.device), [], None, ""
    for folder in map(locate, config.vision):
        cls = import_class(TOWERS, read_config(folder).get("model_type", "timm_wrapper"), folder)
        towers.append(cls.from_pretrained(folder, dtype_to_answer(folder, device), device))
    if not towers:
        name, model = load_to_answer(config.model, config.device)
    title = f"{name or ', '.join(config.vision)}: {title}"
    save_image(
        [make_sheet(image, title, questions if model else [], config, model, towers)], config.out
    )
    print(f"{config.out} shows {title}")


if __name__ == "__main__":
    cli.run(main)

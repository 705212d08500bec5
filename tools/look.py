"""Draw what vision towers and LLM compute from an image, as one PNG sheet.

    python -m tools.look --scene=3                              a test scene of the toy world
    python -m tools.look --image=photo.jpg --prompt='Where is the dog?'    a file or a URL
    python -m tools.look --model=llava-hf/llava-1.5-7b-hf --image=photo.jpg
    python -m tools.look --vision=weights/clip,weights/dinov2   towers without an LLM
    python -m tools.look --html=look.html                       also a page with a slider a section

    pixels (1, 3, R, R) uint8
      | each tower       hidden[0..L] (N, D)  -> principal_colors -> (N, 3)   a color a patch
      | its last block   attention (H, S, S)  -> the class token's row        (H, N)
    prompt and answer, embedded (1, T, C)
      | the LLM          attention (H, T, T)  -> rows of question and answer, columns of the image

The colors are DINOv2's (arXiv 2304.07193, figure 1): patches with similar features have similar
colors. The paper computes the components on several images and without the background. Here they
are those of one image, so compare colors within a panel only. The class token's attention is DINO's
figure (arXiv 2104.14294). In a tower without registers it may have bright spots (arXiv 2309.16588).
COMM's layer weights (arXiv 2310.08825) stand below the layers; they start equal.

An LLM has many heads, and most of them point at nothing. The sheet shows the one that points most,
and the one that the same rule picks in an LLM with random weights: without this control a picked
head proves nothing. Attention shows where values come from, not why an answer is what it is.
"""

import base64
import io
import math
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from common import cli
from common.cli import option
from common.draw import COLORS, MARGIN, TRUE_COLOR, check_name, panel, save_image
from common.errors import InputError
from common.images import ImageSpec, parse_boxes, read_image, to_pixels
from common.pretrained import LARGE, load_part, locate
from dialogue import IMAGE
from interop.load import dtype_to_answer, load_to_answer
from mllm import TOWERS
from toy.scenes import test_scene

NEAREST = Image.Resampling.NEAREST
# The sheet, in pixels.
WIDTH, EDGE, GAP = 1400, 28, 12
COLUMNS, SIDE = 7, 181
INK, FAINT, USED = "#1a1a1a", "#777777", "#0b62d6"
LEGEND = (
    "Bright is strong attention, within one panel. Lines: edges of the image.",
    "Patches with similar features have similar colors, within one panel.",
    "hidden[0] enters the first block, hidden[i] is the output of block i.",
    "Blue: layers that the connector reads.",
    "Under a question: attention of one head of the LLM, from the word of the question or answer",
    "that attends most to the true box (else the answer's box, else the image). %: how much.",
    "Picked: the head that attends most, mean over the questions. Untrained: the same rule,",
    "for an LLM with random weights.",
)


@dataclass
class Config:
    image: str = option("", "file or URL; default: a test scene of the toy world")
    scene: int = option(0, "which scene")
    prompt: str = option("", "default: where the scene's objects are, or a description")
    model: str = option("", "folder or hub id; default: the newest under out/")
    vision: list[str] = option([], "towers to draw instead of a model: folders or hub ids")
    out: str = option("out/look.png", "the sheet")
    html: str = option("", "also write this page: a slider over layers, one over blocks and heads")
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
def recorded_attention(modules, rows):
    """Record these rows of the attention weights of modules in a list, (B, H, rows, T) float32.

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
        recorded.append(scores.softmax(dim=-1)[:, :, rows].cpu())
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
    with recorded_attention([tower.blocks[-1].attn], slice(prefix)) as recorded:
        hidden = tower(pixels[None].to(device))
    return [x[0, prefix:].float().cpu() for x in hidden], recorded[0][0].transpose(0, 1)


@torch.no_grad()
def look_back(model, llm, image, question, answer):
    """Return each head's attention to an image's tokens, (L, H, n, M), and the n words that attend.

    They are those of the question and of the answer. llm: the model's, or another one of its size.
    answer: token ids, the last one ends it.
    """
    pixels, prompt, image_index = model.prompt([image], [(question, None)])
    device = model.llm.embed_tokens.weight.device
    tokens = torch.tensor([prompt + answer], device=device)  # (1, T)
    is_image = (tokens[0] == IMAGE).cpu()
    rows = slice(is_image.nonzero().max().item() + 1, -1)
    with recorded_attention([block.self_attn for block in llm.layers], rows) as recorded:
        llm(embeds=model.embed(tokens, pixels.to(device), image_index), hidden_only=True)
    texts = [model.tokenizer.decode([token]).strip() for token in tokens[0, rows].tolist()]
    words = [text or "newline" for text in texts]
    return torch.stack([x[0][..., is_image] for x in recorded]), words


def patches_in(box, grid):
    """Return which patches of a square grid have their middle in a box, bool (N,)."""
    middle = (torch.arange(grid) + 0.5) / grid
    left, top, right, bottom = box
    rows = (middle > top) & (middle < bottom)
    columns = (middle > left) & (middle < right)
    return (rows[:, None] & columns).flatten()


# ---- drawing -------------------------------------------------------------------------------------


def write(draw, position, text, size=13, color=INK):
    """Write one line of at most 90 characters and return where it ends."""
    font, text = ImageFont.load_default(size=size), textwrap.shorten(text, 90, placeholder="...")
    draw.text(position, text, color, font)
    return position[0] + draw.textlength(text, font)


def mosaic(values, side):
    """Draw a square grid, (N,) or (N, 3) from 0 to 1, as an image of this side."""
    grid = math.isqrt(len(values))
    values = values.reshape(grid, grid, -1).squeeze(-1) * 255
    return Image.fromarray(values.round().byte().numpy()).resize((side, side), NEAREST)


def heatmap(image, weights):
    """Draw attention to patches, (N,), and the edges of the image, but not the image itself.

    A bright object below the colors would look like attention.
    """
    light = mosaic(weights / weights.max().clamp(min=1e-12), SIDE)
    light = ImageOps.colorize(light, "#160b39", "#fdf3a5", mid="#e0463f")
    smooth = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).filter(
        ImageFilter.GaussianBlur(1)
    )
    slopes = np.gradient(np.asarray(smooth, dtype=float), axis=(0, 1))
    edges = np.hypot(*slopes).max(axis=2)
    strong = edges > max(0.2 * edges.max(), np.quantile(edges, 0.85))
    light.paste("white", mask=Image.fromarray(strong))
    return light


def show(pixels):
    """Turn pixels uint8 (3, R, R) into a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def with_boxes(image, boxes, side):
    """Draw boxes [(color, box)] in an image whose longer side becomes `side`."""
    drawn = panel(image, boxes, [], side)
    return ImageOps.crop(drawn, MARGIN)


def draw_section(title, note, panels):
    """Arrange panels [(image, caption, color)] under a title."""
    height = max(image.height for image, _, _ in panels) + 30
    rows = math.ceil(len(panels) / COLUMNS)
    canvas = Image.new("RGB", (WIDTH, 50 + rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    end = write(draw, (EDGE, 14), title, 19)
    write(draw, (end + 14, 18), note, 15, FAINT)
    for i, (image, caption, color) in enumerate(panels):
        x, y = EDGE + i % COLUMNS * (SIDE + GAP), 46 + i // COLUMNS * height
        canvas.paste(image, (x, y))
        write(draw, (x, y + height - 26), caption, 13, color)
    return canvas


def make_sheet(image, title, legend, sections):
    """Draw the image, the text at its right, and the sections below each other."""
    top = Image.new("RGB", (WIDTH, image.height + 50), "white")
    left = EDGE + image.width + 28
    top.paste(image, (EDGE, EDGE))
    draw = ImageDraw.Draw(top)
    write(draw, (left, EDGE), title, 26)
    font = ImageFont.load_default(size=16)
    draw.multiline_text((left, EDGE + 70), "\n".join(legend), INK, font, spacing=12)
    parts = [draw_section(name, note, panels[:shown]) for name, note, panels, shown in sections]
    return Image.fromarray(np.vstack([top, *parts]))


# ---- the sections: (title, note, [(image, caption, color)], how many of them the sheet shows) ----


def tower_sections(tower, pixels, notes):
    """Return a tower's hidden states and its class token; notes: {layer: what is added}."""
    name, image = type(tower).__name__.removesuffix("Vision"), show(pixels)
    hidden, attention = look_through(tower, pixels)
    panels, colors = [], None
    for i, features in enumerate(hidden):
        colors, share = principal_colors(features, colors)
        caption = f"hidden[{i}] · {share:.0%}{notes.get(i, '')}"
        panels.append((mosaic(colors, SIDE), caption, USED if i in notes else INK))
    note = "red, green, blue: the first three principal components; %: their share of the variance"
    sections = [(f"{name}: patches as colors", note, panels, len(panels))]
    if not len(attention):
        return sections
    maps = {"class token, mean": attention[0].mean(dim=0)}
    maps |= {f"head {i}": weights for i, weights in enumerate(attention[0], 1)}
    panels = []
    for caption, weights in maps.items():
        weights = weights[len(attention) :]
        panels.append((heatmap(image, weights), f"{caption} · {weights.sum():.0%}", INK))
    note = f"block {len(tower.blocks)}, the last; %: the share that goes to the patches"
    return [*sections, (f"{name}: attention of the class token", note, panels, len(panels))]


def untrained_like(llm):
    """Make an LLM of the same size with random weights."""
    torch.manual_seed(0)
    with torch.device(llm.embed_tokens.weight.device):
        return type(llm)(llm.config).to(llm.embed_tokens.weight.dtype)


def ask(model, image, question, truth, colors):
    """Ask a question about an image -> the answer, its ids, boxes [(color, box)], target.

    truth: the true box or None. target: bool (N,), the patches in the true box, else in the
    answer's, else all.
    """
    ids = [token.item() for token in model.stream([image], [question], 64)]
    answer = model.text(ids)
    print(f"{question}  {answer}")
    boxes = [(TRUE_COLOR, truth)] if truth else []
    boxes += zip(colors, parse_boxes(answer), strict=False)
    num_patches = model.vision[0].num_patches(model.spec.size)
    # The further tokens of `sti` have no place in the grid, `efficient` has a smaller grid.
    grid = math.isqrt(min(num_patches, model.tokens_per_image))
    _, target = (boxes or [(INK, (0, 0, 1, 1))])[0]
    return answer, ids, boxes, patches_in(target, grid)


def draw_heads(maps, words, target, seen):
    """Draw each head's attention from the word that attends most to the target, bool (N,).

    maps: (L, H, n, N or more). words: n. -> [(image, caption)] and shares, both of L·H heads.
    """
    maps = maps[..., : len(target)].flatten(0, 1)
    shares, best = maps[..., target].sum(dim=-1).max(dim=-1)
    drawn = []
    for weights, share, word in zip(maps, shares, best, strict=True):
        caption = f"“{words[word]}” · {share:.0%}"
        drawn.append((heatmap(seen, weights[word]), caption))
    return drawn, shares


def answer_sections(model, image, questions):
    """Ask questions -> sections and all boxes. The sheet shows picked heads, the page all."""
    llms, seen, found, boxes = {"picked": model.llm}, show(to_pixels(image, model.spec)), [], []
    if sum(p.numel() for p in model.llm.parameters()) < LARGE:
        llms["untrained"] = untrained_like(model.llm)
    totals = dict.fromkeys(llms, 0)
    for i, (question, truth) in enumerate(questions):
        answer, ids, own, target = ask(model, image, question, truth, COLORS[i:])
        drawn = {}
        for name, llm in llms.items():
            maps, words = look_back(model, llm, image, question, ids)
            drawn[name], shares = draw_heads(maps, words, target, seen)
            totals[name] += shares
        found.append((question, answer, with_boxes(image, own, SIDE), drawn))
        boxes += own
    heads = np.ndindex(*maps.shape[:2])
    labels = [f"block {block + 1}, head {head + 1}" for block, head in heads]
    picked = {name: total.argmax().item() for name, total in totals.items()}
    note = "; ".join(f"{name}: {labels[i]}" for name, i in picked.items())
    sections = []
    for question, answer, boxed, drawn in found:
        panels = [(boxed, "solid: answer, dashed: true")]
        for name, i in picked.items():
            panels.append((drawn[name][i][0], f"{name}, {drawn[name][i][1]}"))
        for label, (heat, caption) in zip(labels, drawn["picked"], strict=True):
            panels.append((heat, f"{label}, {caption}"))
        panels = [(*panel, INK) for panel in panels]
        sections.append((question, f"{answer} · {note}", panels, 1 + len(llms)))
    return sections, boxes


def layer_notes(connector):
    """Return {layer: its weight in COMM, else nothing} of the layers read, for each tower."""
    notes = []
    for layers in connector.layers:
        flat = [i for x in layers for i in (x if isinstance(x, range) else [x])]
        notes.append(dict.fromkeys(flat, ""))
    if hasattr(connector, "layer_weights"):
        for note, weights in zip(notes, connector.layer_weights(), strict=True):
            texts = [f" · weight {weight:.3f}" for weight in weights.tolist()]
            note.update(zip(note, texts, strict=True))
    return notes


# ---- the page -----------------------------------------------------------------------------------

PAGE = """<!doctype html><meta charset="utf-8"><title>{0}</title>
<style>body {{ font: 16px sans-serif; margin: 2em }} figure {{ display: inline-block }}
img {{ width: 320px; image-rendering: pixelated }} input {{ width: 320px }}</style>
<h1>{0}</h1>{1}<script>
for (const figure of document.querySelectorAll("figure")) {{
  const slider = figure.querySelector("input"), images = figure.querySelectorAll("img")
  slider.max = images.length - 1
  slider.oninput = () => images.forEach((image, i) => {{
    image.hidden = i != slider.value
    if (!image.hidden) figure.querySelector("b").textContent = image.alt
  }})
  slider.oninput()
}}</script>"""
FIGURE = """<figure><figcaption>{}<br>{}<br><b></b></figcaption>
<input type="range" value="0"><br>{}</figure>"""


def make_page(title, sections):
    """Write sections as HTML, a slider each; the images are within the file."""
    figures = ""
    for name, note, panels, _ in sections:
        images = ""
        for image, caption, _ in panels:
            file = io.BytesIO()
            image.save(file, "png")
            data = base64.b64encode(file.getvalue()).decode()
            images += f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        figures += FIGURE.format(escape(name), escape(note), images)
    return PAGE.format(escape(title), figures)


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
        towers.append(load_part(TOWERS, folder, dtype_to_answer(folder, device), device))
    if not towers:
        name, model = load_to_answer(config.model, config.device)
        towers = model.vision
    sections, boxes, notes, legend = [], [], [{}] * len(towers), LEGEND[:3]
    if model:
        sections, boxes = answer_sections(model, image, questions)
        notes, legend = layer_notes(model.connector), LEGEND
    for tower, note in zip(towers, notes, strict=True):
        if tower.config.model_type == "convnext":
            continue  # it has neither hidden states of patches nor attention
        spec = model.spec if model else ImageSpec(tower.config.image_size)
        sections += tower_sections(tower, to_pixels(image, spec), note)
    title = f"{name or ', '.join(config.vision)}: {title}"
    sheet = make_sheet(with_boxes(image, boxes, 280), title, legend, sections)
    save_image([sheet], config.out)
    print(f"{config.out} shows {title}")
    if config.html:
        Path(config.html).write_text(make_page(title, sections), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)

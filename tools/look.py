"""Draw what vision towers and LLM compute from an image: a sheet, and a page with sliders.

    python -m tools.look --scene=3                              a test scene of the toy world
    python -m tools.look --image=photo.jpg --prompt='Where is the dog?'    a file or a URL
    python -m tools.look --model=llava-hf/llava-1.5-7b-hf --image=photo.jpg
    python -m tools.look --vision=weights/clip,weights/dinov2   towers without an LLM

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
from PIL import Image, ImageFilter, ImageOps

from common import cli
from common.cli import option
from common.draw import COLORS, MARGIN, TRUE_COLOR, arrange, panel, save_image
from common.errors import InputError
from common.images import ImageSpec, parse_boxes, read_image, to_pixels
from common.pretrained import LARGE, load_part, locate
from dialogue import IMAGE
from interop.load import dtype_to_answer, load_to_answer
from mllm import TOWERS
from toy.scenes import test_scene

# The sheet: panels in a row, the pixels of a panel's side, and those of a row.
COLUMNS, SIDE = 8, 168
WIDTH = COLUMNS * (SIDE + 2 * MARGIN) - 2 * MARGIN
HEADS_NOTE = (
    "Attention of a head of the LLM, from the word of the question or answer that attends most to "
    "the true box (else the answer's box, else the image). %: how much. Picked: the head that "
    "attends most, mean over the questions. Untrained: the same rule, for random weights."
)
COLORS_NOTE = (
    "Patches with similar features have similar colors, within one panel: the first three "
    "principal components are red, green and blue. %: their share of the variance. hidden[0] "
    "enters the first block, hidden[i] is the output of block i. Read: by the connector."
)
ATTENTION_NOTE = (
    "The last block. Bright is strong attention, within one panel. Lines: edges of the image. "
    "%: the share that goes to the patches."
)


@dataclass
class Config(cli.ModelConfig):  # --model, --device, --bf16, --fast
    image: str = option("", "file or URL; default: a test scene of the toy world")
    scene: int = option(0, "which scene")
    prompt: str = option("", "default: where the scene's objects are, or a description")
    vision: list[str] = option([], "towers to draw instead of a model: folders or hub ids")
    out: str = option("out/look.png", "the sheet; a page with sliders goes to out/look.html")


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

    scaled_dot_product_attention never stores its softmax. For one-hot values it returns it.
    """
    recorded = []

    def sdpa(q, k, v, **options):
        B, G, T, _ = k.shape
        one_hot = torch.eye(T, device=k.device).expand(B, G, T, T)
        weights = F.scaled_dot_product_attention(q.float(), k.float(), one_hot, **options)
        recorded.append(weights[:, :, rows].cpu())
        return F.scaled_dot_product_attention(q, k, v, **options)

    former = modules[0].sdpa
    for module in modules:
        module.sdpa = sdpa
    try:
        yield recorded
    finally:
        for module in modules:
            module.sdpa = former


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
    words = [model.tokenizer.decode([token]).strip() for token in tokens[0, rows].tolist()]
    words = [word or "newline" for word in words]
    return torch.stack([x[0][..., is_image] for x in recorded]), words


def patches_in(box, grid):
    """Return which patches of a square grid have their middle in a box, bool (N,)."""
    middle = (torch.arange(grid) + 0.5) / grid
    left, top, right, bottom = box
    rows = (middle > top) & (middle < bottom)
    columns = (middle > left) & (middle < right)
    return (rows[:, None] & columns).flatten()


# ---- drawing -------------------------------------------------------------------------------------


def mosaic(values, side=SIDE):
    """Draw a square grid, (N,) or (N, 3) from 0 to 1, as an image of this side."""
    grid = math.isqrt(len(values))
    values = values.reshape(grid, grid, -1).squeeze(-1) * 255
    image = Image.fromarray(values.round().byte().numpy())
    return image.resize((side, side), Image.Resampling.NEAREST)


def show(pixels):
    """Turn pixels uint8 (3, R, R) into a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def find_edges(pixels):
    """Find the edges of an image uint8 (3, R, R) -> a mask, a PIL image."""
    image = show(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    smooth = np.array(image.filter(ImageFilter.GaussianBlur(1)), dtype=float)
    edges = np.hypot(*np.gradient(smooth, axis=(0, 1))).max(axis=2)
    return Image.fromarray(edges > max(0.2 * edges.max(), np.quantile(edges, 0.85)))


def heatmap(weights, edges):
    """Draw attention to patches, (N,), and the edges of the image, but not the image itself.

    A bright object below the colors would look like attention.
    """
    light = mosaic(weights / weights.max().clamp(min=1e-12))
    light = ImageOps.colorize(light, "#160b39", "#fdf3a5", mid="#e0463f")
    light.paste("white", mask=edges)
    return light


def with_boxes(image, boxes, side):
    """Draw boxes [(color, box)] in an image whose longer side becomes `side`."""
    return ImageOps.crop(panel(image, boxes, [], side), MARGIN)


# ---- the sections: (title, note, [(image, caption)], how many are on the sheet; None: all) -------


def tower_sections(tower, pixels, notes):
    """Return a tower's hidden states and its class token; notes: {layer: what is added}."""
    if not hasattr(tower, "blocks"):
        # ConvNeXt has neither hidden states of patches nor attention.
        return []
    name, edges = type(tower).__name__.removesuffix("Vision"), find_edges(pixels)
    hidden, attention = look_through(tower, pixels)
    layers, colors = [(show(pixels), "the image")], None
    for i, features in enumerate(hidden):
        colors, share = principal_colors(features, colors)
        layers.append((mosaic(colors), f"hidden[{i}] · {share:.0%}\n{notes.get(i, '')}"))
    sections = [(f"{name}: patches as colors", COLORS_NOTE, layers, None)]
    # SigLIP has no class token.
    for row in attention[:1]:
        heads = layers[:1]
        for i, weights in enumerate([row.mean(dim=0), *row]):
            weights = weights[len(attention) :]
            caption = f"{f'head {i}' if i else 'mean'} · {weights.sum():.0%}"
            heads.append((heatmap(weights, edges), caption))
        sections.append((f"{name}: attention of the class token", ATTENTION_NOTE, heads, None))
    return sections


def draw_heads(maps, words, target, edges):
    """Draw each head's attention from the word that attends most to the target, bool (N,).

    maps: (L, H, n, N). words: n. -> [(image, caption)] and shares, both of L·H heads.
    """
    shares, best = maps[..., target].sum(dim=-1).max(dim=-1)
    drawn = []
    for block, head in np.ndindex(*shares.shape):
        word, share = best[block, head], shares[block, head]
        caption = f"block {block + 1}, head {head + 1}\n“{words[word]}” · {share:.0%}"
        drawn.append((heatmap(maps[block, head, word], edges), caption))
    return drawn, shares.flatten()


def answer_sections(model, image, questions):
    """Ask questions [(text, true box or None)] -> a section each."""
    llms, found, sections = {"picked": model.llm}, [], []
    if sum(p.numel() for p in model.llm.parameters()) < LARGE:
        torch.manual_seed(0)
        weight = model.llm.embed_tokens.weight
        with torch.device(weight.device):
            llms["untrained"] = type(model.llm)(model.llm.config).to(weight.dtype)
    totals = dict.fromkeys(llms, 0)
    edges = find_edges(to_pixels(image, model.spec))
    # The further tokens of `sti` have no place in the grid, `efficient` has a smaller grid.
    num_patches = model.vision[0].num_patches(model.spec.size)
    grid = math.isqrt(min(num_patches, model.tokens_per_image))
    for question, truth in questions:
        ids = [token.item() for token in model.stream([image], [question], 64)]
        answer = model.text(ids)
        boxes = [(TRUE_COLOR, truth)] if truth else []
        boxes += zip(COLORS, parse_boxes(answer), strict=False)
        target = patches_in(boxes[0][1] if boxes else (0, 0, 1, 1), grid)
        heads = {}
        for name, llm in llms.items():
            maps, words = look_back(model, llm, image, question, ids)
            heads[name], shares = draw_heads(maps[..., : len(target)], words, target, edges)
            totals[name] += shares
        panels = [(with_boxes(image, boxes, SIDE), "solid: answer\ndashed: true")]
        found.append((question, answer, panels, heads))
    for question, answer, panels, heads in found:
        for name, total in totals.items():
            drawn, caption = heads[name][total.argmax()]
            panels.append((drawn, f"{name}: {caption}"))
        note = answer if sections else f"{answer}\n{HEADS_NOTE}"
        sections.append((question, note, panels + heads["picked"], len(panels)))
    return sections


def layer_notes(connector):
    """Return {layer that is read: "read", or its weight in COMM}, for each tower."""
    notes = []
    for tower, layers in enumerate(connector.layers):
        flat = [i for x in layers for i in (x if isinstance(x, range) else [x])]
        texts = ["read"] * len(flat)
        if hasattr(connector, "layer_weights"):
            texts = [f"weight {x:.3f}" for x in connector.layer_weights()[tower].tolist()]
        notes.append(dict(zip(flat, texts, strict=True)))
    return notes


def model_sections(model, image, questions):
    """Return the sections of the answers to questions [(text, true box or None)], and of towers."""
    sections = answer_sections(model, image, questions)
    for tower, notes in zip(model.vision, layer_notes(model.connector), strict=True):
        sections += tower_sections(tower, to_pixels(image, model.spec), notes)
    return sections


# ---- the sheet and the page ----------------------------------------------------------------------


def write(title, note=""):
    """Draw a title and a note as a strip of the sheet."""
    lines = [(TRUE_COLOR, title)]
    for paragraph in note.splitlines():
        lines += [("#aaaaaa", line) for line in textwrap.wrap(paragraph, 180)]
    return panel(Image.new("RGB", (WIDTH, 1)), [], lines, WIDTH)


def make_sheet(title, sections):
    """Draw the sections below each other, as one image."""
    parts = [write(title)]
    for name, note, panels, shown in sections:
        cells = []
        for image, caption in panels[:shown]:
            lines = [(TRUE_COLOR, line) for line in caption.splitlines()]
            cells.append(panel(image, [], lines, SIDE))
        parts += [write(name, note), arrange(cells, COLUMNS)]
    return Image.fromarray(np.vstack(parts))


PAGE = """<!doctype html><meta charset="utf-8"><title>nanoMLLM: {0}</title>
<style>body {{ font: 15px sans-serif; display: flex; flex-wrap: wrap; gap: 24px }}
h1 {{ width: 100%; margin: 0; font-size: 20px }}
figure {{ width: 240px; margin: 0 }} img, input {{ width: 100% }}
p {{ white-space: pre; margin: 4px 0 }} small {{ color: #666; white-space: pre-line }}</style>
<h1>{0}</h1>{1}<script>
for (const figure of document.querySelectorAll("figure")) {{
  const slider = figure.querySelector("input"), images = figure.querySelectorAll("img")
  slider.max = images.length - 1
  slider.oninput = () => images.forEach((image, i) => {{
    image.hidden = i != slider.value
    if (!image.hidden) figure.querySelector("p").textContent = image.alt
  }})
  slider.oninput()
}}</script>"""
FIGURE = """<figure><b>{}</b><input type="range" value="1">{}<p></p><small>{}</small></figure>"""


def make_page(title, sections):
    """Write sections as HTML, a slider each; the images are within the file."""
    figures = ""
    for name, note, panels, _ in sections:
        images = ""
        for image, caption in panels:
            file = io.BytesIO()
            image.save(file, "png")
            data = base64.b64encode(file.getvalue()).decode()
            images += f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        figures += FIGURE.format(escape(name), images, escape(note))
    return PAGE.format(escape(title), figures)


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.scene < 0:
        raise InputError(f"--scene={config.scene}: must be 0 or more")
    objects, image = test_scene(config.scene)
    title = f"test scene {config.scene}"
    questions = [(f"Where is the {x.name}?", x.box) for x in objects[:3]]
    if config.image:
        image, title = read_image(config.image), config.image
        questions = [("Describe the image.", None)]
    if config.prompt:
        questions = [(config.prompt, None)]
    if config.vision:
        name, sections = ", ".join(config.vision), []
        device = cli.pick_device(config.device)
        for folder in map(locate, config.vision):
            tower = load_part(TOWERS, folder, dtype_to_answer(folder, device, config.bf16), device)
            pixels = to_pixels(image, ImageSpec(tower.config.image_size))
            sections += tower_sections(tower, pixels, {})
    else:
        name, model = load_to_answer(config)
        sections = model_sections(model, image, questions)
    title = f"{name}: {title}"
    save_image([make_sheet(title, sections)], config.out)
    page = Path(config.out).with_suffix(".html")
    page.write_text(make_page(title, sections), encoding="utf-8")
    print(f"{config.out} and {page} show {title}")


if __name__ == "__main__":
    cli.run(main)

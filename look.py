"""Look inside a model: what its towers make of a picture, and where it looks while it answers. One PNG sheet.

    python look.py --image=photo.jpg --prompt='Where is the dog?'       a file or a URL; the newest model under out/
    python look.py --scene=3                                  a test scene of the embedded world, and where its objects are
    python look.py --model=llava-hf/llava-1.5-7b-hf --image=photo.jpg   any model that sample.py takes
    python look.py --vision=weights/clip,weights/dinov2       towers alone; these two where nothing is trained yet

    pixels (1, 3, R, R) uint8
      | each tower, all its layers               hidden[0..L] (N, D)  -> principal_colours -> (N, 3)   a colour a patch
      | the last block's Q and K                 attention (H, S, S)  -> the class token's row         (H, N)
    prompt and answer, embedded (1, T, C)
      | the LLM's Q and K, block by block        attention (H, T, T)  -> the rows that write a box, at the picture's M tokens

Colours as in DINOv2 (arXiv 2304.07193, figure 1): what is alike for the tower is alike in colour. The paper finds the components
on several pictures at once and without their background; here it is one picture with all that is in it, so what compares is
the colours within a panel. The class token's attention is DINO's figure (arXiv 2104.14294); registers stand
beside it, since "Vision Transformers Need Registers" (arXiv 2309.16588) is about the bright spots that it has without them. The
bars are COMM's weights (arXiv 2310.08825). Attention says where values are taken from, not why an answer is what it is.
"""
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

import cli
from connector import SIDES
from dialogue import IMAGE, end_ids
from hub import InputError, dtype_to_answer, locate, newest_model, read_config
from images import ImageSpec, parse_box, to_pixels
from llama import rotate, visible
from mllm import MLLM, tower_class
from sample import COLOURS, TRUE, check_name, panel, read_picture, read_text, save_picture, test_scene

WIDTH, MARGIN, GAP = 1400, 28, 12                                    # of the sheet, pixels
MOST_PANELS, MOST_QUESTIONS, MOST_BOXES = 9, 3, 4                     # in a row, on a sheet, of an answer
INK, FAINT, USED = "#1a1a1a", "#777777", "#0b62d6"                   # text, small text, layers that the connector reads


@dataclass
class Config:
    image: str = ""                      # file or http(s) URL; empty: a test scene of the embedded world
    scene: int = 0                       # which one
    prompt: str = ""                     # what to ask; empty: where the scene's objects are, or a description of the image
    model: str = ""                      # folder or id of a whole model; empty: the newest under out/, else weights/
    vision: list[str] = field(default_factory=lambda: [])  # towers without an LLM: folders or ids
    out: str = "out/look.png"            # the sheet
    max_new_tokens: int = 64             # longest answer
    device: str = "auto"                 # auto, cpu, cuda, cuda:1, mps


# --- features as colours ----------------------------------------------------------------------------------------------

def principal_colours(features, before=None):
    """Patch features (N, D) -> their first three principal components as RGB (N, 3) in 0..1, and the part of the variance that
    these three hold. The sign of a component is free: it is chosen so that the colour goes with that of the layer `before`
    (N, 3) if there is one, otherwise so that the few patches unlike the rest are bright. Each component is stretched from its
    2nd to its 98th percentile: one odd patch must not darken all others."""
    features = features.double()
    U, S, _ = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)     # (N, K) and (K,), K = min(N, D)
    scores = F.pad((U * S)[:, :3], (0, max(0, 3 - len(S))))          # (N, 3): where each patch lies along each component
    going = scores.pow(3) if before is None else scores * (before - before.mean(dim=0))
    scores = scores * torch.where(going.sum(dim=0) < 0, -1, 1)
    low, high = scores.quantile(scores.new_tensor([0.02, 0.98]), dim=0)                  # (3,) each
    varies = high - low > 1e-6 * features.norm()                     # where nothing does, noise would be stretched
    colours = torch.where(varies, (scores - low) / (high - low).clamp(min=1e-12), 0.5).clamp(0, 1)
    return colours.float(), (S[:3].square().sum() / S.square().sum().clamp(min=1e-12)).item()


# --- attention, recomputed --------------------------------------------------------------------------------------------
# scaled_dot_product_attention returns softmax(QK^T / sqrt(d)) V and never holds the softmax; that is why it is fast. So a hook
# keeps what goes into the module, and the module's own projections give Q and K once more.

@contextmanager
def inputs_of(modules):
    """-> a list that fills, during a forward pass, with the arguments that each module is called with."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(args)) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(q, k, mask=None):
    """q (B, H, T, d), k (B, G, T, d), mask bool, True where one may look -> softmax(QK^T / sqrt(d)), (B, H, T, T) float32."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)         # grouped queries: H / G heads share a key
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


def tower_attention(module, x, is_causal=False):
    """vit.Attention and what it was called with, x (B, S, D) -> (B, H, S, S)."""
    q, k = (linear(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for linear in (module.q, module.k))
    return attention_weights(q, k)


def llm_attention(module, x, rope, mask, positions=None, cache=None):
    """llama.Attention or phi.Attention and what it was called with, x (B, T, C), no cache -> (B, H, T, T)."""
    q, k = (project(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for project in (module.q_proj, module.k_proj))
    turned = 2 * rope[0].shape[-1]                                   # all channels of a head; in Phi the first few
    q, k = (torch.cat((rotate(heads[..., :turned], *rope), heads[..., turned:]), dim=-1) for heads in (q, k))
    causal = visible(torch.arange(x.shape[1], device=x.device)[None], x.shape[1])        # (1, 1, T, T)
    return attention_weights(q, k, causal if mask is None else mask)


@torch.no_grad()
def look_through(tower, pixels):
    """pixels uint8 (1, 3, R, R) -> all L + 1 hidden states, patches only, (N, D) each; and the last block's attention from the
    prefix tokens, the class token first: (prefix, H, S), where every row sums to one."""
    prefix, last = tower.num_prefix_tokens, tower.blocks[-1].attn
    with inputs_of([last]) as seen:
        hidden = tower(pixels.to(tower.patch.weight.device))
    rows = tower_attention(last, *seen[0])[0, :, :prefix].transpose(0, 1)
    return [h[0, prefix:].float().cpu() for h in hidden], rows.cpu()


def answer_ids(model, picture, question, max_new_tokens):
    """The model's greedy answer as ids, with its end token: an empty answer looked somewhere, too."""
    ids, ends = [], end_ids(model.tokenizer, model.template)
    for token in model.stream([picture], [question], max_new_tokens):
        ids.append(token.item())
        if ids[-1] in ends:
            break
    return ids


@torch.no_grad()
def look_back(model, picture, question, ids, blocks):
    """Where the LLM looked while it wrote each of the answer's ids: attention to the picture's M tokens in these blocks, mean
    over heads -> (blocks, len(ids), M). A row sums to less than one: the rest goes to words. Row t predicts token t + 1, so
    what writes an id is the row of the token before it."""
    pixels, prompt = model.prompt([picture], [(question, None)])
    device = model.llm.embed_tokens.weight.device
    tokens = torch.tensor([prompt + ids], device=device)             # (1, T): one pass over all of it; a causal model
    modules = [model.llm.layers[i].self_attn for i in blocks]        # saw the same when it wrote token by token
    with inputs_of(modules) as seen:
        model.llm(embeds=model.embed(tokens, pixels.to(device)), hidden_only=True)
    writing, is_image = slice(len(prompt) - 1, len(prompt) - 1 + len(ids)), (tokens[0] == IMAGE).cpu()
    weights = (llm_attention(module, *args)[0].mean(dim=0).cpu() for module, args in zip(modules, seen))    # (T, T) each
    return torch.stack([weight[writing][:, is_image] for weight in weights])


def boxes_in(tokenizer, ids):
    """Answer ids -> [(box, places of the ids that spell it)]; [(None, all places)] where there is no box."""
    text, ends = tokenizer.decode(ids), [len(tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    found = [(parse_box(match[0]), [i for i in range(len(ids)) if ends[i] < match.end() and ends[i + 1] > match.start()])
             for match in re.finditer(r"\[[^\[\]]*\]", text)]
    return [(box, places) for box, places in found if box] or [(None, list(range(len(ids))))]


def on_patches(weights, N):
    """Attention to a picture's M tokens -> to the square grid that they stand for. sti's further tokens, each the mean of a
    run of eight patches in one of two layers, give theirs back to these eight; efficient's are a grid of half the side."""
    if len(weights) <= N:
        return weights
    pooled = weights[N:].view(2, -1).sum(dim=0).repeat_interleave(8) / 8                 # (N // 8 * 8,)
    return weights[:N] + F.pad(pooled, (0, N - len(pooled)))


# --- drawing ----------------------------------------------------------------------------------------------------------

def write(draw, place, text, width, size=13, colour=INK):
    """One line of text, cut where it would be wider than `width` -> where it ends."""
    font, text = ImageFont.load_default(size=size), " ".join(text.split())
    while draw.textlength(text, font) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text(place, text, colour, font)
    return place[0] + draw.textlength(text, font)


def mosaic(values, side, resample=Image.Resampling.NEAREST):
    """(N,) or (N, 3) in 0..1, a square grid row by row -> a picture of this side; by default every patch is seen as one."""
    grid = math.isqrt(len(values))
    values = (values.reshape(grid, grid, -1).squeeze(-1) * 255).round().byte().numpy()
    return Image.fromarray(values).resize((side, side), resample)


def heat(picture, weights, side):
    """Attention to N patches (N,) as light on the picture that was seen; the strongest hundredth is the brightest."""
    light = mosaic((weights / weights.quantile(0.99).clamp(min=1e-12)).clamp(0, 1), side, Image.Resampling.BICUBIC)
    light = ImageOps.colorize(light, "#160b39", "#fdf3a5", mid="#e0463f")
    grey = ImageOps.grayscale(picture.resize((side, side), Image.Resampling.BICUBIC)).convert("RGB")
    return Image.blend(grey, light, 0.7)


def framed(picture, boxes, side):
    """The picture, its longer side scaled to `side`, with boxes in it, [(colour, box)]; TRUE is dashed."""
    width, height = (max(1, round(side * length / max(picture.size))) for length in picture.size)
    return panel(picture, boxes, [], side).crop((8, 8, 8 + width, 8 + height))           # sample.py's has a margin of 8


def section(title, note, panels, side):
    """Panels [(picture, caption, colour)], `side` wide, under a title, in as many rows as it takes -> as wide as the sheet."""
    columns, line = (WIDTH - 2 * MARGIN + GAP) // (side + GAP), max([picture.height for picture, _, _ in panels], default=0) + 30
    canvas = Image.new("RGB", (WIDTH, 50 + -(-len(panels) // columns) * line), "white")
    draw = ImageDraw.Draw(canvas)
    draw.line([(MARGIN, 4), (WIDTH - MARGIN, 4)], "#dddddd")
    end = write(draw, (MARGIN, 14), title, WIDTH * 0.6, 19)
    write(draw, (end + 14, 18), note, WIDTH - MARGIN - end - 14, 15, FAINT)
    for i, (picture, caption, colour) in enumerate(panels):
        x, y = MARGIN + i % columns * (side + GAP), 46 + i // columns * line
        canvas.paste(picture, (x + (side - picture.width) // 2, y + (line - 30 - picture.height) // 2))
        write(draw, (x, y + line - 26), caption, side, 13, colour)
    return canvas


def header(picture, boxes, lines, side=280):
    """The picture with all boxes; beside it a title and how to read the sheet."""
    canvas, left = Image.new("RGB", (WIDTH, side + 50), "white"), MARGIN + side + 28
    picture, draw = framed(picture, boxes, side), ImageDraw.Draw(canvas)
    canvas.paste(picture, (MARGIN + (side - picture.width) // 2, MARGIN + (side - picture.height) // 2))
    for i, text in enumerate(lines):
        write(draw, (left, MARGIN + (16 + 30 * i if i else 0)), text, WIDTH - MARGIN - left, 16 if i else 26,
              USED if text.startswith("Blue") else INK)
    return canvas


def bars(layers, weights, side):
    """A tower's layer weights (n,), which sum to one, by hidden index -> bars, and a line at 1/n, where all of them began."""
    canvas, step, floor = Image.new("RGB", (side, 150), "white"), min(70, side / len(layers)), 128
    draw, scale = ImageDraw.Draw(canvas), 100 / weights.max().item()
    for i, (layer, weight) in enumerate(zip(layers, weights.tolist())):
        draw.rectangle((i * step, floor - scale * weight, (i + 0.75) * step, floor), "#9cc3f5")
        write(draw, (i * step, floor - scale * weight - 17), f"{weight:.3f}"[1:], step, 12)
        write(draw, (i * step, floor + 4), str(layer), step, 13)
    draw.line([(0, floor - scale / len(layers)), (len(layers) * step, floor - scale / len(layers))], USED)
    return canvas


# --- what is on the sheet ---------------------------------------------------------------------------------------------

def name_of(tower):
    return type(tower).__name__.removesuffix("Vision")


def tower_sections(tower, pixels, used, side):
    """Its features as colours, layer by layer (`used`: those that the connector reads), and where its class token looks."""
    name, seen = name_of(tower), Image.fromarray(pixels.permute(1, 2, 0).numpy())
    hidden, rows = look_through(tower, pixels[None])
    panels, colours = [], None
    for i, features in enumerate(hidden):
        colours, share = principal_colours(features, colours)
        panels.append((mosaic(colours, side), f"hidden[{i}] · {share:.0%}", USED if i in used else INK))
    yield section(f"{name}: its patches in colour", "red, green and blue: the first three principal components; "
                  "%: the variance that they hold", panels, side)
    if not len(rows):
        yield section(f"{name}: no class token", "there are patches only, and no token of the whole picture that looks at them",
                      [], side)
        return
    other = "register" if hasattr(tower, "register_tokens") else "distillation"          # what may follow the class token
    maps = [(f"{other} {i}, mean" if i else "class token, mean", row.mean(dim=0)) for i, row in enumerate(rows)]
    maps += [(f"head {i + 1}", row) for i, row in enumerate(rows[0])]
    panels = [(heat(seen, row[len(rows):], side), f"{what} · {row[len(rows):].sum():.0%}", INK) for what, row in maps]
    yield section(f"{name}: where its class token looks", f"attention in block {len(tower.blocks)}, the last: mean over heads, "
                  "then head by head; %: what falls on the patches", panels, side)


def answer_sections(model, picture, asked, max_new_tokens, side):
    """Ask [(question, true box or None), ...] -> (section, boxes) for every box of every answer: where the model looked."""
    pixels, L = to_pixels(picture, model.spec), len(model.llm.layers)
    N, seen = (model.spec.size // model.vision[0].config.patch_size) ** 2, Image.fromarray(pixels.permute(1, 2, 0).numpy())
    shown = min((WIDTH - 2 * MARGIN + GAP) // (side + GAP) - 1, L)
    blocks = [(i + 1) * L // shown - 1 for i in range(shown)]        # evenly, and the last one among them
    count = 0
    for question, truth in asked:
        ids = answer_ids(model, picture, question, max_new_tokens)
        answer = model.text(ids)
        print(f"{question}  {answer}")
        looked = look_back(model, picture, question, ids, blocks)    # (blocks, len(ids), M)
        for box, places in boxes_in(model.tokenizer, ids)[:MOST_BOXES]:
            boxes = [(TRUE, truth)] * bool(truth) + [(COLOURS[count % len(COLOURS)], box)] * bool(box)
            caption = ", ".join(["dashed: true"] * bool(truth) + ["solid: answer" if box else "no box: whole answer"])
            panels = [(framed(picture, boxes, side), caption, INK)]
            for block, weights in zip(blocks, looked[:, places].mean(dim=1)):            # (M,) each, mean over the box's ids
                panels.append((heat(seen, on_patches(weights, N), side), f"block {block + 1} · {weights.sum():.0%}", INK))
            count += 1
            yield section(question, answer or "(an empty answer)", panels, side), boxes


def make_sheet(picture, title, asked, model=None, towers=(), max_new_tokens=64):
    """A PIL picture, and a whole model (asked: [(question, true box or None)]) or towers alone -> the sheet."""
    towers = model.vision if model else towers
    deepest = max(len(tower.blocks) for tower in towers) + 1
    columns = max(5, -(-deepest // -(-deepest // MOST_PANELS)))      # all layers in rows of equal length
    side, boxes, sections = (WIDTH - 2 * MARGIN + GAP) // columns - GAP, [], []
    for one, drawn in answer_sections(model, picture, asked, max_new_tokens, side) if model else ():
        sections.append(one)
        boxes += drawn
    for i, tower in enumerate(towers):
        spec = model.spec if model else ImageSpec(tower.config.image_size)
        sections += tower_sections(tower, to_pixels(picture, spec), model.layers[i] if model else (), side)
    parts = ", ".join(f"{name_of(tower)} ({len(tower.blocks)} blocks)" for tower in towers)
    lines = [title, parts, "", "Light on the picture is attention, brightest where it is strongest in that panel.",
             "Colours: patches that are alike for a tower are alike in colour, within one panel.",
             "hidden[0] enters the first block, hidden[i] is what block i makes of it."]
    if model:
        lines[1] += f", {model.connector_config.kind} connector, {type(model.llm).__name__} ({len(model.llm.layers)} blocks)"
        lines[4:4] = ["Under a question: the LLM's attention while it writes the box, mean over heads and over the box's tokens;",
                      "%: what falls on the picture, the rest falls on words."]
        lines += ["Blue: layers that the connector reads."]
        if model.connector_config.kind in SIDES and model.connector_config.merge in ("lln", "layerscale"):      # else plain means
            half, weights = (WIDTH - 2 * MARGIN - GAP) // 2, model.connector.layer_weights()
            panels = [(bars(layers, share.detach().float().cpu(), half), f"hidden[i] of {name_of(tower)}", FAINT)
                      for tower, layers, share in zip(towers, model.layers, weights)]
            sections.append(section("COMM: the learned share of each layer", "the line: equal shares, the start", panels, half))
    sections.insert(0, header(picture, boxes, lines))
    sheet = Image.new("RGB", (WIDTH, sum(one.height for one in sections)), "white")
    for i, one in enumerate(sections):
        sheet.paste(one, (0, sum(above.height for above in sections[:i])))
    return sheet


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.model and config.vision:
        raise InputError("--model and --vision: a whole model has its own towers, choose one of the two")
    if config.scene < 0 or config.max_new_tokens < 1:
        raise InputError(f"--scene={config.scene} --max_new_tokens={config.max_new_tokens}: should be 0 or more, and 1 or more")
    check_name(config.out)
    objects, picture = (None, read_picture(config.image)) if config.image else test_scene(config.scene)
    asked = [("Describe the picture.", None)] if config.image else [(f"Where is the {o.name}?", o.box) for o in objects]
    if config.prompt:
        asked = [(read_text(lambda: config.prompt), None)]
    device = cli.pick_device(config.device)
    name, vision = config.model, config.vision
    if not name and not vision:
        try:
            name = str(newest_model())
        except InputError as error:
            vision = [str(Path(__file__).resolve().parent / "weights" / tower) for tower in ("clip", "dinov2")]
            print(f"({error}; until then these are the towers of weights/)", file=sys.stderr)
    model, towers = None if vision else MLLM.from_pretrained(name, dtype_to_answer(name, device), device), []
    for folder in map(locate, vision):
        kind = read_config(folder).get("model_type", "timm_wrapper")     # timm's own files name none
        towers.append(tower_class(kind, folder)[0].from_pretrained(folder, dtype_to_answer(folder, device), device))
    who, what = name or ", ".join(vision), Path(config.image).name or f"test scene {config.scene}"
    sheet = make_sheet(picture, f"{who}: {what}", asked[:MOST_QUESTIONS], model, towers, config.max_new_tokens)
    save_picture([sheet], config.out)
    print(f"{config.out} shows what {who} makes of {what}")


if __name__ == "__main__":
    cli.run(main)

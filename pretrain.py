"""Train the five tiny checkpoints of weights/ from scratch on the embedded world.

The papers start from pretrained encoders and a pretrained LLM, so the embedded default does too. Each is trained the way
its model at full size was, and written in Hugging Face layout:

    python pretrain.py clip       contrastive: which of 128 captions belongs to which of 128 pictures (arXiv 2103.00020)
                                  and not one with a wrong word (arXiv 2210.01936)
    python pretrain.py dinov2     which views show the same thing, without text: losses of the class token, of patches and of masked
                                  patches, a teacher that is the student's running mean (after arXiv 2304.07193)
    python pretrain.py mae        the pixels of patches that were hidden from it (arXiv 2111.06377)
    python pretrain.py deit       which class of thing a picture shows, by labels (arXiv 2012.12877, without its teacher)
    python pretrain.py llama      next token on the world's language, without pictures: a scene in text, then questions about it

`weights/README.md` has the commands, times and scores of the checkpoints that are in the repository.
"""
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import cli
import world
from clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from dialogue import IMAGE, encode
from dinov2 import DINOv2, DINOv2Config
from eval import score
from hub import InputError
from llama import Llama, LlamaConfig
from vit import Block, ViT, ViTConfig, run_blocks

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
BOS, EOS = 2, 3
MEAN, STD = (0.33,) * 3, (0.22,) * 3                                 # of the world's pixels
# Positions start about as large as the patch embeddings. With the usual 0.02 these short trainings never raise them, and a
# linear probe on the last layers cannot tell where a patch is (R² of the box 0.02; random towers: 0.02 -> 0.0, 0.3 -> 0.6).
POSITION_STD = 0.3


@dataclass
class Config:
    model: str = ""                      # clip, dinov2, mae, deit or llama
    out: str = ""                        # folder to write; empty: weights/<model>
    steps: int = 0                       # optimizer steps; 0: what the committed checkpoints took
    batch: int = 0                       # pictures (or texts) a step; 0: likewise
    lr: float = 0                        # peak learning rate of AdamW, then a cosine to zero; 0: likewise
    init: str = ""                       # llama: go on from this checkpoint; empty: from scratch
    seed: int = 0                        # of the initialisation and of the scenes
    bf16: bool = True                    # autocast to bfloat16 (on a CPU that has it about 1.4 times as fast)
    threads: int = 0                     # CPU threads; 0: all cores


# --- the loop that all five share ------------------------------------------------------------------------------------

def train(model, loss_of, config, adamw=0.5, weight_decay=0.05):
    """Warm-up and cosine on loss_of(step, progress) -> (loss, text to print), progress from 0 to 1. The matrices learn by Muon,
    the rest by AdamW, whose rate is `adamw` times Muon's; in a short trial on LLaMA that was clearly ahead of AdamW alone."""
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in learns.items() if p.dim() == 2 and "embed" not in name]
    others = [p for p in learns.values() if not any(p is q for q in matrices)]
    optimizers = [torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]
    peaks = [config.lr, config.lr * adamw]
    start, model = time.time(), model.train()
    for step in range(config.steps):
        progress = step / config.steps
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 100, (1 + math.cos(math.pi * progress)) / 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss, note = loss_of(step, progress)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learns.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step + 1 == config.steps:
            print(f"step {step:5d}  loss {loss.item():.4f}  {note}  {time.time() - start:.0f} s", flush=True)


def scenes(config, step, most=5):
    """The scenes of a step, each seen once: [(index, objects), ...], of `most` objects or fewer."""
    first = (config.seed * 10_000 + 1) * 1_000_000 + step * config.batch      # far from the indices that train.py draws
    return [(index, world.scene("train", index, most)) for index in range(first, first + config.batch)]


def few_first(progress, alone, pairs):
    """A curriculum: until `alone` of the training scenes of one object, until `pairs` of two at most, then all. What belongs
    together, a word and a look, or a question and its answer, is found much sooner where there is little to confuse it with."""
    return 1 if progress < alone else 2 if progress < pairs else 5


def pictures(drawn, split="train"):
    """[(index, objects), ...] -> pixels uint8 (B, 3, 64, 64)."""
    return torch.from_numpy(np.stack([world.draw(objects, split, index) for index, objects in drawn])).permute(0, 3, 1, 2)


def around_largest(drawn, side):
    """A square part of every scene's picture around its largest object: uint8 (B, 3, side, side)."""
    def start(middle):
        return int(min(max(middle - side / 2, 0), world.SIDE - side))

    parts = []
    for picture, (_, (largest, *_)) in zip(pictures(drawn), drawn):
        x, y = start(largest.x + largest.side / 2), start(largest.y + largest.side / 2)
        parts.append(picture[:, y:y + side, x:x + side])
    return torch.stack(parts)


def crops(pixels, size, scale, generator):
    """A random square crop of every picture, (B, 3, 64, 64) -> uint8 (B, 3, size, size); its side is `scale` of the picture's.
    Flipped and changed in brightness at random; colours stay, they carry meaning here."""
    B = len(pixels)
    side = torch.empty(B).uniform_(*scale, generator=generator)
    centre = (torch.rand(B, 2, generator=generator) * 2 - 1) * (1 - side)[:, None]
    flip = torch.randint(0, 2, (B,), generator=generator) * 2 - 1
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * flip, side, centre
    grid = F.affine_grid(theta, (B, 3, size, size), align_corners=False)
    cropped = F.grid_sample(pixels.float(), grid, align_corners=False, padding_mode="reflection")
    light = torch.empty(B, 1, 1, 1).uniform_(0.7, 1.3, generator=generator)
    return (cropped * light).clamp(0, 255).byte()


def write(model, folder, **extra):
    """Save in Hugging Face layout, in half precision: 14 MB hold all five."""
    model.half().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    for name, content in extra.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {folder}")


PREPROCESSING = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": world.SIDE},
                 "do_center_crop": True, "crop_size": {"height": world.SIDE, "width": world.SIDE}, "do_normalize": True,
                 "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True, "resample": 3,
                 "image_mean": MEAN, "image_std": STD}


# --- the world's language ---------------------------------------------------------------------------------------------

def place_words(o):
    """Where an object is, in words: "at the top left", "in the middle"."""
    column = ("left", "", "right")[min(2, int((o.x + o.side / 2) / world.SIDE * 3))]
    row = ("top", "", "bottom")[min(2, int((o.y + o.side / 2) / world.SIDE * 3))]
    return "at the " + " ".join(filter(None, (row, column))) if row or column else "in the middle"


def clip_caption(objects, rng):
    """One to three of the objects with their places, as people caption: not everything, in any order."""
    chosen = rng.permutation(len(objects))[:rng.integers(1, 4)]
    return " and ".join(f"a {objects[i].name} {place_words(objects[i])}" for i in chosen)


def wrong_caption(caption, rng):
    """The same with one shape, or else one colour, exchanged."""
    words, kinds = caption.split(" "), world.SHAPES if rng.random() < 0.7 else tuple(world.COLOURS)
    at = rng.choice([i for i, word in enumerate(words) if word in kinds])
    words[at] = str(rng.choice([kind for kind in kinds if kind != words[at]]))
    return " ".join(words)


def drawn_in_text(objects):
    """The scene as a drawing in letters, 8 x 8 cells in reading order: " .." where there is nothing, else the colour's initial,
    the shape's first two letters, row and column, as in " Rci04" for a red circle in the first row."""
    cells, side = [" .."] * 64, world.SIDE / 8
    for cell in range(64):
        x, y = cell % 8 * side, cell // 8 * side
        for o in objects:
            width, height = min(o.x + o.side, x + side) - max(o.x, x), min(o.y + o.side, y + side) - max(o.y, y)
            if width > 0 and height > 0 and width * height > 0.3 * side ** 2:
                cells[cell] = f" {o.colour[0].upper()}{o.shape[:2]}{cell // 8}{cell % 8}"
    return "".join(cells)


def told(objects, rng, whole):
    """A scene in text where the picture would stand, a drawing in letters or a list, and what is said about it: (seen, turns,
    template). whole: a caption or the list from left to right, asked for or in stage 1's layout; else six questions."""
    seen = drawn_in_text(objects) if rng.random() < 0.75 else world.listing([objects[i] for i in rng.permutation(len(objects))])
    if whole:
        turn = [("Describe the picture.", world.caption(objects)),
                ("List the shapes.", world.listing(world.left_to_right(objects)))][rng.integers(2)]
        return seen, [turn], ("plain", "tiny")[rng.integers(2)]
    tasks, turns = ["presence", "rec", "reg"] * 3 + ["relation", "count"] * 2 + ["attribute"], []
    while len(turns) < 6:
        turn = world.question(tasks[rng.integers(len(tasks))], objects, rng, about=int(rng.integers(len(objects))))
        turns += [turn] if turn and turn not in turns else []
    return seen, turns, "tiny"


def make_tokenizer():
    """A byte-level BPE whose pieces are words, coordinates ("0.25" or "0.25,") and single marks, trained on the world's language. Any
    text can be written with it; the world's words and coordinates are one token each."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?[A-Z][a-z]{2}\d\d| ?[A-Za-z]+:?| ?\d\.\d\d,?| ?\d| ?\.\.| ?[^\sA-Za-z\d]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for index in range(6000):
        objects, rng = world.scene("train", index), world.generator("train", index, 3)
        texts += [clip_caption(objects, rng), world.caption(objects), drawn_in_text(objects)]
        texts += [f"USER: {q} ASSISTANT: {a}" for q, a in told(objects, rng, False)[1] + world.dialogue(objects, rng)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=3072, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return tokenizer


# --- CLIP -------------------------------------------------------------------------------------------------------------

def pretrain_clip(config, folder):
    tokenizer = make_tokenizer()
    shape = dict(hidden_size=128, num_attention_heads=4, intermediate_size=512, hidden_act="gelu")
    clip = CLIP(CLIPVisionConfig(num_hidden_layers=6, image_size=world.SIDE, patch_size=8, **shape),
                CLIPTextConfig(num_hidden_layers=2, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64,
                               eos_token_id=EOS, **shape), projection_dim=128, mean=MEAN, std=STD)
    clip.tokenizer = tokenizer
    nn.init.normal_(clip.vision.position_embedding, std=POSITION_STD)

    def loss_of(step, progress):
        drawn = scenes(config, step, few_first(progress, 0.15, 0.4))
        rngs = [world.generator("train", index, 3) for index, _ in drawn]
        texts = [clip_caption(objects, rng) for (_, objects), rng in zip(drawn, rngs)]
        wrong = [wrong_caption(text, rng) for text, rng in zip(texts, rngs)]         # else shapes are hardly ever needed to
        logits = clip.similarity(pictures(drawn), texts + wrong).float()             # tell captions apart; (B, 2B)
        B, target = len(drawn), torch.arange(len(drawn))
        right = (logits.argmax(1) == target).float().mean()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :B].T, target)) / 2, f"retrieved {right:.0%}"

    train(clip, loss_of, config, adamw=0.25)
    write(clip, folder, preprocessor_config=PREPROCESSING)
    tokenizer.save(str(folder / "tokenizer.json"))
    print("held out:", clip_scores(folder))


@torch.no_grad()
def clip_scores(folder, count=256):
    """Zero-shot retrieval among `count` held-out scenes: picture -> caption and back, recall at 1 (chance is 1 / count)."""
    clip = CLIP.from_pretrained(folder)
    drawn = [(index, world.scene("test", index)) for index in range(count)]
    texts = [clip_caption(objects, world.generator("test", index, 3)) for index, objects in drawn]
    logits, target = clip.similarity(pictures(drawn, "test"), texts), torch.arange(count)
    return {f"picture to text R@1 of {count}": round((logits.argmax(1) == target).float().mean().item(), 3),
            f"text to picture R@1 of {count}": round((logits.argmax(0) == target).float().mean().item(), 3)}


# --- DINOv2 -----------------------------------------------------------------------------------------------------------

class Head(nn.Module):
    """Features (M, D) -> unit vectors (M, 64), by which looks are compared. At first all class tokens are alike: the batch norm
    tells them apart from the start."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x):
        return F.normalize(self.mlp(x.float()).float(), dim=-1)


def drawn_anew(objects, rng):
    """The same things elsewhere, each up to a fifth larger or smaller, 24 pixels at most; smaller where there is no room."""
    sides = np.clip([o.side * rng.uniform(0.8, 1.2) for o in objects], 12, 24)
    order, placed = np.argsort(-sides), None                         # the largest is placed first
    kinds = [world.SHAPES.index(o.shape) * 8 + list(world.COLOURS).index(o.colour) for o in objects]
    while not placed:
        placed = world.place([kinds[i] for i in order], [float(sides[i]) for i in order], rng)
        sides = np.maximum(12, 0.97 * sides)
    return [placed[i] for i in np.argsort(order)]


def coloured_anew(pixels, generator):
    """uint8 (B, 3, H, W) -> the same in another light, and four of five with their channels exchanged and stretched or grey, so
    that a thing cannot be known again by its colour."""
    B, x = len(pixels), pixels.float()
    order = torch.rand(B, 3, generator=generator).argsort(1)[:, :, None, None].expand_as(x)
    other = x.gather(1, order) * torch.empty(B, 3, 1, 1).uniform_(0.6, 1.4, generator=generator)
    grey, changed, light = torch.rand(3, B, 1, 1, 1, generator=generator)
    other = torch.where(grey < 0.2, other.mean(1, keepdim=True), other)
    return (torch.where(changed < 0.8, other, x) * (0.7 + 0.6 * light)).clamp(0, 255).byte()


def lies_on(objects):
    """Which of the objects lies under the middle of each patch: (64,), -1 where none does."""
    at, thing = (np.arange(8) + 0.5) * world.SIDE / 8, np.full((8, 8), -1)
    for i, o in enumerate(objects):
        thing[np.ix_((at > o.y) & (at < o.y + o.side), (at > o.x) & (at < o.x + o.side))] = i
    return thing.flatten()


def part_around(o, rng):
    """4 x 4 of the 8 x 8 patches with all of an object of 24 pixels or fewer: their numbers, (16,)."""
    corner = [rng.integers(max(0, math.ceil((c + o.side) / 8) - 4), min(4, int(c / 8)) + 1) for c in (o.y, o.x)]
    return (np.arange(corner[0], corner[0] + 4)[:, None] * 8 + np.arange(corner[1], corner[1] + 4)).flatten()


def contrast(queries, keys, own, others):
    """InfoNCE (arXiv 1807.03748): each of queries (M, C) finds its own of keys (K, C), the own[m]-th. others: bool (M, K), the keys
    that it is held against; all of unit length."""
    scores = (queries @ keys.T / 0.1).masked_fill(~others, -torch.inf)
    return F.cross_entropy(scores, own)


def pretrain_dinov2(config, folder, whole_from=0.6, whole_batch=48):
    """Two views of the same things, drawn anew: elsewhere, on another ground, in other colours. What stays is what they are.
    First the tower sees 4 x 4 patches around one of them, later whole pictures with up to five."""
    student = DINOv2(DINOv2Config(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, mlp_ratio=4,
                                  image_size=world.SIDE, patch_size=8, layerscale_value=1.0), MEAN, STD)
    nn.init.normal_(student.position_embeddings, std=POSITION_STD)
    student = nn.ModuleDict({"tower": student, "thing": Head(128), "patch": Head(128)})
    teacher = copy.deepcopy(student).requires_grad_(False)
    generator, rng = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)

    def look(model, pixels, parts, mask=None):
        """pixels (V, 3, 64, 64), of which only the patches numbered parts (V, N) are seen, without those of mask -> class tokens
        (V, D), patches (V, N, D)."""
        tower = model["tower"]
        chosen = parts[..., None].expand(-1, -1, tower.config.hidden_size)
        x = tower.patch(tower.normalize(pixels, torch.float32)).flatten(2).transpose(1, 2).gather(1, chosen)
        x = x if mask is None else torch.where(mask[..., None], tower.mask_token.to(x.dtype), x)
        x = x + tower.position_embeddings[:, 1:].expand(len(x), -1, -1).gather(1, chosen)
        cls = (tower.cls_token + tower.position_embeddings[:, :1]).expand(len(x), -1, -1).to(x.dtype)
        x = tower.norm(run_blocks(tower.blocks, torch.cat([cls, x], 1), [tower.config.num_hidden_layers])[0])
        return x[:, 0], x[:, 1:]

    def loss_of(step, progress):
        torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 0.02)
        whole = progress >= whole_from
        drawn = scenes(config, step, 5 if whole else 1 if progress < whole_from / 2 else 2)[:whole_batch if whole else None]
        drawn = [(index + far, drawn_anew(objects, rng)) for far in (0, 7_777_777) for index, objects in drawn]
        pixels, V = coloured_anew(pictures(drawn), generator), len(drawn)      # V views, the i-th and the (i + V/2)-th of one scene
        parts = np.stack([np.arange(64) if whole else part_around(objects[0], rng) for _, objects in drawn])
        things = np.take_along_axis(np.stack([lies_on(objects) for _, objects in drawn]), parts, 1)
        parts, things = torch.from_numpy(parts), torch.from_numpy(things)      # (V, N) each
        share = torch.rand(V, 1, generator=generator) * 0.4 + 0.1              # 10% to 50% masked, in a quarter or half of the views
        mask = torch.rand(parts.shape, generator=generator) < share
        mask &= torch.rand(V, 1, generator=generator) < (0.5 if whole else 0.25)
        mask[0, :2] = True
        cls, patches = look(student, pixels, parts, mask)
        with torch.no_grad():
            _, known = look(teacher, pixels, parts)

        # The class token finds that of its scene's other view, among those of all scenes.
        names, view = student["thing"](cls), torch.arange(V)
        loss_cls = contrast(names, names, (view + V // 2) % V, ~torch.eye(V, dtype=torch.bool))
        # Every patch of a thing finds the thing in the other view. A thing is the class token where there is but one, else the
        # teacher's mean of its patches.
        per = 5 if whole else 1
        on = (things >= 0) & (things < per)
        thing = (view[:, None] * per + things)[on]                             # its number, of V·per
        count = torch.bincount(thing, minlength=V * per)[:, None]
        if whole:
            with torch.no_grad():
                mean = torch.zeros(V * per, 128).index_add_(0, thing, known[on].float()) / count.clamp(min=1)
                names = teacher["thing"](mean)
        other = (thing + V * per // 2) % (V * per)
        seen = count[other, 0] > 0
        others = (count[:, 0] > 0) & (torch.arange(V * per) != thing[seen, None])
        loss_thing = contrast(student["thing"](patches[on][seen]), names.detach(), other[seen], others)
        # Every masked patch finds what the teacher sees in its place, among all masked patches.
        some = torch.randperm(int(mask.sum()), generator=generator)[:512]
        hidden, truth = student["patch"](patches[mask])[some], teacher["patch"](known[mask])[some]
        loss_patch = contrast(hidden, truth, torch.arange(len(some)), torch.ones(len(some), len(some), dtype=torch.bool))
        return loss_cls + loss_thing + (1 if whole else 0.5) * loss_patch, \
            f"class {loss_cls.item():.3f} thing {loss_thing.item():.3f} patch {loss_patch.item():.3f}"

    train(student, loss_of, config)
    write(teacher["tower"], folder, preprocessor_config=PREPROCESSING | {"image_processor_type": "BitImageProcessor"})
    print("held out:", probe_scores(DINOv2.from_pretrained(folder)))


# --- MAE and DeiT: one ViT, trained in two ways --------------------------------------------------------------------------

def plain_vit(model_type, num_labels=0):
    """An untrained ViT of the other towers' size."""
    tower = ViT(ViTConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
                          image_size=world.SIDE, patch_size=8, model_type=model_type, num_labels=num_labels), MEAN, STD)
    nn.init.normal_(tower.position_embeddings, std=POSITION_STD)
    return tower


class Decoder(nn.Module):
    """MAE's small decoder, thrown away after training: patches (B, M, D) that the encoder saw, and their places (B, M) ->
    the pixels of all N patches, (B, N, 3 P²). Where nothing was seen stands the mask token."""

    def __init__(self, tower, width=64, depth=2):
        super().__init__()
        c, num_patches = tower.config, tower.position_embeddings.shape[1] - 1
        self.embed = nn.Linear(c.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, num_patches, width) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(width, 4, 4 * width, "gelu", c.layer_norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * c.patch_size ** 2)

    def forward(self, seen, places):
        seen = self.embed(seen)
        x = self.mask_token.to(seen.dtype).expand(len(seen), self.positions.shape[1], -1)
        x = x.scatter(1, places[..., None].expand_as(seen), seen) + self.positions
        return self.pixels(self.norm(run_blocks(self.blocks, x, [len(self.blocks)])[0]))


def pretrain_mae(config, folder, hidden_share=0.6):
    """Fewer patches are hidden than the paper's 75%, since there are 64 and not 196. And pixels are not normalised patch by
    patch: most patches here are even but for noise, which would count as much as an edge."""
    tower = plain_vit("vit_mae")
    model = nn.ModuleDict({"tower": tower, "decoder": Decoder(tower)})
    side, generator, rng = tower.config.patch_size, torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)

    def loss_of(step, progress):
        portraits = around_largest(scenes(config, step, few_first(progress, 0.3, 0.6)), rng.integers(32, world.SIDE + 1))
        pixels = crops(portraits, world.SIDE, (0.7, 1.0), generator)
        normal = tower.normalize(pixels, torch.float32)
        truth = F.unfold(normal, side, stride=side).transpose(1, 2)  # (B, N, 3 P²)
        order = torch.rand(truth.shape[:2], generator=generator).argsort(1)
        seen, hidden = order.tensor_split([round(order.shape[1] * (1 - hidden_share))], dim=1)    # places (B, M), (B, N - M)
        x = tower.patch(normal).flatten(2).transpose(1, 2) + tower.position_embeddings[:, 1:]
        x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[2]))  # the encoder sees these alone
        cls = (tower.cls_token + tower.position_embeddings[:, :1]).to(x.dtype).expand(len(x), -1, -1)
        x = tower.norm(run_blocks(tower.blocks, torch.cat([cls, x], 1), [len(tower.blocks)])[0])[:, 1:]
        said, index = model["decoder"](x, seen).float(), hidden[..., None].expand(-1, -1, truth.shape[2])
        return F.mse_loss(said.gather(1, index), truth.gather(1, index)), "mean square"

    train(model, loss_of, config)
    write(tower, folder, preprocessor_config=PREPROCESSING | {"image_processor_type": "BitImageProcessor"})
    print("held out:", probe_scores(ViT.from_pretrained(folder)))


def pretrain_deit(config, folder):
    """As on ImageNet: a picture with one large thing in it, which is its class, 4 shapes x 8 colours."""
    tower, generator = plain_vit("vit", num_labels=32), torch.Generator().manual_seed(config.seed)      # as facebook/deit-small-*
    rng = np.random.default_rng(config.seed)

    def loss_of(step, progress):
        drawn = scenes(config, step, most=2)
        portraits = around_largest(drawn, rng.integers(32, world.SIDE + 1))
        classes = torch.tensor([world.SHAPES.index(o[0].shape) * 8 + list(world.COLOURS).index(o[0].colour) for _, o in drawn])
        logits = tower.classify(crops(portraits, world.SIDE, (0.7, 1.0), generator)).float()
        right = (logits.argmax(1) == classes).float().mean()
        return F.cross_entropy(logits, classes, label_smoothing=0.1), f"right {right:.0%}"

    train(tower, loss_of, config)
    write(tower, folder, preprocessor_config=PREPROCESSING | {"image_processor_type": "BitImageProcessor"})
    print("held out:", probe_scores(ViT.from_pretrained(folder)))


@torch.no_grad()
def probe_scores(tower, count=1000):
    """Linear probes (ridge regression) on the patches of hidden[i]: which colour and which shape lies under the middle of the
    patch, and that object's box in the picture; accuracy and R² on held-out scenes. `count` scenes for each half."""
    def features(split):
        drawn = [(index, world.scene(split, index)) for index in range(count)]
        pixels = pictures(drawn, split)
        hidden = [torch.cat(parts)[:, tower.num_prefix_tokens:] for parts in zip(*(tower(part) for part in pixels.split(250)))]
        grid = int(hidden[0].shape[1] ** 0.5)
        at = (torch.arange(grid) + 0.5) * world.SIDE / grid
        truth = torch.full((count, grid, grid), -1)
        place = torch.zeros(count, grid, grid, 4)
        for row, (_, objects) in enumerate(drawn):
            for o in objects:
                inside = ((at > o.y) & (at < o.y + o.side))[:, None] & ((at > o.x) & (at < o.x + o.side))[None]
                truth[row][inside] = world.SHAPES.index(o.shape) * 8 + list(world.COLOURS).index(o.colour)
                place[row][inside] = torch.tensor(o.box)
        used = truth.flatten() >= 0
        return [h.flatten(0, 1)[used] for h in hidden], truth.flatten()[used], place.flatten(0, 2)[used]

    (train_x, train_y, train_box), (test_x, test_y, test_box) = features("train"), features("test")
    scores = {}
    for layer, (x, x_test) in enumerate(zip(train_x, test_x)):
        ones = [torch.cat([v, torch.ones(len(v), 1)], 1).double() for v in (x, x_test)]
        gram = ones[0].T @ ones[0] + 1e-3 * len(x) * torch.eye(ones[0].shape[1])
        goals = torch.cat([F.one_hot(train_y // 8, 4), F.one_hot(train_y % 8, 8), train_box], 1).double()
        said = ones[1] @ torch.linalg.solve(gram, ones[0].T @ goals)
        error = ((said[:, 12:] - test_box) ** 2).sum() / ((test_box - train_box.mean(0)) ** 2).sum()
        scores[f"hidden[{layer}]"] = {"shape": round((said[:, :4].argmax(1) == test_y // 8).double().mean().item(), 3),
                                      "colour": round((said[:, 4:12].argmax(1) == test_y % 8).double().mean().item(), 3),
                                      "box R2": round(1 - error.item(), 3)}
    return scores


# --- LLaMA ------------------------------------------------------------------------------------------------------------

def pretrain_llama(config, folder):
    tokenizer = make_tokenizer()
    llama = Llama(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=352,
                              num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5,
                              tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS))

    if config.init:
        llama, tokenizer = Llama.from_pretrained(config.init), Tokenizer.from_file(f"{config.init}/tokenizer.json")

    def loss_of(step, progress):
        rows = []
        for index, objects in scenes(config, step, few_first(progress, 0.04, 0.1)):
            seen, ((question, answer), *rest), template = told(objects, world.generator("train", index, 4), step % 4 == 0)
            ids, labels = encode(tokenizer, [(f"<image>\n{question}", answer), *rest], template)
            at, seen = ids.index(IMAGE), tokenizer.encode(seen, add_special_tokens=False).ids    # where the picture will stand
            rows.append((ids[:at] + seen + ids[at + 1:], labels[:at] + [-100] * len(seen) + labels[at + 1:]))
        longest = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
        # Only answers count: scenes and questions are drawn at random, nobody can predict them, and trying to is mere noise.
        answers = labels[:, 1:] >= 0
        logits = llama.logits(llama(tokens[:, :-1], hidden_only=True)[answers]).float()
        loss = F.cross_entropy(logits, labels[:, 1:][answers])
        return loss, f"right {(logits.argmax(-1) == labels[:, 1:][answers]).float().mean():.1%} of tokens"

    train(llama, loss_of, config)
    write(llama, folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                                           "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
          generation_config={"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0})
    config_file = folder / "config.json"                             # how its dialogues are laid out stands in the checkpoint
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"template": "tiny"}, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    print("held out:", llama_scores(folder))


@torch.no_grad()
def llama_scores(folder, count=200):
    """Answers about held-out scenes that are drawn in letters and that are listed: {task: (score of drawn, of listed)}, eval.py's
    scores. A drawing shows boxes to an eighth of its side only."""
    llama, tokenizer = Llama.from_pretrained(folder), Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    scores = {}
    for task in world.TASKS:
        for tell in (drawn_in_text, world.listing):
            prompts, truths, index = [], [], 0
            while len(prompts) < count:
                objects = world.scene("test", index)
                turn = world.any_question(task, objects, world.generator("test", index, 5))
                index += 1
                if turn:
                    ids = encode(tokenizer, [(f"<image>\n{turn[0]}", None)], "tiny")[0]
                    seen = tokenizer.encode(tell(objects), add_special_tokens=False).ids
                    prompts.append([t for token in ids for t in (seen if token == IMAGE else [token])])
                    truths.append(turn[1])
            longest = max(map(len, prompts))
            tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
            said = llama.generate(tokens, 48, lengths=torch.tensor([len(p) for p in prompts]))
            texts = [tokenizer.decode(row.tolist()).strip() for row in said]
            scores.setdefault(task, []).append(round(next(iter(score(task, texts, truths).values())), 3))
    return scores


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    recipes = {"clip": (pretrain_clip, 1800, 128, 6e-3), "dinov2": (pretrain_dinov2, 1600, 128, 3e-3),
               "mae": (pretrain_mae, 900, 64, 6e-3), "deit": (pretrain_deit, 1000, 32, 6e-3),
               "llama": (pretrain_llama, 9000, 16, 6e-3)}
    if config.model not in recipes:
        raise InputError(f"which model? python pretrain.py {'|'.join(recipes)}")
    recipe, steps, batch, lr = recipes[config.model]
    config.steps, config.batch, config.lr = config.steps or steps, config.batch or batch, config.lr or lr
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder = Path(config.out or Path(__file__).parent / "weights" / config.model)
    print(json.dumps(asdict(config)))
    recipe(config, folder)


if __name__ == "__main__":
    cli.run(main)

"""Train the five tiny checkpoints of weights/ from scratch on the toy world.

The papers start from pretrained encoders and a pretrained LLM, so the embedded default does too.
Each model is trained as its full-size original was, and saved in Hugging Face layout:

    python -m toy.pretrain clip     contrastive: match 128 images with 128 captions (arXiv
                                    2103.00020) and reject captions with a wrong word (2210.01936)
    python -m toy.pretrain dinov2   match views of the same objects without text, by losses on the
                                    class token, on patches and on masked patches, with a teacher
                                    that is the student's running mean (after arXiv 2304.07193)
    python -m toy.pretrain mae      predict the pixels of hidden patches (arXiv 2111.06377)
    python -m toy.pretrain deit     classify images by labels (arXiv 2012.12877, without a teacher)
    python -m toy.pretrain llama    next token of the world's language: a scene in text, then
                                    questions about it

weights/README.md has the commands, times and scores of the checkpoints in the repository.
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from common import cli
from common.cli import option
from common.errors import InputError
from common.pretrained import read_json
from common.save import write_json
from dialogue import IGNORE, IMAGE, encode
from dinov2 import DINOv2, DINOv2Config
from eval import score
from llama import Llama, LlamaConfig
from toy import world
from toy.language import (
    BOS,
    EOS,
    PAD,
    clip_caption,
    drawing,
    encode_text,
    make_tokenizer,
    text_scene,
    wrong_caption,
)
from vit import Block, ViT, ViTConfig

# Mean and standard deviation of the world's pixels.
MEAN, STD = (0.33,) * 3, (0.22,) * 3
WIDTH, PATCH, GRID = 128, 8, world.SIDE // 8
BLOCK = {"hidden_size": WIDTH, "num_attention_heads": 4}
TOWER = BLOCK | {"num_hidden_layers": 6, "image_size": world.SIDE, "patch_size": PATCH}
# DINOv2 has an mlp_ratio instead.
BLOCK |= {"intermediate_size": 4 * WIDTH, "hidden_act": "gelu"}
# Position embeddings start about as large as patch embeddings. From the usual 0.02 these short
# trainings never raise them, and the last layers do not know where a patch is.
POSITION_STD = 0.3


@dataclass
class Config:
    model: str = option("", "clip, dinov2, mae, deit or llama; the first word of the command")
    out: str = option("", "folder to write; default: weights/MODEL")
    steps: int = option(0, "optimizer steps; 0: those of the checkpoint in weights/")
    batch: int = option(0, "images or texts per step; 0: likewise")
    lr: float = option(0.0, "peak learning rate; 0: likewise")
    seed: int = option(0, "seed of the initialization and of the scenes")
    bf16: bool = option(True, "autocast to bfloat16")
    threads: int = option(0, "CPU threads; 0: all cores")
    evaluate: bool = option(True, "print scores on held-out scenes at the end")


# --- shared by all five -------------------------------------------------------------------


def train(model, loss_of, config, adamw=0.5):
    """Minimize loss_of(step) by a warm-up, then a cosine to zero.

    Muon updates the matrices. AdamW updates the rest with `adamw` times the learning rate.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    start = time.time()
    model.train()
    for step in range(config.steps):
        cosine = (1 + math.cos(math.pi * step / config.steps)) / 2
        factor = min((step + 1) / 100, cosine)
        muon.param_groups[0]["lr"] = config.lr * factor
        adam.param_groups[0]["lr"] = config.lr * adamw * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = loss_of(step)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        if step % 50 == 0 or step + 1 == config.steps:
            seconds = time.time() - start
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def scenes_of(config, step, one, two):
    """Return the scenes of a step, [(index, objects), ...].

    They have one object until the share `one` of all steps, up to two until `two`, then up to five.
    What belongs together, as a word and a shape, is learned much sooner from simple scenes. Every
    scene is seen once, and their indices are far from those that train.py uses.
    """
    most = 5
    if step < two * config.steps:
        most = 2
    if step < one * config.steps:
        most = 1
    first = (config.seed * 10_000 + 1) * 1_000_000 + step * config.batch
    return [(i, world.scene("train", i, most)) for i in range(first, first + config.batch)]


def generators(config):
    return torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)


def pixels_of(scenes, split="train"):
    """Draw [(index, objects), ...] -> uint8 (B, 3, 64, 64)."""
    images = np.stack([world.draw(objects, split, index) for index, objects in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def portraits(scenes, generator, rng):
    """Cut a square around the largest object out of every image: uint8 (B, 3, 64, 64)."""
    side = rng.integers(32, world.SIDE + 1)
    parts = []
    for image, (_, objects) in zip(pixels_of(scenes), scenes, strict=True):
        corner = np.array(objects[0].center) - side / 2
        x, y = corner.clip(0, world.SIDE - side).astype(int)
        parts.append(image[:, y : y + side, x : x + side])
    return augment(torch.stack(parts), generator)


def augment(pixels, generator):
    """Cut a random square out of every image, and resize it: uint8 (B, 3, 64, 64).

    It has 0.7 to 1 of the image's side. It is flipped and changed in brightness at random. Colors
    stay, since they have meaning here.
    """
    B, size = len(pixels), world.SIDE
    side = torch.empty(B).uniform_(0.7, 1.0, generator=generator)
    center = (torch.rand(B, 2, generator=generator) * 2 - 1) * (1 - side)[:, None]
    flip = torch.randint(0, 2, (B,), generator=generator) * 2 - 1
    affine = torch.zeros(B, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = side * flip, side, center
    grid = F.affine_grid(affine, (B, 3, size, size), align_corners=False)
    cropped = F.grid_sample(pixels.float(), grid, align_corners=False, padding_mode="reflection")
    light = torch.empty(B, 1, 1, 1).uniform_(0.7, 1.3, generator=generator)
    return (cropped * light).clamp(0, 255).byte()


def share(right):
    return round(right.double().mean().item(), 3)


def save(model, folder, tokenizer=None):
    """Save in Hugging Face layout and half precision: 14 MB for all five."""
    model.half().save_pretrained(folder)
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    print(f"wrote {folder}")


# --- CLIP ---------------------------------------------------------------------------------


def pretrain_clip(config, folder):
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(**TOWER | BLOCK)
    text = CLIPTextConfig(
        num_hidden_layers=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=64,
        eos_token_id=EOS,
        **BLOCK,
    )
    clip = CLIP(vision, text, projection_dim=WIDTH, mean=MEAN, std=STD)
    clip.tokenizer = tokenizer
    nn.init.normal_(clip.vision.position_embedding, std=POSITION_STD)

    def loss_of(step):
        scenes, texts, wrong = scenes_of(config, step, 0.15, 0.4), [], []
        for index, objects in scenes:
            rng = world.generator("train", index, 3)
            texts.append(clip_caption(objects, rng))
            # Without these, captions can be told apart almost without the shapes.
            wrong.append(wrong_caption(texts[-1], rng))
        logits = clip.similarity(pixels_of(scenes), texts + wrong).float()  # (B, 2B)
        target = torch.arange(len(scenes))
        to_text = F.cross_entropy(logits, target)
        to_image = F.cross_entropy(logits[:, : len(scenes)].T, target)
        return (to_text + to_image) / 2

    train(clip, loss_of, config, adamw=0.25)
    save(clip, folder, tokenizer)


def clip_scores(clip, count=256):
    """Score zero-shot retrieval among held-out scenes: recall at 1, where chance is 1 / count."""
    scenes = [(index, world.scene("test", index)) for index in range(count)]
    texts = [clip_caption(objects, world.generator("test", i, 3)) for i, objects in scenes]
    logits = clip.similarity(pixels_of(scenes, "test"), texts)
    target = torch.arange(count)
    return {
        "image to text": share(logits.argmax(1) == target),
        "text to image": share(logits.argmax(0) == target),
    }


# --- DINOv2 -------------------------------------------------------------------------------


class Head(nn.Sequential):
    """Project features (M, D) to unit vectors (M, 64), in which views are compared.

    At first all class tokens are alike. The batch norm separates them from the start.
    """

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x):
        return F.normalize(super().forward(x).float(), dim=-1)


def move(objects, rng):
    """Put the same objects elsewhere, up to a fifth larger or smaller, at most 24 pixels."""
    sides = np.clip([o.side * rng.uniform(0.8, 1.2) for o in objects], 12, 24)
    # The largest is placed first. Without room for all, they shrink.
    order, placed = np.argsort(-sides), None
    kinds = [objects[i].kind for i in order]
    while not placed:
        placed = world.place(kinds, sides[order], rng)
        sides = np.maximum(12, 0.97 * sides)
    return [placed[i] for i in np.argsort(order)]


def recolor(pixels, generator):
    """Change the light of uint8 (B, 3, H, W), and the colors of four in five.

    Their channels are exchanged and stretched, or gray, so that color identifies no object.
    """
    B, x = len(pixels), pixels.float()
    order = torch.rand(B, 3, generator=generator).argsort(1)[:, :, None, None].expand_as(x)
    other = x.gather(1, order) * torch.empty(B, 3, 1, 1).uniform_(0.6, 1.4, generator=generator)
    gray, changed, light = torch.rand(3, B, 1, 1, 1, generator=generator)
    other = torch.where(gray < 0.2, other.mean(1, keepdim=True), other)
    return (torch.where(changed < 0.8, other, x) * (0.7 + 0.6 * light)).clamp(0, 255).byte()


def object_of_patch(objects):
    """Return the number of the object under the middle of each patch, (64,), or -1."""
    middle, number = (np.arange(GRID) + 0.5) * PATCH, np.full((GRID, GRID), -1)
    for i, o in enumerate(objects):
        rows = (middle > o.y) & (middle < o.y + o.side)
        columns = (middle > o.x) & (middle < o.x + o.side)
        number[np.ix_(rows, columns)] = i
    return number.flatten()


def patches_around(o, rng):
    """Choose 4 x 4 of the 8 x 8 patches that cover an object of 24 pixels or fewer: (16,)."""
    corner = []
    for start in (o.y, o.x):
        first = max(0, math.ceil((start + o.side) / PATCH) - 4)
        corner.append(rng.integers(first, min(4, int(start / PATCH)) + 1))
    rows, columns = corner[0] + np.arange(4), corner[1] + np.arange(4)
    return (rows[:, None] * GRID + columns).flatten()


def contrast(queries, keys, target, excluded):
    """Compute InfoNCE (arXiv 1807.03748): query m must find key target[m].

    queries (M, C) and keys (K, C) are unit vectors, excluded bool (M, K) the keys to leave out.
    """
    logits = (queries @ keys.T / 0.1).masked_fill(excluded, -torch.inf)
    return F.cross_entropy(logits, target)


def encode_part(tower, pixels, parts, mask=None):
    """Run a DINOv2 or ViT on some of the patches -> class tokens (B, D), patches (B, n, D).

    pixels: normalized (B, 3, 64, 64). parts (B, n): the numbers of the patches. mask (B, n): which
    of them the mask token replaces.
    """
    chosen = parts[..., None].expand(-1, -1, WIDTH)
    positions = tower.position_embeddings.expand(len(parts), -1, -1)
    x = tower.patch(pixels).flatten(2).transpose(1, 2).gather(1, chosen)
    if mask is not None:
        x = torch.where(mask[..., None], tower.mask_token.to(x.dtype), x)
    x = x + positions[:, 1:].gather(1, chosen)
    x = torch.cat([tower.cls_token + positions[:, :1], x], dim=1)
    for block in tower.blocks:
        x = block(x)
    x = tower.norm(x)
    return x[:, 0], x[:, 1:]


def make_views(scenes, whole, rng, generator):
    """Draw two views of every scene -> pixels (V, 3, 64, 64), parts (V, n), owners (V, n).

    Views i and i + V/2 show the same objects elsewhere, on another background, in other colors.
    parts: the patches to see, all if `whole`. owners: the object on each, or -1.
    """
    views = []
    for offset in (0, 7_777_777):
        views += [(index + offset, move(objects, rng)) for index, objects in scenes]
    pixels = recolor(pixels_of(views), generator)
    parts, owners = [], []
    for _, objects in views:
        part = np.arange(GRID**2) if whole else patches_around(objects[0], rng)
        parts.append(part)
        owners.append(object_of_patch(objects)[part])
    return pixels, torch.from_numpy(np.stack(parts)), torch.from_numpy(np.stack(owners))


def make_mask(shape, share, generator):
    """Mask 10% to 50% of the patches in this share of the views: bool (V, n)."""
    amount = torch.rand(shape[0], 1, generator=generator) * 0.4 + 0.1
    mask = torch.rand(shape, generator=generator) < amount
    mask &= torch.rand(shape[0], 1, generator=generator) < share
    mask[0, :2] = True
    return mask


def object_loss(student, teacher, names, patches, known, owners, whole):
    """Every patch of an object must find the object in the other view.

    An object is represented by the class token (names), or by the teacher's mean of its patches if
    the view is whole and shows several.
    """
    V, per_view = len(owners), 5 if whole else 1
    objects = V * per_view
    on = (owners >= 0) & (owners < per_view)
    number = (torch.arange(V)[:, None] * per_view + owners)[on]
    count = torch.bincount(number, minlength=objects)
    if whole:
        with torch.no_grad():
            total = torch.zeros(objects, WIDTH).index_add_(0, number, known[on].float())
            names = teacher["thing"](total / count.clamp(min=1)[:, None])
    other = (number + objects // 2) % objects
    seen = count[other] > 0
    excluded = (count == 0) | (torch.arange(objects) == number[seen, None])
    return contrast(student["thing"](patches[on][seen]), names.detach(), other[seen], excluded)


def pretrain_dinov2(config, folder):
    """First the tower sees 4 x 4 patches around one object, later images with up to five."""
    tower = DINOv2(DINOv2Config(mlp_ratio=4, layerscale_value=1.0, **TOWER), MEAN, STD)
    nn.init.normal_(tower.position_embeddings, std=POSITION_STD)
    student = nn.ModuleDict({"tower": tower, "thing": Head(), "patch": Head()})
    teacher = copy.deepcopy(student).requires_grad_(False)
    generator, rng = generators(config)

    def loss_of(step):
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.02)
        whole = step >= 0.6 * config.steps
        scenes = scenes_of(config, step, 0.3, 0.6)
        scenes = scenes[:48] if whole else scenes
        pixels, parts, owners = make_views(scenes, whole, rng, generator)
        mask = make_mask(parts.shape, 0.5 if whole else 0.25, generator)
        normal = tower.normalize(pixels, torch.float32)
        cls, patches = encode_part(tower, normal, parts, mask)
        with torch.no_grad():
            _, known = encode_part(teacher["tower"], normal, parts)
        # The class token must find that of the other view of its scene.
        V, names = len(pixels), student["thing"](cls)
        other = (torch.arange(V) + V // 2) % V
        loss_cls = contrast(names, names, other, torch.eye(V, dtype=torch.bool))
        loss_object = object_loss(student, teacher, names, patches, known, owners, whole)
        # A masked patch must find what the teacher sees there, among all masked patches.
        some = torch.randperm(int(mask.sum()), generator=generator)[:512]
        hidden, target = student["patch"](patches[mask]), teacher["patch"](known[mask])
        right, none = torch.arange(len(some)), torch.tensor(False)
        loss_patch = contrast(hidden[some], target[some], right, none)
        return loss_cls + loss_object + (1 if whole else 0.5) * loss_patch

    train(student, loss_of, config)
    save(teacher["tower"], folder)


# --- MAE and DeiT: one ViT, trained in two ways -------------------------------------------


def plain_vit(model_type, num_labels=0):
    """Make an untrained ViT of the other towers' size."""
    config = ViTConfig(model_type=model_type, num_labels=num_labels, **TOWER | BLOCK)
    tower = ViT(config, MEAN, STD)
    nn.init.normal_(tower.position_embeddings, std=POSITION_STD)
    return tower


class Decoder(nn.Module):
    """MAE's small decoder, which is not saved: (B, n, D) of the seen patches -> all pixels.

    places (B, n): the numbers of the seen patches. The output is (B, N, 3 P²). The mask token
    replaces patches that were not seen.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(WIDTH, 64)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.positions = nn.Parameter(torch.randn(1, GRID**2, 64) * POSITION_STD)
        blocks = [Block(64, 4, 256, "gelu", 1e-12) for _ in range(2)]
        self.layers = nn.Sequential(*blocks, nn.LayerNorm(64), nn.Linear(64, 3 * PATCH**2))

    def forward(self, seen, places):
        seen = self.embed(seen)
        x = self.mask_token.to(seen.dtype).expand(len(seen), GRID**2, -1)
        x = x.scatter(1, places[..., None].expand_as(seen), seen)
        return self.layers(x + self.positions)


def pretrain_mae(config, folder):
    """Hide 60% of the 64 patches, since the paper's 75% of 196 would leave too few.

    Pixels are not normalized patch by patch: most patches here are flat but for noise, which would
    count as much as an edge.
    """
    tower, decoder = plain_vit("vit_mae"), Decoder()
    generator, rng = generators(config)

    def loss_of(step):
        pixels = portraits(scenes_of(config, step, 0.3, 0.6), generator, rng)
        normal = tower.normalize(pixels, torch.float32)
        target = F.unfold(normal, PATCH, stride=PATCH).transpose(1, 2)  # (B, N, 3 P²)
        order = torch.rand(target.shape[:2], generator=generator).argsort(1)
        seen, hidden = order.tensor_split([round(0.4 * GRID**2)], dim=1)
        _, patches = encode_part(tower, normal, seen)
        prediction = decoder(patches, seen).float()
        hidden = hidden[..., None].expand(-1, -1, target.shape[2])
        return F.mse_loss(prediction.gather(1, hidden), target.gather(1, hidden))

    train(nn.ModuleDict({"tower": tower, "decoder": decoder}), loss_of, config)
    save(tower, folder)


def pretrain_deit(config, folder):
    """Classify images of one large object, as on ImageNet: 4 shapes x 8 colors."""
    # model_type as in facebook/deit-small-*
    tower = plain_vit("vit", num_labels=32)
    generator, rng = generators(config)

    def loss_of(step):
        scenes = scenes_of(config, step, 0, 1)
        classes = torch.tensor([objects[0].kind for _, objects in scenes])
        logits = tower.classify(portraits(scenes, generator, rng)).float()
        return F.cross_entropy(logits, classes, label_smoothing=0.1)

    train(tower, loss_of, config)
    save(tower, folder)


def probe_data(tower, split, count):
    """Return the M patches on an object: features, kinds (M,), boxes (M, 4).

    The features are each hidden state and a one for the bias, (M, D + 1).
    """
    scenes = [(index, world.scene(split, index)) for index in range(count)]
    owners = np.stack([object_of_patch(objects) for _, objects in scenes])
    image, patch = np.nonzero(owners >= 0)
    shown = [scenes[i][1][owners[i, j]] for i, j in zip(image, patch, strict=True)]
    hidden = tower(pixels_of(scenes, split))
    features = [F.pad(x[image, patch + tower.num_prefix_tokens], (0, 1), value=1) for x in hidden]
    return features, torch.tensor([o.kind for o in shown]), torch.tensor([o.box for o in shown])


def probe_scores(tower, count=1000):
    """Score linear probes (ridge regression) on the patches of every hidden state.

    They predict the color and the shape under the middle of the patch, and that object's box.
    Returns accuracies and R² on `count` held-out scenes, after as many training scenes.
    """
    features, kinds, boxes = probe_data(tower, "train", count)
    test_features, test_kinds, test_boxes = probe_data(tower, "test", count)
    targets = [F.one_hot(kinds // 8, 4), F.one_hot(kinds % 8, 8), boxes]
    targets = torch.cat(targets, dim=1).double()
    variance = F.mse_loss(boxes.mean(0).expand_as(test_boxes), test_boxes)
    scores = {}
    for layer, (x, x_test) in enumerate(zip(features, test_features, strict=True)):
        x, x_test = x.double(), x_test.double()
        gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])
        prediction = x_test @ torch.linalg.solve(gram, x.T @ targets)
        shape, color, box = prediction.split([4, 8, 4], dim=1)
        scores[f"hidden[{layer}]"] = {
            "shape": share(shape.argmax(1) == test_kinds // 8),
            "color": share(color.argmax(1) == test_kinds % 8),
            "box R2": round(1 - (F.mse_loss(box, test_boxes) / variance).item(), 3),
        }
    return scores


# --- LLaMA --------------------------------------------------------------------------------


def replace(ids, place, text):
    """Put the tokens of a scene in text where the image would be."""
    return ids[:place] + text + ids[place + 1 :]


def pad(rows, value):
    """Pad rows of unequal length at the end -> (B, longest)."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value)


def pretrain_llama(config, folder):
    tokenizer = make_tokenizer()
    llama = Llama(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=WIDTH,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )

    def loss_of(step):
        rows, targets = [], []
        for index, objects in scenes_of(config, step, 0.04, 0.1):
            rng = world.generator("train", index, 4)
            text, ((question, answer), *rest), template = text_scene(objects, rng, step % 4 == 0)
            ids, labels = encode(tokenizer, [(f"<image>\n{question}", answer), *rest], template)
            place, text = ids.index(IMAGE), encode_text(tokenizer, text)
            rows.append(replace(ids, place, text))
            targets.append(replace(labels, place, [IGNORE] * len(text)))
        tokens, labels = pad(rows, PAD), pad(targets, IGNORE)[:, 1:]
        # Only answers count: scenes and questions are random, and nobody can predict them.
        answers = labels >= 0
        logits = llama.logits(llama(tokens[:, :-1], hidden_only=True)[answers]).float()
        return F.cross_entropy(logits, labels[answers])

    train(llama, loss_of, config)
    save(llama, folder, tokenizer)
    config_file = folder / "config.json"
    write_json(config_file, read_json(config_file) | {"template": "tiny"})
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", names)


def held_out(task):
    """Yield the held-out scenes with a question of a task: objects, question, answer."""
    for index in itertools.count():
        objects = world.scene("test", index)
        turn = world.any_question(task, objects, world.generator("test", index, 5))
        if turn:
            yield objects, *turn


def llama_scores(llama, count=200):
    """Score answers about held-out scenes: {task: [drawn in letters, listed]}, as eval.py does.

    A drawing shows boxes only to an eighth of the image.
    """
    tokenizer, scores = make_tokenizer(), {}
    for task in world.TASKS:
        scores[task] = []
        for describe in (drawing, world.listing):
            prompts, targets = [], []
            for objects, question, answer in itertools.islice(held_out(task), count):
                ids, _ = encode(tokenizer, [(f"<image>\n{question}", None)], "tiny")
                text = encode_text(tokenizer, describe(objects))
                prompts.append(replace(ids, ids.index(IMAGE), text))
                targets.append(answer)
            lengths = torch.tensor([len(prompt) for prompt in prompts])
            answers = llama.generate(pad(prompts, PAD), 48, lengths=lengths)
            texts = [tokenizer.decode(answer.tolist()).strip() for answer in answers]
            first, *_ = score(task, texts, targets).values()
            scores[task].append(round(first, 3))
    return scores


# Training, class, scores of the saved model, default steps, batch and learning rate.
RECIPES = {
    "clip": (pretrain_clip, CLIP, clip_scores, 1800, 128, 6e-3),
    "dinov2": (pretrain_dinov2, DINOv2, probe_scores, 1600, 128, 3e-3),
    "mae": (pretrain_mae, ViT, probe_scores, 900, 64, 6e-3),
    "deit": (pretrain_deit, ViT, probe_scores, 1000, 32, 6e-3),
    "llama": (pretrain_llama, Llama, llama_scores, 9000, 16, 6e-3),
}


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.model not in RECIPES:
        raise InputError(f"model {config.model!r}: must be one of {', '.join(RECIPES)}")
    pretrain, model_class, scores, steps, batch, lr = RECIPES[config.model]
    config.steps = config.steps or steps
    config.batch = config.batch or batch
    config.lr = config.lr or lr
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder = Path(config.out or f"weights/{config.model}")
    print(config)
    pretrain(config, folder)
    if config.evaluate:
        with torch.no_grad():
            print("held out:", scores(model_class.from_pretrained(folder)))


if __name__ == "__main__":
    cli.run(main)

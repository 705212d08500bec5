"""Train the five tiny checkpoints of weights/ from scratch on the toy world.

The papers start from pretrained encoders and a pretrained LLM, so the embedded default does too.
Each model is trained as its full-size original was, and saved in Hugging Face layout:

    python -m toy.pretrain clip     contrastive: match 128 images with 128 captions (arXiv
                                    2103.00020) and reject captions with a wrong word (2210.01936)
    python -m toy.pretrain dinov2   match views of the same objects without text, by losses on the
                                    class token and on masked patches, with a teacher that is the
                                    student's running mean (after arXiv 2304.07193)
    python -m toy.pretrain mae      predict the pixels of hidden patches (arXiv 2111.06377)
    python -m toy.pretrain deit     classify images by labels (arXiv 2012.12877, without a teacher)
    python -m toy.pretrain llama    next token of the world's language: a scene in text, then
                                    questions about it

A recipe is a function that builds a model and defines the loss of a step. toy/views.py has the
images, toy/language.py the texts. weights/README.md has the commands, times and scores of the
checkpoints in the repository.
"""

import copy
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from clip import CLIP, CLIPTextConfig, CLIPVisionConfig
from common import cli
from common.cli import option
from common.pretrained import read_config, read_json
from common.save import write_json
from dialogue import IGNORE, IMAGE, encode
from dinov2 import DINOv2, DINOv2Config
from eval import score
from llama import Llama, LlamaConfig
from toy import language, world
from toy.language import BOS, EOS, PAD, TOKENIZER
from toy.scenes import questions
from toy.views import GRID, PATCH, crops, make_views, object_of_patch, pixels_of
from vit import Block, ViT, ViTConfig, prepend

# Mean and standard deviation of the world's pixels.
MEAN, STD = (0.33,) * 3, (0.22,) * 3
WIDTH = 128
BLOCK = {"hidden_size": WIDTH, "num_attention_heads": 4}
TOWER = BLOCK | {"num_hidden_layers": 6, "image_size": world.SIDE, "patch_size": PATCH}
# DINOv2 has an mlp_ratio instead, 4 by default.
MLP = {"intermediate_size": 4 * WIDTH, "hidden_act": "gelu"}
# Position embeddings start about as large as patch embeddings. From the usual 0.02 these short
# trainings never raise them, and the last layers do not know where a patch is.
POSITION_STD = 0.3


@dataclass
class Config:
    model: str = option("", "clip, dinov2, mae, deit or llama; the first word of the command")
    out: str = option("", "folder to write; default: weights/MODEL")
    steps: int = option(0, "optimizer steps; default: those of the checkpoint in weights/")
    batch: int = option(0, "images or texts per step; default: likewise")
    weight_decay: float = option(0.0, "of the matrices; default: likewise")
    seed: int = option(0, "seed of the initialization and of the scenes")


# --- shared by all five -------------------------------------------------------------------


def train(model, loss_of, config, lr=6e-3, adamw=0.5):
    """Minimize loss_of(step) by a warm-up to `lr`, then a cosine to zero.

    Muon updates the matrices. AdamW updates the rest with `adamw` times the learning rate, and
    without weight decay.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    decay = config.weight_decay
    muon = torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True)
    for step in range(config.steps):
        cosine = (1 + math.cos(math.pi * step / config.steps)) / 2
        factor = min((step + 1) / 100, cosine)
        muon.param_groups[0]["lr"] = lr * factor
        adam.param_groups[0]["lr"] = lr * adamw * factor
        loss = loss_of(step)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


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


def encode_patches(tower, pixels, parts, mask=None):
    """Run a DINOv2 or ViT on some of the patches -> class tokens (B, D), patches (B, n, D).

    pixels: uint8 (B, 3, 64, 64). parts (B, n): the numbers of the patches. mask (B, n): which of
    them the mask token replaces.
    """
    positions, parts = tower.position_embeddings, parts[..., None]
    x = tower.embed_patches(pixels).take_along_dim(parts, 1)
    if mask is not None:
        x = torch.where(mask[..., None], tower.mask_token, x)
    x = x + positions[:, 1:].take_along_dim(parts, 1)
    x = prepend(tower.cls_token + positions[:, :1], x)
    for block in tower.blocks:
        x = block(x)
    x = tower.norm(x)
    return x[:, 0], x[:, 1:]


def start_positions(embedding):
    """Start position embeddings (..., 1 + 64, D) from sines and cosines of row and column."""
    nn.init.normal_(embedding, std=POSITION_STD)
    frequency = 100 ** -(torch.arange(WIDTH // 4) * 4 / WIDTH)
    along = torch.arange(GRID)
    places = torch.cartesian_prod(along, along)[..., None] * frequency  # (64, 2, D / 4)
    x = torch.cat([places.sin(), places.cos()], dim=-1).flatten(1)
    x = x - x.mean(0)
    embedding.data[..., 1:, :] = POSITION_STD * x / x.std()


def share(right):
    return round(right.double().mean().item(), 3)


# --- CLIP ---------------------------------------------------------------------------------


def pretrain_clip(config):
    """Match B images with 2B captions, half of them with a wrong word.

    The wrong words make the shapes necessary.
    """
    text = CLIPTextConfig(
        num_hidden_layers=2,
        vocab_size=TOKENIZER.get_vocab_size(),
        max_position_embeddings=64,
        eos_token_id=EOS,
        **BLOCK,
        **MLP,
    )
    clip = CLIP(CLIPVisionConfig(**TOWER, **MLP), text, WIDTH, MEAN, STD)
    clip.tokenizer = TOKENIZER
    start_positions(clip.vision.position_embedding)
    target = torch.arange(config.batch)

    def loss_of(step):
        scenes = scenes_of(config, step, 0.15, 0.4)
        texts, wrong = [], []
        for index, objects in scenes:
            rng = world.generator("train", index, 3)
            texts.append(language.clip_caption(objects, rng))
            wrong.append(language.wrong_caption(texts[-1], rng))
        logits = clip.similarity(pixels_of(scenes), texts + wrong)  # (B, 2B)
        to_image = F.cross_entropy(logits[:, : config.batch].T, target)
        return (F.cross_entropy(logits, target) + to_image) / 2

    train(clip, loss_of, config, adamw=0.25)
    return clip


def clip_scores(clip, count=256):
    """Score zero-shot retrieval among held-out scenes: recall at 1, where chance is 1 / count."""
    scenes = [(index, world.scene("test", index)) for index in range(count)]
    texts = [language.clip_caption(o, world.generator("test", i, 3)) for i, o in scenes]
    logits = clip.similarity(pixels_of(scenes, "test"), texts)
    target = torch.arange(count)
    return {
        "image to text": share(logits.argmax(1) == target),
        "text to image": share(logits.argmax(0) == target),
    }


# --- DINOv2 -------------------------------------------------------------------------------


def make_head():
    """Make a projection of features (M, D) to vectors (M, 64), in which views are compared.

    At first all class tokens are alike. The batch norm separates them from the start.
    """
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64))


def pretrain_dinov2(config):
    """Match views. First they are 4 x 4 patches around one object, later up to five objects."""
    tower = DINOv2(DINOv2Config(**TOWER), MEAN, STD)
    start_positions(tower.position_embeddings)
    student = nn.ModuleDict({"tower": tower, "cls": make_head(), "patch": make_head()})
    teacher = copy.deepcopy(student).requires_grad_(False)
    generator, rng = generators(config)

    def loss_of(step):
        for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.02)
        whole = step >= 0.6 * config.steps
        scenes = scenes_of(config, step, 0.3, 0.6)[: 48 if whole else None]
        pixels, parts, mask = make_views(scenes, whole, rng, generator)
        cls, patches = encode_patches(tower, pixels, parts, mask)
        with torch.no_grad():
            _, known = encode_patches(teacher["tower"], pixels, parts)
        # The class token must find that of the other view of its scene.
        V, cls = len(pixels), F.normalize(student["cls"](cls))
        loss_cls = contrast(cls, cls, torch.arange(V).roll(V // 2))
        # A masked patch must find what the teacher sees there, among all masked patches.
        some = torch.randperm(int(mask.sum()), generator=generator)[:512]
        hidden = F.normalize(student["patch"](patches[mask]))
        target = F.normalize(teacher["patch"](known[mask]))
        loss_patch = contrast(hidden[some], target[some], torch.arange(len(some)))
        return loss_cls + (1 if whole else 0.5) * loss_patch

    train(student, loss_of, config, lr=3e-3)
    return teacher["tower"]


def contrast(queries, keys, target):
    """Compute InfoNCE (arXiv 1807.03748): query m must find key target[m], all unit vectors."""
    logits = queries @ keys.T / 0.1
    if keys is queries:
        logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, target)


# --- MAE and DeiT: one ViT, trained in two ways -------------------------------------------


def plain_vit(**options):
    """Make an untrained ViT of the other towers' size."""
    tower = ViT(ViTConfig(**options, **TOWER, **MLP), MEAN, STD)
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
        x = self.mask_token.expand(len(seen), GRID**2, -1)
        x = x.scatter(1, places[..., None].expand_as(seen), seen)
        return self.layers(x + self.positions)


def pretrain_mae(config):
    """Hide 60% of the 64 patches, since the paper's 75% of 196 would leave too few.

    Pixels are not normalized patch by patch: most patches here are flat but for noise, which would
    count as much as an edge.
    """
    tower, decoder = plain_vit(model_type="vit_mae"), Decoder()
    generator, rng = generators(config)

    def loss_of(step):
        pixels = crops(scenes_of(config, step, 0.3, 0.6), generator, rng)
        normal = tower.normalize(pixels, torch.float32)
        target = F.unfold(normal, PATCH, stride=PATCH).transpose(1, 2)  # (B, N, 3 P²)
        order = torch.rand(target.shape[:2], generator=generator).argsort(1)
        seen, hidden = order.split([26, 38], dim=1)
        _, patches = encode_patches(tower, pixels, seen)
        prediction, hidden = decoder(patches, seen), hidden[..., None]
        return F.mse_loss(prediction.take_along_dim(hidden, 1), target.take_along_dim(hidden, 1))

    train(nn.ModuleList([tower, decoder]), loss_of, config)
    return tower


def pretrain_deit(config):
    """Classify images of one large object, as on ImageNet: 4 shapes x 8 colors."""
    tower = plain_vit(num_labels=32)
    generator, rng = generators(config)

    def loss_of(step):
        scenes = scenes_of(config, step, 0, 1)
        classes = torch.tensor([objects[0].kind for _, objects in scenes])
        logits = tower.classify(crops(scenes, generator, rng))
        return F.cross_entropy(logits, classes, label_smoothing=0.1)

    train(tower, loss_of, config)
    return tower


# --- scores of a vision tower -------------------------------------------------------------


def probe_data(tower, split, count):
    """Return the M patches on an object: features and targets (M, 4 + 8 + 4).

    The features are each hidden state and a one for the bias, (M, D + 1). The targets are shape and
    color as one-hot vectors, and the box.
    """
    scenes = [(index, world.scene(split, index)) for index in range(count)]
    numbers = np.stack([object_of_patch(objects) for _, objects in scenes])
    images, patches = np.nonzero(numbers >= 0)
    shown = [scenes[i][1][numbers[i, patch]] for i, patch in zip(images, patches, strict=True)]
    patches += tower.num_prefix_tokens
    hidden = tower(pixels_of(scenes, split))
    features = [F.pad(x[images, patches], (0, 1), value=1).double() for x in hidden]
    kinds = torch.tensor([o.kind for o in shown])
    boxes = torch.tensor([o.box for o in shown]).double()
    return features, torch.cat([F.one_hot(kinds // 8, 4), F.one_hot(kinds % 8, 8), boxes], dim=1)


def probe_scores(tower, count=1000):
    """Score linear probes (ridge regression) on the patches of every hidden state.

    They predict the color and the shape under the middle of the patch, and that object's box.
    Returns accuracies and R² on `count` held-out scenes, after as many training scenes.
    """
    features, targets = probe_data(tower, "train", count)
    test_features, test_targets = probe_data(tower, "test", count)
    true_shape, true_color, true_box = test_targets.split([4, 8, 4], dim=1)
    variance = F.mse_loss(targets[:, 12:].mean(0).expand_as(true_box), true_box)
    scores = {}
    for layer, (x, x_test) in enumerate(zip(features, test_features, strict=True)):
        gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])
        prediction = x_test @ torch.linalg.solve(gram, x.T @ targets)
        shape, color, box = prediction.split([4, 8, 4], dim=1)
        scores[f"hidden[{layer}]"] = {
            "shape": share(shape.argmax(1) == true_shape.argmax(1)),
            "color": share(color.argmax(1) == true_color.argmax(1)),
            "box R2": round(1 - (F.mse_loss(box, true_box) / variance).item(), 3),
        }
    return scores


# --- LLaMA --------------------------------------------------------------------------------


def encode_scene(text, turns, template):
    """Encode turns about a scene in text, which takes the place of the image -> ids, labels."""
    (question, answer), *rest = turns
    ids, labels = encode(TOKENIZER, [(f"<image>\n{question}", answer), *rest], template)
    place, scene = ids.index(IMAGE), TOKENIZER.encode(text, add_special_tokens=False).ids
    ids[place : place + 1] = scene
    labels[place : place + 1] = [IGNORE] * len(scene)
    return torch.tensor(ids), torch.tensor(labels)


def pretrain_llama(config):
    """Predict the answers: scenes and questions are random, and nobody can predict them."""
    llm = LlamaConfig(
        vocab_size=TOKENIZER.get_vocab_size(),
        intermediate_size=352,
        num_hidden_layers=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **BLOCK,
    )
    llama = Llama(llm)

    def loss_of(step):
        dialogues = []
        for index, objects in scenes_of(config, step, 0.04, 0.1):
            scene = language.text_scene(objects, world.generator("train", index, 4), step % 4 == 0)
            dialogues.append(encode_scene(*scene))
        tokens, labels = zip(*dialogues, strict=True)
        tokens, labels = pad_sequence(tokens, True, PAD), pad_sequence(labels, True, IGNORE)[:, 1:]
        answers = labels >= 0
        logits = llama.logits(llama(tokens[:, :-1], hidden_only=True)[answers])
        return F.cross_entropy(logits, labels[answers])

    train(llama, loss_of, config)
    return llama


def llama_scores(llama, count=200):
    """Score answers to eval.py's questions: {task: [drawn in letters, listed]}.

    A language.drawing shows boxes only to an eighth of the image.
    """
    scores = {}
    for task in world.TASKS:
        scores[task] = []
        for describe in (language.drawing, world.listing):
            prompts, targets = [], []
            for _, objects, question, target in islice(questions(task), count):
                prompts.append(encode_scene(describe(objects), [(question, None)], "tiny")[0])
                targets.append(target)
            lengths = torch.tensor(list(map(len, prompts)))
            answers = llama.generate(pad_sequence(prompts, True, PAD), 48, lengths=lengths)
            texts = TOKENIZER.decode_batch(answers.tolist())
            first, *_ = score(task, texts, targets).values()
            scores[task].append(round(first, 3))
    return scores


# --- the command --------------------------------------------------------------------------

# Training, scores of the saved model, and default flags. With a weight decay of 0.05 CLIP's values
# would grow tenfold from hidden[0] to hidden[5], and a mean over layers would be that of the deep
# ones.
RECIPES = {
    "clip": (pretrain_clip, clip_scores, "--steps=1800 --batch=128 --weight_decay=0.2"),
    "dinov2": (pretrain_dinov2, probe_scores, "--steps=1600 --batch=128 --weight_decay=1.0"),
    "mae": (pretrain_mae, probe_scores, "--steps=900 --batch=64 --weight_decay=0.05"),
    "deit": (pretrain_deit, probe_scores, "--steps=1000 --batch=32 --weight_decay=0.05"),
    "llama": (pretrain_llama, llama_scores, "--steps=9000 --batch=16 --weight_decay=0.05"),
}


def save(model, folder):
    """Save in Hugging Face layout and half precision: 14 MB for all five."""
    model.half().save_pretrained(folder)
    if isinstance(model, CLIP | Llama):
        TOKENIZER.save(str(folder / "tokenizer.json"))
        tokens = read_json(language.FOLDER / "tokenizer_config.json")
        if isinstance(model, CLIP):
            tokens["model_max_length"] = model.text.config.max_position_embeddings
        write_json(folder / "tokenizer_config.json", tokens)
    if isinstance(model, Llama):
        write_json(folder / "config.json", read_config(folder) | {"template": "tiny"})
    print(f"wrote {folder}")


def main(arguments):
    name = cli.parse(Config, arguments, __doc__).model
    pretrain, scores, defaults = cli.find_class(RECIPES, name, "model")
    config = cli.parse(Config, [*defaults.split(), *arguments])
    torch.manual_seed(config.seed)
    folder = Path(config.out or f"weights/{name}")
    model = pretrain(config)
    save(model, folder)
    with torch.no_grad():
        print("held out:", scores(type(model).from_pretrained(folder)))


if __name__ == "__main__":
    cli.run(main)

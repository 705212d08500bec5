"""The world in words: what CLIP and LLaMA read in pretraining, and their tokenizer.

clip_caption, wrong_caption    "a red circle and a blue star", and one with a wrong word
drawing, text_scene            a scene in letters or as a list, in place of the image
make_tokenizer                 a byte-level BPE, trained on all of this
"""

from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from toy import world
from toy.views import GRID, PATCH

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
# Their ids.
PAD, BOS, EOS = 0, 2, 3


def place_words(o):
    """Say where an object is: "at the top left", "in the middle"."""
    column, row = (int(value / world.SIDE * 3) for value in o.center)
    words = ("top ", "", "bottom ")[row] + ("left", "", "right")[column]
    return f"at the {words.strip()}" if words else "in the middle"


def clip_caption(objects, rng, places=False):
    """Name one to three of the objects in any order. The tokenizer also learns their places."""
    texts = []
    for i in rng.permutation(len(objects))[: rng.integers(1, 4)]:
        place = f" {place_words(objects[i])}" if places else ""
        texts.append(f"a {objects[i].name}{place}")
    return " and ".join(texts)


def wrong_caption(caption, rng):
    """Exchange one shape, or else one color."""
    words = caption.split(" ")
    kinds = world.SHAPES if rng.random() < 0.7 else world.NAMES
    place = rng.choice([i for i, word in enumerate(words) if word in kinds])
    words[place] = rng.choice([kind for kind in kinds if kind != words[place]])
    return " ".join(words)


def drawing(objects):
    """Draw a scene in letters: 8 x 8 cells in reading order, one for each patch of the image.

    An empty cell is " ..". Else it has the color's initial, the shape's first two letters, row and
    column, as in " Rci04" for a red circle in the first row.
    """
    cells, edges = np.full((GRID, GRID), " ..", dtype=object), np.arange(GRID + 1) * PATCH
    for o in objects:
        # How much of each column and row the object covers.
        width = np.diff(edges.clip(o.x, o.x + o.side))
        height = np.diff(edges.clip(o.y, o.y + o.side))
        for row, column in np.argwhere(np.outer(height, width) > 0.3 * PATCH**2):
            cells[row, column] = f" {o.color[0].upper()}{o.shape[:2]}{row}{column}"
    return "".join(cells.flat)


def text_scene(objects, rng, whole):
    """Return a scene in text in place of the image, turns about it, and their template.

    The scene is a drawing in letters or a list. The turns are a caption or the list from left to
    right if `whole`, else six questions.
    """
    if rng.random() < 0.75:
        text = drawing(objects)
    else:
        text = world.listing([objects[i] for i in rng.permutation(len(objects))])
    if whole:
        task = ("caption", "listing")[rng.integers(2)]
        turn = world.question(task, objects, rng)
        return text, [turn], ("plain", "tiny")[rng.integers(2)]
    tasks = ["presence", "rec", "reg"] * 3 + ["relation", "count"] * 2 + ["attribute"]
    turns = []
    while len(turns) < 6:
        task, about = tasks[rng.integers(len(tasks))], int(rng.integers(len(objects)))
        turn = world.question(task, objects, rng, about)
        if turn and turn not in turns:
            turns.append(turn)
    return text, turns, "tiny"


@cache
def make_tokenizer():
    """Train a byte-level BPE on the world's language.

    The world's words and coordinates ("0.25" or "0.25,") are one token each. Any other text can be
    written, too.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(
        r" ?[A-Z][a-z]{2}\d\d| ?[A-Za-z]+:?| ?\d\.\d\d,?| ?\d| ?\.\.| ?[^\sA-Za-z\d]|\s+"
    )
    split = pre_tokenizers.Split(pieces, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for index in range(6000):
        objects, rng = world.scene("train", index), world.generator("train", index, 3)
        texts += [clip_caption(objects, rng, places=True), world.caption(objects), drawing(objects)]
        turns = text_scene(objects, rng, False)[1] + world.dialogue(objects, rng)
        texts += [f"USER: {question} ASSISTANT: {answer}" for question, answer in turns]
    trainer = trainers.BpeTrainer(
        vocab_size=3072,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer

"""The world in words: what CLIP and LLaMA read in pretraining.

clip_caption, wrong_caption    "a red circle and a blue star", and one with a wrong word
drawing, text_scene            a scene in letters or as a list, in place of the image

The tokenizer is a byte-level BPE that was trained on such texts. The world's words and coordinates
("0.25" or "0.25,") are one token each. Any other text can be written, too.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from toy import world
from toy.views import GRID, PATCH

FOLDER = Path(__file__).parents[1] / "weights" / "llama"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
# The ids of <pad>, <s> and </s>.
PAD, BOS, EOS = 0, 2, 3


def clip_caption(objects, rng):
    """Name one to three of the objects in any order."""
    order = rng.permutation(len(objects))[: rng.integers(1, 4)]
    return " and ".join(f"a {objects[i].name}" for i in order)


def wrong_caption(caption, rng):
    """Exchange one shape, or else one color."""
    words = caption.split()
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
    tasks = ("presence rec reg " * 3 + "relation count " * 2 + "attribute").split()
    turns = []
    while len(turns) < 6:
        task, about = tasks[rng.integers(len(tasks))], int(rng.integers(len(objects)))
        turn = world.question(task, objects, rng, about)
        if turn and turn not in turns:
            turns.append(turn)
    return text, turns, "tiny"

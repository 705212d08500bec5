"""Zero-shot video: a model that was trained on single pictures is asked about clips of the embedded world.

The Dense Connector does so (arXiv 2405.13800): eight frames, the visual tokens of one after those of the other, and the
question behind them. Its benchmarks made small, in the words of single pictures, for the tiny LLaMA knows no others:

    passing    one object after the other comes and goes, no frame shows two   "Is there a red circle?"
                                                                               "How many crosses are there?"
    moving    one object goes left, right, up or down, the others stand still "Is the red circle left or right of the red circle?"

A clip is eight lists of objects, `frames`, a function of (split, index) alone, as scenes are; all its objects together are those
of a held-out scene. What moves takes 0.05 of the picture's side a frame, the step in which the world's boxes are written.

`python findings.py --table=video` trains the models and asks them.
"""
from dataclasses import replace
from itertools import count

import numpy as np
from PIL import Image

import eval as evaluation
import world
from dialogue import MARK
from images import parse_box
from world import SIDE

FRAMES = 8
STEP = 0.05 * SIDE                                                   # pixels a frame
WAYS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}       # as `relation` names them
OWN = 1000                                                           # scenes a clip chooses from, which are its own alone
READ = 256                                                           # positions that still read well; tokens beyond are pooled


# --- clips ------------------------------------------------------------------------------------------------------------

def passing(split, index):
    """The two to five objects of a scene one after the other, in random order, about as long each -> frames."""
    objects = next(o for o in (world.scene(split, n) for n in count(OWN * index)) if len(o) > 1)
    order = world.generator(split, index, 4).permutation(len(objects))
    return [[objects[order[frame * len(objects) // FRAMES]]] for frame in range(FRAMES)]


def moving(split, index):
    """A scene of one to three objects, the first of which moves without touching another -> frames, its way. The four ways
    take turns."""
    way, rng = list(WAYS)[index % 4], world.generator(split, index, 5)
    across, down = WAYS[way]
    for n in count(OWN * index):
        first, *others = world.scene(split, n, most=3)
        for x, y in rng.uniform(0, SIDE - first.side, size=(30, 2)):
            path = [replace(first, x=float(x + across * STEP * i), y=float(y + down * STEP * i)) for i in range(FRAMES)]
            if min(path[-1].box) >= 0 and max(path[-1].box) <= 1 and not any(touch(o, other) for o in path for other in others):
                return [[o, *others] for o in path], way


def touch(a, b):
    """Do the squares around two objects overlap?"""
    return abs(a.x - b.x + (a.side - b.side) / 2) < (a.side + b.side) / 2 > abs(a.y - b.y + (a.side - b.side) / 2)


def everything(frames):
    """Each object of a clip that stands still once."""
    return list({o.name: o for objects in frames for o in objects}.values())


def draw(frames, split, index):
    """The pictures of a clip, uint8 (64, 64, 3) each, on one background."""
    return [world.draw(objects, split, OWN * index) for objects in frames]


def strip(path):
    """A clip of either kind as a picture, 8 frames wide, in 256 colours."""
    clips = [draw(passing("test", 4), "test", 4), draw(moving("test", 2)[0], "test", 2)]
    rows = [np.pad(np.concatenate([np.pad(frame, ((0, 0), (0, 2), (0, 0))) for frame in clip], axis=1), ((0, 2), (0, 0), (0, 0)))
            for clip in clips]
    Image.fromarray(np.concatenate(rows)).quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


# --- questions --------------------------------------------------------------------------------------------------------

def questions(task, number):
    """Of "presence" or "count" about passing clips -> clips (lists of pictures), one picture a clip of all its objects, texts,
    truths."""
    clips, wholes, texts, truths = [], [], [], []
    for index in range(number):
        frames = passing("test", index)
        objects = everything(frames)
        text, truth = world.any_question(task, objects, world.generator("test", index, 2))
        clips.append(draw(frames, "test", index))
        wholes.append(world.draw(objects, "test", OWN * index))
        texts.append(text)
        truths.append(truth)
    return clips, wholes, texts, truths


def way_question(o, way):
    """The one question about two places that the LLM has read is `relation`'s: here both places are the same object's, later
    and earlier. The axis is told, so guessing gives one half."""
    name = f"{o.colour} {o.shape}"
    return f"Is the {name} {'left or right of' if way in ('left', 'right') else 'above or below'} the {name}?"


def went(first, last, way):
    """Did the middle of the box go this way from the first frame's box to the last one's? A box that is None: no."""
    if not (first and last):
        return False
    across, down = ((last[i] + last[i + 2]) - (first[i] + first[i + 2]) for i in (0, 1))
    return across * WAYS[way][0] + down * WAYS[way][1] > 0


# --- scores -----------------------------------------------------------------------------------------------------------

def ask(model, clips, texts, max_new_tokens, batch=25):
    """Clips: a list of pictures a question, which all stand before it."""
    said = []
    for i in range(0, len(texts), batch):
        prompts = [MARK * len(clip) + "\n" + text for clip, text in zip(clips[i:i + batch], texts[i:i + batch])]
        said += model.generate(clips[i:i + batch], prompts, max_new_tokens)
    return said


def evaluate(model, number):
    """-> {"presence, eight frames": share of right answers, ...}, `number` questions each; the keys are in `shown` and below.
    Where eight frames are more than READ tokens, the model is asked so ("unpooled"), and then has its tokens pooled for good."""
    model.llm.config.max_position_embeddings = max(model.llm.config.max_position_embeddings, FRAMES * model.tokens_per_image + 64)
    asked, scores = {task: questions(task, number) for task in ("presence", "count")}, {}
    moves = [moving("test", index) for index in range(number)]
    films, ways = [draw(frames, "test", index) for index, (frames, _) in enumerate(moves)], [way for _, way in moves]
    which = [way_question(frames[0][0], way) for frames, way in moves]
    empties = [world.draw([], "test", OWN * index) for index in range(number)]
    others = evaluation.exchange(number, seed=0)

    def score(key, task, clips):
        _, _, texts, truths = asked[task]
        scores[f"{task}, {key}"] = next(iter(evaluation.score(task, ask(model, clips, texts, 4), truths).values()))

    def look(suffix=""):
        for task, (clips, wholes, _, _) in asked.items():
            score("one picture" + suffix, task, [[whole] for whole in wholes])
            score("that eight times" + suffix, task, [[whole] * FRAMES for whole in wholes])
            score("eight frames" + suffix, task, clips)
            score("with seven empty" + suffix, task, [[whole] + [empty] * (FRAMES - 1) for whole, empty in zip(wholes, empties)])
        forth = ask(model, films, which, 4)
        scores["direction, eight frames" + suffix] = evaluation.exact_match(forth, ways)
        return forth

    first, last = ([parse_box(said) for said in ask(model, [[film[i]] for film in films],
                                                    [f"Where is the {frames[0][0].name}?" for frames, _ in moves], 32)]
                   for i in (0, -1))
    scores["direction, from two boxes"] = evaluation.share(map(went, first, last, ways))
    if FRAMES * model.tokens_per_image > READ:
        look(", unpooled")
        evaluation.pool(model, 1)
    forth = look()
    for task, (clips, _, _, truths) in asked.items():
        score("one frame", task, [[clip[FRAMES // 2]] for clip in clips])
        score("another clip", task, [clips[i] for i in others])
        scores[f"{task}, best guess"] = max(map(truths.count, truths)) / number
    back = ask(model, [film[::-1] for film in films], which, 4)
    scores["direction, same answer backwards"] = evaluation.share(a == b for a, b in zip(forth, back))
    scores["direction, another clip"] = evaluation.exact_match(ask(model, [films[i] for i in others], which, 4), ways)
    return scores

"""Zero-shot video: ask a model that was trained on single images about clips of the toy world.

The Dense Connector does this (arXiv 2405.13800): the visual tokens of eight frames, one frame after
the other, and the question behind them. In a clip two to five objects of a held-out scene appear
one after the other, never two in a frame. The questions are those that the tiny LLaMA knows:

    presence    "Is there a red circle?"
    count       "How many crosses are there?"

`python -m toy.findings --table=video` trains the models and asks them.
"""

from collections import defaultdict
from itertools import count

from common.pool import pool_tokens
from dialogue import MARK
from eval import answer, score
from toy import world

FRAMES = 8
# Every clip chooses from this many scenes, which no other clip uses.
SCENES = 1000
# The LLM reads this many positions well. More visual tokens are pooled.
WELL_READ = 256


def choose_objects(index):
    """Choose the scene of clip `index` -> its objects in the order in which they appear."""
    scenes = (world.scene("test", n) for n in count(SCENES * index))
    objects = next(objects for objects in scenes if len(objects) > 1)
    return [objects[i] for i in world.generator("test", index, 4).permutation(len(objects))]


def evaluate(model, number):
    """Ask `number` questions per task -> {"presence, eight frames": share of right answers, ...}.

    Clips are shown in three ways. If eight frames have more than WELL_READ tokens, all images are
    pooled.
    """
    if FRAMES * model.tokens_per_image > WELL_READ:
        pool_tokens(model, "grid")
    scores = {}
    for task in ("presence", "count"):
        ways, turns = defaultdict(list), []
        for index in range(number):
            objects = choose_objects(index)
            turns.append(world.any_question(task, objects, world.generator("test", index, 2)))
            shown = [objects[frame * len(objects) // FRAMES] for frame in range(FRAMES)]
            # All on one background.
            clip = [world.draw([o], "test", SCENES * index) for o in shown]
            ways["one frame"].append([clip[FRAMES // 2]])
            ways["eight frames"].append(clip)
            ways["one image"].append([world.draw(objects, "test", SCENES * index)])
        texts, targets = zip(*turns, strict=True)
        scores[f"{task}, best guess"] = max(map(targets.count, targets)) / number
        for way, clips in ways.items():
            prompts = [f"{MARK * len(clips[0])}\n{text}" for text in texts]
            answers = answer(model, clips, prompts, 25)
            scores[f"{task}, {way}"], *_ = score(task, answers, targets).values()
    return scores

"""Zero-shot video: ask a model that was trained on single images about clips of the toy world.

The Dense Connector does this (arXiv 2405.13800): the visual tokens of eight frames, one frame after
the other, and the question behind them. Its benchmarks become these two, with the questions that
the tiny LLaMA knows:

    passing   one object after the other appears alone    "Is there a red circle?"
                                                          "How many crosses are there?"
    moving    one object moves, the others stay           "Is the red circle left or right of the
                                                          red circle?"

A clip is eight lists of objects, `frames`, and depends only on its index. All its objects are those
of a held-out scene. A moving object takes steps of 0.05 of the image's
side, in which the world's boxes are written.

`python -m toy.findings --table=video` trains the models and asks them.
"""

from dataclasses import replace
from itertools import count

from common.images import parse_box
from connector import half_side, halve_grid
from dialogue import MARK
from eval import exchange, score
from toy import world
from toy.world import SIDE

FRAMES = 8
# Pixels per frame.
STEP = 0.05 * SIDE
# Directions as `relation` names them: x, y.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
# Every clip chooses from this many scenes, which no other clip uses.
SCENES = 1000
# The LLM reads this many positions well. More visual tokens are pooled.
WELL_READ = 256


# --- clips --------------------------------------------------------------------------------


def passing(index):
    """Show two to five objects of a scene one after the other, in random order -> frames."""
    scenes = (world.scene("test", n) for n in count(SCENES * index))
    objects = next(objects for objects in scenes if len(objects) > 1)
    order = world.generator("test", index, 4).permutation(len(objects))
    return [[objects[order[frame * len(objects) // FRAMES]]] for frame in range(FRAMES)]


def moving(index):
    """Move the first of one to three objects without touching another -> frames, direction."""
    direction, rng = list(DIRECTIONS)[index % 4], world.generator("test", index, 5)
    dx, dy = (STEP * value for value in DIRECTIONS[direction])
    for n in count(SCENES * index):
        first, *others = world.scene("test", n, most=3)
        for x, y in rng.uniform(0, SIDE - first.side, size=(30, 2)):
            path = [replace(first, x=float(x + dx * i), y=float(y + dy * i)) for i in range(FRAMES)]
            inside = 0 <= min(path[-1].box) and max(path[-1].box) <= 1
            if inside and all(world.apart(o, other) for o in path for other in others):
                return [[o, *others] for o in path], direction


def draw(clips):
    """Draw clips, uint8 (64, 64, 3) per frame, each on one background."""
    drawn = []
    for index, frames in enumerate(clips):
        drawn.append([world.draw(objects, "test", SCENES * index) for objects in frames])
    return drawn


# --- questions ----------------------------------------------------------------------------


def direction_question(o, direction):
    """Ask `relation`'s question about one object, later and earlier.

    The LLM knows no other question about two places. The axis is given, so guessing scores a half.
    """
    name = f"{o.color} {o.shape}"
    words = "left or right of" if direction in ("left", "right") else "above or below"
    return f"Is the {name} {words} the {name}?"


def moved(first, last, direction):
    """Return True if the middle of a box moved in this direction. A missing box (None): False."""
    if not first or not last:
        return False
    x1, y1, x2, y2 = (b - a for a, b in zip(first, last, strict=True))
    dx, dy = DIRECTIONS[direction]
    return (x1 + x2) * dx + (y1 + y2) * dy > 0


# --- scores -------------------------------------------------------------------------------


def ask(model, clips, texts, max_new_tokens=4, batch=25):
    """Answer questions, each behind all images of its clip."""
    prompts = [f"{MARK * len(clip)}\n{text}" for clip, text in zip(clips, texts, strict=True)]
    answers = []
    for i in range(0, len(texts), batch):
        some = slice(i, i + batch)
        answers += model.generate(clips[some], prompts[some], max_new_tokens)
    return answers


def score_passing(model, task, number):
    """Score a task on passing clips, shown in several ways -> {way: share of right answers}."""
    frames = [passing(index) for index in range(number)]
    objects = [list({o.name: o for (o,) in clip}.values()) for clip in frames]
    turns = []
    for index, shown in enumerate(objects):
        turns.append(world.any_question(task, shown, world.generator("test", index, 2)))
    texts, targets = zip(*turns, strict=True)
    clips = draw(frames)
    # A clip's objects in one image, which is the first frame, and seven empty frames.
    still = draw([shown] + [[]] * (FRAMES - 1) for shown in objects)
    ways = {
        "one image": [clip[:1] for clip in still],
        "that eight times": [clip[:1] * FRAMES for clip in still],
        "eight frames": clips,
        "with seven empty": still,
        "one frame": [[clip[FRAMES // 2]] for clip in clips],
        "another clip": [clips[i] for i in exchange(number, seed=0)],
    }
    scores = {f"{task}, best guess": max(map(targets.count, targets)) / number}
    for way, images in ways.items():
        answers = ask(model, images, texts)
        scores[f"{task}, {way}"], *_ = score(task, answers, targets).values()
    return scores


def score_moving(model, number):
    """Score the direction of moving clips -> {way: share of right answers}."""
    frames, directions = zip(*map(moving, range(number)), strict=True)
    clips, objects = draw(frames), [clip[0][0] for clip in frames]
    texts = list(map(direction_question, objects, directions))
    forward = ask(model, clips, texts)
    backward = ask(model, [clip[::-1] for clip in clips], texts)
    other = ask(model, [clips[i] for i in exchange(number, seed=0)], texts)
    where = [f"Where is the {o.name}?" for o in objects]
    first = map(parse_box, ask(model, [clip[:1] for clip in clips], where, 32))
    last = map(parse_box, ask(model, [clip[-1:] for clip in clips], where, 32))
    ways = {
        "eight frames": (forward, directions),
        "another clip": (other, directions),
        "same answer backwards": (forward, backward),
    }
    scores = {}
    for way, pair in ways.items():
        scores[f"direction, {way}"] = score("count", *pair)["accuracy"]
    right = map(moved, first, last, directions)
    return scores | {"direction, from two boxes": sum(right) / number}


def score_all(model, number):
    scores = score_moving(model, number)
    for task in ("presence", "count"):
        scores |= score_passing(model, task, number)
    return scores


def evaluate(model, number):
    """Ask `number` questions per task -> {"presence, eight frames": share of right answers, ...}.

    If eight frames have more than WELL_READ tokens, the model is asked so ("unpooled"), and again
    with its tokens pooled.
    """
    config, tokens = model.llm.config, FRAMES * model.tokens_per_image
    config.max_position_embeddings = max(config.max_position_embeddings, tokens + 64)
    unpooled = score_all(model, number)
    if tokens <= WELL_READ:
        return unpooled
    model.connector.register_forward_hook(lambda connector, hidden, tokens: halve_grid(tokens))
    model.tokens_per_image = half_side(model.tokens_per_image) ** 2
    scores = {f"{way}, unpooled": value for way, value in unpooled.items()}
    scores |= score_all(model, number)
    scores["direction, from two boxes"] = unpooled["direction, from two boxes"]
    return scores

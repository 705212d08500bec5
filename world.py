"""The embedded world: pictures of coloured shapes, and conversations about them, made on the fly from an index.

It stands in for COCO and its dialogues where there is nothing to download. A scene is 1 to 5 shapes on a textured
background; scene i of a split is always the same. The tasks are those of the two papers' benchmarks, made small:

    caption    "Describe the picture."                     -> "a large red circle, a small blue cross and ..."  (COCO)
    presence   "Is there a red circle?"                    -> "yes" / "no", half and half                       (POPE)
    count      "How many circles are there?"               -> "2"                                               (VQAv2)
    rec        "Where is the small blue cross?"            -> "[0.55,0.10,0.80,0.35]"       (RefCOCO: text to box)
    reg        "What is at [0.55,0.10,0.80,0.35]?"         -> "small blue cross"          (RefCOCOg: box to text)
    attribute  "What colour is the cross?"                 -> "blue"                                            (GQA)
    relation   "Is the red circle left or right of the blue cross?" -> "left"                                   (GQA)

Train and test are disjoint by construction: a scene belongs to the test split if a checksum of what it shows (which
colours, which shapes) is 0 modulo 8, and generation draws again until the scene falls on the side that was asked for. So
no set of objects that a test scene shows has been seen together in training.
"""
from dataclasses import dataclass

import numpy as np

from data import NothingToLearn, Sample

SIDE = 64                                                            # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (45, 90, 220), "yellow": (240, 210, 50),
           "purple": (150, 60, 190), "cyan": (60, 200, 215), "orange": (245, 135, 30), "white": (240, 240, 240)}
SIZES = {"small": (13, 17), "large": (20, 25)}                       # range of an object's side in pixels
TASKS = ("caption", "presence", "count", "rec", "reg", "attribute", "relation")


@dataclass
class Object:
    shape: str
    colour: str
    size: str
    x: float                                                         # left edge, pixels
    y: float                                                         # top edge, pixels
    side: float                                                      # pixels

    @property
    def name(self):
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def box(self):                                                   # normalised by the picture's side, as in Shikra
        return [value / SIDE for value in (self.x, self.y, self.x + self.side, self.y + self.side)]

    @property
    def box_text(self):                                              # in steps of 0.05: 21 numbers to learn, not 101
        return "[" + ",".join(f"{round(value * 20) / 20:.2f}" for value in self.box) + "]"


def generator(split, index, purpose):
    """A random generator that depends on these three and nothing else."""
    return np.random.default_rng([("train", "test").index(split), index, purpose])


def scene(split, index, most=5):
    """Scene `index` of "train" or "test": its objects, no two of the same colour and shape, no two overlapping. `most`: of
    them at most so many (pretrain.py begins with few)."""
    rng = generator(split, index, 0)
    kinds = len(SHAPES) * len(COLOURS)                               # kind k: shape k // 8, colour k % 8
    while True:
        count = min(most, rng.choice([1, 2, 3, 4, 5], p=[0.15, 0.2, 0.2, 0.2, 0.25]))
        chosen = rng.choice(kinds, size=count, replace=False)
        if count > 1 and rng.random() < 0.7:                         # else nearly every count of a colour or shape is 0 or 1
            shared = rng.choice(chosen)
            alike = [k for k in range(kinds) if (k % 8 == shared % 8) or (k // 8 == shared // 8)]
            chosen = np.unique(np.append(rng.choice(alike, size=count - 1, replace=False), shared))
        if (int(sum(pow(31, int(k), 997) for k in chosen)) % 8 == 0) != (split == "test"):
            continue
        sides = [rng.uniform(*SIZES[size]) for size in rng.choice(list(SIZES), size=count)]
        objects = place(rng.permutation(chosen), sorted(sides, reverse=True), rng)
        if objects:
            return objects


def place(chosen, sides, rng):
    """Objects of these kinds and sides, none over another; None where a few throws do not find room for all."""
    objects = []
    for k, side in zip(chosen, sides):
        for x, y in rng.uniform(0, SIDE - side, size=(30, 2)):
            if all(abs(x - o.x + (side - o.side) / 2) > (side + o.side) / 2 or
                   abs(y - o.y + (side - o.side) / 2) > (side + o.side) / 2 for o in objects):
                size = "small" if side <= SIZES["small"][1] else "large"
                objects.append(Object(SHAPES[k // 8], list(COLOURS)[k % 8], size, float(x), float(y), float(side)))
                break
        else:
            return None
    return objects


def draw(objects, split, index):
    """The scene's picture, uint8 (64, 64, 3): shapes with soft edges on a dim texture, with pixel noise."""
    rng = generator(split, index, 1)
    coarse = rng.uniform(40, 110) + rng.uniform(-15, 15, size=3) + rng.uniform(-25, 25, size=(9, 9, 1))
    at = np.linspace(0, 7.999, SIDE)                                 # the texture: 9 x 9 random greys, joined linearly
    low, part = at.astype(int), (at % 1)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    part = part.transpose(1, 0, 2)
    picture = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    for o in objects:
        left, top = int(o.x), int(o.y)
        right, bottom = min(SIDE, int(o.x + o.side) + 2), min(SIDE, int(o.y + o.side) + 2)
        half = o.side / 2
        x = np.arange(left, right)[None, :] + 0.5 - o.x - half       # distance from the object's centre, pixels
        y = np.arange(top, bottom)[:, None] + 0.5 - o.y - half
        if o.shape == "circle":
            outside = np.hypot(x, y) - half
        elif o.shape == "square":
            outside = np.maximum(abs(x), abs(y)) - half
        elif o.shape == "triangle":                                  # tip up, base down
            outside = np.maximum((2 * abs(x) - y - half) / 5 ** 0.5, y - half)
        else:                                                        # a cross: two bars, a third as thick as long
            outside = np.minimum(np.maximum(abs(x) - half, abs(y) - half / 3), np.maximum(abs(x) - half / 3, abs(y) - half))
        cover = np.clip(0.5 - outside, 0, 1)[..., None]              # 1 inside, 0 outside, between on the edge
        shade = np.array(COLOURS[o.colour]) * rng.uniform(0.85, 1.0)
        region = picture[top:bottom, left:right]
        region += cover * (shade - region)
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def left_to_right(objects):
    return sorted(objects, key=lambda o: o.x + o.side / 2)


def caption(objects):
    """All objects from left to right."""
    names = [f"a {o.name}" for o in left_to_right(objects)]
    return names[0] + "." if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] + "."


def question(task, objects, rng, about=0):
    """One (question, answer) of a task, or None where the scene gives no such question. `about`: the object it is about."""
    o = objects[about % len(objects)]
    present = {(other.colour, other.shape) for other in objects}
    if task == "caption":
        return "Describe the picture.", caption(objects)
    if task == "presence":
        colour, shape, wanted = o.colour, o.shape, rng.random() < 0.5
        while not wanted and (colour, shape) in present:             # adversarial: one of the two is there, half the time
            colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
            if rng.random() < 0.5:
                colour, shape = (o.colour, shape) if rng.random() < 0.5 else (colour, o.shape)
        return f"Is there {'an' if colour == 'orange' else 'a'} {colour} {shape}?", "yes" if wanted else "no"
    if task == "count":
        kind = rng.integers(5)
        if kind == 0:
            return "How many shapes are there?", str(len(objects))
        if kind < 3:
            colour = o.colour if rng.random() < 0.8 else str(rng.choice(list(COLOURS)))
            return f"How many {colour} shapes are there?", str(sum(other.colour == colour for other in objects))
        shape = o.shape if rng.random() < 0.8 else str(rng.choice(SHAPES))
        plural = shape + ("es" if shape == "cross" else "s")
        return f"How many {plural} are there?", str(sum(other.shape == shape for other in objects))
    if task == "rec":
        return f"Where is the {o.name}?", o.box_text
    if task == "reg":
        return f"What is at {o.box_text}?", o.name
    if task == "attribute":
        if rng.random() < 0.5 and sum(other.shape == o.shape for other in objects) == 1:
            return f"What colour is the {o.shape}?", o.colour
        if sum(other.colour == o.colour for other in objects) == 1:
            return f"What shape is the {o.colour} one?", o.shape
        return None
    for other in (objects[i] for i in rng.permutation(len(objects))):   # relation: clearly apart along one axis
        dx, dy = (o.x + o.side / 2) - (other.x + other.side / 2), (o.y + o.side / 2) - (other.y + other.side / 2)
        if max(abs(dx), abs(dy)) > SIDE / 5:
            first, second, gap = ("left", "right", dx) if abs(dx) > abs(dy) else ("above", "below", dy)
            of = " of" if first == "left" else ""
            return (f"Is the {o.colour} {o.shape} {first} or {second}{of} the {other.colour} {other.shape}?",
                    first if gap < 0 else second)
    return None


def any_question(task, objects, rng):
    """One (question, answer) of a task about a random object that gives one, or None where none does."""
    start = int(rng.integers(len(objects)))
    options = (question(task, objects, rng, about=start + i) for i in range(len(objects)))
    return next((turn for turn in options if turn), None)


def dialogue(objects, rng):
    """Questions about one picture: [(question, answer), ...]. Each question is about another object: an answer that an earlier turn
    gives away would teach to copy, not to look. So a caption or a list, which gives all away, is a dialogue of its own."""
    draw = rng.random()
    if draw < 0.25:
        return [question("caption", objects, rng) if draw < 0.1 else ("List the shapes.", listing(left_to_right(objects)))]
    turns = [question("count", objects, rng, about=int(rng.integers(len(objects))))]
    for i in range(len(objects)):
        task = ("rec", "rec", "reg", "reg", "presence", "presence", "presence", "attribute", "relation")[rng.integers(9)]
        turns.append(question(task, objects, rng, about=i))
    return [turns[i] for i in rng.permutation(len(turns)) if turns[i]]


def listing(objects):
    """All that is there, with boxes: "small red circle [..]; large blue cross [..]"."""
    return "; ".join(f"{o.name} {o.box_text}" for o in objects)


class World:
    """The world as a dataset. style "caption": stage 1, a picture and its caption, half of them with boxes; "dialogue": stage 2,
    several questions; a task's name: that one question. `length` is for grouping by length."""

    def __init__(self, split, size, style="dialogue"):
        self.split, self.size, self.style = split, size, style

    def __len__(self):
        return self.size

    def length(self, index):
        return 0                                                     # 71 to 158 tokens, never padded: grouping gains nothing

    def turns(self, index, objects):
        rng = generator(self.split, index, 2)
        if self.style == "caption":
            return [("", caption(objects) if rng.random() < 0.5 else listing(left_to_right(objects)))]
        if self.style == "dialogue":
            return dialogue(objects, rng)
        turn = any_question(self.style, objects, rng)
        if turn is None:                                             # the loader skips such a sample
            raise NothingToLearn(f"{self.split} scene {index} gives no {self.style} question")
        return [turn]

    def __getitem__(self, index):
        objects = scene(self.split, index)
        (first, answer), *rest = self.turns(index, objects)
        turns = [(f"<image>\n{first}", answer), *rest]
        return Sample([draw(objects, self.split, index)], turns, f"{self.split} scene {index}")

"""The toy world: images of colored shapes, and dialogues about them, made from an index.

It replaces COCO and its dialogues, so nothing has to be downloaded. A scene has 1 to 5 shapes on a
textured background. Scene i of a split is always the same. Each task is a small version of one of
the papers' benchmarks:

    caption    "Describe the picture."           -> "a large red circle, a ... and ..."  (COCO)
    presence   "Is there a red circle?"          -> "yes" or "no", half and half  (POPE)
    count      "How many circles are there?"     -> "2"  (VQAv2)
    rec        "Where is the small blue cross?"  -> "[0.55,0.10,0.80,0.35]"  (RefCOCO)
    reg        "What is at [0.55,0.10,0.80,0.35]?" -> "small blue cross"  (RefCOCOg)
    attribute  "What colour is the cross?"       -> "blue"  (GQA)
    relation   "Is the red circle left or right of the blue cross?" -> "left"  (GQA)

Train and test share no set of objects. A checksum of the shapes and colors in a scene decides its
split, and `scene` draws until the scene belongs to the split that is wanted. The checkpoints in
weights/ have learned these questions word for word.
"""

from dataclasses import dataclass

import numpy as np
from PIL import ImageColor

from data import Sample

# Side of an image in pixels.
SIDE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": "#d62828",
    "green": "#2ea043",
    "blue": "#2d5adc",
    "yellow": "#f0d232",
    "purple": "#963cbe",
    "cyan": "#3cc8d7",
    "orange": "#f5871e",
    "white": "#f0f0f0",
}
NAMES = tuple(COLORS)
# Range of an object's side in pixels.
SIZES = {"small": (13, 17), "large": (20, 25)}
TASKS = "caption presence count rec reg attribute relation".split()


# --- scenes -------------------------------------------------------------------------------


@dataclass
class Object:
    # Shape and color as one number from 0 to 31: 8 * shape + color.
    kind: int
    # Left edge, top edge and side, in pixels.
    x: float
    y: float
    side: float

    @property
    def shape(self):
        return SHAPES[self.kind // 8]

    @property
    def color(self):
        return NAMES[self.kind % 8]

    @property
    def name(self):
        size = "small" if self.side <= SIZES["small"][1] else "large"
        return f"{size} {self.color} {self.shape}"

    @property
    def center(self):
        return self.x + self.side / 2, self.y + self.side / 2

    @property
    def box(self):
        """[x1, y1, x2, y2], divided by the side of the image as in Shikra."""
        return [value / SIDE for value in (self.x, self.y, self.x + self.side, self.y + self.side)]

    @property
    def box_text(self):
        """The box in steps of 0.05, so that there are 21 numbers to learn instead of 101."""
        return "[" + ",".join(f"{round(value * 20) / 20:.2f}" for value in self.box) + "]"


def generator(split, index, purpose):
    """Make a random generator that depends on these three arguments only."""
    return np.random.default_rng([("train", "test").index(split), index, purpose])


def in_test_split(kinds):
    """Decide by a checksum whether this set of shapes and colors is held out for testing."""
    return sum(pow(31, int(kind), 997) for kind in kinds) % 8 == 0


def scene(split, index, most=5):
    """Return the objects of scene `index` of "train" or "test".

    No two objects have the same color and shape, and no two overlap. `most` limits their number.
    """
    rng = generator(split, index, 0)
    while True:
        count = min(most, 1 + rng.choice(5, p=[0.15, 0.2, 0.2, 0.2, 0.25]))
        kinds = rng.choice(32, size=count, replace=False)
        # Without this, nearly every count of a color or a shape is 0 or 1.
        if count > 1 and rng.random() < 0.7:
            shared = rng.choice(kinds)
            alike = [k for k in range(32) if k % 8 == shared % 8 or k // 8 == shared // 8]
            kinds = np.unique(np.append(rng.choice(alike, size=count - 1, replace=False), shared))
        if in_test_split(kinds) != (split == "test"):
            continue
        sides = [rng.uniform(*SIZES[size]) for size in rng.choice(list(SIZES), size=count)]
        objects = place(rng.permutation(kinds), sorted(sides, reverse=True), rng)
        if objects:
            return objects


def place(kinds, sides, rng):
    """Put objects of these kinds and sides at random places without overlap.

    Returns None if 30 random places are not enough for one of them.
    """
    objects = []
    # There may be more sides than kinds: `scene` drops duplicates.
    for kind, side in zip(kinds, sides, strict=False):
        for x, y in rng.uniform(0, SIDE - side, size=(30, 2)):
            candidate = Object(int(kind), float(x), float(y), float(side))
            if all(apart(candidate, other) for other in objects):
                objects.append(candidate)
                break
        else:
            return None
    return objects


def apart(a, b):
    """Return True if the squares around two objects do not overlap."""
    (ax, ay), (bx, by) = a.center, b.center
    return max(abs(ax - bx), abs(ay - by)) > (a.side + b.side) / 2


# --- images -------------------------------------------------------------------------------


def draw(objects, split, index):
    """Draw a scene: uint8 (64, 64, 3), shapes with soft edges on a dim texture, with noise."""
    rng = generator(split, index, 1)
    image, pixels = texture(rng), np.arange(SIDE) + 0.5
    for o in objects:
        rows = slice(int(o.y), int(o.y + o.side) + 2)
        columns = slice(int(o.x), int(o.x + o.side) + 2)
        # Offset of each pixel from the object's center.
        half = o.side / 2
        x = pixels[columns] - o.x - half
        y = pixels[rows, None] - o.y - half
        # 1 inside, 0 outside, in between on the edge.
        cover = np.clip(0.5 - distance(o.shape, x, y, half), 0, 1)[..., None]
        shade = np.array(ImageColor.getrgb(COLORS[o.color])) * rng.uniform(0.85, 1.0)
        region = image[rows, columns]
        region += cover * (shade - region)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def texture(rng):
    """Draw the background, float (64, 64, 3): 9 x 9 random grays, interpolated bilinearly."""
    gray, tint = rng.uniform(40, 110), rng.uniform(-15, 15, size=3)
    coarse = gray + tint + rng.uniform(-25, 25, size=(9, 9, 1))
    position = np.linspace(0, 7.999, SIDE)
    low, part = position.astype(int), (position % 1)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    part = part.transpose(1, 0, 2)
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def distance(shape, x, y, half):
    """Return the distance of the points x, y to a centered shape in pixels, negative inside."""
    # Left and right are alike.
    x = abs(x)
    if shape == "circle":
        return np.hypot(x, y) - half
    if shape == "square":
        return np.maximum(x, abs(y)) - half
    if shape == "triangle":
        return np.maximum((2 * x - y - half) / 5**0.5, y - half)
    # A cross: two bars, three times as long as wide.
    across = np.maximum(x - half, abs(y) - half / 3)
    down = np.maximum(x - half / 3, abs(y) - half)
    return np.minimum(across, down)


# --- questions and answers ----------------------------------------------------------------


def left_to_right(objects):
    return sorted(objects, key=lambda o: o.center[0])


def caption(objects):
    """Name all objects from left to right."""
    *names, last = [f"a {o.name}" for o in left_to_right(objects)]
    return f"{', '.join(names)} and {last}." if names else f"{last}."


def listing(objects):
    """List all objects with their boxes: "small red circle [..]; large blue cross [..]"."""
    return "; ".join(f"{o.name} {o.box_text}" for o in objects)


def ask_presence(objects, o, rng, hard):
    """Ask for an object, or for one that is not there.

    The share `hard` of the negatives is adversarial: the object's color or its shape is exchanged.
    The same share of these keeps the color.
    """
    present = {(other.color, other.shape) for other in objects}
    color, shape, answer = o.color, o.shape, "yes" if rng.random() < 0.5 else "no"
    while answer == "no" and (color, shape) in present:
        color, shape = rng.choice(NAMES), rng.choice(SHAPES)
        if rng.random() < hard:
            color, shape = (o.color, shape) if rng.random() < hard else (color, o.shape)
    article = "an" if color == "orange" else "a"
    return f"Is there {article} {color} {shape}?", answer


def ask_count(objects, o, rng):
    kind = rng.integers(5)
    if kind == 0:
        return "How many shapes are there?", str(len(objects))
    if kind < 3:
        name = o.color if rng.random() < 0.8 else rng.choice(NAMES)
        plural = f"{name} shapes"
    else:
        name = o.shape if rng.random() < 0.8 else rng.choice(SHAPES)
        plural = name + ("es" if name == "cross" else "s")
    number = sum(name in (other.color, other.shape) for other in objects)
    return f"How many {plural} are there?", str(number)


def ask_attribute(objects, o, rng):
    if rng.random() < 0.5 and sum(other.shape == o.shape for other in objects) == 1:
        return f"What colour is the {o.shape}?", o.color
    if sum(other.color == o.color for other in objects) == 1:
        return f"What shape is the {o.color} one?", o.shape
    return None


def ask_relation(objects, o, rng):
    for i in rng.permutation(len(objects)):
        other = objects[i]
        dx, dy = o.center[0] - other.center[0], o.center[1] - other.center[1]
        # Only pairs that are clearly apart along one axis.
        if max(abs(dx), abs(dy)) <= SIDE / 5:
            continue
        if abs(dx) > abs(dy):
            words, answer = "left or right of", "left" if dx < 0 else "right"
        else:
            words, answer = "above or below", "above" if dy < 0 else "below"
        return f"Is the {o.color} {o.shape} {words} the {other.color} {other.shape}?", answer
    return None


def question(task, objects, rng, about=0, hard=0.5):
    """Return one (question, answer) of a task about object number `about`.

    Returns None if the scene gives no such question.
    """
    o = objects[about % len(objects)]
    if task == "caption":
        return "Describe the picture.", caption(objects)
    if task == "listing":
        return "List the shapes.", listing(left_to_right(objects))
    if task == "rec":
        return f"Where is the {o.name}?", o.box_text
    if task == "reg":
        return f"What is at {o.box_text}?", o.name
    if task == "presence":
        return ask_presence(objects, o, rng, hard)
    ask = {"count": ask_count, "attribute": ask_attribute, "relation": ask_relation}
    return ask[task](objects, o, rng)


def any_question(task, objects, rng):
    """Return one (question, answer) about a random object that gives one, or None."""
    start = rng.integers(len(objects))
    for i in range(len(objects)):
        turn = question(task, objects, rng, start + i)
        if turn:
            return turn
    return None


def dialogue(objects, rng, hard=0.5):
    """Ask several questions about one scene: [(question, answer), ...].

    Each question is about another object: an answer that an earlier turn reveals would teach
    copying instead of looking. A caption or a list reveals everything, so it is asked alone.
    """
    chance = rng.random()
    if chance < 0.25:
        return [question("caption" if chance < 0.1 else "listing", objects, rng)]
    turns = [question("count", objects, rng, about=rng.integers(len(objects)))]
    tasks = "rec rec reg reg presence presence presence attribute relation".split()
    for i in range(len(objects)):
        turns.append(question(tasks[rng.integers(9)], objects, rng, i, hard))
    return [turns[i] for i in rng.permutation(len(turns)) if turns[i]]


# --- the dataset --------------------------------------------------------------------------


@dataclass
class World:
    """The world as a dataset of `size` samples.

    The style "caption" is stage 1: an image and its caption, or in half of them a list with boxes.
    "dialogue" is stage 2: several questions. A task's name gives one question of that task, or a
    caption if the scene has none.
    """

    split: str
    size: int
    style: str = "dialogue"

    def __len__(self):
        return self.size

    def length(self, index):
        """Return the same length for all: samples have 71 to 158 tokens and need no grouping."""
        return 0

    def turns(self, index, objects):
        rng = generator(self.split, index, 2)
        if self.style == "caption":
            task = "caption" if rng.random() < 0.5 else "listing"
            return [("", question(task, objects, rng)[1])]
        if self.style == "dialogue":
            # With the test's negatives the color alone answers 84% of the questions about
            # presence, and models do not learn to check the shape. Here it answers 63%.
            return dialogue(objects, rng, hard=0.85)
        return [any_question(self.style, objects, rng) or question("caption", objects, rng)]

    def __getitem__(self, index):
        objects = scene(self.split, index)
        (first, answer), *rest = self.turns(index, objects)
        turns = [(f"<image>\n{first}", answer), *rest]
        return Sample([draw(objects, self.split, index)], turns, f"{self.split} scene {index}")

"""Ask a model about test scenes of the toy world.

`sample.py` shows the answers to all kinds of questions about a few scenes, `eval.py` scores many
questions of one kind. Test scenes are never in the training data.
"""

import re
from collections import Counter
from itertools import count, islice

from PIL import Image

from common.draw import COLORS, TRUE_COLOR, panel, save_image
from common.images import format_box, iou, parse_box, parse_boxes
from toy import world


def test_scene(index):
    """Draw a test scene -> its objects, a PIL image."""
    objects = world.scene("test", index)
    return objects, Image.fromarray(world.draw(objects, "test", index))


def questions(task):
    """Yield the test scenes with a question of a task: index, objects, question, target."""
    for index in count():
        objects = world.scene("test", index)
        turn = world.any_question(task, objects, world.generator("test", index, 2))
        if turn and task == "rec":
            # compare with the box itself, not with its rounded text
            box = next(item.box for item in objects if item.name in turn[0])
            turn = turn[0], format_box(box, decimals=4)
        if turn:
            yield index, objects, *turn


def task_questions(task, number):
    """Ask about the first `number` of these scenes -> images, texts, targets."""
    found = []
    for index, objects, *turn in islice(questions(task), number):
        found.append((world.draw(objects, "test", index), *turn))
    return zip(*found, strict=True)


def scene_questions(objects, index):
    """List (question, answer) about a test scene: all tasks, and where each object is."""
    rng = world.generator("test", index, 6)
    turns = [world.any_question(task, objects, rng) for task in world.TASKS if task != "rec"]
    for item in objects:
        # its box itself, not the rounded one that is trained
        turns.append((f"Where is the {item.name}?", format_box(item.box, decimals=2)))
    return [turn for turn in turns if turn]


def scene_to_ask(index):
    """Draw a test scene -> a list of its PIL image, three questions about it."""
    objects, image = test_scene(index)
    questions = [question for question, _ in scene_questions(objects, index)]
    return [image], [*questions[:2], questions[-1]]


def named_objects(caption):
    """Count the objects of a caption: "a red circle, a ..." -> Counter of "red circle", ..."""
    parts = re.split(r",|\band\b|\.", caption.lower())
    names = [re.sub(r"^(a|an|the)\s+", "", " ".join(part.split())) for part in parts]
    return Counter(filter(None, names))


def object_f1(answer, target):
    """Compare the named objects with those in the target, in any order. 1: the same objects."""
    named, present = named_objects(answer), named_objects(target)
    hits = (named & present).total()
    return 2 * hits / (named.total() + present.total()) if hits else 0.0


def normalize(text):
    """Reduce a text to what exact match compares: lower case, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def verdict(prediction, target):
    """Compare an answer with the target: by IoU if that is a box, else as text."""
    box, true_box = parse_box(prediction), parse_box(target)
    if true_box:
        return f"IoU {iou(box, true_box):.2f}" if box else "no box"
    return "right" if normalize(prediction) == normalize(target) else "wrong"


def show_scenes(model, config, sampling):
    """Print answers and targets for test scenes, and save the scenes with their boxes.

    config: sample.Config, of which seed (the first scene), count and out are read.
    """
    panels = []
    for index in range(config.seed, config.seed + config.count):
        objects, image = test_scene(index)
        texts, targets = zip(*scene_questions(objects, index), strict=True)
        predictions = model.generate([image] * len(texts), texts, **sampling)
        print(f"{f'test scene {index}':72} {'answer':26} target")
        boxes, lines = [], [(TRUE_COLOR, f"test scene {index} (dashed: target, solid: answer)")]
        for question, prediction, target in zip(texts, predictions, targets, strict=True):
            result = verdict(prediction, target)
            print(f"  {result:9} {question:60} {prediction:26} {target}")
            if parse_box(target):
                color = COLORS[len(lines) - 1]
                lines.append((color, f"{question} {result}"))
                boxes.append((TRUE_COLOR, parse_box(target)))
                boxes += [(color, box) for box in parse_boxes(prediction)[:1]]
        panels.append(panel(image, boxes, lines))
    save_image(panels, config.out)
    print(f"\nsaved {config.out}")

"""Ask a trained model about images.

    python sample.py                                          test scenes of the toy world
    python sample.py --image=photo.jpg --prompt="What is this?"      a file or a URL, or several
    python sample.py --image=photo.jpg --chat                 a conversation; an empty line ends it
    python sample.py --image=clip.mp4 --frames=8 --prompt="What happens?"       frames of a video

The default model is the newest under out/. An answer to --prompt or --chat is printed token by
token. The image is saved to --out, with the boxes of the answer: "[x1,y1,x2,y2]" in Shikra's
notation (arXiv 2306.15195).
"""

import sys
from contextlib import suppress
from dataclasses import dataclass

import torch

from common import cli
from common.cli import option
from common.draw import COLORS, TRUE_COLOR, panel, save_image
from common.errors import InputError
from common.images import parse_boxes, read_image
from common.video import ENDINGS, open_frames
from dialogue import MARK


@dataclass
class Config(cli.ModelConfig):  # --model, --device, --bf16, --fast
    image: list[str] = option([], "files or URLs; empty: a scene of the toy world; none: no image")
    frames: int = option(0, "show this many frames of each file, a video or a folder of frames")
    pool: str = option("", "fewer tokens an image: grid (a quarter) or pairs (half, for video)")
    prompt: str = option("", "the question; without <image> in it, the image comes first")
    chat: bool = option(False, "a conversation: one question per line of stdin")
    count: int = option(4, "number of test scenes, without --image, --prompt and --chat")
    out: str = option("", "where to save the image; default: out/sample.png or out/chat.png")
    max_new_tokens: int = option(128, "longest answer, in tokens")
    temperature: float = option(0.0, "0: greedy; 1: sample from the model's distribution")
    top_k: int | None = option(None, "sample from the k most likely tokens only")
    top_p: float | None = option(None, "sample from the most likely tokens with this probability")
    seed: int = option(0, "of the sampling; the first test scene")


# What --chat proposes for an image that it does not know.
QUESTIONS = ("Describe the picture.", "What is in the middle?", "How many people are there?")


def open_images(names, frames):
    """Open images, or `frames` frames of each video -> PIL images. Raises InputError."""
    images = []
    for name in names:
        if name.lower().endswith(ENDINGS) and not frames:
            raise InputError(f"--image={name}: a video needs --frames=8, or another number")
        if name != "none":
            images += open_frames(name, frames) if frames else [read_image(name)]
    return images


def stream_answer(model, images, turns, **sampling):
    """Yield the answer piece by piece; together they are what model.generate returns.

    All ids so far are decoded every time: a character may be spread over several tokens.
    """
    ids, length = [], 0
    for token in model.stream([images], [turns], **sampling):
        ids.append(token.item())
        text = model.text(ids)
        # an incomplete character at the end is shown as U+FFFD
        if not text.endswith("\ufffd"):
            yield text[length:]
            length = max(length, len(text))
    yield model.text(ids)[length:]


def answer(model, images, turns, out, sampling):
    """Print the answer to the last question as it comes, save its boxes, and return it."""
    text = ""
    for piece in stream_answer(model, images, turns, **sampling):
        print(piece, end="", flush=True)
        text += piece
    print()
    boxes = [(COLORS[0], box) for box in parse_boxes(text)]
    # With several images nobody knows which one a box belongs to.
    if boxes and len(images) == 1:
        lines = [(TRUE_COLOR, turns[-1][0]), (COLORS[0], text)]
        save_image([panel(images[0], boxes, lines, 768)], out)
        print(f"(the boxes are in {out})", file=sys.stderr)
    return text


def read_question():
    """Read a line of stdin, which can be edited in a terminal. An empty one at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def chat(model, images, out, sampling, marks=""):
    """Answer the questions of stdin, each with all turns before it. The first one gets `marks`."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401
    turns = []
    for question in iter(read_question, ""):
        question = question if turns else marks + question
        try:
            text = answer(model, images, [*turns, (question, None)], out, sampling)
            turns.append((question, text))
        except InputError as error:  # most often the conversation is too long
            print(f"error: {error}", file=sys.stderr)


def main(arguments):
    from interop.load import load_to_answer
    from toy.scenes import scene_to_ask, show_scenes

    config = cli.parse(Config, arguments, __doc__)
    if config.count < 1 or config.seed < 0 or config.frames < 0:
        raise InputError("--count must be at least 1, --seed and --frames at least 0")
    config.out = config.out or ("out/chat.png" if config.chat else "out/sample.png")
    images = open_images(config.image, config.frames)
    _, model = load_to_answer(config.model, config.device, config.bf16, config.fast, config.pool)
    options = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = {key: getattr(config, key) for key in options}
    sampling["generator"] = torch.Generator().manual_seed(config.seed)
    if not (config.image or config.prompt or config.chat):
        return show_scenes(model, config, sampling)
    questions = QUESTIONS
    if not config.image:
        images, questions = scene_to_ask(config.seed)
        print(f"image: test scene {config.seed} of the toy world, {config.out}", file=sys.stderr)
    if images:
        # now, so that a folder without write access does not interrupt a conversation
        save_image([panel(image, [], [], 768) for image in images], config.out)
    # The frames of a video touch. Other images stand in lines of their own.
    touch = images and config.frames and MARK not in config.prompt
    marks = f"{MARK * len(images)}\n" if touch else ""
    if config.chat:
        print(f"try: {' '.join(questions)}\nAn empty line ends the conversation.", file=sys.stderr)
        return chat(model, images, config.out, sampling, marks)
    question = marks + (config.prompt or QUESTIONS[0])
    answer(model, images, [(question, None)], config.out, sampling)


if __name__ == "__main__":
    cli.run(main)

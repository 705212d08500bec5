"""Ask a trained model about images.

    python sample.py                                          test scenes of the toy world
    python sample.py --image=photo.jpg --prompt="What is this?"          a file or a URL
    python sample.py --image=photo.jpg --chat                 a conversation; an empty line ends it

The default model is the newest under out/. An answer to --prompt or --chat is printed token by
token. The image is saved to --out, with the boxes of the answer: "[x1,y1,x2,y2]" in Shikra's
notation (arXiv 2306.15195).
"""

import sys
from dataclasses import dataclass

import torch

from common import cli
from common.cli import option
from common.draw import COLORS, TRUE_COLOR, check_name, panel, save_image
from common.errors import InputError
from common.images import parse_boxes, read_image
from common.speed import speed_up


@dataclass
class Config:
    model: str = option("", "folder or hub id of a model; empty: the newest under out/")
    image: str = option("", "file or URL; empty: a scene of the toy world; none: no image")
    prompt: str = option("", "the question; without <image> in it, the image comes first")
    chat: bool = option(False, "a conversation: one question per line of stdin")
    count: int = option(4, "number of test scenes, without --image, --prompt and --chat")
    out: str = option("out/sample.png", "where to save the image with boxes")
    max_new_tokens: int = option(128, "longest answer, in tokens")
    temperature: float = option(0.0, "0: greedy; 1: sample from the model's distribution")
    top_k: int | None = option(None, "sample from the k most likely tokens only")
    top_p: float | None = option(None, "sample from the most likely tokens with this probability")
    seed: int = option(0, "of the sampling; the first test scene")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")
    bf16: bool | None = option(None, "bfloat16; default: on CUDA and for 16-bit checkpoints")
    fast: bool = option(False, "on CUDA: compile the decoding step first")


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


def answer(model, image, turns, out, sampling):
    """Print the answer to the last question as it comes, save its boxes, and return it."""
    text, images = "", [image] if image else []
    for piece in stream_answer(model, images, turns, **sampling):
        print(piece, end="", flush=True)
        text += piece
    print()
    boxes = [(COLORS[0], box) for box in parse_boxes(text)]
    if image and boxes:
        lines = [(TRUE_COLOR, turns[-1][0]), (COLORS[0], text)]
        save_image([panel(image, boxes, lines, 768)], out)
        print(f"(the boxes are in {out})", file=sys.stderr)
    return text


def chat(model, image, out, sampling):
    """Answer the questions of stdin, each with all turns before it."""
    turns = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        try:
            text = answer(model, image, [*turns, (question, None)], out, sampling)
            turns.append((question, text))
        except InputError as error:  # most often the conversation is too long
            print(f"error: {error}", file=sys.stderr)


def main(arguments):
    from interop.load import dtype_to_answer, load_model, newest_model
    from toy.scenes import show_scenes, test_scene

    config = cli.parse(Config, arguments, __doc__)
    if config.count < 1 or config.seed < 0:
        raise InputError("--count must be at least 1, and --seed at least 0")
    check_name(config.out)
    device = cli.pick_device(config.device)
    image = read_image(config.image) if config.image not in ("", "none") else None
    name = config.model or newest_model()
    print(f"model: {name}", file=sys.stderr)
    model = load_model(name, dtype_to_answer(name, device, config.bf16), device)
    speed_up(model, "chat", compile=config.fast)
    options = ("max_new_tokens", "temperature", "top_k", "top_p")
    sampling = {key: getattr(config, key) for key in options}
    sampling["generator"] = torch.Generator().manual_seed(config.seed)
    if not (config.image or config.prompt or config.chat):
        return show_scenes(model, config, sampling)
    if not config.image:
        image = test_scene(config.seed)[1]
        print(f"image: test scene {config.seed} of the toy world, {config.out}", file=sys.stderr)
    if image:
        # now, so that a folder without write access does not interrupt a conversation
        save_image([panel(image, [], [], 768)], config.out)
    if config.chat:
        return chat(model, image, config.out, sampling)
    question = config.prompt or "Describe the picture."
    answer(model, image, [(question, None)], config.out, sampling)


if __name__ == "__main__":
    cli.run(main)

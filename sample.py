"""Talk to a trained model about pictures.

    python sample.py                                        asks about test scenes; answers beside the truth, out/sample.png
    python sample.py --image=photo.jpg --prompt='What is this?'         a file or a URL
    python sample.py --image=photo.jpg --chat               a conversation about one picture; an empty line ends it

Without --model it is the newest under out/. Without --image, the picture is a test scene of the embedded world. An answer
appears word by word; when it holds a box ([x1,y1,x2,y2], Shikra's notation), a picture with that box drawn in is saved.
"""
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import cli
import world
from compiled import compile_step
from eval import iou, normalise
from hub import InputError, dtype_to_answer, newest_model
from images import BadImage, open_image, parse_box, parse_boxes, unpad_box
from linear import by_convolution, by_row
from mllm import MLLM

LARGEST_DOWNLOAD = 50_000_000                                        # bytes
COLOURS = ("#ff4fd8", "#5dff5d", "#ffb000", "#4fc3ff", "#ff6a5d")    # of the boxes; a picture's first, second, ...
TRUE = "white"


@dataclass
class Config:
    model: str = ""                      # folder of a trained model; empty: the newest under out/
    image: str = ""                      # file or http(s) URL; empty: test scenes; none: no picture
    prompt: str = ""                     # what to ask; <image> says where the picture stands, else it comes first
    chat: bool = False                   # a conversation: one question a line on stdin
    count: int = 4                       # test scenes to ask about, where there is neither --image, --prompt nor --chat
    out: str = "out/sample.png"          # the picture with boxes
    max_new_tokens: int = 128            # longest answer
    temperature: float = 0.0             # 0: the likeliest token (greedy); 1: as likely as the model thinks
    top_k: int | None = None             # draw from the k likeliest tokens only
    top_p: float | None = None           # draw from the likeliest tokens that make up this probability
    seed: int = 0                        # of the drawing of tokens, and which test scenes
    device: str = "auto"                 # auto, cpu, cuda, cuda:1, mps
    bf16: bool | None = None             # bfloat16; none: on CUDA, and where the checkpoint has 16 bits a number itself
    fast: bool = False                   # on CUDA: faster words, each one CUDA graph, once it is compiled


# --- pictures ---------------------------------------------------------------------------------------------------------

def read_picture(name):
    """A file or a URL -> PIL image. Raises InputError."""
    if not name.startswith(("http://", "https://")):
        return open_image(name)
    import requests                                                  # imported here: slow, and files need none of it
    try:
        with requests.get(name, timeout=20, stream=True) as reply:
            reply.raise_for_status()
            content = b""
            for part in reply.iter_content(1 << 16):
                content += part
                if len(content) > LARGEST_DOWNLOAD:
                    raise InputError(f"{name}: larger than {LARGEST_DOWNLOAD // 1_000_000} MB")
    except requests.RequestException as error:
        raise InputError(f"{name}: cannot be downloaded ({type(error).__name__}: {error})") from None
    try:
        return open_image(io.BytesIO(content))
    except BadImage:
        raise BadImage(f"{name}: what is there is not a readable image") from None


def test_scene(index):
    """Objects and picture of a scene that training has not seen."""
    objects = world.scene("test", index)
    return objects, Image.fromarray(world.draw(objects, "test", index))


def panel(picture, boxes, lines, side=448):
    """A picture, scaled so that its longer side is `side`, with boxes in it and lines of text below: [(colour, box)] and
    [(colour, text)]. The colour TRUE draws a dashed line. Boxes are by the side of the padded picture."""
    scale, margin, font = side / max(picture.size), 8, ImageFont.load_default(size=15)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    canvas = Image.new("RGB", (side + 2 * margin, height + 2 * margin + 21 * len(lines)), "#202020")
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (margin, margin))
    draw = ImageDraw.Draw(canvas)
    for colour, box in boxes:                                        # a model may say anything: keep it on the canvas
        x1, y1, x2, y2 = (margin + min(max(value * scale, -margin), most)
                          for value, most in zip(unpad_box(box, *picture.size), (width, height, width, height)))
        x1, x2, y1, y2 = *sorted((x1, x2)), *sorted((y1, y2))
        if colour != TRUE:
            draw.rectangle((x1, y1, x2, y2), outline=colour, width=3)
            continue
        draw.rectangle((x1, y1, x2, y2), outline="black", width=2)   # white dashes on black are seen on every ground
        for x in range(round(x1), round(x2) - 5, 12):
            draw.line([(x, y1), (x + 6, y1)], TRUE, 2), draw.line([(x, y2), (x + 6, y2)], TRUE, 2)
        for y in range(round(y1), round(y2) - 5, 12):
            draw.line([(x1, y), (x1, y + 6)], TRUE, 2), draw.line([(x2, y), (x2, y + 6)], TRUE, 2)
    for i, (colour, text) in enumerate(lines):
        text = " ".join(text.split())[:200]
        while draw.textlength(text, font) > side:
            text = text[:-4] + "..."
        draw.text((margin, height + margin + 4 + 21 * i), text, colour, font)
    return canvas


def save_picture(panels, path):
    """Panels, two a row -> one image file."""
    columns = min(2, len(panels))
    width, height = (max(sizes) for sizes in zip(*(one.size for one in panels)))
    sheet = Image.new("RGB", (width * columns, height * -(-len(panels) // columns)), "#202020")
    for i, one in enumerate(panels):
        sheet.paste(one, (i % columns * width, i // columns * height))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:                           # ValueError: a name that ends in no image format
        raise InputError(f"--out={path}: cannot be written ({error})") from None


def show(one, path, what):
    """Save a panel and say so; where that cannot be, say why and go on, for the answer matters more."""
    try:
        save_picture([one], path)
        print(f"({path} shows {what})", file=sys.stderr)
    except InputError as error:
        print(f"note: {error}", file=sys.stderr)


def check_name(path):
    """InputError where a picture cannot be saved under this name: at once, not after the work."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--out={path}: the picture's name should end in .png, .jpg or another image format")


# --- answers ----------------------------------------------------------------------------------------------------------

def stream_answer(model, images, turns, max_new_tokens, **sampling):
    """Yield the answer's text piece by piece; together they are what `model.generate` returns. All ids so far are decoded
    every time: a character may be spread over several tokens, and a space belongs to the word after it."""
    ids, shown = [], 0
    for token in model.stream([images], [turns], max_new_tokens, **sampling):
        ids.append(token.item())
        text = model.text(ids)
        if not text.endswith("\ufffd"):                              # else the rest of a character is still to come
            yield text[shown:]
            shown = max(shown, len(text))
    yield model.text(ids)[shown:]


def say(model, picture, turns, config, sampling):
    """Answer the last question on stdout as it comes; draw the boxes it holds. Returns the answer."""
    answer = ""
    for piece in stream_answer(model, [picture] if picture else [], turns, config.max_new_tokens, **sampling):
        print(piece, end="", flush=True)
        answer += piece
    print()
    boxes = parse_boxes(answer)
    if picture and boxes:
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(boxes))]
        show(panel(picture, list(zip(colours, boxes)), [(TRUE, turns[-1][0]), (COLOURS[0], answer)], 768), config.out, "the box")
    return answer


def read_text(read):
    """What read() returns, if that is text: bytes that are not UTF-8 fail in reading, or are smuggled in as surrogates."""
    try:
        text = read()
        text.encode()
        return text
    except UnicodeError:
        raise InputError("the question is not UTF-8 text") from None


def chat(model, picture, config, sampling):
    """Question by question from stdin, each with all that was said before it."""
    turns, asking = [], "> " if sys.stdin.isatty() else ""
    while True:
        print(asking, end="", flush=True)
        question = read_text(sys.stdin.readline).strip()             # "" at the end of the input, too
        if not question:
            return
        try:
            turns.append((question, say(model, picture, [*turns, (question, None)], config, sampling)))
        except InputError as error:                                  # too long, most often; what was said before stays
            print(f"error: {error}" + ", or begin anew" * bool(turns), file=sys.stderr)


def questions(objects, rng):
    """[(question, answer, the object whose box it asks for or None)]: every task once, and where each object is."""
    asked = [world.any_question(task, objects, rng) for task in world.TASKS if task != "rec"]
    return [(*turn, None) for turn in asked if turn] + [(*world.question("rec", [o], rng), o) for o in objects]


def show_scenes(model, config, sampling):
    """Ask about test scenes; print the answers beside the truth, draw a panel with boxes for each."""
    panels = []
    for index in range(config.seed * config.count, (config.seed + 1) * config.count):
        objects, picture = test_scene(index)
        asked = questions(objects, world.generator("test", index, 6))
        answers = model.generate([picture] * len(asked), [question for question, _, _ in asked], config.max_new_tokens, **sampling)
        boxes, lines = [], [(TRUE, f"test scene {index} (dashed: true box, solid: the model's)")]
        print(f"test scene {index}".ljust(72) + f" {'answer':26} truth")
        for (question, truth, about), answer in zip(asked, answers):
            verdict = "right" if normalise(answer) == normalise(truth) else "wrong"
            if about:
                colour, box = COLOURS[len(lines) - 1], parse_box(answer)
                verdict = f"IoU {iou(box, about.box):.2f}" if box else "no box"
                boxes += [(TRUE, about.box)] + [(colour, box)] * bool(box)
                lines.append((colour, f"{about.name}: {verdict}"))
            print(f"  {verdict:9} {question:60} {answer:26} {truth}")
        panels.append(panel(picture, boxes, lines))
    save_picture(panels, config.out)
    print(f"\n{config.out} shows the boxes: dashed the true ones, solid the model's")


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.count < 1 or config.seed < 0:
        raise InputError(f"--count={config.count} --seed={config.seed}: count should be 1 or more, seed 0 or more")
    check_name(config.out)
    device = cli.pick_device(config.device)
    picture = read_picture(config.image) if config.image not in ("", "none") else None
    name = config.model or newest_model()
    model = MLLM.from_pretrained(name, dtype_to_answer(name, device, config.bf16), device)
    by_row(model)                                                    # words of a large LLM on a CPU; and its prompts
    by_convolution(model)
    if config.fast and device.type == "cuda":
        compile_step(model.llm)
    elif config.fast:
        print(f"note: --fast changes nothing on {device.type}: it compiles for CUDA", file=sys.stderr)
    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                    generator=torch.Generator().manual_seed(config.seed))
    if not (config.image or config.prompt or config.chat):
        return show_scenes(model, config, sampling)
    if not config.image:
        picture = test_scene(config.seed)[1]
        show(panel(picture, [], [(TRUE, f"test scene {config.seed}")]), config.out, f"test scene {config.seed}, which is asked about")
    if config.chat:
        return chat(model, picture, config, sampling)
    say(model, picture, [(read_text(lambda: config.prompt) or "Describe the picture.", None)], config, sampling)


if __name__ == "__main__":
    cli.run(main)

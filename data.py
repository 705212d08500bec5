"""From dialogues and pictures to batches: templates, tokens and labels, pixels, datasets, the loader.

    sample  Sample(images, turns, id)                            a dialogue: turns of (question, answer), '<image>' marks inside
      |     render(turns, template)                              -> text, and the character ranges that are supervised
      |     encode(tokenizer, turns, template)                   -> ids (one IMAGE a mark), labels
      |     to_pixels(image, spec)                               -> uint8 (3, R, R)
    batch   Batch(pixels (I, 3, R, R), tokens, labels, positions (B, T) each, ids, skipped)

Formats: LLaVA's JSON (arXiv 2304.08485, 2310.03744) and Shikra's JSONL for boxes (arXiv 2306.15195). The embedded shapes
world (world.py) yields the same Sample. Layouts and masks follow LLaVA's with two differences. The label mask comes from
the character offsets of one tokenisation (LLaVA tokenises prefixes again and compares lengths). And `<image>` stays where
the dialogue has it (LLaVA moves it to the front).
"""
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch.utils.data import ConcatDataset, DataLoader

from hub import InputError, read_json

IMAGE = -200                                                         # LLaVA's placeholder id for a picture in token lists
IGNORE = -100                                                        # label of a token that is not supervised
MARK = "<image>"                                                     # a picture in text


class BadImage(InputError):
    """A picture that cannot be used. The loader skips its sample, and stops the run when there are too many."""


class NothingToLearn(InputError):
    """A sample without a supervised token. The loader skips it."""


@dataclass
class Sample:
    images: list                                                     # one a mark: a path, a PIL image, or uint8 (H, W, 3)
    turns: list                                                      # (question, answer), in order
    id: str                                                          # names the sample in messages


# ---------------------------------------------------------------------------------------------------------------------
# 1. Templates: how a dialogue is laid out as text

@dataclass(frozen=True)
class Template:
    """first q1 ask reply a1 end  later q2 ask reply a2 end ...; a prompt stops after `ask`. Of this only `a end` is
    supervised. `ask` never ends in a space and `reply` holds it: tokenizers glue a space to the word after it, so a prompt
    with the space at its end would not be a prefix, in tokens, of what was trained."""
    first: str                                                       # before the first question, system prompt included
    later: str                                                       # before every other question
    ask: str                                                         # between question and answer, the prompt's end
    reply: str                                                       # between that and the answer
    end: str                                                         # after the answer; supervised, so generation learns to stop
    special: tuple                                                   # tokens that the tokenizer must have
    bos: tuple = ("<s>", "<|begin_of_text|>")                        # starts a text: the first of these that the tokenizer has
    question: bool = True                                            # False: of a question only its pictures are kept


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
VISION = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user "
          "provides, and assist the user with a variety of tasks using natural language.")

TEMPLATES = {
    # Stage 1: a picture, its caption, a newline. As in LLaVA no end token is trained; the newline ends an answer (end_ids).
    "plain": Template("", "", "", "", "\n", (), question=False),
    "vicuna_v1": Template(f"{VICUNA} USER: ", "USER: ", " ASSISTANT:", " ", "</s>", ("<s>", "</s>")),
    "llama_2": Template(f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " ", " </s>", ("<s>", "</s>")),
    "llama_3": Template(f"<|start_header_id|>system<|end_header_id|>\n\n{VISION}<|eot_id|>"
                        "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>user<|end_header_id|>\n\n",
                        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>",
                        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": Template("<|im_start|>system\nAnswer the questions.<|im_end|>\n<|im_start|>user\n", "\n<|im_start|>user\n",
                       "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), bos=()),
    "tiny": Template("USER: ", "USER: ", " ASSISTANT:", " ", "</s>", ("</s>",)),          # the embedded world's
}


def render(turns, template):
    """turns [(question, answer), ...] -> text, spans. The last answer may be None: then the text is the prompt for it.
    spans: the (start, end) character ranges that are supervised. An empty answer teaches nothing and has none."""
    template, text, spans = named(template), "", []
    for i, (question, answer) in enumerate(turns):
        text += template.later if i else template.first
        text += (question if template.question else MARK * question.count(MARK)) + template.ask
        if answer is None:
            break
        answer = answer.lstrip()                                     # white space would merge with the prompt's last token
        start = len(text) + len(template.reply)
        text += template.reply + answer + template.end
        if answer:
            spans.append((start, len(text)))
    return text, spans


def named(template):
    if template not in TEMPLATES:
        raise InputError(f"no template {template!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def find_template(folder):
    """The template that a checkpoint was trained with: the one its config.json names ("template": ours), or the one that
    its chat template is recognised as. None if it has no chat template (a base model, or Vicuna)."""
    folder = Path(folder)
    if (folder / "config.json").exists() and "template" in (config := read_json(folder / "config.json")):
        named(config["template"])
        return config["template"]
    chat = None
    if (folder / "chat_template.jinja").exists():
        chat = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").exists():
        chat = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not chat:
        return None
    chat = json.dumps(chat)                                          # a string, or a list of named ones
    for name, marks in {"llama_3": ["<|start_header_id|>"], "chatml": ["<|im_start|>"], "llama_2": ["[INST]", "<<SYS>>"],
                        "vicuna_v1": ["USER:", "ASSISTANT:"]}.items():
        if all(mark in chat for mark in marks):
            return name
    raise InputError(f"{folder}: its chat template is none of ours ({chat[:60]}...): name one of {', '.join(TEMPLATES)}")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Tokens and labels

def load_tokenizer(folder):
    """tokenizer.json of a checkpoint. What it may do besides splitting text is taken off: truncation and padding (lengths
    are ours), and the post-processor, which adds a BOS (the template's business) and trims spaces off the offsets."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{folder}: no tokenizer.json, the LLM has no tokenizer (a tokenizer.model is not read: "
                         "copy tokenizer.json from a checkpoint of the same family)")
    spec = read_json(path)
    try:
        return Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None, "post_processor": None}))
    except Exception as error:                                       # the tokenizers library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer ({error})") from None


def encode(tokenizer, turns, template):
    """turns -> ids, labels: two lists of equal length. A mark is one IMAGE. labels[i] is ids[i] where a supervised range
    covers token i, else IGNORE; the model shifts.

    Every text between marks is tokenised once, on its own, as LLaVA does (with a sentencepiece tokenizer each chunk then
    begins with a space, and generation after a picture sees the same)."""
    layout = named(template)
    for token in layout.special:
        if tokenizer.token_to_id(token) is None:
            raise InputError(f"the tokenizer has no token {token}, which the template {template} needs: "
                             "choose a template that was made for this LLM")
    text, spans = render(turns, template)
    ids = [tokenizer.token_to_id(token) for token in layout.bos if tokenizer.token_to_id(token) is not None][:1]
    labels = [IGNORE] * len(ids)
    begin = 0                                                        # of the chunk, in characters of the text
    for i, chunk in enumerate(text.split(MARK)):
        if i:
            ids, labels, begin = ids + [IMAGE], labels + [IGNORE], begin + len(MARK)
        encoded = tokenizer.encode(chunk, add_special_tokens=False)
        covered = begin                                              # a token reaches from where the last one ended: spaces
        for token, (start, stop) in zip(encoded.ids, encoded.offsets):   # that were trimmed off its offsets are its own
            start, stop = min(begin + start, covered), begin + stop
            inside = any((start >= a or stop > a) and start < b for a, b in spans)
            ids.append(token)
            labels.append(token if inside else IGNORE)
            covered = stop
        begin += len(chunk)
    return ids, labels


def end_ids(tokenizer, template):
    """The tokens that end an answer: the template's end token; for plain every token that holds a newline."""
    end = named(template).end.strip(" ")
    if end in named(template).special:
        return [tokenizer.token_to_id(end)]
    return [i for i in range(tokenizer.get_vocab_size()) if end in tokenizer.decode([i], skip_special_tokens=False)]


def cut_to_length(ids, labels, max_length, tokens_per_image):
    """Drop whole turns from the end until the rest, pictures expanded, has at most max_length tokens. What is left is what
    encode gives for those turns; it is empty when not even the first turn fits."""
    length, keep = 0, 0
    for i, token in enumerate(ids):
        length += tokens_per_image if token == IMAGE else 1
        if length > max_length:
            return ids[:keep], labels[:keep]
        if labels[i] != IGNORE and (i + 1 == len(ids) or labels[i + 1] == IGNORE):
            keep = i + 1                                             # the end token: here a turn ends
    return ids, labels


# ---------------------------------------------------------------------------------------------------------------------
# 3. Pictures and boxes

@dataclass(frozen=True)
class ImageSpec:
    """How a checkpoint wants its pictures. `stretch`: resize to a square. `crop`: resize the shorter side, cut the middle
    out. `pad`: pad to a square with the mean colour, resize; nothing is lost, so boxes stay meaningful."""
    size: int                                                        # R, the side that the tower sees
    mode: str = "pad"                                                # pad, crop or stretch
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)                # OpenAI CLIP's
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resample: int = Image.Resampling.BICUBIC
    resize_to: int = None                                            # crop, stretch: resized to this, then cropped to size

    @classmethod
    def from_folder(cls, folder):
        """preprocessor_config.json of CLIP, SigLIP, DINOv2 (Bit), ViT, DeiT or LLaVA, old spellings included."""
        path = Path(folder) / "preprocessor_config.json"
        config = read_json(path)
        try:
            kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
            size, crop = config["size"], config.get("crop_size") if config.get("do_center_crop") else None
            if not isinstance(size, dict):                           # a number: the shorter side, or ViT's square
                square = kind.startswith(("ViT", "DeiT", "Siglip"))
                size = {"height": size, "width": size} if square else {"shortest_edge": size}
            stretch = "height" in size
            resize_to = size["height"] if stretch else size["shortest_edge"]
            final = resize_to if crop is None else crop["height"] if isinstance(crop, dict) else crop
            for sides in (size, crop):
                if isinstance(sides, dict) and sides.get("height") != sides.get("width"):
                    raise InputError(f"{path}: pictures of {sides['height']}x{sides['width']}, only squares are supported")
            mode = "pad" if config.get("do_pad") and "Llava" in kind else "stretch" if stretch else "crop"
            return cls(final, mode, tuple(config["image_mean"]), tuple(config["image_std"]),
                       config.get("resample", Image.Resampling.BICUBIC), resize_to if resize_to != final else None)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the description of an image processor ({error!r})") from None

    def config(self):
        """The contents of a preprocessor_config.json that from_folder reads back, and transformers reads too."""
        side = self.resize_to or self.size
        return dict(image_processor_type="LlavaImageProcessor", do_pad=self.mode == "pad", do_resize=True,
                    size=dict(height=side, width=side) if self.mode == "stretch" else dict(shortest_edge=side),
                    resample=int(self.resample), do_center_crop=True, crop_size=dict(height=self.size, width=self.size),
                    do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(self.mean),
                    image_std=list(self.std), do_convert_rgb=True)


def open_image(path_or_file):
    """Any image file -> PIL image, RGB, upright, the first frame. BadImage names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path_or_file) as image:
                return to_rgb(image)
    except FileNotFoundError:
        raise BadImage(f"{path_or_file}: no such image") from None
    except Exception as error:                                       # decoders raise anything at all on damaged bytes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadImage(f"{path_or_file}: not a readable image ({reason})") from None


def to_rgb(image):
    """A PIL image of any mode -> RGB. Orientation from EXIF, 16 bits to 8, transparency on white (as transformers)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                   # 16-bit grey; "I" is how some versions of PIL open it.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8    # convert() would cut off everything over 255
        image = Image.fromarray(grey.astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, spec):
    """PIL image or uint8 (H, W, 3) array -> uint8 (3, R, R), the very pixels that transformers' PIL processors make.
    Towers scale and normalise on the device."""
    image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
    side, (width, height) = spec.size if spec.mode == "pad" else spec.resize_to or spec.size, image.size
    longest, shortest = max(width, height), min(width, height)
    if spec.mode == "crop":
        width, height = (int(side * edge / shortest) for edge in (width, height))
    if max(longest ** 2 if spec.mode == "pad" else 0, width * height) > 2 * Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"a picture of {image.width}x{image.height} is too elongated to be resized")
    if spec.mode == "pad":                                           # LLaVA's expand2square
        square = Image.new("RGB", (longest, longest), tuple(int(255 * channel) for channel in spec.mean))
        square.paste(image, ((longest - width) // 2, (longest - height) // 2))
        image = square
    image = image.resize((width, height) if spec.mode == "crop" else (side, side), spec.resample)
    left, top = (image.width - spec.size) // 2, (image.height - spec.size) // 2
    image = image.crop((left, top, left + spec.size, top + spec.size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()           # (3, R, R)


def pad_box(box, width, height):
    """Box (x1, y1, x2, y2) in pixels -> the same box after square padding, by the side of the square: 0 to 1."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2            # as in to_pixels
    return [(value + offset) / side for value, offset in zip(box, (left, top, left, top))]


def unpad_box(box, width, height):
    """The inverse of pad_box: scores are computed in original pixels."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return [value * side - offset for value, offset in zip(box, (left, top, left, top))]


def format_box(box, decimals=3):
    return "[" + ",".join(f"{value:.{decimals}f}" for value in box) + "]"


def parse_box(text):
    """The first box in a text -> four floats, or None. "[0.390,0.483,0.884,0.866]" """
    number = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
    found = re.search(r"\[" + ",".join([number] * 4) + r"\]", text)
    return [float(value) for value in found.groups()] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# 4. Datasets

def read_records(path):
    """A JSON array, or JSONL (one object a line) -> [(where, object)]; `where` is how messages name it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    found = []
    array = text.lstrip().startswith("[")
    for number, line in [(1, text)] if array else enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((f"{path}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: not JSON, line {number + error.lineno - 1}: {error.msg}") from None
    if array:
        found = [(f"{path}, sample {i}", record) for i, record in enumerate(found[0][1])]
    if not found:
        raise InputError(f"{path}: holds no samples")
    for where, record in found:
        if not isinstance(record, dict):
            raise InputError(f"{where}: should be an object, is a {type(record).__name__}")
    return found


class LlavaData:
    """LLaVA's format: {"id", "image": name or list (absent: text only), "conversations": [{"from": "human" | "gpt",
    "value": text}, ...]}. Turns alternate. As in LLaVA an answer before the first question is dropped; so is a question
    after the last answer. The whole file is checked at once, so that a run does not break on its last sample."""

    def __init__(self, path, image_dir):
        self.image_dir = os.path.abspath(image_dir)
        self.samples = [self.parse(record, where, i) for i, (where, record) in enumerate(read_records(path))]
        if any(sample.images for sample in self.samples) and not os.path.isdir(image_dir):
            raise InputError(f"{image_dir}: no such folder; the pictures of {path} should be in it")

    def parse(self, record, where, index):
        where = f"{where} (id {record['id']})" if "id" in record else where
        messages = record.get("conversations")
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: no conversations")
        for message in messages:
            if not isinstance(message, dict) or message.get("from") not in ("human", "gpt"):
                raise InputError(f'{where}: every message needs a role, "from": "human" or "gpt"')
            if not isinstance(message.get("value"), str):
                raise InputError(f'{where}: every message needs a text, "value"')
        if messages[0]["from"] == "gpt":
            messages = messages[1:]
        if any(message["from"] != ("human", "gpt")[i % 2] for i, message in enumerate(messages)):
            raise InputError(f"{where}: human and gpt do not take turns")
        turns = [(ask["value"], answer["value"]) for ask, answer in zip(messages[::2], messages[1::2])]
        if not turns:
            raise InputError(f"{where}: conversations without a question and its answer")
        images = record.get("image") or []
        return self.checked(Sample([images] if isinstance(images, str) else images, turns, str(record.get("id", index))), where)

    def checked(self, sample, where):
        """A picture a mark, every picture inside the folder."""
        if not isinstance(sample.images, list) or not all(isinstance(name, str) for name in sample.images):
            raise InputError(f"{where}: image should be a name or a list of names")
        marks = sum(text.count(MARK) for turn in sample.turns for text in turn)
        if marks != len(sample.images):
            raise InputError(f"{where}: {marks} {MARK} marks for {len(sample.images)} images")
        sample.images = [self.inside(os.path.normpath(os.path.join(self.image_dir, name)), where) for name in sample.images]
        return sample

    def inside(self, path, where, folder=None):
        if "\0" in path or os.path.commonpath([path, folder or self.image_dir]) != (folder or self.image_dir):
            raise InputError(f"{where}: the image path {path!r} leaves the image folder {self.image_dir}")
        return path

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        for path in sample.images:                                   # a link may lead out of the folder, too
            self.inside(os.path.realpath(path), f"sample {sample.id}", os.path.realpath(self.image_dir))
        return sample

    def length(self, index):
        """About how long the sample is, in characters; a picture counts as 2000."""
        sample = self.samples[index]
        return sum(len(text) for turn in sample.turns for text in turn) + 2000 * len(sample.images)


class ShikraData(LlavaData):
    """Shikra's JSONL of referring expressions: {"img_path", "expression", "bbox": [x1, y1, x2, y2] in pixels, "height",
    "width"}. task "rec": expression -> box (comprehension); "reg": box -> expression (generation). The questions take
    turns by index."""
    QUESTIONS = {
        "rec": ["Where is <expr>? Answer with the box [x1,y1,x2,y2].", "Give the coordinates of <expr> in the picture.",
                "Please find <expr> and tell me its box.", "Which region of the picture shows <expr>? Answer with a box."],
        "reg": ["What is in the box <boxes>? Describe it so that it can be told from everything else.",
                "Give a phrase that names only the object at <boxes>.", "Describe the region <boxes> of the picture.",
                "Which object does the box <boxes> show?"]}

    def __init__(self, path, image_dir, task="rec"):
        if task not in self.QUESTIONS:
            raise InputError(f"no task {task!r} in Shikra's data: rec or reg")
        self.task = task
        super().__init__(path, image_dir)

    def parse(self, record, where, index):
        name, expression, box = (record.get(key) for key in ("img_path", "expression", "bbox"))
        height, width = record.get("height"), record.get("width")
        if not isinstance(name, str) or not isinstance(expression, str):
            raise InputError(f"{where}: img_path and expression are needed, as texts")
        numbers = [height, width, *box] if isinstance(box, list) and len(box) == 4 else [None]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise InputError(f"{where}: height, width and a bbox of four numbers are needed")
        if min(height, width) <= 0 or box[0] > box[2] or box[1] > box[3]:
            raise InputError(f"{where}: bbox should be [x1, y1, x2, y2] in a picture of height x width pixels, is {box}")
        questions, answer = self.QUESTIONS[self.task], format_box(pad_box(box, int(width), int(height)))
        question = questions[index % len(questions)].replace("<expr>", expression).replace("<boxes>", answer)
        turns = [(f"{MARK}\n{question}", answer if self.task == "rec" else expression)]
        return self.checked(Sample([name], turns, f"{name}#{index}"), where)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Batches and the loader

@dataclass
class Batch:
    """Right-padded. A picture stands in `tokens` as tokens_per_image times IMAGE, so that shapes are known before the model
    runs; `pixels` holds the batch's pictures in the order of the marks."""
    pixels: torch.Tensor                                             # (I, 3, R, R) uint8; I may be 0
    tokens: torch.Tensor                                             # (B, T); padding is 0
    labels: torch.Tensor                                             # (B, T); tokens where supervised, else IGNORE
    positions: torch.Tensor                                          # (B, T); 0, 1, 2, ...
    ids: list                                                        # of the samples, B (none in a stand-in batch)
    skipped: list                                                    # (id, InputError) of samples left out


@dataclass
class Example:
    """An encoded sample, or why there is none. Errors travel as values, since one that is raised in a worker arrives as a
    traceback of many lines."""
    id: str
    tokens: list = None
    labels: list = None
    pixels: list = field(default_factory=list)
    error: InputError = None


class Examples(torch.utils.data.Dataset):
    """dataset[i] -> Example: what a worker does."""

    def __init__(self, dataset, tokenizer, template, spec, tokens_per_image, max_length):
        self.dataset, self.tokenizer, self.template, self.spec = dataset, tokenizer, template, spec
        self.tokens_per_image, self.max_length = tokens_per_image, max_length

    def __getitem__(self, index):
        example = Example(str(index))
        try:
            sample = self.dataset[index]
            example.id = sample.id
            ids, labels = encode(self.tokenizer, sample.turns, self.template)
            ids, labels = cut_to_length(ids, labels, self.max_length, self.tokens_per_image)
            if all(label == IGNORE for label in labels):
                raise NothingToLearn("nothing to learn from: empty answers" if ids else
                                     f"nothing to learn from: not even its first turn fits into {self.max_length} tokens")
            repeats = [self.tokens_per_image if token == IMAGE else 1 for token in ids]
            example.tokens = [token for token, times in zip(ids, repeats) for _ in range(times)]
            example.labels = [label for label, times in zip(labels, repeats) for _ in range(times)]
            for image in sample.images[:ids.count(IMAGE)]:           # turns that were cut off may have had pictures
                image = open_image(image) if isinstance(image, (str, Path)) else image
                example.pixels.append(to_pixels(image, self.spec))
        except InputError as error:
            example.error = error
        return example


def collate(examples, size):
    """Examples -> Batch. If none is left, one row of one unsupervised token stands in, for a forward that adds nothing."""
    kept = [example for example in examples if example.error is None]
    length = max((len(example.tokens) for example in kept), default=1)
    tokens = torch.zeros(max(len(kept), 1), length, dtype=torch.long)                # (B, T)
    labels = torch.full_like(tokens, IGNORE)
    for row, example in enumerate(kept):
        tokens[row, :len(example.tokens)] = torch.tensor(example.tokens)
        labels[row, :len(example.labels)] = torch.tensor(example.labels)
    pictures = [pixels for example in kept for pixels in example.pixels]
    return Batch(torch.stack(pictures) if pictures else torch.zeros(0, 3, size, size, dtype=torch.uint8), tokens, labels,
                 torch.arange(length).expand_as(tokens), [example.id for example in kept],
                 [(example.id, example.error) for example in examples if example.error is not None])


def order(n, seed, epoch, lengths=None, global_batch=1, window=16):
    """The indices 0..n-1 as epoch `epoch` visits them: a pure function of its arguments. Shuffled; then, given lengths,
    every `window` global batches are sorted by length and cut into batches of like length (less padding), and the batches
    are shuffled. A last batch that is not full stays last, so that the others stay whole."""
    generator = np.random.default_rng([seed, epoch])
    indices = generator.permutation(n).tolist()
    if lengths is None:
        return indices
    batches = []
    for i in range(0, n, window * global_batch):
        alike = sorted(indices[i:i + window * global_batch], key=lengths.__getitem__)
        batches += [alike[j:j + global_batch] for j in range(0, len(alike), global_batch)]
    last = [] if n % global_batch == 0 else batches.pop()
    return [index for i in generator.permutation(len(batches)) for index in batches[i]] + last


def lengths_of(dataset):
    if isinstance(dataset, ConcatDataset):
        return [length for part in dataset.datasets for length in lengths_of(part)]
    return [dataset.length(i) for i in range(len(dataset))]


class Loader:
    """Iterating yields, for every optimizer step and without end, the list of this rank's micro-batches. The samples of all
    epochs, in order, are one stream; step k of a run takes stream[start + k*global_batch:][:global_batch], rank r every
    world_size-th of them. So a run can begin at any sample, and the number of workers changes nothing.

    A sample with a bad picture, or with nothing to learn from, leaves a gap in its batch. `skipped` names them all, `seen`
    counts samples. Bad pictures stop the run when there are more than three of them and more than 1% of what was seen (of
    the first 1000 samples, or the whole dataset if that is smaller, before so many were seen)."""

    def __init__(self, dataset, tokenizer, template, spec, tokens_per_image, max_length, global_batch, micro_batch, seed=0,
                 rank=0, world_size=1, workers=0, start=0):
        if not len(dataset):
            raise InputError("a dataset without samples")
        self.examples = Examples(dataset, tokenizer, template, spec, tokens_per_image, max_length)
        self.global_batch, self.micro_batch, self.seed, self.start = global_batch, micro_batch, seed, start
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.lengths = lengths_of(dataset)
        self.share = math.ceil(global_batch / world_size)            # the most samples of a step that a rank gets: all ranks
        self.micro_batches = math.ceil(self.share / micro_batch)     # make as many forwards, the last one may be a stand-in
        self.seen, self.skipped = 0, {}                              # by this rank; {id: InputError}

    def stream(self):
        """The indices of all samples to come."""
        epoch, offset = divmod(self.start, len(self.lengths))
        while True:
            yield from order(len(self.lengths), self.seed, epoch, self.lengths, self.global_batch)[offset:]
            epoch, offset = epoch + 1, 0

    def indices(self):
        """The indices of this rank's micro-batches to come."""
        stream = self.stream()
        while True:
            mine = [next(stream) for _ in range(self.global_batch)][self.rank::self.world_size]
            for i in range(0, self.micro_batches * self.micro_batch, self.micro_batch):
                yield mine[i:i + self.micro_batch]

    def __iter__(self):
        batches = DataLoader(self.examples, batch_sampler=self.indices(), num_workers=self.workers,
                             collate_fn=partial(collate, size=self.examples.spec.size),
                             generator=torch.Generator())            # its own: the run's random state stays untouched
        step = []
        for batch in batches:
            self.count(batch)
            step.append(batch)
            if len(step) == self.micro_batches:
                yield step
                step = []

    def count(self, batch):
        self.seen += len(batch.ids) + len(batch.skipped)
        for name, error in batch.skipped:
            if not isinstance(error, (BadImage, NothingToLearn)):
                raise error
            self.skipped[name] = error
        bad = [f"{name} ({error})" for name, error in self.skipped.items() if isinstance(error, BadImage)]
        if len(bad) > max(3, 0.01 * max(self.seen, min(1000, len(self.lengths)))):
            raise InputError(f"{len(bad)} samples have bad images, more than 1% of those seen; the last: {', '.join(bad[-3:])}")

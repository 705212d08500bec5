"""From dialogues and pictures to batches: templates, tokens and labels, pixels, datasets, the loader.

    Sample(images, turns, id)        turns of (question, answer); '<image>' stands in the text once a picture
      |  render(turns, template)                   -> text, and the character ranges of it that are supervised
      |  encode(tokenizer, turns, template)        -> ids (one IMAGE a picture), labels
      |  to_pixels(image, spec)                    -> uint8 (3, R, R)
    Batch(pixels (I, 3, R, R), tokens (B, T), labels (B, T), positions (B, T), ids, skipped)

Formats: LLaVA's JSON (arXiv 2304.08485, 2310.03744) and Shikra's JSONL with boxes (arXiv 2306.15195); the embedded
world (world.py) yields the same samples. Layouts are LLaVA's, with two differences: labels come from the character
offsets of one tokenisation (LLaVA tokenises every prefix again and compares lengths), and `<image>` stays where the
text has it (LLaVA moves it to the front).
"""
import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch.utils.data import ConcatDataset, DataLoader

from hub import InputError, read_json

IMAGE = -200                                                         # LLaVA's placeholder id for a picture
IGNORE = -100                                                        # label of a token that is not supervised
MARK = "<image>"                                                     # a picture in text


class Sample(NamedTuple):
    images: list                                                     # one a mark: path, PIL image or uint8 (H, W, 3)
    turns: list                                                      # (question, answer), in order
    id: str                                                          # names the sample in messages


class BadImage(InputError):
    """A picture that cannot be used. The loader skips its sample, and stops the run when they are too many."""


class NothingToLearn(InputError):
    """A sample without a supervised token. The loader skips it."""


# --- 1. Templates: a dialogue as text -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """first q1 ask reply a1 end, later q2 ask reply a2 end, ...; a prompt stops after `ask`, the rest is supervised.
    A space before the answer belongs to `reply`, not to `ask`: most tokenizers glue it to the word that follows, and a
    prompt that ended in it would not be, in tokens, a prefix of what was trained."""
    first: str                                                       # before the first question: system prompt and role
    later: str                                                       # before every other question
    ask: str                                                         # after a question; the end of a prompt
    reply: str                                                       # before an answer
    end: str                                                         # after an answer; generation stops there
    special: tuple                                                   # tokens that the tokenizer must have
    bos: tuple = ("<s>", "<|begin_of_text|>")                        # at the very start: the first that there is
    question: bool = True                                            # False: of a question only its pictures are kept


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
LLAVA = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user "
         "provides, and assist the user with a variety of tasks using natural language.")
USER, ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))

TEMPLATES = {
    # Stage 1: picture, caption, newline. LLaVA trains no end token here, so the newline ends an answer (see end_ids).
    "plain": Template("", "", "", "", "\n", (), question=False),
    "vicuna_v1": Template(f"{VICUNA} USER: ", "USER: ", " ASSISTANT:", " ", "</s>", ("<s>", "</s>")),
    "llama_2": Template(f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " ", " </s>",
                        ("<s>", "</s>")),
    "llama_3": Template(f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA}<|eot_id|>{USER}", USER,
                        f"<|eot_id|>{ASSISTANT}", "", "<|eot_id|>",
                        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": Template("<|im_start|>system\nAnswer the questions.<|im_end|>\n<|im_start|>user\n",
                       "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>",
                       ("<|im_start|>", "<|im_end|>"), bos=()),
    "tiny": Template("USER: ", "USER: ", " ASSISTANT:", " ", "</s>", ("</s>",)),     # the embedded world's
}


def named(template):
    if template not in TEMPLATES:
        raise InputError(f"no template {template!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def render(turns, template):
    """turns [(question, answer), ...] -> text, spans. The last answer may be None: the text is then the prompt for it.
    spans: the (start, end) character ranges that are supervised, each all that follows its prompt: the answer, its end
    token, and a space before them if the template has one. An empty answer teaches nothing and has no span."""
    layout, text, spans = named(template), "", []
    for i, (question, answer) in enumerate(turns):
        text += layout.later if i else layout.first
        text += (question if layout.question else MARK * question.count(MARK)) + layout.ask
        if answer is None:
            break
        answer = answer.lstrip()                                     # spaces would merge with the prompt's last token
        start, text = len(text), text + layout.reply + answer + layout.end
        if answer:
            spans.append((start, len(text)))
    return text, spans


def find_template(folder):
    """A checkpoint's own template: the one that its config.json names ("template", as we save it), or the one that its
    chat template is recognised as. None if it has no chat template (a base model; Vicuna)."""
    folder, chat = Path(folder), None
    if (folder / "config.json").exists() and "template" in (config := read_json(folder / "config.json")):
        named(config["template"])                                    # raises if there is none of that name
        return config["template"]
    if (folder / "chat_template.jinja").exists():
        chat = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").exists():
        chat = read_json(folder / "tokenizer_config.json").get("chat_template")
    if not chat:
        return None
    for name, marks in {"llama_3": ["<|start_header_id|>"], "chatml": ["<|im_start|>"],
                        "llama_2": ["[INST]", "<<SYS>>"], "vicuna_v1": ["USER:", "ASSISTANT:"]}.items():
        if all(mark in str(chat) for mark in marks):                 # a text, or a list of named ones
            return name
    raise InputError(f"{folder}: its chat template is none of ours, name one: {', '.join(TEMPLATES)}")


# --- 2. Tokens and labels -------------------------------------------------------------------------------------------

def load_tokenizer(folder):
    """A checkpoint's tokenizer.json, without what it may do besides splitting text: truncation and padding (lengths are
    ours to choose), and the post-processor (it adds a BOS, the template's part, and trims spaces off offsets)."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{folder}: no tokenizer.json, and a language model needs its tokenizer (tokenizer.model is "
                         "not read: copy tokenizer.json from a checkpoint of the same family)")
    description = read_json(path)
    try:
        return Tokenizer.from_str(json.dumps(description | dict(truncation=None, padding=None, post_processor=None)))
    except Exception as error:                                       # the tokenizers library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer ({error})") from None


def encode(tokenizer, turns, template):
    """turns -> ids, labels, two lists of equal length. A picture is one IMAGE. A label is the token itself where that
    begins in a supervised range, else IGNORE; shifting by one is left to the loss.

    Each chunk of text between pictures is tokenised once, on its own, as in LLaVA. (A sentencepiece tokenizer puts a
    space before every chunk: before the first word after a picture, too.)"""
    layout = named(template)
    for token in layout.special:
        if tokenizer.token_to_id(token) is None:
            raise InputError(f"the tokenizer has no token {token}, which the template {template} needs: choose the "
                             "template that the language model was trained with")
    text, spans = render(turns, template)
    supervised = {i for start, end in spans for i in range(start, end)}              # characters
    ids = [tokenizer.token_to_id(token) for token in layout.bos if tokenizer.token_to_id(token) is not None][:1]
    labels = [IGNORE] * len(ids)
    begin = 0                                                        # where the chunk begins in the text
    for i, chunk in enumerate(text.split(MARK)):
        if i:
            ids, labels, begin = ids + [IMAGE], labels + [IGNORE], begin + len(MARK)
        encoding = tokenizer.encode(chunk, add_special_tokens=False)
        ids += encoding.ids
        labels += [token if begin + start in supervised else IGNORE
                   for token, (start, _) in zip(encoding.ids, encoding.offsets)]
        begin += len(chunk)
    return ids, labels


def end_ids(tokenizer, template):
    """The tokens that end an answer: the template's end token; for plain, every token that holds a newline."""
    end = named(template).end.strip(" ")
    if end in named(template).special:
        return [tokenizer.token_to_id(end)]
    return [i for i in range(tokenizer.get_vocab_size()) if end in tokenizer.decode([i])]


def cut_to_length(ids, labels, max_length, tokens_per_image):
    """Leave out whole turns at the end until the rest, pictures expanded, has at most max_length tokens: what encode
    gives for the turns that stay. Empty if not even the first turn fits."""
    length, keep = 0, 0
    for i, token in enumerate(ids):
        length += tokens_per_image if token == IMAGE else 1
        if length > max_length:
            return ids[:keep], labels[:keep]
        if labels[i] != IGNORE and (i + 1 == len(ids) or labels[i + 1] == IGNORE):
            keep = i + 1                                             # an answer's end token: a turn ends here
    return ids, labels


# --- 3. Pictures and boxes ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ImageSpec:
    """How a checkpoint wants pictures. pad: pad to a square with the mean colour, then resize; nothing is lost, and
    boxes keep their meaning. crop: resize the shorter side, cut out the middle. stretch: resize to a square."""
    size: int                                                        # R, the side of what the tower sees
    mode: str = "pad"
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)                # OpenAI CLIP's; towers normalise on the device
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3                                                # PIL's number: 3 bicubic, 2 bilinear
    resize_to: int = None                                            # crop, stretch: resize to this, then crop to size

    @classmethod
    def from_folder(cls, folder):
        """preprocessor_config.json of CLIP, SigLIP, DINOv2 (Bit), ViT, DeiT and LLaVA, old spellings included."""
        path = Path(folder) / "preprocessor_config.json"
        config = read_json(path)
        try:
            kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
            size, crop = config["size"], config.get("crop_size") if config.get("do_center_crop") else None
            if not isinstance(size, dict):                           # a number: CLIP's shorter side, or ViT's square
                square = kind.startswith(("ViT", "DeiT", "Siglip"))
                size = {"height": size, "width": size} if square else {"shortest_edge": size}
            crop = crop if isinstance(crop, dict) or crop is None else {"height": crop, "width": crop}
            if any(sides and sides.get("height") != sides.get("width") for sides in (size, crop)):
                raise InputError(f"{path}: only square pictures are supported")
            resize_to = size["height"] if "height" in size else size["shortest_edge"]
            final = crop["height"] if crop else resize_to
            mode = "stretch" if "height" in size else "pad" if config.get("do_pad") else "crop"
            return cls(final, mode, tuple(config["image_mean"]), tuple(config["image_std"]), config.get("resample", 3),
                       resize_to if resize_to != final else None)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the description of an image processor ({error!r})") from None

    def config(self):
        """The preprocessor_config.json that from_folder reads back as this spec; transformers reads it, too."""
        side = self.resize_to or self.size
        size = dict(height=side, width=side) if self.mode == "stretch" else dict(shortest_edge=side)
        return dict(image_processor_type="LlavaImageProcessor", do_pad=self.mode == "pad", do_resize=True, size=size,
                    do_center_crop=True, crop_size=dict(height=self.size, width=self.size), resample=int(self.resample),
                    do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(self.mean),
                    image_std=list(self.std), do_convert_rgb=True)


def open_image(path_or_file):
    """Any image file -> PIL image: RGB, upright, of an animation the first frame. BadImage names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path_or_file) as image:
                return to_rgb(image)
    except FileNotFoundError:
        raise BadImage(f"{path_or_file}: no such image") from None
    except Exception as error:                                       # on damaged bytes decoders raise anything at all
        raise BadImage(f"{path_or_file}: not a readable image "
                       f"({' '.join(f'{type(error).__name__}: {error}'.split())})") from None


def to_rgb(image):
    """PIL image of any mode -> RGB: turned as EXIF says, 16 bits to 8, transparency on white (as transformers does)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                   # 16-bit grey; convert() would clip it at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, spec):
    """PIL image or uint8 (H, W, 3) -> uint8 (3, R, R): the very pixels that transformers' PIL processors make."""
    image = to_rgb(image) if isinstance(image, Image.Image) else Image.fromarray(image)
    longest, shortest = max(image.size), min(image.size)
    side = spec.size if spec.mode == "pad" else spec.resize_to or spec.size
    largest = {"pad": longest ** 2, "crop": side * int(side * longest / shortest), "stretch": side ** 2}[spec.mode]
    if largest > 2 * Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"a picture of {image.width}x{image.height} is too elongated to {spec.mode}")
    if spec.mode == "pad":                                           # LLaVA's expand2square
        square = Image.new("RGB", (longest, longest), tuple(int(255 * channel) for channel in spec.mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = square
    resized = tuple(int(side * edge / shortest) for edge in image.size) if spec.mode == "crop" else (side, side)
    image = image.resize(resized, spec.resample)
    left, top = ((edge - spec.size) // 2 for edge in image.size)
    image = image.crop((left, top, left + spec.size, top + spec.size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def padding(width, height):
    """Side of the padded square, and where the picture begins in it (as to_pixels pads)."""
    side = max(width, height)
    return side, ((side - width) // 2, (side - height) // 2) * 2


def pad_box(box, width, height):
    """Box (x1, y1, x2, y2) in pixels of a picture -> the same in the square-padded picture, by its side: 0 to 1."""
    side, offsets = padding(width, height)
    return [(value + offset) / side for value, offset in zip(box, offsets)]


def unpad_box(box, width, height):
    """The inverse of pad_box: scores are computed in original pixels."""
    side, offsets = padding(width, height)
    return [value * side - offset for value, offset in zip(box, offsets)]


def format_box(box, decimals=3):
    """Box -> "[0.390,0.483,0.884,0.866]"."""
    return "[" + ",".join(f"{value:.{decimals}f}" for value in box) + "]"


def parse_box(text):
    """The first box in a text -> four floats, or None."""
    found = re.search(r"\[" + ",".join([r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"] * 4) + r"\]", text)
    return [float(value) for value in found.groups()] if found else None


# --- 4. Datasets: dataset[i] -> (images, turns, id), dataset.length(i) ------------------------------------------------

def read_records(path):
    """A JSON array, or JSONL (an object a line) -> [(where, object), ...]; `where` names it in messages."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    array = text.lstrip().startswith("[")
    records = []
    for number, part in enumerate([text] if array else text.split("\n"), start=1):
        try:
            if part.strip():
                records.append((f"{path}, line {number}", json.loads(part)))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: not JSON, line {number + error.lineno - 1}: {error.msg}") from None
    if array:
        records = [(f"{path}, sample {i}", record) for i, record in enumerate(records[0][1])]
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where}: should be an object, is a {type(record).__name__}")
    if not records:
        raise InputError(f"{path}: holds no samples")
    return records


class LlavaData:
    """LLaVA's format: {"id", "image": a name or a list of names (none: text only), "conversations": [{"from": "human"
    or "gpt", "value"}, ...]}. An answer before the first question is dropped, as in LLaVA; so is a question after the
    last answer. The whole file is checked at once: a run should not break on its last sample."""

    def __init__(self, path, image_dir):
        self.image_dir = os.path.abspath(image_dir)
        self.samples = [self.parse(record, where, i) for i, (where, record) in enumerate(read_records(path))]
        if any(sample.images for sample in self.samples) and not os.path.isdir(image_dir):
            raise InputError(f"{image_dir}: no such folder; the pictures of {path} should be in it")

    def parse(self, record, where, index):
        where += f" (id {record['id']})" if "id" in record else ""
        messages, images = record.get("conversations"), record.get("image") or []
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{where}: no conversations")
        for message in messages:
            if not isinstance(message, dict) or message.get("from") not in ("human", "gpt"):
                raise InputError(f'{where}: every message needs a role, "from": "human" or "gpt"')
            if not isinstance(message.get("value"), str):
                raise InputError(f'{where}: every message needs a text, "value"')
        messages = messages[1:] if messages[0]["from"] == "gpt" else messages
        if any(message["from"] != ("human", "gpt")[i % 2] for i, message in enumerate(messages)):
            raise InputError(f"{where}: human and gpt should take turns")
        turns = [(ask["value"], answer["value"]) for ask, answer in zip(messages[::2], messages[1::2])]
        if not turns:
            raise InputError(f"{where}: conversations without a question and its answer")
        return self.sample([images] if isinstance(images, str) else images, turns, str(record.get("id", index)), where)

    def sample(self, images, turns, name, where):
        """A Sample, once there is a picture for every mark, and in the folder."""
        if not isinstance(images, list) or not all(isinstance(image, str) and "\0" not in image for image in images):
            raise InputError(f"{where}: image should be a file name or a list of them")
        marks = sum(text.count(MARK) for turn in turns for text in turn)
        if marks != len(images):
            raise InputError(f"{where}: {marks} {MARK} marks but {len(images)} images")
        paths = [os.path.normpath(os.path.join(self.image_dir, image)) for image in images]
        for path in paths:
            self.check_inside(path, self.image_dir, where)
        return Sample(paths, turns, name)

    def check_inside(self, path, folder, where):
        if os.path.commonpath([path, folder]) != folder:
            raise InputError(f"{where}: the image path {path} leaves the image folder {self.image_dir}")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        for path in sample.images:                                   # a link may lead out of the folder, too
            self.check_inside(os.path.realpath(path), os.path.realpath(self.image_dir), f"sample {sample.id}")
        return sample

    def length(self, index):
        """About how long a sample is, in characters; a picture counts as 2000."""
        images, turns, _ = self.samples[index]
        return sum(len(text) for turn in turns for text in turn) + 2000 * len(images)


class ShikraData(LlavaData):
    """Shikra's JSONL: {"img_path", "expression", "bbox": [x1, y1, x2, y2] in pixels, "height", "width"}. Task "rec"
    (comprehension): expression -> box; "reg" (generation): box -> expression. The index chooses the question."""
    QUESTIONS = {
        "rec": ("Where is <expr>? Answer with the box [x1,y1,x2,y2].", "Give the coordinates of <expr> in the picture.",
                "Please find <expr> and tell me its box.", "Which region shows <expr>? Answer with a box."),
        "reg": ("What is in the box <boxes>? Tell it from everything else.", "Describe the region <boxes>.",
                "Give a phrase that means only the object at <boxes>.", "Which object does the box <boxes> show?")}

    def __init__(self, path, image_dir, task="rec"):
        if task not in self.QUESTIONS:
            raise InputError(f"no task {task!r} in Shikra's data: rec or reg")
        self.task = task
        super().__init__(path, image_dir)

    def parse(self, record, where, index):
        image, expression, box, width, height = map(record.get, ("img_path", "expression", "bbox", "width", "height"))
        if not isinstance(expression, str):
            raise InputError(f"{where}: needs an expression")
        numbers = [width, height, *box] if isinstance(box, list) and len(box) == 4 else [None]
        if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers) or min(width, height) < 1:
            raise InputError(f"{where}: needs width and height in pixels, and a bbox of four numbers")
        if not (0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height):
            raise InputError(f"{where}: bbox {box} is not x1, y1, x2, y2 inside a picture of {width}x{height} pixels")
        text = format_box(pad_box(box, int(width), int(height)))
        question = self.QUESTIONS[self.task][index % 4].replace("<expr>", expression).replace("<boxes>", text)
        turns = [(f"{MARK}\n{question}", text if self.task == "rec" else expression)]
        return self.sample([image], turns, f"{image}#{index}", where)


# --- 5. Batches and the loader --------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Padded on the right. A picture is tokens_per_image times IMAGE in `tokens`: shapes are known before the model
    runs. Where no sample is left, one row of one unsupervised token stands in, for a forward that adds nothing."""
    pixels: torch.Tensor                                             # (I, 3, R, R) uint8, in the order of the marks
    tokens: torch.Tensor                                             # (B, T); padding is 0
    labels: torch.Tensor                                             # (B, T); tokens where supervised, else IGNORE
    positions: torch.Tensor                                          # (B, T); 0, 1, 2, ...
    ids: list                                                        # the samples' names, B of them (0 for a stand-in)
    skipped: list                                                    # (id, InputError) of the samples left out


class Batches(torch.utils.data.Dataset):
    """batches[indices] -> Batch: what a worker does. Errors travel as values in `skipped`, since one that is raised in
    a worker arrives as a traceback of many lines."""

    def __init__(self, dataset, tokenizer, template, spec, tokens_per_image, max_length):
        self.dataset, self.tokenizer, self.template, self.spec = dataset, tokenizer, template, spec
        self.tokens_per_image, self.max_length = tokens_per_image, max_length

    def __getitem__(self, indices):
        examples, skipped = [], []                                   # an example: id, tokens, labels, pictures
        for index in indices:
            name = f"sample {index}"
            try:
                images, turns, name = self.dataset[index]
                examples.append((name, *self.example(images, turns)))
            except InputError as error:
                skipped.append((name, error))
        return collate(examples, skipped, self.spec.size)

    def example(self, images, turns):
        """A sample -> tokens and labels, pictures expanded, and the pictures' pixels."""
        ids, labels = encode(self.tokenizer, turns, self.template)
        ids, labels = cut_to_length(ids, labels, self.max_length, self.tokens_per_image)
        if all(label == IGNORE for label in labels):
            raise NothingToLearn("no supervised token: " + ("its answers are empty" if ids else
                                 f"not even the first turn fits into {self.max_length} tokens"))
        repeats = [self.tokens_per_image if token == IMAGE else 1 for token in ids]
        images = images[:ids.count(IMAGE)]                           # turns that were cut off may have had pictures
        images = [open_image(image) if isinstance(image, (str, Path)) else image for image in images]
        return ([token for token, times in zip(ids, repeats) for _ in range(times)],
                [label for label, times in zip(labels, repeats) for _ in range(times)],
                [to_pixels(image, self.spec) for image in images])


def collate(examples, skipped, size):
    """[(id, tokens, labels, pictures), ...] -> Batch."""
    length = max((len(tokens) for _, tokens, _, _ in examples), default=1)
    batch_tokens = torch.zeros(max(len(examples), 1), length, dtype=torch.long)      # (B, T)
    batch_labels = torch.full_like(batch_tokens, IGNORE)
    for row, (_, tokens, labels, _) in enumerate(examples):
        batch_tokens[row, :len(tokens)] = torch.tensor(tokens)
        batch_labels[row, :len(labels)] = torch.tensor(labels)
    pixels = [picture for _, _, _, pictures in examples for picture in pictures]
    return Batch(torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size, dtype=torch.uint8), batch_tokens,
                 batch_labels, torch.arange(length).expand_as(batch_tokens), [name for name, *_ in examples], skipped)


def order(n, seed, epoch, lengths=None, global_batch=1, window=16):
    """The order in which an epoch visits samples 0..n-1: a pure function of its arguments. Shuffled; then, given
    lengths, every `window` global batches are sorted by length and cut into batches of alike samples (less padding),
    and the batches are shuffled. A last batch that is not full stays last, so that the others stay whole."""
    generator = np.random.default_rng([seed, epoch])
    indices = generator.permutation(n).tolist()
    if lengths is None:
        return indices
    batches = []
    for i in range(0, n, window * global_batch):
        alike = sorted(indices[i:i + window * global_batch], key=lengths.__getitem__)
        batches += [alike[j:j + global_batch] for j in range(0, len(alike), global_batch)]
    last = batches.pop() if n % global_batch else []
    return [index for i in generator.permutation(len(batches)) for index in batches[i]] + last


def lengths_of(dataset):
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    return [part.length(i) for part in parts for i in range(len(part))]


class Loader:
    """Iterating yields, for every optimizer step and without end, the list of this rank's micro-batches. The samples of
    all epochs are one stream; step k of a run takes the global_batch samples from start + k * global_batch on, rank r
    every world_size-th of them. So a run continues at any sample, and workers change nothing but the speed.

    A sample with a bad picture, or with nothing to learn from, leaves a gap in its batch. `skipped` names them ({id:
    InputError}), `seen` counts all samples. Bad pictures stop the run when they are more than three and more than 1% of
    the samples seen (taken as 1000 at the least, and as the whole dataset at the most); so does a dataset of which no
    sample is left."""

    def __init__(self, dataset, tokenizer, template, spec, tokens_per_image, max_length, global_batch, micro_batch,
                 seed=0, rank=0, world_size=1, workers=0, start=0):
        self.batches = Batches(dataset, tokenizer, template, spec, tokens_per_image, max_length)
        self.global_batch, self.micro_batch, self.seed, self.start = global_batch, micro_batch, seed, start
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.lengths = lengths_of(dataset)
        self.forwards = math.ceil(math.ceil(global_batch / world_size) / micro_batch)    # a step, on every rank
        self.seen, self.skipped = 0, {}                              # by this rank

    def stream(self):
        epoch, offset = divmod(self.start, len(self.lengths))
        while True:
            yield from order(len(self.lengths), self.seed, epoch, self.lengths, self.global_batch)[offset:]
            epoch, offset = epoch + 1, 0

    def micro_batches(self):
        stream = self.stream()
        while True:
            mine = [next(stream) for _ in range(self.global_batch)][self.rank::self.world_size]
            for i in range(self.forwards):
                yield mine[i * self.micro_batch:(i + 1) * self.micro_batch]

    def __iter__(self):
        own = torch.Generator()                                      # leaves the run's random state untouched
        step = []
        for batch in DataLoader(self.batches, sampler=self.micro_batches(), batch_size=None, num_workers=self.workers,
                                generator=own):
            self.count(batch)
            step.append(batch)
            if len(step) == self.forwards:
                yield step
                step = []

    def count(self, batch):
        self.seen += len(batch.ids) + len(batch.skipped)
        for name, error in batch.skipped:
            if not isinstance(error, (BadImage, NothingToLearn)):
                raise error
            self.skipped[name] = error
        bad = [f"{name} ({error})" for name, error in self.skipped.items() if isinstance(error, BadImage)]
        if len(bad) > max(3, 0.01 * min(max(self.seen, 1000), len(self.lengths))):
            raise InputError(f"{len(bad)} samples with bad images, more than 1% of those seen; the last ones: "
                             f"{'; '.join(bad[-3:])}")
        if len(self.skipped) == len(self.lengths):
            name, error = list(self.skipped.items())[-1]
            raise InputError(f"no sample of the dataset can be learnt from; the last one: {name} ({error})")

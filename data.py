"""Datasets, batches and the loader: from files to what the model is fed.

    dataset[i]  Sample(images, turns, id)     LLaVA's JSON, Shikra's JSONL, or the embedded world (world.py)
      |  encode (dialogue.py), to_pixels (images.py)
    Batch       pixels (I, 3, R, R), tokens (1, T), labels (1, T), lengths, shown, ids, skipped
      |  Loader                               order from (seed, epoch, rank), grouped by length, from any sample on
    the micro-batches of a step, for this rank

Formats: LLaVA's (arXiv 2304.08485, 2310.03744) and Shikra's (arXiv 2306.15195).
"""
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader

from dialogue import IGNORE, IMAGE, MARK, cut_to_length, encode
from hub import InputError
from images import BadImage, format_box, open_image, pad_box, to_pixels, upright_size


class Sample(NamedTuple):
    images: list                                                     # one a mark: path, PIL image or uint8 (H, W, 3)
    turns: list                                                      # (question, answer), in order
    id: str                                                          # names the sample in messages


HALF = re.compile("[\ud800-\udfff]")                                 # a surrogate alone: JSON can hold it, no tokenizer takes it


class NothingToLearn(InputError):
    """A sample without a supervised token. The loader skips it."""


# --- Datasets: dataset[i] -> (images, turns, id), dataset.length(i) ------------------------------------------------

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
            if not array and is_json(text):
                raise InputError(f"{path}: is one JSON object; a list of samples is read, or JSONL, an object a line") from None
            raise InputError(f"{path}: not JSON, line {number + error.lineno - 1}: {error.msg}") from None
        except (ValueError, RecursionError) as error:                # a number of thousands of digits, or lists in lists in ...
            raise InputError(f"{path}: cannot be read as JSON, line {number} ({error})") from None
    if array:
        records = [(f"{path}, sample {i}", record) for i, record in enumerate(records[0][1])]
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where}: should be an object, is a {type(record).__name__}")
    if not records:
        raise InputError(f"{path}: holds no samples")
    return records


def is_json(text):
    try:
        json.loads(text)
        return True
    except (ValueError, RecursionError):
        return False


class Samples:
    """A list of Samples, kept as JSON in one row of bytes. As Python's objects they would take several times as much, and forked
    workers, who count references in what they read, would come to hold a copy each."""

    def __init__(self, samples):
        self.text, ends = bytearray(), [0]
        for sample in samples:
            self.text += json.dumps(sample).encode()
            ends.append(len(self.text))
        self.ends = np.array(ends)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]                              # IndexError where there is none
        images, turns, name = json.loads(self.text[self.ends[index]:self.ends[index + 1]])
        return Sample(images, [tuple(turn) for turn in turns], name)


class LlavaData:
    """LLaVA's format: {"id", "image": a name or a list of names (none: text only), "conversations": [{"from": "human"
    or "gpt", "value"}, ...]}. An answer before the first question is dropped, as in LLaVA; so is a question after the
    last answer. In a dialogue without pictures '<image>' may be text, but not at a message's start or end. The whole file is
    checked at once: a run should not break on its last sample."""

    def __init__(self, path, image_dir):
        self.image_dir = os.path.abspath(image_dir)
        folders = set()
        self.samples = Samples(self.parsed(path, folders))
        if folders and not os.path.isdir(image_dir):
            raise InputError(f"{image_dir}: no such folder; the pictures of {path} should be in it")
        for folder in folders:
            if not self.is_inside(os.path.realpath(folder), os.path.realpath(image_dir)):
                raise InputError(f"{folder}: is a link out of the image folder {self.image_dir}, which may only hold what lies in it: "
                                 "move the pictures there (or mount them), or let --image_dir name the folder that holds them all")

    def parsed(self, path, folders):
        """Yield the file's samples; put the folders of their pictures into `folders`."""
        records = read_records(path)[::-1]
        for index in range(len(records)):
            where, record = records.pop()                            # what is done with is let go
            sample = self.parse(record, where, index)
            folders.update(map(os.path.dirname, sample.images))
            yield sample

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
            if HALF.search(message["value"]):
                raise InputError(f"{where}: holds half of a character (a lone surrogate, as of an emoji that was cut)")
        messages = messages[1:] if messages[0]["from"] == "gpt" else messages
        if any(message["from"] != ("human", "gpt")[i % 2] for i, message in enumerate(messages)):
            raise InputError(f"{where}: human and gpt should take turns")
        turns = [(ask["value"], answer["value"]) for ask, answer in zip(messages[::2], messages[1::2])]
        if not turns:                                                # nothing to learn from, which the loader will say
            images = []
        return self.sample([images] if isinstance(images, str) else images, turns, str(record.get("id", index)), where)

    def sample(self, images, turns, name, where):
        """A Sample, once there is a picture for every mark, and in the folder."""
        if not isinstance(images, list) or not all(isinstance(image, str) and "\0" not in image for image in images):
            raise InputError(f"{where}: image should be a file name or a list of them")
        texts = [text.strip() for turn in turns for text in turn]
        marks = sum(text.count(MARK) for text in texts)
        if marks != len(images) and (images or any(text.startswith(MARK) or text.endswith(MARK) for text in texts)):
            raise InputError(f"{where}: {marks} {MARK} marks but {len(images)} images")
        paths = [os.path.normpath(os.path.join(self.image_dir, image)) for image in images]
        for path, image in zip(paths, images):
            if path == self.image_dir:
                raise InputError(f"{where}: {image!r} is no picture's name")
            if not self.is_inside(path, self.image_dir):
                raise InputError(f"{where}: the image path {path} leaves the image folder {self.image_dir}")
        return Sample(paths, turns, name)

    def is_inside(self, path, folder):
        return os.path.commonpath([path, folder]) == folder

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        for path in sample.images:                                   # a link may lead out of the folder, too
            if not self.is_inside(os.path.realpath(path), os.path.realpath(self.image_dir)):
                raise BadImage(f"{sample.id}: {path} is a link out of the image folder {self.image_dir}")
        return sample

    def length(self, index):
        """About how long a sample is, in characters; a picture counts as 2000."""
        images, turns, _ = self.samples[index]
        return sum(len(text) for turn in turns for text in turn) + 2000 * len(images)


def shikra_fields(record, where):
    """Shikra's {"img_path", "expression", "bbox": [x1, y1, x2, y2] in pixels, "width", "height"} -> those five, checked. What of a
    box is outside its picture, as in some of Visual Genome's, is cut off."""
    image, expression, box, width, height = map(record.get, ("img_path", "expression", "bbox", "width", "height"))
    if not isinstance(image, str) or not isinstance(expression, str):
        raise InputError(f"{where}: needs img_path, the name of a picture, and an expression")
    numbers = [width, height, *box] if isinstance(box, list) and len(box) == 4 else [None]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers) or min(width, height) < 1:
        raise InputError(f"{where}: needs width and height in pixels, and a bbox of four numbers")
    if not (box[0] <= box[2] and box[1] <= box[3] and box[0] <= width and box[1] <= height and box[2] >= 0 and box[3] >= 0):
        raise InputError(f"{where}: bbox {box} is not x1, y1, x2, y2 inside a picture of {width}x{height} pixels")
    if max(box) <= 1 and any(value % 1 for value in box):
        raise InputError(f"{where}: bbox {box} is in shares of the picture; Shikra's are in pixels")
    box = [min(max(value, 0), most) for value, most in zip(box, (width, height) * 2)]
    return image, expression, box, int(width), int(height)


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
        self.task, self.sides = task, []                             # of every picture: width, height
        super().__init__(path, image_dir)

    def parse(self, record, where, index):
        image, expression, box, width, height = shikra_fields(record, where)
        text = format_box(pad_box(box, width, height))
        question = self.QUESTIONS[self.task][index % 4].replace("<expr>", expression).replace("<boxes>", text)
        turns = [(f"{MARK}\n{question}", text if self.task == "rec" else expression)]
        self.sides.append((width, height))
        return self.sample([image], turns, f"{image}#{index}", where)

    def __getitem__(self, index):
        sample, (width, height) = super().__getitem__(index), self.sides[index]
        shown = upright_size(sample.images[0])                       # None: cannot be read, which is told when it is opened
        if shown and abs(shown[0] * height - shown[1] * width) > 0.02 * shown[0] * height:
            raise BadImage(f"{sample.images[0]}: is {shown[0]}x{shown[1]} upright, its boxes are of {width}x{height}")
        return sample


# --- Batches and the loader --------------------------------------------------------------------------------------

@dataclass
class Batch:
    """B dialogues packed into one row, one behind the other: T is the sum of their lengths, nothing is padded. A picture is
    tokens_per_image times IMAGE in `tokens`: shapes are known before the model runs. Where no sample is left, one
    unsupervised token stands in, for a forward that adds nothing."""
    pixels: torch.Tensor                                             # (I, 3, R, R) uint8; a file that is shown twice is here once
    tokens: torch.Tensor                                             # (1, T)
    labels: torch.Tensor                                             # (1, T); tokens where supervised, else IGNORE
    lengths: list                                                    # in tokens, of every dialogue
    shown: torch.Tensor                                              # (marks,); which of the I pictures each mark shows
    ids: list                                                        # the samples' names, B of them (0 for a stand-in)
    skipped: list                                                    # (index, id, InputError) of the samples left out


class Batches(torch.utils.data.Dataset):
    """batches[indices] -> Batch: what a worker does. Errors travel as values in `skipped`, since one that is raised in
    a worker arrives as a traceback of many lines."""

    def __init__(self, dataset, tokenizer, template, spec, tokens_per_image, max_length):
        self.dataset, self.tokenizer, self.template, self.spec = dataset, tokenizer, template, spec
        self.tokens_per_image, self.max_length = tokens_per_image, max_length

    def __getitem__(self, indices):
        examples, skipped, opened = [], [], {}                       # an example: id, tokens, labels, pictures
        for index in indices:
            name = f"sample {index}"
            try:
                images, turns, name = self.dataset[index]
                examples.append((name, *self.example(images, turns, opened)))
            except InputError as error:
                skipped.append((index, name, error))
        return collate(examples, skipped, self.spec.size)

    def example(self, images, turns, opened):
        """A sample -> tokens and labels, pictures expanded, and the pictures' pixels. opened: {file: its pixels} of this
        batch, so that a file is decoded once."""
        ids, labels = encode(self.tokenizer, turns, self.template, pictures=bool(images))
        ids, labels = cut_to_length(ids, labels, self.max_length, self.tokens_per_image)
        if all(label == IGNORE for label in labels):
            raise NothingToLearn("no supervised token: " + ("its answers are empty" if ids or not turns else
                                 f"not even the first turn fits into {self.max_length} tokens"))
        repeats = [self.tokens_per_image if token == IMAGE else 1 for token in ids]
        images = images[:ids.count(IMAGE)]                           # turns that were cut off may have had pictures
        for image in images:
            if isinstance(image, (str, Path)) and image not in opened:
                opened[image] = to_pixels(open_image(image), self.spec)
        return ([token for token, times in zip(ids, repeats) for _ in range(times)],
                [label for label, times in zip(labels, repeats) for _ in range(times)],
                [opened[image] if isinstance(image, (str, Path)) else to_pixels(image, self.spec) for image in images])


def collate(examples, skipped, size):
    """[(id, tokens, labels, pictures), ...] -> Batch."""
    names, tokens, labels, pictures = zip(*examples) if examples else ([], [[0]], [[IGNORE]], [])
    pictures = [picture for of_one in pictures for picture in of_one]
    distinct = {id(picture): picture for picture in pictures}        # the same tensor twice is the same file
    places = {key: place for place, key in enumerate(distinct)}
    return Batch(torch.stack([*distinct.values()]) if distinct else torch.zeros(0, 3, size, size, dtype=torch.uint8),
                 torch.tensor([token for row in tokens for token in row])[None],
                 # the first token of a dialogue is predicted by none: before it stands the last one of another
                 torch.tensor([label for row in labels for label in [IGNORE, *row[1:]]])[None],
                 [len(row) for row in tokens], torch.tensor([places[id(picture)] for picture in pictures], dtype=torch.long),
                 list(names), skipped)


def order(n, seed, epoch, lengths=None, global_batch=1, window=16):
    """The order in which an epoch visits samples 0..n-1: a pure function of its arguments. Shuffled; then, given
    lengths, every `window` global batches are sorted by length and cut into batches of alike samples (micro-batches and
    ranks then have as much to do), and the batches are shuffled. A last batch that is not full stays last, and the next
    epoch begins with what fills it, so that the others stay whole."""
    generator = np.random.default_rng([seed, epoch])
    indices = generator.permutation(n).tolist()
    if lengths is None:
        return indices
    fill, batches = -epoch * n % global_batch, []
    first, indices = indices[:fill], indices[fill:]
    n = len(indices)
    for i in range(0, n, window * global_batch):
        alike = sorted(indices[i:i + window * global_batch], key=lengths.__getitem__)
        batches += [alike[j:j + global_batch] for j in range(0, len(alike), global_batch)]
    last = batches.pop() if n % global_batch else []
    return first + [index for i in generator.permutation(len(batches)) for index in batches[i]] + last


def lengths_of(dataset):
    parts = dataset.datasets if isinstance(dataset, ConcatDataset) else [dataset]
    return [part.length(i) for part in parts for i in range(len(part))]


class Loader:
    """Iterating yields, for every optimizer step and without end, the list of this rank's micro-batches. The samples of
    all epochs are one stream; step k of a run takes the global_batch samples from start + k * global_batch on, rank r
    every world_size-th of them. So a run continues at any sample, and workers change nothing but the speed.

    A sample with a bad picture, or with nothing to learn from, leaves a gap in its batch. `skipped` holds them ({index:
    (id, InputError)}), `seen` counts all samples. Bad pictures stop the run when they are more than three and more than 1% of
    the samples that this rank has seen (taken as 20,000 at the least, since those of one source come in clumps, and as the
    whole dataset at the most); so does a dataset of which no sample is left."""

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
        step = []                                                    # forked workers share the samples, and take signals as we do
        how = "fork" if self.workers and sys.platform == "linux" else None
        for batch in DataLoader(self.batches, sampler=self.micro_batches(), batch_size=None, num_workers=self.workers,
                                generator=own, multiprocessing_context=how):
            self.count(batch)
            step.append(batch)
            if len(step) == self.forwards:
                yield step
                step = []

    def count(self, batch):
        self.seen += len(batch.ids) + len(batch.skipped)
        for index, name, error in batch.skipped:
            if not isinstance(error, (BadImage, NothingToLearn)):
                raise error
            self.skipped[index] = name, error                        # ids need not be unique
        bad = [f"{name} ({error})" for name, error in self.skipped.values() if isinstance(error, BadImage)]
        if len(bad) > max(3, 0.01 * min(max(self.seen, 20_000), len(self.lengths))):
            raise InputError(f"{len(bad)} samples with bad images, more than 1% of those seen; the last ones: "
                             f"{'; '.join(bad[-3:])}")
        if len(self.skipped) == len(self.lengths):
            name, error = list(self.skipped.values())[-1]
            raise InputError(f"no sample of the dataset can be learnt from; the last one: {name} ({error})")

"""Turn data files into batches, in an order that is a pure function of the seed.

    dataset[i]         Sample: images, turns, id      LLaVA's JSON, Shikra's JSONL, or the toy world
      |  encode (dialogue.py), prepare (common/images.py)
    batches[[i, j]]    Batch: pixels (I, 3, R, R), tokens (1, T), labels (1, T), lengths, ...
      |  Loader        order from (seed, epoch), starting at any sample
    [Batch, Batch]     the micro-batches of an optimizer step, for this rank

Formats: LLaVA's (arXiv 2304.08485, 2310.03744), and those of COMM's mix (common/mix.py). A new
format is one class and one line in DATASETS, at the end of this file.
"""

import math
import sys
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from common import mix
from common.errors import InputError, printable
from common.images import BadImage, ImageSpec, join, prepare
from common.records import FileData, Sample, llava_fields
from common.shikra import check_size
from common.speed import Movable
from dialogue import IGNORE, IMAGE, cut_to_length, encode, repeats
from llama import pack


@dataclass
class Batch(Movable):
    """B samples packed one behind the other into one row of T tokens, without padding.

    An image is IMAGE for each of its visual tokens, so shapes are known before the model runs.
    If no sample is left, the row is two unsupervised tokens, for a forward pass that adds nothing.
    Black images fill up a batch with fewer than two. With none, DDP would wait for the connector's
    gradient. With one, torch.compile would compile again, as it does for a size of 0 or 1.
    Indices that depend on the values of tokens are made here: on a GPU the host would have to wait.
    """

    pixels: torch.Tensor  # (I, 3, R, R) uint8, all tiles; a file that is used twice is here once
    tokens: torch.Tensor  # (1, T)
    labels: torch.Tensor  # (1, T); the token where it is supervised, else IGNORE
    lengths: list  # in tokens, of each sample
    packed: tuple  # positions, starts and longest: llama.pack
    places: torch.Tensor  # (V,); where the IMAGE tokens are
    image_index: torch.Tensor  # (V,); which of the I * M visual tokens each IMAGE is
    supervised: torch.Tensor  # (n,); where the supervised tokens are
    ids: list  # of the B samples
    skipped: list  # (index, id, InputError) of the samples left out


class NothingToLearn(InputError):
    """A sample without a supervised token. The loader skips it."""


# --- from samples to a batch ---


@dataclass
class Batches:
    """Make the batch of a list of indices. This runs in the workers.

    Errors are values in `skipped`: raised in a worker they would arrive as tracebacks.
    """

    dataset: Dataset
    tokenizer: Tokenizer
    template: str
    spec: ImageSpec
    tokens_per_image: int  # M; with AnyRes, of a tile
    max_length: int

    def __getitem__(self, indices):
        examples, skipped = [], []
        images = {}  # {key: Prepared}; a file's name is its key, so it is decoded once
        for index in indices:
            name = f"sample {index}"
            try:
                sample = self.dataset[index]
                name = sample.id
                examples.append(self.example(sample, images))
            except InputError as error:
                skipped.append((index, name, error))
        return collate(examples, skipped, images, self.spec, self.tokens_per_image)

    def example(self, sample, images):
        """Encode a sample -> its id, a row of tokens and one of labels (2, T), keys of its images.

        Adds its images to those of the batch so far.
        """
        ids, labels = encode(
            self.tokenizer, sample.turns, self.template, bool(sample.images), system=sample.system
        )
        keys = []
        for image in sample.images:
            # an image in memory is named by a number
            key = image if isinstance(image, str) else len(images)
            if key not in images:
                images[key] = prepare(image, self.spec, self.tokens_per_image)
            if sample.size:
                check_size(key, images[key].size, sample.size)
            keys.append(key)
        image_tokens = [len(images[key].rows) for key in keys]
        ids, labels = cut_to_length(ids, labels, self.max_length, image_tokens)
        if set(labels) <= {IGNORE}:
            raise NothingToLearn(f"no answer in the turns that fit into {self.max_length} tokens")
        row = np.repeat([ids, labels], repeats(ids, image_tokens), axis=1)
        # turns that were cut off may have had images
        return sample.id, row, keys[: ids.count(IMAGE)]


def collate(examples, skipped, images, spec, num_tokens):
    """Pack examples [(id, tokens and labels (2, T), keys of images), ...] into a Batch."""
    ids, rows, keys = zip(*examples, strict=True) if examples else ([], [], [])
    # an image whose sample was skipped is left out
    pixels, image_index = join(images, sum(keys, []), spec, num_tokens)
    blank = pixels.new_zeros(max(0, 2 - len(pixels)), *pixels.shape[1:])
    rows = rows or [np.array([[0, 0], [IGNORE, IGNORE]])]
    for row in rows:
        # nothing predicts the first token: the one before it belongs to another sample
        row[1, 0] = IGNORE
    tokens, labels = torch.from_numpy(np.concatenate(rows, axis=1))[:, None]  # (1, T) each
    lengths = [row.shape[1] for row in rows]
    return Batch(
        pixels=torch.cat([pixels, blank]),
        tokens=tokens,
        labels=labels,
        lengths=lengths,
        packed=pack(lengths),
        places=(tokens[0] == IMAGE).nonzero()[:, 0],
        image_index=image_index,
        supervised=(labels[0] != IGNORE).nonzero()[:, 0],
        ids=list(ids),
        skipped=skipped,
    )


# --- the order of the samples ---


def order(lengths, seed, epoch, global_batch):
    """Order the samples of an epoch: a pure function of its arguments -> list of their indices.

    1. Shuffle the samples.
    2. Sort every 16 global batches by length and cut them into batches of similar samples, so
       that micro-batches and ranks have equal work.
    3. Shuffle these batches. A last batch that is not full stays last. The next epoch begins with
       the samples that fill it.
    """
    generator = np.random.default_rng([seed, epoch])
    indices = generator.permutation(len(lengths))
    # what the last batch of the former epoch left to fill
    first, indices = np.split(indices, [(-epoch * len(lengths)) % global_batch])
    windows = np.arange(len(indices)) // (16 * global_batch)
    indices = indices[np.lexsort((np.take(lengths, indices), windows))]
    batches, last = np.split(indices, [len(indices) // global_batch * global_batch])
    batches = batches.reshape(-1, global_batch)
    batches = batches[generator.permutation(len(batches))]
    return np.concatenate([first, batches.flatten(), last]).tolist()


@dataclass
class Loader(Batches):
    """Yield the micro-batches of this rank, a list for each optimizer step, without end.

    The epochs follow each other without a gap. Step k takes the global_batch samples from
    start + k * global_batch on, and rank r takes every world_size-th of them. So a run continues at
    any sample, and the number of workers changes nothing but the speed.

    A sample with a bad image, or with nothing to learn from, leaves a gap in its batch. `skipped`
    has them all, {index: (id, InputError)}; `seen` counts this rank's samples. Raises InputError if
    too many images are bad.
    """

    global_batch: int
    micro_batch: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    start: int = 0

    def __post_init__(self):
        self.lengths = []
        # a ConcatDataset has a part for each file of --data1
        for part in getattr(self.dataset, "datasets", [self.dataset]):
            self.lengths += [part.length(i) for i in range(len(part))]
        # forward passes per step, the same number on every rank
        self.forwards = math.ceil(math.ceil(self.global_batch / self.world_size) / self.micro_batch)
        self.seen, self.skipped = 0, {}

    def all_indices(self):
        """Yield the index of one sample after another, epoch after epoch."""
        epoch, offset = divmod(self.start, len(self.lengths))
        while True:
            yield from order(self.lengths, self.seed, epoch, self.global_batch)[offset:]
            epoch, offset = epoch + 1, 0

    def micro_batches(self):
        """Yield the indices of one micro-batch of this rank after another."""
        indices = self.all_indices()
        while True:
            step = list(islice(indices, self.global_batch))[self.rank :: self.world_size]
            # The longest samples are last. They run first, while no gradients are in memory. Within
            # a micro-batch the order stays.
            step.reverse()
            for i in range(self.forwards):
                yield step[i * self.micro_batch : (i + 1) * self.micro_batch][::-1]

    def __iter__(self):
        loading = DataLoader(
            self,
            # yields lists of indices: self[list] is a whole batch
            sampler=self.micro_batches(),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # leaves the run's random state alone
            generator=torch.Generator(),
            # forked workers share the samples' memory
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )
        batches = iter(loading)
        while True:
            step = list(islice(batches, self.forwards))
            for batch in step:
                self.count(batch)
            yield step

    def count(self, batch):
        """Count the samples of a batch and name those left out. Raises InputError for bad images.

        At most three bad images or 1% of the samples seen are allowed. Bad images come in clumps,
        so at least 20,000 samples count as seen, or the whole dataset if it is smaller.
        """
        self.seen += len(batch.ids) + len(batch.skipped)
        for index, name, error in batch.skipped:
            # neither a BadImage nor NothingToLearn
            if type(error) is InputError:
                raise error
            if index not in self.skipped:
                print(f"skipped {name}: {error}", file=sys.stderr)
            self.skipped[index] = name, error
        bad = [pair for pair in self.skipped.values() if isinstance(pair[1], BadImage)]
        if len(bad) > max(3, 0.01 * min(max(self.seen, 20_000), len(self.lengths))):
            name, error = bad[-1]
            raise InputError(f"{len(bad)} bad images, more than 1%; the last: {name} ({error})")


# --- datasets: len(dataset), dataset[i] -> Sample, dataset.length(i), dataset.num_with_images ---


class LlavaData(FileData):
    """{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}.

    LLaVA's format, a JSON array or JSONL; the whole file is checked at once. "image" is a name or a
    list of names, or none. Also read: "images", "messages", "role", "content", the roles user,
    assistant and system. In a dialogue without images "<image>" may be text, but not at a message's
    start or end. Raises InputError, also where an image is outside image_dir.
    """

    def parse(self, record, where, index):
        images, turns, system = llava_fields(record, self.image_dir, where)
        return Sample(images, turns, printable(record.get("id", index)), system)


# --data1=KIND:FILE; without KIND: llava
DATASETS = {
    "llava": LlavaData,
    "rec": mix.Comprehension,
    "reg": mix.Generation,
    "vqa": mix.VQA,
    "caption": mix.Captions,
    "v7w": mix.Visual7W,
    "rd": mix.ShikraRD,
}

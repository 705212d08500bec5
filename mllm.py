"""The multimodal LLM: vision towers, a connector, and an LLM that reads the image as tokens.

LLaVA's design (arXiv 2304.08485), with the towers and connectors of COMM (2310.08825) and of the
Dense Connector (2405.13800). I images in the batch, M visual tokens an image:

    pixels (I, 3, R, R) uint8          one tensor for all towers
      | each tower, no deeper than the connector reads              vit.py, dinov2.py, clip.py
    hidden states of the patches, (I, N, D) each
      | connector                                                   connector.py
    visual tokens (I, M, C)
      | take the places of the IMAGE ids in the text's embeddings
    embeddings (B, T, C)               in training (1, T, C): the dialogues one behind the other
      | LLM                                                         llama.py
    logits (n, V) at the n supervised positions -> sum of their cross-entropies

A trained model is one folder: config.json (towers, connector, LLM, template), model.safetensors,
tokenizer.json and preprocessor_config.json.
"""

from dataclasses import replace
from itertools import takewhile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from common import anyres, layouts
from common.errors import InputError
from common.images import ImageSpec, join, prepare
from common.pretrained import (
    Pretrained,
    check_tokens,
    load_part,
    locate,
    read_parts,
    read_processor,
)
from common.save import save_mllm
from common.speed import sum_in_parts
from connector import Tower, make_connector
from dialogue import IMAGE, MARK, encode, end_ids, find_template, load_tokenizer, repeats

# class, imported when it is needed -> the model_types of its checkpoints
TOWERS = {
    "clip.CLIPVision": layouts.CLIP,
    "clip.SigLIPVision": layouts.SIGLIP,
    "dinov2.DINOv2": layouts.DINOV2,
    "vit.ViT": layouts.VIT,
    "interop.convnext.ConvNeXt": layouts.CONVNEXT,
}
LLMS = {"llama.Llama": layouts.LLAMA, "interop.phi.Phi": ["phi"]}


class MLLM(Pretrained):
    """Towers, connector and LLM in one: images and tokens go in, a loss or a text comes out."""

    def __init__(self, towers, llm, connector, tokenizer, template, spec):
        """Join the parts; the connector is new.

        towers: vision towers; llm: a Llama or Phi; connector: a name or a spec (connector.py);
        template: a name in dialogue.TEMPLATES; spec: ImageSpec, the side R and how an image is
        brought to it. Raises InputError where the parts do not fit.
        """
        super().__init__()
        shapes = [Tower(*tower.shape(spec.size)) for tower in towers]
        self.vision = nn.ModuleList(towers)
        self.connector = make_connector(connector, shapes, llm.config.hidden_size)
        for tower in towers:
            tower.crops = self.connector.crops
            tower.check_size(spec.size)
        if spec.mode == "anyres":
            anyres.add_newline(self.connector, llm.config.hidden_size)
        self.llm = llm
        self.tokenizer = tokenizer
        self.template = template
        self.spec = spec
        self.tokens_per_image = self.connector.num_tokens  # M

    # ---- forward ---------------------------------------------------------------------------------

    def see(self, pixels):
        """Turn pixels uint8 (I, 3, R, R) into visual tokens (I, M, C)."""
        hidden = []
        for tower, layers in zip(self.vision, self.connector.layers, strict=True):
            states = tower(pixels, layers)  # (I, S, D) each
            hidden.append([x[:, tower.num_prefix_tokens :] for x in states])  # (I, N, D) each
        return self.connector(hidden)

    def embed(self, tokens, pixels, image_index=None, places=None):
        """Embed text and images: tokens (B, T), pixels (I, 3, R, R) -> (B, T, C).

        Each IMAGE in `tokens` is the place of a visual token. image_index (V,): which of the I * M
        visual tokens each one is; default: all, in their order. places (V,): where they are among
        the B * T tokens. To find them here, the host has to wait for a GPU.
        """
        is_image = tokens == IMAGE  # (B, T)
        embeds = self.llm.embed(tokens.masked_fill(is_image, 0))  # (B, T, C)
        if len(pixels) == 0:
            return embeds
        visual = self.see(pixels).flatten(0, 1)  # (I * M, C)
        if image_index is not None:
            visual = visual[image_index]  # (V, C)
        if places is None:
            places = is_image.flatten().nonzero()[:, 0]
        rows = embeds.flatten(0, 1).index_copy(0, places, visual.to(embeds.dtype))  # (B * T, C)
        return rows.view_as(embeds)

    def forward(self, batch):
        """Return the sum of the cross-entropies of a data.Batch, which comes from the CPU.

        The caller divides by the number of supervised tokens in the whole global batch, so the loss
        does not depend on micro-batches or ranks.
        """
        check_tokens(self.llm.config, batch.tokens)
        batch = batch.to(self.llm.embed_tokens.weight.device)
        embeds = self.embed(batch.tokens, batch.pixels, batch.image_index, batch.places)
        hidden = self.llm(embeds=embeds, packed=batch.packed, hidden_only=True)  # (1, T, C)
        # A token is predicted from the one before it. Only supervised tokens need logits.
        hidden = hidden[0, batch.supervised - 1]  # (n, C)
        targets = batch.tokens[0, batch.supervised]  # (n,)
        return sum_in_parts(self.cross_entropy, hidden, targets, self.llm.config.vocab_size)

    def cross_entropy(self, hidden, targets):
        """Sum the cross-entropies of hidden (n, C) against targets (n,), in float32."""
        return F.cross_entropy(self.llm.logits(hidden).float(), targets, reduction="sum")

    # ---- generation ------------------------------------------------------------------------------

    def prompt(self, images, turns):
        """Prepare a prompt -> pixels (I, 3, R, R), token ids, image_index: see embed.

        images: PIL, uint8 arrays (H, W, 3), or files. turns: [(question, answer), ...], the last
        answer None. Images without an <image> in the text come before the first question.
        """
        num_marks = sum(text.count(MARK) for turn in turns for text in turn if text)
        if num_marks > len(images):
            raise InputError(f"{num_marks} {MARK} marks for {len(images)} images")
        question, answer = turns[0]
        turns = [(f"{MARK}\n" * (len(images) - num_marks) + question, answer), *turns[1:]]
        ids, _ = encode(self.tokenizer, turns, self.template)
        images = [prepare(image, self.spec, self.tokens_per_image) for image in images]
        ids = np.repeat(ids, repeats(ids, [len(image.rows) for image in images]))
        check_tokens(self.llm.config, ids)
        pixels, image_index = join(images, range(len(images)), self.spec, self.tokens_per_image)
        return pixels, ids.tolist(), image_index

    def end_ids(self):
        """Return the ids that end an answer: the template's, and those of the LLM's checkpoint."""
        ids = self.llm.config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return sorted({*end_ids(self.tokenizer, self.template), *ids} - {None})

    @torch.no_grad()
    def stream(self, images, prompts, max_new_tokens=256, **sampling):
        """Yield the next token ids, (B,) a step; a row that has ended repeats the end token.

        The arguments and errors are those of `generate`.
        """
        pixels, rows, image_index, num_visual = [], [], [], 0
        for image, prompt in zip(images, prompts, strict=True):
            if not isinstance(image, list | tuple):
                image = [] if image is None else [image]
            turns = [(prompt, None)] if isinstance(prompt, str) else prompt
            row_pixels, row, row_index = self.prompt(image, turns)
            pixels.append(row_pixels)
            rows.append(torch.tensor(row))
            image_index.append(row_index + num_visual)
            num_visual += len(row_pixels) * self.tokens_per_image
        device = self.llm.embed_tokens.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        tokens = pad_sequence(rows, batch_first=True).to(device)
        pixels, image_index = torch.cat(pixels).to(device), torch.cat(image_index).to(device)
        embeds = self.embed(tokens, pixels, image_index)
        sampling |= {"max_new_tokens": max_new_tokens, "eos": self.end_ids()}
        yield from self.llm.stream(embeds=embeds, lengths=lengths, **sampling)

    def generate(self, images, prompts, max_new_tokens=256, **sampling):
        """Answer prompts about images -> list of str; or one prompt about one image -> str.

        images: for each prompt an image (PIL, uint8 (H, W, 3), or a file), a list of them, or None.
        prompts: texts, or dialogues [(question, answer), ..., (question, None)].
        sampling: temperature=0 (greedy), top_k, top_p, generator. Raises InputError.
        """
        if isinstance(prompts, str):
            return self.generate([images], [prompts], max_new_tokens, **sampling)[0]
        steps = list(self.stream(images, prompts, max_new_tokens, **sampling))
        return [self.text(ids) for ids in torch.stack(steps, dim=1).tolist()]

    def text(self, ids):
        """Decode generated ids up to the end token."""
        ends = self.end_ids()
        answer = takewhile(lambda token: token not in ends, ids)
        return self.tokenizer.decode(list(answer)).strip()

    # ---- from checkpoints, to one folder ---------------------------------------------------------

    @classmethod
    def assemble(
        cls,
        vision,
        llm,
        connector,
        template=None,
        image_size=None,
        image_mode="pad",
        device="cpu",
        vision_dtype=torch.float32,
        llm_dtype=torch.float32,
    ):
        """Load towers and LLM from public checkpoints and add a new connector.

        vision: a list of folders or Hugging Face ids. Defaults: template, the one that the LLM's
        checkpoint names, else vicuna_v1; image_size, the first tower's.
        llm_dtype None: leave the LLM in its memory-mapped files (common/fsdp.py).
        Raises InputError.
        """
        folders, folder = [locate(name) for name in vision], locate(llm)
        tokenizer = load_tokenizer(folder)
        template = template or find_template(folder) or "vicuna_v1"
        # Raise now if the tokenizer lacks the template's special tokens.
        encode(tokenizer, [("", "")], template)
        towers = [load_part(TOWERS, path, vision_dtype, device) for path in folders]
        spec = ImageSpec(image_size or towers[0].config.image_size, image_mode)
        if read_processor(folders[0])[1]:
            stated = ImageSpec.from_folder(folders[0])
            spec = replace(spec, mean=stated.mean, std=stated.std, resample=stated.resample)
        llm = load_part(LLMS, folder, llm_dtype, device if llm_dtype else "cpu")
        model = cls(towers, llm, connector, tokenizer, template, spec)
        model.connector.to(device)
        return model

    # save(folder): write everything that from_pretrained needs
    save = save_mllm

    @classmethod
    def from_folder(cls, folder):
        """Build the model of a folder that `save` wrote. from_pretrained then loads its weights."""
        towers, llm, config = read_parts(folder, TOWERS, LLMS)
        tokenizer, spec = load_tokenizer(folder), ImageSpec.from_folder(folder)
        return cls(towers, llm, config["connector"], tokenizer, config["template"], spec)

"""The multimodal LLM: vision towers, a connector, and a LLaMA that reads the picture as if it were words.

LLaVA's design (arXiv 2304.08485), with the towers and connectors of COMM (2310.08825) and of the Dense Connector (2405.13800):

    pixels (I, 3, R, R) uint8            one tensor for all towers; I pictures in the batch
      | each tower, no deeper than the connector reads                 vit.py, dinov2.py, clip.py
    hidden states, patch tokens only, (I, N, D) each
      | connector                                                      connector.py
    visual tokens (I, M, C)              M a picture, as wide as the LLM
      | take the places of the IMAGE ids in the text's embeddings
    embeddings (B, T, C)                 in training (1, T, C): the dialogues of a batch one behind the other, no padding
      | LLaMA (or Phi)                                                 llama.py, phi.py
    logits (n, V) at the n supervised positions, LOGITS numbers at a time -> sum of their cross-entropies

A trained model is one folder that needs nothing else: config.json (towers, connector, LLM, template), model.safetensors,
tokenizer.json and preprocessor_config.json.
"""
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from connector import SIDES, ConnectorConfig, TowerShape, layers_asked, layers_needed, make_connector, visual_tokens
from dialogue import IGNORE, IMAGE, MARK, encode, end_ids, find_template, load_tokenizer
from dinov2 import DINOv2, DINOv2Config
from hub import InputError, fields_of, load_weights, locate, on_meta, read_config, read_json, save_in_files
from images import ImageSpec, open_image, to_pixels
from llama import Llama
from phi import Phi
from vit import ViT, ViTConfig

TOWERS = {"clip": (CLIPVision, CLIPVisionConfig), "clip_vision_model": (CLIPVision, CLIPVisionConfig),
          "siglip": (SigLIPVision, SigLIPVisionConfig), "siglip_vision_model": (SigLIPVision, SigLIPVisionConfig),
          "dinov2": (DINOv2, DINOv2Config), "dinov2_with_registers": (DINOv2, DINOv2Config),
          "vit": (ViT, ViTConfig), "deit": (ViT, ViTConfig), "vit_mae": (ViT, ViTConfig),
          "deit3": (ViT, ViTConfig), "timm_wrapper": (ViT, ViTConfig)}        # the second: transformers' name for timm's models
LLMS = {"llama": Llama, "mistral": Llama, "qwen2": Llama, "phi": Phi}
LOGITS = 2 ** 26                                                     # so many at once in training: 256 MiB in float32


def tower_class(model_type, where):
    """model_type of a config.json -> (tower class, config class). Raises InputError for another kind."""
    if model_type not in TOWERS:
        raise InputError(f"{where}: model_type {model_type!r} is not a vision tower ({', '.join(TOWERS)})")
    return TOWERS[model_type]


def llm_class(model_type, where):
    """model_type of a config.json -> Llama or Phi. Raises InputError for another kind."""
    if model_type not in LLMS:
        raise InputError(f"{where}: model_type {model_type!r} is not a language model of ours ({', '.join(LLMS)})")
    return LLMS[model_type]


def check_towers(towers, kind, side):
    """COMM reads CLIP first and DINOv2 second; widths and depths may not tell them apart, so their kinds are compared. A DINOv2
    takes pictures of any side that its patches divide, the others of the side that they were trained at."""
    if kind == "comm" and len(towers) == 2 and isinstance(towers[0], DINOv2) and not isinstance(towers[1], DINOv2):
        raise InputError("connector comm takes CLIP first and DINOv2 second: swap the two towers")
    for tower in towers:
        if isinstance(tower, DINOv2) and side % tower.config.patch_size:
            raise InputError(f"pictures of {side} x {side} for a DINOv2 with patches of {tower.config.patch_size}: --image_size "
                             "should be a multiple of them")
        if not isinstance(tower, DINOv2) and side != tower.config.image_size:
            raise InputError(f"pictures of {side} x {side} for a tower that was trained at {tower.config.image_size} x "
                             f"{tower.config.image_size}: only DINOv2 takes others (--image_size={tower.config.image_size}?)")


class MLLM(nn.Module):
    """Towers, connector and LLM in one: pictures and tokens in, a loss or a text out."""

    def __init__(self, towers, llm, connector_config, tokenizer, template, spec):
        """towers: list of vision towers; llm: a Llama or Phi; template: a name in dialogue.TEMPLATES; spec: images.ImageSpec, the
        side R and how a picture is brought to it. The connector is new. Raises InputError where the parts do not fit."""
        super().__init__()
        check_towers(towers, connector_config.kind, spec.size)
        self.connector_config, self.tokenizer, self.template, self.spec = connector_config, tokenizer, template, spec
        if tokenizer.get_vocab_size() > llm.config.vocab_size:
            raise InputError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the LLM only {llm.config.vocab_size}: "
                             "they do not belong together")
        self.vision, self.llm = nn.ModuleList(towers), llm
        shapes = [TowerShape(t.config.num_hidden_layers, t.config.hidden_size, (spec.size // t.config.patch_size) ** 2)
                  for t in towers]
        self.connector = make_connector(connector_config, shapes, llm.config.hidden_size)
        depths = [shape.num_hidden_layers for shape in shapes]
        self.layers, self.asked = layers_needed(connector_config, depths), layers_asked(connector_config, depths)
        self.tokens_per_image = visual_tokens(connector_config, shapes[0].num_patches)     # M

    @classmethod
    def assemble(cls, vision, llm, connector_config, template=None, image_size=None, image_mode="pad", tokenizer=None,
                 dtype=torch.float32, device="cpu", llm_dtype=None, llm_mapped=False):
        """Public checkpoints, each named by folder or id, and a new connector -> MLLM. `vision`: a list. template None: the
        one that the LLM's checkpoint names, else vicuna_v1. image_size None: the first tower's. llm_dtype None: dtype.
        llm_mapped: the LLM stays in its files, mapped into memory, whatever their dtype (shard.py). Raises InputError."""
        folders = [locate(name) for name in vision]
        kinds = [read_config(folder).get("model_type", "timm_wrapper") for folder in folders]    # timm's own files name none
        towers = [tower_class(kind, folder)[0].from_pretrained(folder, dtype, device) for kind, folder in zip(kinds, folders)]
        llm_folder = locate(llm)
        kind = llm_class(read_config(llm_folder).get("model_type", "llama"), llm_folder)
        words = load_tokenizer(locate(tokenizer) if tokenizer else llm_folder)
        template = template or find_template(llm_folder) or "vicuna_v1"
        encode(words, [("", "")], template)                          # has the tokenizer the template's special tokens?
        size = image_size or towers[0].config.image_size
        if (folders[0] / "preprocessor_config.json").exists():       # mean and resampling come with the checkpoint
            spec = ImageSpec.from_folder(folders[0])
            spec = ImageSpec(size, image_mode, spec.mean, spec.std, spec.resample)
        else:
            spec = ImageSpec(size, image_mode)
        llm = kind.from_pretrained(llm_folder, *((None, "cpu") if llm_mapped else (llm_dtype or dtype, device)))
        model = cls(towers, llm, connector_config, words, template, spec)
        model.connector.to(device)
        return model

    # --- forward -----------------------------------------------------------------------------------------------------

    def see(self, pixels):
        """pixels uint8 (I, 3, R, R) -> visual tokens (I, M, C). Frozen towers run without gradients."""
        hidden = []
        for tower, asked in zip(self.vision, self.asked):
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
            with torch.set_grad_enabled(trained):
                states = [h[:, tower.num_prefix_tokens:] for h in tower(pixels, asked)]               # (I, N, D) each
            hidden.append(states if self.connector_config.kind in SIDES else dict(zip(asked, states)))
        return self.connector(hidden)

    def embed(self, tokens, pixels, shown=None):
        """tokens (B, T), where every picture stands as M times IMAGE; pixels (I, 3, R, R) -> (B, T, C). The pictures stand in
        order, or `shown` (marks,) says which of them each mark shows: one that several dialogues are about is seen once."""
        is_image = tokens == IMAGE                                   # (B, T)
        embeds = self.llm.embed(tokens.masked_fill(is_image, 0))     # (B, T, C)
        if len(pixels) == 0:
            seeing = [*self.vision.parameters(), *self.connector.parameters()]
            if not (torch.is_grad_enabled() and any(p.requires_grad for p in seeing)):
                return embeds
            blank = pixels.new_zeros(1, *pixels.shape[1:])           # text only: every rank of DDP must still touch what
            return embeds + 0 * self.see(blank).sum()                # sees, or the others wait for its gradients
        visual = self.see(pixels).to(embeds.dtype)                   # (I, M, C)
        visual = (visual if shown is None else visual[shown]).flatten(0, 1)      # (marks·M, C)
        # the i-th IMAGE of the batch is visual token i, so counting the marks finds its row
        index = (is_image.flatten().cumsum(0) - 1).clamp(0, len(visual) - 1).view_as(tokens)
        return torch.where(is_image[..., None], visual[index], embeds)

    def forward(self, pixels, tokens, labels, lengths=None, shown=None):
        """pixels uint8 (I, 3, R, R); tokens, labels (1, T), lengths and shown as in data.Batch, or tokens and labels (B, T),
        padded on the right -> (sum of the cross-entropies of the supervised tokens, their number), float32. The caller
        divides: by the number in the whole global batch, not this one's."""
        hidden = self.llm(embeds=self.embed(tokens, pixels, shown), lengths=lengths, hidden_only=True)     # (B, T, C)
        supervised = labels[:, 1:] != IGNORE                         # position t predicts token t + 1
        # Logits at supervised positions only: a sixth of LLaVA's dialogues, a thirtieth of its captions. And not all at once:
        # of 2048 positions and a vocabulary of 128K they are 1 GiB in float32, their gradient another.
        hidden, labels = hidden[:, :-1][supervised], labels[:, 1:][supervised]       # (n, C), (n,)
        rows = max(1, LOGITS // self.llm.config.vocab_size)
        parts = [self.cross_entropy(*part) if len(hidden) <= rows else
                 checkpoint(self.cross_entropy, *part, use_reentrant=False)          # the backward pass computes them again
                 for part in zip(hidden.split(rows), labels.split(rows))]
        return torch.stack(parts).sum(), supervised.sum()

    def cross_entropy(self, hidden, labels):
        """hidden (n, C), labels (n,) -> the sum over n, float32."""
        return F.cross_entropy(self.llm.logits(hidden).float(), labels, reduction="sum")

    # --- generation --------------------------------------------------------------------------------------------------

    def prompt(self, images, turns):
        """Pictures (PIL, uint8 arrays (H, W, 3), or files) and turns whose last answer is None -> (pixels (I, 3, R, R), token ids
        with every picture as M times IMAGE). Pictures without a mark in the text stand before the first question."""
        missing = len(images) - sum(text.count(MARK) for turn in turns for text in turn if text)
        if missing < 0:
            raise InputError(f"{-missing} more {MARK} marks than pictures")
        turns = [(f"{MARK}\n" * missing + turns[0][0], turns[0][1]), *turns[1:]]
        ids, _ = encode(self.tokenizer, turns, self.template)
        ids = [i for token in ids for i in ([token] * self.tokens_per_image if token == IMAGE else [token])]
        images = [open_image(image) if isinstance(image, (str, Path)) else image for image in images]
        pixels = [to_pixels(image, self.spec) for image in images]
        return torch.stack(pixels) if pixels else torch.zeros(0, 3, self.spec.size, self.spec.size, dtype=torch.uint8), ids

    @torch.no_grad()
    def stream(self, images, prompts, max_new_tokens=256, **sampling):
        """As `generate`, but yields the next token ids (B,) a step. A row that has ended goes on with the end token."""
        images = [[] if some is None else list(some) if isinstance(some, (list, tuple)) else [some] for some in images]
        turns = [[(prompt, None)] if isinstance(prompt, str) else prompt for prompt in prompts]
        if len(images) != len(turns) or not turns:
            raise InputError(f"{len(turns)} prompts and {len(images)} entries of pictures: one entry (None, a picture, or a list) a prompt")
        pixels, rows = zip(*(self.prompt(*pair) for pair in zip(images, turns)))
        device, longest = self.llm.embed_tokens.weight.device, max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)       # padded on the right
        lengths = torch.tensor([len(row) for row in rows], device=device)
        embeds = self.embed(tokens, torch.cat(pixels).to(device))
        yield from self.llm.stream(embeds=embeds, lengths=lengths, max_new_tokens=max_new_tokens,
                                   eos=end_ids(self.tokenizer, self.template), **sampling)

    def generate(self, images, prompts, max_new_tokens=256, **sampling):
        """images: one entry a prompt, a picture (PIL, a uint8 array, or a file's name), a list of them, or None. prompts: texts, or
        dialogues [(question, answer), ..., (question, None)]. sampling: temperature=0 (greedy), top_k, top_p, generator. -> list of
        answers.
        InputError: entries and prompts of different number, more marks than pictures, and as Llama.stream."""
        steps = list(self.stream(images, prompts, max_new_tokens, **sampling))
        return [self.text(row) for row in torch.stack(steps, dim=1).tolist()]

    def text(self, ids):
        """Generated ids -> text, up to the end token."""
        ends = set(end_ids(self.tokenizer, self.template))
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return self.tokenizer.decode(ids[:stop]).strip()

    # --- one folder --------------------------------------------------------------------------------------------------

    def save(self, folder, dtype=None, named=None):
        """Write everything that from_pretrained needs. The folder appears whole or not at all. dtype None: as in memory. named:
        the pairs (name, tensor) in the place of this model's own."""
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        config = {"model_type": "mllm", "template": self.template, "connector": asdict(self.connector_config),
                  "vision": [asdict(tower.config) for tower in self.vision], "llm": self.llm.config.to_dict()}
        named = named or self.state_dict().items()
        save_in_files(partial, ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in named), config)
        self.tokenizer.save(str(partial / "tokenizer.json"))
        statistics = [{"mean": t.normalize.mean.flatten().tolist(), "std": t.normalize.std.flatten().tolist()} for t in self.vision]
        (partial / "preprocessor_config.json").write_text(json.dumps(self.spec.config() | {"towers": statistics}, indent=2) + "\n")
        replace_folder(partial, folder)

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """A folder that `save` wrote, or a public LLaVA or Dense Connector (llava.py) -> MLLM, ready to generate. Raises
        InputError naming what is missing or left over."""
        import llava                                                 # imported here: it builds its models with this file
        folder = locate(folder_or_id)
        config = read_config(folder)
        if llava.is_foreign(config):
            return llava.load(folder, config, dtype, device)
        if config.get("model_type") != "mllm":
            raise InputError(f"{folder}: model_type {config.get('model_type')!r} is not a multimodal model (ours, which train.py "
                             "writes under out/, or a LLaVA)")
        spec = ImageSpec.from_folder(folder)
        try:
            statistics = read_json(folder / "preprocessor_config.json")["towers"]
            with on_meta():
                towers = []
                for shape, numbers in zip(config["vision"], statistics):
                    tower, tower_config = tower_class(shape["model_type"], folder)
                    towers.append(tower(fields_of(tower_config, shape, folder), numbers["mean"], numbers["std"]))
                kind = llm_class(config["llm"]["model_type"], folder)
                llm = kind(kind.config_class.from_dict(config["llm"], folder))
                model = cls(towers, llm, ConnectorConfig(**config["connector"]), load_tokenizer(folder), config["template"], spec)
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder}: config.json or preprocessor_config.json is not as MLLM.save writes it ({error!r})") from None
        return load_weights(model, folder, lambda name: name, dtype, device).eval()


def replace_folder(partial, folder):
    """Put the finished folder `partial` in the place of `folder`. Every file is synced first; if the machine dies between the
    two renames, the former folder is still there under its name with ".old" behind it."""
    for file in partial.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

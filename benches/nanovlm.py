"""nanoVLM (https://github.com/huggingface/nanoVLM) as a contender of `train`. Nothing of it is copied: --nanovlm=FOLDER names a
checkout (written for its commit 4e0c096), whose packages `models` and `data` the contender's own process imports.

    python bench.py train --vs=transformers,nanovlm --nanovlm=FOLDER

The same as on the other sides: the sizes of the ViT and the LLaMA, the dialogues with their supervised tokens, a picture of 196
visual tokens each (pixel shuffle of factor 1, which merges none), what learns in each stage, float32 weights under autocast,
AdamW. The weights are its own random start, so that the first loss is near ln(vocabulary). Where its step does something else:

    packing     its knapsack fills rows of 1024 tokens, its collator pads them on the left: four rows, 18% padding. The samples
                of a row see each other, and positions count on from one to the next: more attention than a dialogue's own.
    tower       all of its blocks run, where LLaVA's connector reads the second to last layer and ours leaves the last block
                out; no class token, and GELU's tanh form for CLIP's quick one
    projector   a single linear map without bias, where LLaVA-1.5's connector is two maps: less work, under 1% of a step
    loss        logits of all positions, padding's among them; the unsupervised ones are left out in the cross entropy alone
    pixels      are floats from 0 to 1 beforehand, and are not normalised in the step

Its train.py also clips gradients, and compiles the model if asked to (the default is no): here neither.
"""
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from hub import InputError

ROW = 1024                                                           # tokens of a packed row
TOKENIZER = SimpleNamespace(image_token_id=1, pad_token_id=2)        # all that model and packing ask of one; texts have ids from 3


def check_checkout(folder):
    """InputError unless the folder is a checkout of nanoVLM."""
    wanted = "it should be a checkout of https://github.com/huggingface/nanoVLM"
    if not folder:
        raise InputError(f"--vs=nanovlm needs --nanovlm=FOLDER; {wanted}")
    if not Path(folder).is_dir():
        raise InputError(f"--nanovlm={folder}: no such folder; {wanted}")
    for file in ("models/vision_language_model.py", "data/advanced_datasets.py", "data/collators.py"):
        if not (Path(folder) / file).is_file():
            raise InputError(f"--nanovlm={folder}: not nanoVLM, it has no {file}; {wanted}")


def import_from(checkout):
    """Puts the checkout first on the path of this process, where its package `data` then stands for our data.py."""
    check_checkout(checkout)
    sys.path.insert(0, str(Path(checkout).resolve()))
    processors = ModuleType("data.processors")                       # the true one needs torchvision, and a tokenizer of the hub
    processors.get_tokenizer = lambda *_: TOKENIZER
    sys.modules["data.processors"] = processors


def pack(examples, tokens_per_image):
    """Dialogues [(name, tokens, labels, [pixels])] -> nanoVLM's batch: input_ids, labels, attention_mask, each (rows, ROW), and
    images, a list for each row of (1, 3, R, R)."""
    from data.advanced_datasets import ConstantLengthDataset
    from data.collators import VQACollator

    from dialogue import IGNORE, IMAGE

    class Samples(list):                                             # what ConstantLengthDataset asks of a dataset
        dataset, tokenizer, mp_image_token_length = (), TOKENIZER, tokens_per_image

    class Packed(ConstantLengthDataset):
        def _balanced_greedy_knapsack(self, buffer, length, delta, **rest):
            """It takes five rows more than are needed, which thousands of samples fill; of eight, each would lie in its own."""
            return super()._balanced_greedy_knapsack(buffer, length, 0, **rest)
    samples = Samples()
    for _, tokens, labels, pixels in examples:
        ids = torch.tensor(tokens)
        samples.append({"input_ids": ids.masked_fill(ids == IMAGE, TOKENIZER.image_token_id),
                        "attention_mask": torch.ones_like(ids),
                        "labels": torch.tensor([*labels[1:], IGNORE]),                       # its datasets shift them, not its loss
                        "images": [picture[None] / 255 for picture in pixels]})
    rows = Packed(samples, max_sample_length=ROW, seq_length=ROW, num_of_sequences=len(samples))
    return VQACollator(TOKENIZER, ROW)(list(rows))


def build(checkout, vision, llm, examples, stage, device):
    """vision, llm: CLIPVisionConfig, LlamaConfig; examples: dialogues -> the model, and a function that gives their loss."""
    import_from(checkout)
    from models.config import VLMConfig
    from models.vision_language_model import VisionLanguageModel
    patches = (vision.image_size // vision.patch_size) ** 2
    model = VisionLanguageModel(VLMConfig(
        vit_hidden_dim=vision.hidden_size, vit_inter_dim=vision.intermediate_size, vit_n_blocks=vision.num_hidden_layers,
        vit_n_heads=vision.num_attention_heads, vit_img_size=vision.image_size, vit_patch_size=vision.patch_size,
        lm_hidden_dim=llm.hidden_size, lm_inter_dim=llm.intermediate_size, lm_n_blocks=llm.num_hidden_layers,
        lm_n_heads=llm.num_attention_heads, lm_n_kv_heads=llm.num_key_value_heads, lm_vocab_size=llm.vocab_size,
        lm_rms_eps=llm.rms_norm_eps, lm_re_base=llm.rope_theta, lm_max_position_embeddings=llm.max_position_embeddings,
        lm_tie_weights=llm.tie_word_embeddings, mp_pixel_shuffle_factor=1, mp_image_token_length=patches), load_backbone=False)
    model = model.to(device).train().requires_grad_(False)
    model.MP.requires_grad_(True)
    model.decoder.requires_grad_(stage == 2)
    batch = pack(examples, patches)
    tokens, labels, mask = (batch[key].to(device) for key in ("input_ids", "labels", "attention_mask"))
    pixels = [[picture.to(device) for picture in row] for row in batch["images"]]
    return model, lambda: model(tokens, pixels, attention_mask=mask, targets=labels)[1]

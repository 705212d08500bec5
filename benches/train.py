"""`train`: a step (forward, backward, AdamW) on eight dialogues of uneven length about a picture each: a frozen CLIP-B/16 at
224, LLaVA-1.5's connector and a LLaMA of 160M, random weights, the same for all. Ours packs them into one row; transformers'
LlavaForConditionalGeneration gets them padded on the right. nanoVLM, imported from a checkout (--nanovlm=FOLDER), packs them
into rows whose samples see each other; benches/nanovlm.py says what its step does otherwise. Rates count real tokens, pictures'
included, padding not. The FLOPs are those of the blocks that are read, causal attention within a dialogue, logits of supervised
tokens, gradients of what learns: the same number for all, for what a side computes beyond them is its own loss.
"""
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benches import nanovlm
from benches.turns import fastest, limits, peak_memory, spread, take_turns, wait

TEXTS = (212, 472, 154, 271, 310, 71, 211, 105)                      # tokens of text in each dialogue, as in LLaVA's instructions
SUPERVISED = 0.6                                                     # the share of a text that is answers, its end here


def write_llava(folder, tower=None, llm=None):
    """A LLaVA in the layout that both sides load, float32, random weights. tower, llm: configs, None: the reference case's."""
    from tokenizers import Tokenizer

    from clip import CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig
    from export import export
    from images import ImageSpec
    from llama import Llama, LlamaConfig
    from mllm import MLLM
    tower = tower or CLIPVisionConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                                      image_size=224, patch_size=16)
    llm = llm or LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                             num_attention_heads=12)
    torch.manual_seed(0)
    words = Tokenizer.from_file(str(Path(__file__).parents[1] / "weights" / "llama" / "tokenizer.json"))      # any: no text is read
    export(MLLM([CLIPVision(tower)], Llama(llm), ConnectorConfig("mlp"), words, "vicuna_v1", ImageSpec(tower.image_size)), folder)


def shapes(folder):
    """-> the configs of the tower and of the LLM of the LLaVA in the folder."""
    from clip import CLIPVisionConfig
    from hub import fields_of, read_config
    from llama import LlamaConfig
    config = read_config(folder)
    return fields_of(CLIPVisionConfig, config["vision_config"], folder), LlamaConfig.from_dict(config["text_config"], folder)


def dialogues(side, tokens_per_image, texts=TEXTS):
    """Eight random dialogues -> [(name, tokens, labels, [pixels])] as data.collate takes them: a token, a picture, the rest."""
    from dialogue import IGNORE, IMAGE
    random, examples = torch.Generator().manual_seed(0), []
    for i, length in enumerate(texts):
        words = torch.randint(3, 600, (length,), generator=random).tolist()
        asked = length - int(SUPERVISED * length)
        tokens = [words[0], *[IMAGE] * tokens_per_image, *words[1:]]
        labels = [IGNORE] * (tokens_per_image + asked) + words[asked:]
        examples.append((f"{i}", tokens, labels, [torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=random)]))
    return examples


def train_ours(folder, stage, device, texts=TEXTS, compiled=False, dtype="bfloat16"):
    """-> the model, and a function that gives the loss of the dialogues."""
    from data import collate
    from compiled import compile_blocks
    from linear import by_convolution
    from mllm import MLLM
    from train import choose_trained
    model = MLLM.from_pretrained(folder, device=device).train()
    if compiled:                                                     # as train.py --compile=true
        for blocks in (model.llm.layers, *(tower.blocks for tower in model.vision)):
            compile_blocks(blocks)
    elif dtype == "float32":                                         # and as without
        by_convolution(model)
    choose_trained(model, ["connector"] if stage == 1 else ["connector", "llm"])
    batch = collate(dialogues(model.spec.size, model.tokens_per_image, texts), [], model.spec.size)
    pixels, tokens, labels, shown = (tensor.to(device) for tensor in (batch.pixels, batch.tokens, batch.labels, batch.shown))

    def loss():
        total, number = model(pixels, tokens, labels, batch.lengths, shown)
        return total / number
    return model, loss


def train_transformers(folder, stage, device, texts=TEXTS):
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    from clip import CLIP_MEAN, CLIP_STD
    from dialogue import IGNORE, IMAGE
    from vit import Normalize
    transformers.logging.disable_progress_bar()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).train()
    model.requires_grad_(stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    side, image = model.config.vision_config.image_size, model.config.image_token_index
    _, tokens, labels, pixels = zip(*dialogues(side, (side // model.config.vision_config.patch_size) ** 2, texts))
    tokens = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)                    # (B, T)
    tokens = tokens.masked_fill(tokens == IMAGE, image).to(device)
    labels = pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORE).to(device)
    pixels = Normalize(CLIP_MEAN, CLIP_STD)(torch.cat([torch.stack(picture) for picture in pixels]), torch.float32).to(device)
    lengths = torch.tensor([length + tokens.shape[1] - max(texts) for length in texts], device=device)
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
    return model, lambda: model(input_ids=tokens, pixel_values=pixels, attention_mask=mask, labels=labels, use_cache=False).loss


def train_nanovlm(folder, stage, device, texts=TEXTS, checkout=""):
    vision, llm = shapes(folder)
    examples = dialogues(vision.image_size, (vision.image_size // vision.patch_size) ** 2, texts)
    return nanovlm.build(checkout, vision, llm, examples, stage, device)


TRAINERS = {"ours": train_ours, "ours_compiled": partial(train_ours, compiled=True), "transformers": train_transformers,
            "nanovlm": train_nanovlm}


def one_turn(config):
    """The contender's own process: build, two steps to warm up (in the second the allocator still grows), two steps -> seconds of
    one, seconds of the first, bytes at the highest, the first loss."""
    if config.contender == "limits":
        return limits(config)
    options = {"checkout": config.nanovlm} if config.contender == "nanovlm" else {}
    if config.contender.startswith("ours"):
        options = {"dtype": config.dtype}
    model, loss_of = TRAINERS[config.contender](config.folder, config.stage, config.device, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)

    def step():
        start = time.perf_counter()
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), wait(config.device) - start
    (loss, warm_up), _ = step(), step()
    return {"seconds": statistics.mean(step()[1] for _ in range(2)), "warm_up": warm_up, "memory": peak_memory(config.device), "loss": loss}


def train_flops(folder, stage, texts=TEXTS):
    """FLOPs that a step cannot do without. A linear map costs 2 a weight and token, forward; its backward costs the same for
    what flows back, and again for its weights if they learn. Attention's is twice its forward. Elementwise work is left out."""
    v, c = shapes(folder)
    patches, D, C = (v.image_size // v.patch_size) ** 2, v.hidden_size, c.hidden_size
    lengths = [length + patches for length in texts]
    tower = len(texts) * (2 * patches * 3 * v.patch_size ** 2 * D + (v.num_hidden_layers - 1) * (
        2 * (patches + 1) * (4 * D * D + 2 * D * v.intermediate_size) + 4 * (patches + 1) ** 2 * D))
    connector = 2 * len(texts) * patches * (2 * (D * C + C * C) + C * C)     # both maps forward and their weights, one back
    heads = c.num_attention_heads * c.head_dim
    weights = c.num_hidden_layers * (2 * C * (heads + c.num_key_value_heads * c.head_dim) + 3 * C * c.intermediate_size)
    linear = 2 * (weights * sum(lengths) + C * c.vocab_size * sum(int(SUPERVISED * length) for length in texts))
    attention = c.num_hidden_layers * 2 * heads * sum(length ** 2 for length in lengths)     # causal: half of all pairs
    return tower + connector + (1 + stage) * linear + 3 * attention


def bench(config):
    """-> {"stage1", "stage2"}: {"limits", contender: medians} with real tokens a second, share of the limit, first loss; and how
    many times as fast the faster form of ours is. Prints a table."""
    contenders, result = [name for name in TRAINERS if name.startswith("ours") or name in config.vs], {"dtype": config.dtype}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        folder = Path(folder) / "llava"
        write_llava(folder)
        tokens = sum(TEXTS) + len(TEXTS) * 196
        padding = 1 - tokens / len(TEXTS) / (max(TEXTS) + 196)
        print(f"{len(TEXTS)} dialogues of {tokens:,} tokens; padded to the longest, {padding:.0%} would be padding")
        for stage in (1, 2):
            flops = train_flops(folder, stage)
            found = result[f"stage{stage}"] = take_turns(config, contenders, folder=folder, stage=stage, nanovlm=config.nanovlm)
            found["flops"] = flops
            for name in contenders:
                one = found[name]
                one["tokens_per_second"] = tokens / one["seconds"]
                one["of_the_limit"] = flops / one["seconds"] / found["limits"]["flops"]
                print(f"stage {stage}  {name:13} {spread(one)}, {one['tokens_per_second']:5.0f} tokens/s, "
                      f"{one['of_the_limit']:.0%} of the limit for {flops / 1e12:.2f} TFLOP, {one['memory'] / 2 ** 30:.1f} GiB, "
                      f"loss {one['loss']:.4f}, first step {one['warm_up']:.1f} s", flush=True)
            for peer in config.vs:
                found[f"times_{peer}"] = fastest(found, peer) / fastest(found, "ours")
                print(f"stage {stage}  ours is {found[f'times_{peer}']:.2f} times as fast as {peer}", flush=True)
    return result

"""`train`: a step (forward, backward, AdamW) on eight dialogues of uneven length about a picture each, random weights, the same
for all: a frozen CLIP, LLaVA-1.5's connector and a LLaMA, as large as --size says. Ours packs them into one row; transformers'
LlavaForConditionalGeneration gets them padded on the right. nanoVLM, imported from a checkout (--nanovlm=FOLDER), packs them
into rows whose samples see each other; benches/nanovlm.py says what its step does otherwise. Rates count real tokens, pictures'
included, padding not. The FLOPs are plan.py's: those of the blocks that are read, causal attention within a dialogue, logits of
supervised tokens, gradients of what learns: the same number for all, for what a side computes beyond them is its own loss.
--connector and --lora_rank are for ours alone; --profile says where our time goes.
"""
import re
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from benches import nanovlm
from benches.turns import fastest, limits, peak_memory, spread, take_turns, turn, wait
from hub import InputError

TEXTS = (212, 472, 154, 271, 310, 71, 211, 105)                      # tokens of text in each dialogue, as in LLaVA's instructions
SUPERVISED = 0.6                                                     # the share of a text that is answers, its end here

CLIP_B = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224, patch_size=16)
CLIP_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336, patch_size=14)
SIZES = {                                                            # a CLIP and a LLaMA: the reference case, TinyLlama's and
    "160m": (CLIP_B, dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)),    # Vicuna's
    "1b": (CLIP_L, dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)),
    "7b": (CLIP_L, dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32))}
KINDS = {"rest": "^triton_", "loss": "log_softmax|nll_loss|cross_entropy", "optimizer": "adam", "attention": "bmm|softmax|attention|flash|fmha",
         "products": "mm|linear|conv|gemm|nvjet|cutlass|Product"}    # how the profiler names them; the first that fits counts


def llava_of(size):
    """-> an MLLM of that size, where torch puts new tensors."""
    from tokenizers import Tokenizer

    from clip import CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig
    from images import ImageSpec
    from llama import Llama, LlamaConfig
    from mllm import MLLM
    tower, llm = SIZES[size]
    words = Tokenizer.from_file(str(Path(__file__).parents[1] / "weights" / "llama" / "tokenizer.json"))      # any: no text is read
    return MLLM([CLIPVision(CLIPVisionConfig(**tower))], Llama(LlamaConfig(**{"vocab_size": 32000} | llm)), ConnectorConfig("mlp"),
                words, "vicuna_v1", ImageSpec(tower["image_size"]))


def with_connector(model, kind):
    """An MLLM with a new connector of that kind in the place of its own, and for comm with a DINOv2 of CLIP's size."""
    from connector import ConnectorConfig
    from dinov2 import DINOv2, DINOv2Config
    from mllm import MLLM
    shape = model.vision[0].config
    towers = [*model.vision] + [DINOv2(DINOv2Config(shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads,
                                                    patch_size=shape.patch_size)) for _ in range(kind == "comm")]
    return MLLM(towers, model.llm, ConnectorConfig(kind), model.tokenizer, model.template, model.spec)


def write_llava(folder, size="160m", device="cpu"):
    """A LLaVA in the layout that both sides load, random weights, float32; of 7B bfloat16, for 27 GB are slow to write."""
    from export import export
    torch.manual_seed(0)
    with torch.device(device):
        model = llava_of(size)
    export(model.to(torch.bfloat16 if size == "7b" else torch.float32), folder)
    del model
    torch.cuda.empty_cache()                                         # the contenders' processes need the whole card


def shapes(folder):
    """-> the configs of the tower and of the LLM of the LLaVA in the folder."""
    from clip import CLIPVisionConfig
    from hub import fields_of, read_config
    from llama import LlamaConfig
    config = read_config(folder)
    return fields_of(CLIPVisionConfig, config["vision_config"], folder), LlamaConfig.from_dict(config["text_config"], folder)


def dialogues(side, tokens_per_image, texts=TEXTS):
    """Random dialogues -> [(name, tokens, labels, [pixels])] as data.collate takes them: a token, a picture, the rest."""
    from dialogue import IGNORE, IMAGE
    random, examples = torch.Generator().manual_seed(0), []
    for i, length in enumerate(texts):
        words = torch.randint(3, 600, (length,), generator=random).tolist()
        asked = length - int(SUPERVISED * length)
        tokens = [words[0], *[IMAGE] * tokens_per_image, *words[1:]]
        labels = [IGNORE] * (tokens_per_image + asked) + words[asked:]
        examples.append((f"{i}", tokens, labels, [torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=random)]))
    return examples


def learning(stage):
    return ["connector"] if stage == 1 else ["connector", "llm"]


def train_ours(folder, stage, device, texts=TEXTS, dtype="bfloat16", compiled=False, connector="mlp", lora_rank=0):
    """-> the model, and a function that gives the loss of the dialogues. As train.py has them: under autocast an LLM whose own
    weights do not learn is bfloat16."""
    import lora
    from compiled import compile_blocks
    from data import collate
    from linear import by_convolution
    from mllm import MLLM
    from train import choose_trained
    model = MLLM.from_pretrained(folder, device=device).train()
    if connector != "mlp":
        model = with_connector(model, connector)
    if dtype == "bfloat16" and (stage == 1 or lora_rank):
        model.llm.bfloat16()
    if stage == 2 and lora_rank:
        lora.adapt(model.llm, lora_rank, 2 * lora_rank)
    model.to(device)
    if compiled:                                                     # as train.py --compile=true
        for blocks in (model.llm.layers, *(tower.blocks for tower in model.vision)):
            compile_blocks(blocks)
    elif dtype == "float32":                                         # and as without
        by_convolution(model)
    choose_trained(model, learning(stage))
    batch = collate(dialogues(model.spec.size, model.tokens_per_image, texts), [], model.spec.size)
    pixels, tokens, labels, shown = (tensor.to(device) for tensor in (batch.pixels, batch.tokens, batch.labels, batch.shown))

    def loss():
        total, number = model(pixels, tokens, labels, batch.lengths, shown)
        return total / number
    return model, loss


def train_transformers(folder, stage, device, texts=TEXTS, dtype="bfloat16"):
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
    if stage == 1 and dtype == "bfloat16":                           # a frozen LLM, as ours
        for parameter in (*model.model.language_model.parameters(), *model.lm_head.parameters()):
            parameter.data = parameter.data.bfloat16()
    side, image = model.config.vision_config.image_size, model.config.image_token_index
    _, tokens, labels, pixels = zip(*dialogues(side, (side // model.config.vision_config.patch_size) ** 2, texts))
    tokens = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)                    # (B, T)
    tokens = tokens.masked_fill(tokens == IMAGE, image).to(device)
    labels = pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORE).to(device)
    pixels = Normalize(CLIP_MEAN, CLIP_STD)(torch.cat([torch.stack(picture) for picture in pixels]), torch.float32).to(device)
    lengths = torch.tensor([length + tokens.shape[1] - max(texts) for length in texts], device=device)
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
    return model, lambda: model(input_ids=tokens, pixel_values=pixels, attention_mask=mask, labels=labels, use_cache=False).loss


def train_nanovlm(folder, stage, device, texts=TEXTS, dtype="bfloat16", checkout=""):
    vision, llm = shapes(folder)
    examples = dialogues(vision.image_size, (vision.image_size // vision.patch_size) ** 2, texts)
    return nanovlm.build(checkout, vision, llm, examples, stage, device)


TRAINERS = {"ours": train_ours, "ours_compiled": partial(train_ours, compiled=True), "transformers": train_transformers,
            "nanovlm": train_nanovlm}


def texts_of(config):
    """The lengths of --batch dialogues: TEXTS, over and over."""
    return (TEXTS * -(-config.batch // len(TEXTS)))[:config.batch]


def one_turn(config):
    """The contender's own process: build, three steps to warm up (in the third the allocator may still grow), three steps -> seconds
    of the middle one, seconds of the first, bytes at the highest, the first loss; with --profile what `where_time_goes` says."""
    options = {"checkout": config.nanovlm} if config.contender == "nanovlm" else {}
    if config.contender.startswith("ours"):
        options = {"connector": config.connector, "lora_rank": config.lora_rank}
    model, loss_of = TRAINERS[config.contender](config.folder, config.stage, config.device, texts_of(config), config.dtype, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)
    if config.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()                         # of the steps, not of how each side loads

    def step(mark=lambda: None):
        start = wait(config.device)
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of()
        mark()
        loss.backward()
        mark()
        optimizer.step()
        optimizer.zero_grad()
        mark()
        return loss.item(), wait(config.device) - start
    (loss, warm_up), _, _ = step(), step(), step()
    if config.profile:
        return where_time_goes(step, config.device)
    seconds = statistics.median(step()[1] for _ in range(3))
    found = {"seconds": seconds, "warm_up": warm_up, "memory": peak_memory(config.device), "loss": loss}
    del model, loss_of, optimizer                                    # the limits need room
    return found | limits(config)


def where_time_goes(step, device):
    """-> {"phases": seconds of forward, backward, optimizer; "kinds": seconds of each of KINDS, of "rest" (elementwise work,
    norms, copies), and on CUDA "idle", which is what its kernels leave of a step}."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    times = [wait(device)]
    step(lambda: times.append(wait(device)))
    _, seconds = step()
    cuda, kinds = device.startswith("cuda"), Counter()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
        step()
    for event in profiler.key_averages():
        # CUDA's kernels alone, without the spans that only name several of them; or what the CPU did itself
        if (event.device_type == DeviceType.CUDA) == cuda and not (cuda and event.is_user_annotation):
            kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key, re.I)), "rest")
            kinds[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    if cuda:
        kinds["idle"] = max(0, seconds - kinds.total())
    phases = dict(zip(("forward", "backward", "optimizer"), (after - before for before, after in zip(times, times[1:]))))
    return {"phases": phases, "kinds": dict(kinds)}


def planned(config, stage):
    """What plan.py says of our step -> FLOPs that it cannot do without, bytes at the highest on a GPU, tokens."""
    import plan
    from hub import on_meta
    from train import choose_trained
    with on_meta():
        model = with_connector(llava_of(config.size), config.connector)
    trained, texts = choose_trained(model, learning(stage)), texts_of(config)
    lengths = [length + model.tokens_per_image for length in texts]
    load = plan.Load(sum(lengths), sum(length ** 2 for length in lengths), sum(int(SUPERVISED * length) for length in texts), len(texts))
    one_card = SimpleNamespace(activation_checkpointing=False, gpus=1)
    run = plan.Run(one_card, model, trained, load, 1, config.dtype == "bfloat16", config.device.startswith("cuda"))
    form = plan.Form("one card", config.lora_rank if stage == 2 else 0)
    needed = sum(value for part, value in plan.flops(run, form).items() if part != "again")
    return needed, plan.memory(run, form)["peak"], lengths


def check(config):
    if config.size not in SIZES:
        raise InputError(f"--size={config.size}: {', '.join(SIZES)}")
    if config.stage not in (0, 1, 2):
        raise InputError(f"--stage={config.stage}: 1, 2, or 0 for both")
    if config.vs and (config.connector != "mlp" or config.lora_rank):
        raise InputError("--vs: only with --connector=mlp and without --lora_rank, which the others do not have here")
    if "nanovlm" in config.vs and config.size != "160m":
        raise InputError("--vs=nanovlm: only with --size=160m, whose pictures have the 196 tokens that it packs")


def bench(config):
    """-> {"stage1", "stage2"}: {"limits", contender: medians} with real tokens a second, share of the limit, first loss; and how
    many times as fast the faster form of ours is. Prints a table."""
    check(config)
    contenders, result = [name for name in TRAINERS if name.startswith("ours") or name in config.vs], {"dtype": config.dtype}
    cuda = config.device.startswith("cuda")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        folder = Path(folder) / "llava"
        write_llava(folder, config.size, config.device)
        for stage in (config.stage,) if config.stage else (1, 2):
            flops, peak, lengths = planned(config, stage)
            print(f"stage {stage}  {len(lengths)} dialogues of {sum(lengths):,} tokens; padded to the longest, "
                  f"{1 - statistics.mean(lengths) / max(lengths):.0%} would be padding", flush=True)
            options = dict(folder=folder, stage=stage, nanovlm=config.nanovlm, size=config.size, connector=config.connector,
                           lora_rank=config.lora_rank, batch=config.batch)
            found = result[f"stage{stage}"] = take_turns(config, contenders, **options)
            found["flops"], found["planned_memory"] = flops, peak
            for name in contenders:
                one = found[name]
                one["tokens_per_second"] = sum(lengths) / one["seconds"]
                one["of_the_limit"] = flops / one["seconds"] / one["limit_flops"]
                one["mfu"] = flops / one["seconds"] / (config.gpu_flops * 1e12)
                of_the_card = f", MFU {one['mfu']:.0%} of {config.gpu_flops:g} TFLOP/s" if cuda else ""
                the_plan = f" ({one['memory'] / peak - 1:+.0%} of the plan's)" if cuda and name.startswith("ours") else ""
                print(f"stage {stage}  {name:13} {spread(one)}, {one['tokens_per_second']:5.0f} tokens/s, "
                      f"{one['of_the_limit']:.0%} of the limit for {flops / 1e12:.2f} TFLOP{of_the_card}, "
                      f"{one['memory'] / 2 ** 30:.1f} GiB{the_plan}, loss {one['loss']:.4f}, first step {one['warm_up']:.1f} s", flush=True)
            for peer in config.vs:
                found[f"times_{peer}"] = fastest(found, peer) / fastest(found, "ours")
                print(f"stage {stage}  ours is {found[f'times_{peer}']:.2f} times as fast as {peer}", flush=True)
            for name in [name for name in contenders if name.startswith("ours")] if config.profile else []:
                parts = found[name]["profile"] = turn(config, name, profile="true", **options)
                print(f"stage {stage}  {name:13} " + "; ".join(", ".join(f"{key} {seconds / sum(of.values()):.0%}" for key, seconds in
                      sorted(of.items(), key=lambda pair: -pair[1])) for of in parts.values()), flush=True)
    return result

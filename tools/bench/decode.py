"""decode: answers of a LLaMA with 1.1B parameters.

TinyLlama's shape, random weights, greedy: PROMPT tokens in, ANSWER tokens out. "ours" is what
sample.py runs, "ours_packed" what eval.py runs on a CPU, "ours_fast" what --fast runs on CUDA.
transformers runs generate with its dynamic cache, with its static cache, and compiled. The first
token is measured apart from the others.
"""

import statistics
import tempfile

import torch

from common.speed import speed_up
from llama import Llama, LlamaConfig
from tools.bench.train import SIZES
from tools.bench.turns import limits, list_contenders, peak_memory, ratios, spread, take_turns, wait

PROMPT, ANSWER = 700, 64


def decode_ours(folder, device, dtype, form):
    model = Llama.from_pretrained(folder, dtype=dtype, device=device)
    speed_up(model, "batch" if form == "packed" else "chat", compile=form == "fast")

    def generate(tokens, length, on_token):
        for _ in model.stream(tokens, max_new_tokens=length, eos=[]):
            on_token()

    return generate


def decode_transformers(folder, device, dtype, form):
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    model.generation_config.eos_token_id = None
    if form == "compiled":
        model.forward = torch.compile(model.forward, dynamic=True)
    cache = {"cache_implementation": "static"} if form == "static" else {}

    class Streamer:
        """`generate` calls put with the prompt, then with every token."""

        def __init__(self, on_token):
            self.on_token, self.is_prompt = on_token, True

        def put(self, tokens):
            if not self.is_prompt:
                self.on_token()
            self.is_prompt = False

        def end(self):
            pass

    def generate(tokens, length, on_token):
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=length,
            do_sample=False,
            streamer=Streamer(on_token),
            **cache,
        )

    return generate


def one_turn(config):
    """Load, generate three tokens to warm up, then measure."""
    name, _, form = config.contender.partition("_")
    load = decode_ours if name == "ours" else decode_transformers
    generate = load(config.folder, config.device, getattr(torch, config.dtype), form)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 32000, (config.batch, PROMPT), generator=generator).to(config.device)
    start = wait(config.device)
    generate(tokens, 3, lambda: None)
    warm_up, firsts = wait(config.device) - start, []
    for length in (3, 3, ANSWER):
        times = [wait(config.device)]
        generate(tokens, length, lambda times=times: times.append(wait(config.device)))
        firsts.append(times[1] - times[0])
    found = {"warm_up": warm_up, "first": statistics.median(firsts)}
    # Tokens after the first one.
    found["token"] = (times[-1] - times[1]) / (len(times) - 2)
    return found | {"memory": peak_memory(config.device)} | limits(config)


def work(model, batch, width):
    """Count the FLOPs of the first token and the bytes that a later one reads.

    A step in the middle of the answer reads all weights but the embedding, and the cached keys and
    values. width: bytes of a number.
    """
    c = model.config
    blocks = sum(p.numel() for p in model.layers.parameters())
    head, L, C = c.vocab_size * c.hidden_size, c.num_hidden_layers, c.hidden_size
    cached = 2 * L * c.num_key_value_heads * c.head_dim * (PROMPT + ANSWER // 2)
    # Causal attention: half of all pairs.
    flops = batch * (2 * blocks * PROMPT + 2 * L * C * PROMPT**2 + 2 * head)
    return flops, width * (blocks + head + batch * cached)


def bench(config):
    """Print a table and return {contender: medians}."""
    ours = ["ours", "ours_packed" if config.device == "cpu" else "ours_fast"]
    theirs = ["transformers", "transformers_static", "transformers_compiled"]
    contenders = list_contenders(config, ours, theirs)
    shape = SIZES["1b"][1] | {"num_hidden_layers": config.layers}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        torch.manual_seed(0)
        model = Llama(LlamaConfig.from_dict(shape, "bench")).bfloat16()
        model.save_pretrained(folder)
        flops, read = work(model, config.batch, 2 if config.dtype == "bfloat16" else 4)
        del model
        result = take_turns(config, contenders, folder=folder, batch=config.batch)
    for name in contenders:
        one = result[name]
        first_share = flops / one["first"] / one["limit_flops"]
        token_share = read / one["token"] / one["limit_read"]
        print(
            f"{name:22} first token {spread(one, 'first')} s, {first_share:.0%} of the limit; "
            f"others {spread(one, 'token', 1e3)} ms, {token_share:.0%} of the limit; "
            f"{one['memory'] / 2**30:.1f} GiB, warm-up {one['warm_up']:.1f} s"
        )
    ratios(result, contenders, "first")
    ratios(result, contenders, "token")
    return result

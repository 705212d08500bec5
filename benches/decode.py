"""`decode`: a LLaMA of 1.1B (TinyLlama's shape), PROMPT tokens in, ANSWER out, greedily. `ours` is what sample.py does, on CUDA
`ours_fast` what it does with --fast (compiled.compile_step), on a CPU `ours_packed` what eval.py does (linear.pack). transformers'
forms are generate with its dynamic cache, its static one, and the dynamic one with a compiled forward. The warm-up contains the
preparation, and three tokens.
"""
import statistics
import tempfile
from pathlib import Path

import torch

from benches.load import tiny_llama, write_llama
from benches.turns import fastest, limits, peak_memory, spread, take_turns, wait

PROMPT, ANSWER = 700, 64                                             # tokens in, tokens out


def decode_ours(folder, device, dtype, form):
    from compiled import compile_step
    from linear import by_convolution, by_row, pack
    from llama import Llama
    model = Llama.from_pretrained(folder, dtype=dtype, device=device)
    if form == "fast":
        compile_step(model)
    elif form != "packed":
        by_row(model), by_convolution(model)

    def generate(tokens, new, told):
        if form == "packed":
            pack(model)                                              # the first time; then there is nothing left to do
        for _ in model.stream(tokens, max_new_tokens=new, eos=[]):
            told()
    return generate


def decode_transformers(folder, device, dtype, form):
    import transformers
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    model.generation_config.eos_token_id = None                      # so that nothing ends the text
    cache = {"cache_implementation": "static"} if form == "static" else {}
    if form == "compiled":
        model.forward = torch.compile(model.forward, dynamic=True)

    class Teller:                                                    # generate shows it the prompt and then every token
        def __init__(self, told):
            self.told, self.prompt = told, True

        def put(self, tokens):
            if not self.prompt:
                self.told()
            self.prompt = False

        def end(self):
            pass
    return lambda tokens, new, told: model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
                                                    do_sample=False, streamer=Teller(told), **cache)


GENERATORS = {"ours": decode_ours, "ours_fast": decode_ours, "ours_packed": decode_ours, "transformers": decode_transformers,
              "transformers_static": decode_transformers, "transformers_compiled": decode_transformers}


def one_turn(config):
    """The contender's own process: load, three tokens to warm up, then PROMPT tokens in and ANSWER out; the first token is the
    median of three, two of them of short answers."""
    name, _, form = config.contender.partition("_")
    generate = GENERATORS[name](config.folder, config.device, getattr(torch, config.dtype), form)
    tokens = torch.randint(3, 32000, (config.batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(config.device)
    start = wait(config.device)
    generate(tokens, 3, lambda: None)
    warm_up, firsts = wait(config.device) - start, []
    for new in (3, 3, ANSWER):
        times = [wait(config.device)]
        generate(tokens, new, lambda: times.append(wait(config.device)))
        firsts.append(times[1] - times[0])
    steps = [after - before for before, after in zip(times[1:], times[2:])]
    return {"warm_up": warm_up, "first": statistics.median(firsts), "token": statistics.median(steps),
            "memory": peak_memory(config.device)} | limits(config)


def decode_work(config, batch, width):
    """-> FLOPs of the prompt with the first token, and bytes that a step in the middle of the answer reads: every weight but
    the embeddings, and the cached keys and values of all rows. width: bytes of a number."""
    C, L, narrow = config.hidden_size, config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    weights = L * (2 * C * C + 2 * C * narrow + 3 * C * config.intermediate_size)
    head = config.vocab_size * C
    flops = batch * (2 * weights * PROMPT + 2 * L * C * PROMPT ** 2 + 2 * head)      # attention is causal: half of all pairs
    return flops, width * (weights + head + 2 * batch * L * narrow * (PROMPT + ANSWER // 2))


def bench(config):
    """-> {"limits", contender: medians}, and how many times the fastest form of theirs ours is. Prints a table."""
    other = "ours_fast" if config.device == "cpu" else "ours_packed"  # the other kind of device's
    contenders = [name for name in GENERATORS if name != other and (name.startswith("ours") or config.vs)]
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as folder:
        size = write_llama(Path(folder), config.layers)
        flops, read = decode_work(tiny_llama(config.layers), config.batch, 2 if config.dtype == "bfloat16" else 4)
        print(f"{size / 2e9:.2f}B parameters, {config.dtype}; batch {config.batch}, {PROMPT} tokens in "
              f"({flops / 1e12:.2f} TFLOP), {ANSWER} out ({read / 1e9:.2f} GB read a step), on {config.device}", flush=True)
        result = take_turns(config, contenders, folder=folder, batch=config.batch)
    result |= {"parameters": size // 2, "flops": flops, "bytes_read": read}
    for name in contenders:
        one = result[name]
        one["of_the_limit"] = {"first": flops / one["first"] / one["limit_flops"],
                               "token": read / one["token"] / one["limit_read"]}
        print(f"{name:22} first token {spread(one, 'first')}, {one['of_the_limit']['first']:.0%} of the limit; then "
              f"{spread(one, 'token', 1e3, 'ms')} a step, {read / one['token'] / 1e9:.1f} GB/s, "
              f"{one['of_the_limit']['token']:.0%} of the limit; warm-up {one['warm_up']:.1f} s, "
              f"{one['memory'] / 2 ** 30:.1f} GiB")
    if config.vs:
        for key in ("first", "token"):
            result[f"{key}_times_transformers"] = fastest(result, "transformers", key) / fastest(result, "ours", key)
            print(f"{key}: ours is {result[f'{key}_times_transformers']:.2f} times as fast, the fastest form of each")
    return result

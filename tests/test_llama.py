"""llama.py: recorded results of transformers, a real model's published text, generation, sampling, configs, errors.
The fixtures are written by make_llama_fixtures.py."""
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import llama
from conftest import relative_error
from hub import InputError
from llama import KVCache, Llama, LlamaConfig, Packed, attend_each, attend_in_one_kernel, sample

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("llama_*"))
MULTI_HEAD = Path(__file__).parent / "fixtures" / "llama_multi_head"
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small(seed=0, **settings):
    """A random model with weights so large that attention is far from uniform: every wrong position or mask shows."""
    settings = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None) | settings
    model = Llama(LlamaConfig(**settings))
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            noise = 0.3 * torch.randn(parameter.shape, generator=seeded(1000 * seed + place))
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def prompts(batch, width, seed=1):
    return torch.randint(0, 61, (batch, width), generator=seeded(seed))


# --- against recorded results -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_hidden_states_logits_and_greedy_ids_are_the_recorded_ones(folder):
    model, expected, states = Llama.from_pretrained(folder), load_file(folder / "expected.safetensors"), []
    with torch.no_grad():
        logits = model(expected["tokens"], states=states)
    assert len(states) == len(expected["hidden_states"])
    for i, hidden in enumerate(states):
        assert relative_error(hidden, expected["hidden_states"][i]) < 1e-5, f"hidden state {i}"
    assert relative_error(logits, expected["logits"]) < 1e-5
    assert torch.equal(model.generate(expected["prompts"], 12, attention_mask=expected["mask"]), expected["greedy"])


def test_every_variant_is_recorded():
    assert len(FIXTURES) == 5


def test_real_llama_tells_its_published_story(real):
    model = Llama.from_pretrained(real / "llama-stories260K")
    expected = json.loads((real / "llama-stories260K" / "expected.json").read_text())
    ids = [1] + model.generate(torch.tensor([[1]]), 255)[0].tolist()
    assert ids == expected["greedy_ids_with_bos"]

    def text(ids):                                                   # byte tokens look like <0x0A>
        pieces = [expected["vocab_latin1"][i] for i in ids]
        return b"".join(bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.encode("latin-1")
                        for piece in pieces).decode()
    assert text(ids[1:201]).strip() == expected["upstream_expected_200_steps"].strip()


# --- the forward pass -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, dict(sliding_window=4), dict(tie_word_embeddings=True)], ids=str)
def test_padding_on_the_right_changes_nothing_before_it(settings):
    model, tokens = small(**settings), prompts(2, 20)
    with torch.no_grad():
        assert relative_error(model(tokens)[:, :12], model(tokens[:, :12])) < 1e-6


def test_window_as_long_as_the_text_is_plain_attention():
    tokens = prompts(2, 10)
    with torch.no_grad():
        assert torch.equal(small(sliding_window=10)(tokens), small()(tokens))
        assert relative_error(small(sliding_window=9)(tokens)[:, 9], small()(tokens)[:, 9]) > 1e-3


@pytest.mark.parametrize("settings, windows", [
    (dict(sliding_window=4), 2), (dict(sliding_window=4, qkv_bias=True, max_window_layers=1), 1)], ids=str)
def test_gradients_reach_as_far_back_as_the_windows(settings, windows):
    """Training: through w blocks with a window of 4, a token learns from 3 w tokens back, and from none before them."""
    model, tokens = small(**settings), prompts(1, 12)
    model.layers = model.layers[len(model.layers) - windows:]
    model.config.max_window_layers = 0
    embeds = model.embed(tokens).detach().requires_grad_()
    model(embeds=embeds)[0, -1].logsumexp(-1).backward()
    reached = embeds.grad[0].norm(dim=-1) > 0
    assert reached.tolist() == [i >= 11 - 3 * windows for i in range(12)]


LENGTHS = [7, 1, 12, 5]
PACKED = [{}, dict(sliding_window=4), dict(sliding_window=4, qkv_bias=True, max_window_layers=1), dict(num_key_value_heads=4)]


@pytest.mark.parametrize("settings", PACKED, ids=str)
def test_sequences_packed_into_one_row_are_as_each_alone(settings):
    """Logits and all gradients, float32: the same products, summed in another order."""
    model, row = small(**settings), prompts(1, sum(LENGTHS))
    logits = model(row, lengths=LENGTHS)
    logits.logsumexp(-1).sum().backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = torch.cat([model(piece) for piece in row.split(LENGTHS, dim=1)], dim=1)
    alone.logsumexp(-1).sum().backward()
    assert relative_error(logits, alone) < 1e-6
    for ours, parameter in zip(packed, model.parameters()):
        assert relative_error(ours, parameter.grad) < 1e-5


@pytest.mark.parametrize("settings", PACKED, ids=str)
def test_no_sequence_of_a_row_sees_another(settings):
    """Bit for bit: every other token of the row exchanged."""
    model, row = small(**settings), prompts(1, sum(LENGTHS))
    other = (row + 1) % 61
    other[:, 8:20] = row[:, 8:20]                                    # the third stays as it is
    with torch.no_grad():
        same = (model(row, lengths=LENGTHS) == model(other, lengths=LENGTHS)).all(-1)[0]
    assert same[8:20].all() and not same[:8].any() and not same[20:].any()


@pytest.mark.parametrize("window", (None, 4))
def test_the_one_kernel_gets_what_it_documents(window, monkeypatch):
    """It runs on CUDA only. Here a plain one takes its place, written after its documentation: q (T, H, D), where each sequence
    starts, how far back and forth a token looks. The real one at least accepts the arguments: its shapes, on no device."""
    packed = Packed(torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32), max(LENGTHS), window)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8, generator=seeded(heads)) for heads in (4, 2, 2))

    def plain(q, k, v, starts, key_starts, longest, longest_key, window_size, enable_gqa=False):
        assert starts is key_starts and longest == longest_key == 12 and enable_gqa == (torch.__version__ >= "2.12")
        sequence = torch.bucketize(torch.arange(len(q)), starts[1:], right=True)
        behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
        mask = (sequence[:, None] == sequence) & (behind >= -window_size[1]) & ((behind <= window_size[0]) | (window_size[0] < 0))
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    on_no_device = (x.bfloat16().to("meta") for x in (q, k, v))
    accepted = attend_in_one_kernel(*on_no_device, packed._replace(starts=packed.starts.to("meta")))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain)
    one, each = attend_in_one_kernel(q, k, v, packed), attend_each(q, k, v, packed)
    assert accepted.shape == one.shape == each.shape == (1, 25, 32) and relative_error(one, each) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 2 ** -7)))    # bf16 rounds scores
@pytest.mark.parametrize("masked", (True, False))
def test_attention_of_one_token_is_that_of_pytorch(dtype, tolerance, masked):
    q, k, v = (torch.randn(2, heads, T, 16, generator=seeded(heads + T)).to(dtype) for heads, T in ((6, 1), (2, 9), (2, 9)))
    mask = llama.visible(torch.tensor([[3], [8]]), 9) if masked else torch.ones(1, 1, 1, 9, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(*(heads.double() for heads in (q, k, v)), attn_mask=mask, enable_gqa=True)
    assert relative_error(llama.attend_from_one(q, k, v, mask), expected.transpose(1, 2).flatten(2)) < tolerance
    large = llama.attend_from_one(*(heads.half() * scale for heads, scale in ((q, 100), (k, 100), (v, 1))), mask)
    assert large.isfinite().all()                                    # unscaled, the products pass float16's 65504
    alone = llama.attend_from_one(q, k[:, :, :1], v[:, :, :1], None)                                # the first token of a text
    assert torch.equal(alone.view(2, 6, 16), v[:, :, 0].repeat_interleave(3, 1))


def test_rope_sees_only_distances_between_positions():
    model, tokens = small(rope_scaling=LLAMA3, rope_theta=100.0), prompts(2, 10)
    with torch.no_grad():
        moved = model(tokens, positions=torch.arange(10).expand(2, 10) + 57)
        spread = model(tokens, positions=torch.arange(10).expand(2, 10) * 2)
        assert relative_error(moved, model(tokens)) < 1e-5
        assert relative_error(spread, model(tokens)) > 1e-2


def test_hidden_only_leaves_the_head_to_the_caller():
    model, tokens = small(), prompts(2, 10)
    with torch.no_grad():
        hidden = model(embeds=model.embed(tokens), hidden_only=True)
        assert torch.equal(model.logits(hidden), model(tokens))
        assert relative_error(model.logits(hidden[:, 3:5]), model(tokens)[:, 3:5]) < 1e-6


def test_random_start_is_as_good_as_guessing():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(256, 64, 128, 4, 4))
    tokens = torch.randint(0, 256, (64, 32), generator=seeded(2))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(256) - 0.5) < 0.1              # logits of variance 1 cost half of it, in nats
    attention = model.layers[0].self_attn                            # 4096 weights: their deviation is known to 1.1%
    assert attention.q_proj.weight.std().item() == pytest.approx(64 ** -0.5, rel=0.05)
    assert attention.o_proj.weight.std().item() == pytest.approx(64 ** -0.5 / math.sqrt(8), rel=0.05)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = small(sliding_window=4).train()
        model.gradient_checkpointing = recompute
        model(prompts(2, 9)).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients):
        assert relative_error(recomputed, plain) < 1e-5


def test_training_forward_is_one_graph_for_the_compiler():
    model, tokens = small(sliding_window=4), prompts(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # fullgraph: a break in the graph is an error
    assert relative_error(compiled(tokens).detach(), model(tokens).detach()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    """16-bit weights and activations err by about 2^-8 an operation in bfloat16; 5% bounds two blocks of them."""
    exact, model = Llama.from_pretrained(MULTI_HEAD), Llama.from_pretrained(MULTI_HEAD, dtype=dtype)
    tokens = prompts(2, 60)
    with torch.no_grad():
        logits = model(tokens)
        assert logits.dtype == dtype and relative_error(logits, exact(tokens)) < 0.05
        assert torch.equal(exact.to(dtype)(tokens), logits)          # .to() rounds the weights, not RoPE's frequencies
    assert model.generate(tokens[:, :5], 6).shape == (2, 6)


def test_autocast_runs_forward_and_generation(monkeypatch):
    model, tokens = small(), prompts(2, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(tokens).float(), small()(tokens).float()) < 0.05
        caches, make = [], llama.KVCache
        monkeypatch.setattr(llama, "KVCache", lambda *given: caches.append(make(*given)) or caches[0])
        assert model.generate(tokens, 6).shape == (2, 6)
    assert {keys.dtype for keys in caches[0].keys} == {torch.bfloat16}     # half of what float32 weights would ask for


def test_the_mean_of_squares_is_taken_in_float32():
    """300² is over float16's 65504."""
    norm = llama.RMSNorm(64, 1e-6).half()
    assert norm(torch.full((1, 64), 300.0).half()).eq(1).all()


# --- generation -------------------------------------------------------------------------------------------------------

def greedy_without_cache(model, prompt, new):
    tokens = prompt[None]
    with torch.no_grad():
        for _ in range(new):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt):]


@pytest.mark.parametrize("settings", [{}, dict(sliding_window=4), dict(rope_scaling=LLAMA3),
                                      dict(qkv_bias=True, sliding_window=3, max_window_layers=1)], ids=str)
def test_ragged_rows_of_a_batch_say_what_each_says_alone(settings):
    model, lengths, width = small(3, **settings), [9, 1, 5, 8], 9
    rows = [prompts(1, length, seed=length)[0] for length in lengths]
    alone = torch.stack([greedy_without_cache(model, row, 15) for row in rows])
    right = torch.stack([torch.cat((row, torch.full((width - len(row),), 60))) for row in rows])
    assert torch.equal(model.generate(right, 15, lengths=lengths), alone)
    left = torch.stack([torch.cat((torch.full((width - len(row),), 60), row)) for row in rows])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    assert torch.equal(model.generate(left, 15, attention_mask=mask), alone)
    assert torch.equal(model.generate(right, 15, attention_mask=mask.flip(1).bool()), alone)
    assert torch.equal(model.generate(embeds=model.embed(left), max_new_tokens=15, attention_mask=mask), alone)


@pytest.mark.parametrize("settings", [{}, dict(sliding_window=4), dict(sliding_window=4, max_window_layers=1)], ids=str)
def test_tokens_added_to_the_cache_in_pieces_give_the_logits_of_the_whole(settings):
    model, tokens = small(**settings), prompts(2, 16)
    positions = torch.arange(16).expand(2, 16)
    cache = KVCache(model.config, 2, 20)
    with torch.no_grad():
        pieces = [model(tokens[:, :6], cache=cache)] + [
            model(tokens[:, a:b], positions=positions[:, a:b], cache=cache) for a, b in ((6, 7), (7, 13), (13, 16))]
        assert relative_error(torch.cat(pieces, dim=1), model(tokens)) < 1e-5


def test_stream_yields_what_generate_returns():
    model, tokens = small(), prompts(3, 5)
    for settings in ({}, dict(temperature=0.9, top_k=20, top_p=0.8)):
        steps = list(model.stream(tokens, max_new_tokens=7, generator=seeded(4), **settings))
        assert torch.equal(torch.stack(steps, dim=1), model.generate(tokens, 7, generator=seeded(4), **settings))


def test_head_scores_only_the_last_token_of_each_row(monkeypatch):
    model, shapes, logits = small(), [], Llama.logits
    monkeypatch.setattr(Llama, "logits", lambda self, hidden: shapes.append(hidden.shape) or logits(self, hidden))
    model.generate(prompts(3, 50), 4)
    assert shapes == [(3, 32)] * 4


def test_ended_rows_are_filled_with_eos_and_all_ended_stops():
    model, tokens = small(), prompts(3, 5)
    free = model.generate(tokens, 12)
    ends = [free[0, 2].item(), free[1, 4].item(), free[2, 0].item()]
    ended = model.generate(tokens, 12, eos=ends)
    first = [min(i for i, token in enumerate(row) if token in ends) for row in free.tolist()]
    assert ended.shape[1] == max(first) + 1
    for row, whole, end in zip(ended.tolist(), free.tolist(), first):
        assert row == whole[:end + 1] + [ends[0]] * (len(row) - end - 1)
    model.config.eos_token_id = ends                                 # what eos=None takes, and eos=[] overrides
    assert torch.equal(model.generate(tokens, 12), ended)
    assert torch.equal(model.generate(tokens, 12, eos=[]), free)


def test_padding_may_be_an_id_outside_the_vocabulary():
    model, tokens = small(), prompts(2, 5)
    tokens[1, 3:] = 99
    assert torch.equal(model.generate(tokens, 4, lengths=[5, 3])[1:], model.generate(tokens[1:, :3], 4))


# --- sampling ---------------------------------------------------------------------------------------------------------

def kept(logits, temperature, top_k, top_p):
    """The distribution to draw from, slowly: {id: probability}."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    likeliest = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total, mass, chosen = sum(weights[i] for i in likeliest), 0, []
    for i in likeliest:
        if top_p is None or mass < top_p:
            chosen.append(i)
        mass += weights[i] / total
    return {i: weights[i] / sum(weights[j] for j in chosen) for i in chosen}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1, None, None), (0.5, None, None), (2.0, 5, None), (1, None, 0.6), (0.7, 8, 0.9), (1.5, 99, 1.0), (1, None, 1e-6)])
def test_samples_follow_temperature_top_k_and_top_p(temperature, top_k, top_p):
    """20000 draws: a frequency's standard error is at most 0.0035, and the bound is more than four of them."""
    logits, draws = torch.randn(12, generator=seeded(5)), 20000
    ids = sample(logits.expand(draws, 12), temperature, top_k, top_p, seeded(6)).tolist()
    expected, counts = kept(logits.tolist(), temperature, top_k, top_p), Counter(ids)
    assert set(counts) <= set(expected)
    for i, probability in expected.items():
        assert abs(counts[i] / draws - probability) < 0.015


def test_one_candidate_is_greedy():
    model, tokens = small(), prompts(3, 5)
    greedy = model.generate(tokens, 8)
    assert torch.equal(model.generate(tokens, 8, temperature=1.3, top_k=1), greedy)
    assert torch.equal(model.generate(tokens, 8, temperature=1.3, top_p=1e-9), greedy)
    assert not torch.equal(model.generate(tokens, 8, temperature=1.3, generator=seeded(7)), greedy)


def test_the_fewest_tokens_that_reach_top_p_are_kept():
    halves = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(200, 3)
    assert set(sample(halves, 1, None, 0.5, seeded(1)).tolist()) == {0}
    assert len(set(sample(halves, 1, None, 0.51, seeded(1)).tolist())) == 2


def test_same_seed_same_sample():
    model, tokens = small(), prompts(3, 5)
    first, again, other = (model.generate(tokens, 8, temperature=1, generator=seeded(seed)) for seed in (8, 8, 9))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- configs and checkpoints ------------------------------------------------------------------------------------------

SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)


def test_old_and_new_ways_to_write_rope_are_one_config():
    for scaling in (dict(type="linear", factor=4.0), LLAMA3):
        old = LlamaConfig.from_dict(SHAPE | dict(rope_theta=5e5, rope_scaling=scaling), "old")
        new = LlamaConfig.from_dict(SHAPE | dict(rope_parameters=scaling | dict(rope_theta=5e5)), "new")
        assert old == new and new.rope_theta == 5e5
    default = LlamaConfig.from_dict(SHAPE | dict(rope_parameters=dict(rope_type="default", rope_theta=7.0)), "default")
    assert default == LlamaConfig(**SHAPE, rope_theta=7.0) and default.rope_scaling is None


def test_linear_scaling_stretches_the_context():
    scaling = dict(rope_type="linear", factor=4.0)
    assert LlamaConfig(**SHAPE, max_position_embeddings=4096, rope_scaling=scaling).context == 16384
    assert LlamaConfig(**SHAPE, max_position_embeddings=4096, rope_scaling=LLAMA3).context == 4096


def test_mistral_without_the_key_has_its_window_and_null_has_none():
    assert LlamaConfig.from_dict(SHAPE | dict(model_type="mistral"), "v0.1").sliding_window == 4096
    assert LlamaConfig.from_dict(SHAPE | dict(model_type="mistral", sliding_window=None), "v0.2").sliding_window is None
    assert LlamaConfig.from_dict(SHAPE | dict(model_type="llama", sliding_window=9), "llama").sliding_window is None


def test_a_list_of_layers_says_what_the_number_says_or_is_an_error():
    """transformers 5 writes layer_types into every Qwen2's config and goes by it."""
    window = SHAPE | dict(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    kinds = ["full_attention", "sliding_attention"]
    assert LlamaConfig.from_dict(window | dict(layer_types=kinds), "same") == LlamaConfig.from_dict(window, "none")
    off = window | dict(use_sliding_window=False)
    assert LlamaConfig.from_dict(off | dict(layer_types=["full_attention"] * 2), "same") == LlamaConfig.from_dict(off, "none")
    for wrong in (kinds[::-1], kinds[:1], ["full_attention"] * 2):
        with pytest.raises(InputError, match="somewhere: layer_types gives the window to other blocks"):
            LlamaConfig.from_dict(window | dict(layer_types=wrong), "somewhere")


def test_qwen2_has_its_window_only_where_it_is_switched_on():
    window = dict(model_type="qwen2", sliding_window=7, max_window_layers=1)
    off, on = (LlamaConfig.from_dict(SHAPE | window | dict(use_sliding_window=use), "qwen2") for use in (False, True))
    assert off.sliding_window is None and (on.sliding_window, on.max_window_layers) == (7, 1)
    assert LlamaConfig.from_dict(SHAPE | window, "absent").sliding_window is None
    model = Llama(off)                                               # biases on q, k and v, and on nothing else
    assert {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("change, named", [
    (dict(model_type="gemma"), "gemma"), (dict(hidden_act="quick_gelu"), "quick_gelu"),
    (dict(rope_scaling=dict(type="yarn", factor=2)), "yarn"), (dict(rope_scaling=dict(rope_type="llama3")), "factor"),
    (dict(num_key_value_heads=3), "num_key_value_heads"), (dict(vocab_size=None), "vocab_size")])
def test_config_that_is_not_of_the_family_is_an_error(change, named):
    with pytest.raises(InputError, match=rf"somewhere.*{named}") as error:
        LlamaConfig.from_dict(SHAPE | change, "somewhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [
    {}, dict(tie_word_embeddings=True, rope_scaling=LLAMA3), dict(sliding_window=4), dict(qkv_bias=True),
    dict(qkv_bias=True, sliding_window=4, max_window_layers=1),
    dict(head_dim=12, attention_bias=True, mlp_bias=True, eos_token_id=[2, 7])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_loads_as_it_was(settings, dtype, tmp_path):
    model = small(**settings).to(dtype)
    model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == model.config
    for (name, ours), (other, loaded) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, loaded) and loaded.requires_grad
    with torch.no_grad():
        assert torch.equal(model(prompts(2, 9)), again(prompts(2, 9)))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_tables_and_tied_heads_of_early_files_are_left_out(tmp_path):
    model = small(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"lm_head.weight": torch.zeros(61, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert torch.equal(Llama.from_pretrained(tmp_path)(prompts(1, 5)), model(prompts(1, 5)))


def test_untied_model_without_head_is_an_error_and_not_a_random_head(tmp_path):
    shutil.copytree(MULTI_HEAD, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight"):
        Llama.from_pretrained(tmp_path)


def test_generation_config_names_the_end_tokens_of_chat_models(tmp_path):
    small(eos_token_id=2).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert Llama.from_pretrained(tmp_path).config.eos_token_id == [2, 9]


# --- bad requests -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, named", [
    (dict(temperature=-1), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(temperature=1, top_k=0), "top_k"), (dict(temperature=1, top_p=0), "top_p"),
    (dict(temperature=1, top_p=1.5), "top_p"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(max_new_tokens=124), "context of 128"),
    (dict(lengths=[5, 0]), "empty prompt"), (dict(lengths=[6, 5]), "6 tokens"),
    (dict(attention_mask=torch.tensor([[1] * 5, [0] * 5])), "empty prompt")], ids=str)
def test_request_that_cannot_be_met_is_an_error_that_says_why(settings, named):
    with pytest.raises(InputError, match=named):
        small().generate(prompts(2, 5), **dict(max_new_tokens=4) | settings)


@pytest.mark.parametrize("token", [61, -1])
def test_token_outside_the_vocabulary_is_an_error(token):
    tokens = prompts(2, 5)
    tokens[1, 2] = token
    with pytest.raises(InputError, match=f"token id {token} is outside the vocabulary of 61"):
        small().generate(tokens, 4)


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_empty_prompt_is_an_error(shape):
    with pytest.raises(InputError, match="empty prompt"):
        small().generate(torch.zeros(shape, dtype=torch.long), 4)


def test_the_last_place_of_the_context_can_be_filled():
    assert small().generate(prompts(1, 100), 28).shape == (1, 28)

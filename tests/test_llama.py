"""llama.py and interop/phi.py: recorded results of transformers, packed rows, generation, configs.

make_llama_fixtures.py writes the fixtures. live_transformers.py compares more variants.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import recorded, refused, relative_error
from safetensors.torch import load_file, save_file

from interop.phi import Phi, PhiConfig
from llama import Llama, LlamaConfig, RMSNorm, pack, sample

RECORDED = ("llama_multi_head", "llama_llama3_rope", "llama_biases_linear_rope")
RECORDED += ("llama_mistral_window", "llama_qwen2_window", "llama_qwen3", "llama_smollm3", "phi")
SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=40)
SHAPE |= dict(num_hidden_layers=2, num_attention_heads=4)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=64)
WINDOW = {"sliding_window": 4}
QWEN2 = WINDOW | {"qkv_bias": True, "max_window_layers": 1}
QWEN3 = {"qk_norm": True, "head_dim": 12}
SMOLLM3 = {"no_rope_layers": [0, 1]}
PHI = {"partial_rotary_factor": 0.5}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small(**settings):
    """Build a random model whose attention is far from uniform, so that a wrong mask shows."""
    shape = {"num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": None}
    settings = SHAPE | shape | settings
    is_phi = "partial_rotary_factor" in settings
    model = Phi(PhiConfig(**settings)) if is_phi else Llama(LlamaConfig(**settings))
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            noise = 0.3 * torch.randn(parameter.shape, generator=seeded(i))
            parameter.copy_(1 + noise if "norm.weight" in name else noise)
    return model


def prompts(batch, length, seed=1):
    return torch.randint(0, 61, (batch, length), generator=seeded(seed))


def gradients(model, logits):
    model.zero_grad()
    logits.logsumexp(-1).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_logits_and_greedy_ids_are_those_of_transformers(name):
    folder, expected = recorded(name)
    model = (Phi if name == "phi" else Llama).from_pretrained(folder)
    assert relative_error(model(expected["tokens"]), expected["logits"]) < 1e-5
    rows = zip(expected["prompts"], expected["mask"].bool(), expected["greedy"], strict=True)
    for prompt, mask, ids in rows:
        assert torch.equal(model.generate(prompt[mask][None], 12)[0], ids)


def test_a_real_llama_tells_its_published_story(real):
    folder = real / "llama-stories260K"
    expected = json.loads((folder / "expected.json").read_text())
    ids = Llama.from_pretrained(folder).generate(torch.tensor([[1]]), 255)[0].tolist()
    assert [1, *ids] == expected["greedy_ids_with_bos"]


@pytest.mark.parametrize("settings", ({}, WINDOW, QWEN2, PHI), ids=str)
def test_sequences_in_a_packed_row_do_not_see_each_other(settings):
    """Logits and gradients equal those of each sequence alone."""
    model, lengths = small(**settings), [7, 1, 12, 5]
    row = prompts(1, sum(lengths))
    packed = model(row, packed=pack(lengths))
    alone = torch.cat([model(piece) for piece in row.split(lengths, dim=1)], dim=1)
    assert relative_error(packed, alone) < 1e-5
    assert relative_error(gradients(model, packed), gradients(model, alone)) < 1e-5


@torch.no_grad()
def test_half_precision_rounds_weights_and_activations_but_no_positions():
    folder, tokens = recorded("llama_multi_head")[0], prompts(2, 60)
    exact = Llama.from_pretrained(folder)(tokens)
    for dtype in (torch.bfloat16, torch.float16):
        model = Llama.from_pretrained(folder, dtype=dtype)
        assert model(tokens).dtype == dtype and relative_error(model(tokens), exact) < 0.05
        assert model.rope_frequencies.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Llama.from_pretrained(folder).generate(tokens, 3).shape == (2, 3)
    assert RMSNorm(4, 1e-6)(torch.ones(4).bfloat16()).dtype == torch.bfloat16
    # 300² is more than float16 holds.
    assert RMSNorm(64, 1e-6).half()(torch.full((1, 64), 300.0).half()).eq(1).all()


def greedy_without_cache(model, prompt, new):
    tokens = prompt[None]
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt) :]


@pytest.mark.parametrize("settings", (QWEN3, WINDOW, QWEN2, {"rope_scaling": LLAMA3}), ids=str)
@torch.no_grad()
def test_prompts_of_a_batch_are_answered_as_each_alone_without_a_cache(settings):
    model, lengths = small(**settings), [9, 1, 5, 8]
    rows = [prompts(1, length, seed=length)[0] for length in lengths]
    alone = torch.stack([greedy_without_cache(model, row, 15) for row in rows])
    padded = torch.stack([F.pad(row, (0, 9 - len(row)), value=60) for row in rows])
    assert torch.equal(model.generate(padded, 15, lengths=lengths), alone)
    embeds = model.embed(padded)
    assert torch.equal(model.generate(None, 15, embeds=embeds, lengths=lengths), alone)


def test_an_ended_row_repeats_eos_and_generation_stops_when_all_have_ended():
    model, tokens = small(), prompts(3, 5)
    free = model.generate(tokens, 12)
    ends = [free[0, 2].item(), free[1, 4].item(), free[2, 0].item()]
    ended = model.generate(tokens, 12, eos=ends)
    first = [min(i for i, token in enumerate(row) if token in ends) for row in free.tolist()]
    assert ended.shape[1] == max(first) + 1
    for row, whole, end in zip(ended.tolist(), free.tolist(), first, strict=True):
        assert row == whole[: end + 1] + [ends[0]] * (len(row) - end - 1)
    model.config.eos_token_id = ends
    assert torch.equal(model.generate(tokens, 12), ended)
    assert torch.equal(model.generate(tokens, 12, eos=[]), free)


def test_samples_follow_temperature_top_k_and_top_p_and_a_seed_repeats_them():
    """A frequency of 20000 draws has a standard error of at most 0.0035. The bound is 4 of them."""
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    for temperature, top_k, top_p, expected in (
        (1, None, None, [0.4, 0.3, 0.15, 0.1, 0.05]),
        (0.5, None, None, [0.5614, 0.3158, 0.0789, 0.0351, 0.0088]),
        (1, 2, None, [4 / 7, 3 / 7, 0, 0, 0]),
        (1, 99, 0.69, [4 / 7, 3 / 7, 0, 0, 0]),
        (1, None, 0.71, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        (1, None, 1e-6, [1, 0, 0, 0, 0]),
    ):
        ids = sample(logits.expand(20000, 5), temperature, top_k, top_p, seeded(6))
        counts = ids.bincount(minlength=5)
        for number, probability in zip(counts.tolist(), expected, strict=True):
            assert abs(number / 20000 - probability) < 0.015
            assert probability > 0 or number == 0
    model, tokens = small(), prompts(3, 5)
    greedy = model.generate(tokens, 8)
    assert torch.equal(model.generate(tokens, 8, temperature=1.3, top_k=1), greedy)
    runs = [model.generate(tokens, 8, temperature=1.3, generator=seeded(s)) for s in (8, 8, 9)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_wrong_request_is_an_error_that_names_the_option():
    model, tokens = small(), prompts(2, 5)
    assert model.generate(prompts(1, 100), 28).shape == (1, 28)
    for options, name in (
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1, "top_k": 0}, "top_k"),
        ({"temperature": 1, "top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 124}, "max_new_tokens"),
        ({"lengths": [5, 0]}, "lengths"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, "empty prompt"),
    ):
        with refused(name):
            model.generate(**{"tokens": tokens, "max_new_tokens": 4} | options)


def test_a_config_means_what_transformers_takes_it_for():
    def read(**changes):
        return LlamaConfig.from_dict(SHAPE | changes, "somewhere")

    for scaling in ({"type": "linear", "factor": 4.0}, LLAMA3):
        old = read(rope_theta=5e5, rope_scaling=scaling)
        assert old == read(rope_parameters=scaling | {"rope_theta": 5e5}) and old.rope_theta == 5e5
    assert read(rope_scaling={"type": "linear", "factor": 4.0}).context == 4 * 2048
    assert read(model_type="mistral").sliding_window == 4096
    qwen2 = dict(model_type="qwen2", sliding_window=7, max_window_layers=1)
    assert read(**qwen2).sliding_window is None
    on = read(**qwen2, use_sliding_window=True)
    assert (on.sliding_window, on.max_window_layers, on.qkv_bias) == (7, 1, True)
    assert read(model_type="qwen3").head_dim == 128
    smollm3 = read(model_type="smollm3")
    assert (smollm3.rope_theta, smollm3.no_rope_layers[:5]) == (2e6, [1, 1, 1, 0, 1])
    rope = {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.25}
    phi = PhiConfig.from_dict(SHAPE | {"model_type": "phi", "rope_parameters": rope}, "somewhere")
    assert (phi.rotary_dim, phi.rope_theta, phi.hidden_act) == (2, 7.0, "gelu_new")


def test_a_config_that_cannot_be_computed_is_one_line_that_names_the_key():
    for change, name in (
        ({"model_type": "gemma"}, "gemma"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ):
        with refused(f"somewhere.*{name}"):
            LlamaConfig.from_dict(SHAPE | change, "somewhere")
    with refused("relu"):
        Phi(PhiConfig(**SHAPE, hidden_act="relu"))


def test_a_saved_model_loads_as_it_was(tmp_path):
    ends = {"eos_token_id": [2, 7]}
    biases = {"head_dim": 12, "attention_bias": True, "mlp_bias": True}
    tied = {"tie_word_embeddings": True, "rope_scaling": LLAMA3}
    for i, settings in enumerate((ends, tied, WINDOW, QWEN2, QWEN3, SMOLLM3, biases, PHI)):
        model = small(**settings).to((torch.float32, torch.bfloat16)[i % 2])
        model.save_pretrained(tmp_path / str(i))
        again = type(model).from_pretrained(tmp_path / str(i), model.embed_tokens.weight.dtype)
        assert again.config == model.config
        assert model.state_dict().keys() == again.state_dict().keys()
        assert all(p.requires_grad for p in again.parameters())
        assert torch.equal(model(prompts(2, 9)), again(prompts(2, 9)))


def test_unused_tensors_of_early_files_are_ignored(tmp_path):
    model = small(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    file, unused = tmp_path / "model.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(file)
    more = {"lm_head.weight": torch.zeros(61, 32), unused: torch.zeros(4)}
    save_file(tensors | more, file)
    again = Llama.from_pretrained(tmp_path)
    assert torch.equal(again(prompts(1, 5)), model(prompts(1, 5)))
    # Some chat models name their end tokens only in generation_config.json.
    assert again.config.eos_token_id == [2, 9]

"""phi.py: recorded results of transformers, generation, training, configs, and its place in a multimodal model.
The fixture is written by make_llama_fixtures.py, and test_llama_live.py compares more variants."""
import json

import pytest
import torch

from conftest import recorded, relative_error
from connector import ConnectorConfig
from hub import InputError
from llama import KVCache
from mllm import MLLM, llm_class
from phi import Phi, PhiConfig

SHAPE = dict(model_type="phi", vocab_size=61, hidden_size=40, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             partial_rotary_factor=0.4)


@pytest.fixture
def phi():
    return Phi.from_pretrained(recorded("phi")[0])


def prompts(batch, width):
    return torch.randint(0, 61, (batch, width), generator=torch.Generator().manual_seed(1))


def test_hidden_states_logits_and_greedy_ids_are_the_recorded_ones(phi):
    expected, states = recorded("phi")[1], []
    with torch.no_grad():
        logits = phi(expected["tokens"], states=states)
    assert len(states) == len(expected["hidden_states"]) == 3
    for i, hidden in enumerate(states):
        assert relative_error(hidden, expected["hidden_states"][i]) < 1e-5, f"hidden state {i}"
    assert relative_error(logits, expected["logits"]) < 1e-5
    assert torch.equal(phi.generate(expected["prompts"], 12, attention_mask=expected["mask"]), expected["greedy"])


def test_tokens_added_to_the_cache_in_pieces_give_the_logits_of_the_whole(phi):
    tokens, positions, cache = prompts(2, 16), torch.arange(16).expand(2, 16), KVCache(phi.config, 2, 20)
    with torch.no_grad():
        pieces = [phi(tokens[:, :6], cache=cache)] + [
            phi(tokens[:, a:b], positions=positions[:, a:b], cache=cache) for a, b in ((6, 7), (7, 13), (13, 16))]
        assert relative_error(torch.cat(pieces, dim=1), phi(tokens)) < 1e-5


def test_sequences_packed_into_one_row_are_as_each_alone(phi):
    row, lengths = prompts(1, 25), [7, 1, 12, 5]
    with torch.no_grad():
        alone = torch.cat([phi(piece) for piece in row.split(lengths, dim=1)], dim=1)
        assert relative_error(phi(row, lengths=lengths), alone) < 1e-6


def test_gradient_checkpointing_gives_the_same_gradients(phi):
    gradients = []
    for phi.gradient_checkpointing in (False, True):
        phi.train().zero_grad()
        phi(prompts(2, 9)).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in phi.parameters()])
    for plain, recomputed in zip(*gradients):
        assert relative_error(recomputed, plain) < 1e-5


def test_training_forward_is_one_graph_for_the_compiler(phi):
    compiled = torch.compile(phi, fullgraph=True, backend="eager")   # fullgraph: a break in the graph is an error
    assert relative_error(compiled(prompts(2, 9)).detach(), phi(prompts(2, 9)).detach()) < 1e-6


def test_half_precision_rounds_the_weights_and_not_the_frequencies(phi):
    exact, tokens = phi(prompts(2, 60)).detach(), prompts(2, 60)
    assert phi.bfloat16().rope_frequencies.dtype == torch.float32
    assert relative_error(phi(tokens).detach(), exact) < 0.05        # about 2^-8 an operation, through two blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_loads_as_it_was(phi, dtype, tmp_path):
    phi.to(dtype).save_pretrained(tmp_path)
    again = Phi.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == phi.config
    for (name, ours), (other, loaded) in zip(phi.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, loaded)


def test_rotary_part_is_read_where_either_layout_writes_it():
    rope = dict(rope_type="default", rope_theta=7.0, partial_rotary_factor=0.4)
    shape = {key: value for key, value in SHAPE.items() if key != "partial_rotary_factor"}
    old = PhiConfig.from_dict(SHAPE | dict(rope_theta=7.0), "old")
    new = PhiConfig.from_dict(shape | dict(rope_parameters=rope), "new")
    assert old == new and new.rotary_dim == 4 and new.rope_theta == 7.0
    absent = PhiConfig.from_dict({key: value for key, value in shape.items() if key != "hidden_act"}, "absent")
    assert absent.rotary_dim == 5 and absent.hidden_act == "gelu_new"


@pytest.mark.parametrize("change, named", [
    (dict(model_type="llama"), "llama"), (dict(model_type="phi-msft"), "newest revision"), (dict(qk_layernorm=True), "qk_layernorm"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings"), (dict(hidden_act="relu"), "relu"), (dict(hidden_size=None), "hidden_size")])
def test_config_of_another_kind_is_an_error(change, named):
    with pytest.raises(InputError, match=rf"somewhere.*{named}") as error:
        PhiConfig.from_dict(SHAPE | change, "somewhere")
    assert "\n" not in str(error.value)


def test_multimodal_model_speaks_with_phi(world_tokenizer, tiny_folders, tmp_path):
    """Assembled by the model_type of its folder, trained for a step, saved, loaded, and talked to."""
    torch.manual_seed(0)
    Phi(PhiConfig(world_tokenizer.get_vocab_size(), 40, 64, 2, 4, partial_rotary_factor=0.4)).save_pretrained(tmp_path / "phi")
    world_tokenizer.save(str(tmp_path / "phi" / "tokenizer.json"))
    model = MLLM.assemble([tiny_folders["clip"]], tmp_path / "phi", ConnectorConfig("mlp"), "tiny")
    assert isinstance(model.llm, Phi)
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    pixels, ids = model.prompt([picture], [("what?", None)])
    tokens = torch.tensor([ids])
    loss, count = model(pixels, tokens, torch.where(tokens < 0, -100, tokens))
    loss.backward()
    assert count > 0 and all(parameter.grad is not None for parameter in model.llm.layers.parameters())
    model.save(tmp_path / "model")
    again = MLLM.from_pretrained(tmp_path / "model")
    assert isinstance(again.llm, Phi) and again.llm.config == model.llm.config
    assert again.generate([picture], ["what?"], 5) == model.eval().generate([picture], ["what?"], 5)


def test_language_model_of_another_kind_is_an_error_that_lists_ours(tiny_folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(InputError, match="'gemma2' is not a language model of ours .llama, mistral, qwen2, phi"):
        MLLM.assemble([tiny_folders["clip"]], tmp_path, ConnectorConfig("mlp"))
    assert llm_class("phi", "") is Phi

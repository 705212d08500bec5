"""llama.py and phi.py against transformers, on fresh random models and inputs of every variant."""
import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import relative_error
from llama import Llama, LlamaConfig
from make_llama_fixtures import VARIANTS, continuation, prompts_of, reference
from mllm import llm_class
from phi import Phi, PhiConfig

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_logits_and_greedy_ids_are_those_of_transformers(variant, tmp_path):
    theirs = reference(variant, seed=7)
    theirs.save_pretrained(tmp_path)
    ours = llm_class(theirs.config.model_type, tmp_path).from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 40), generator=generator)
    states = []
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        logits = ours(tokens, states=states)
    assert len(states) == len(expected.hidden_states) == theirs.config.num_hidden_layers + 1
    for i, (hidden, reference_hidden) in enumerate(zip(states, expected.hidden_states)):
        assert relative_error(hidden, reference_hidden) < 1e-5, f"hidden state {i}"
    assert relative_error(logits, expected.logits) < 1e-5

    prompts, mask = prompts_of(generator, theirs.config.vocab_size, 4, 11)
    assert torch.equal(ours.generate(prompts, 20, attention_mask=mask), continuation(theirs, prompts, mask, 20))


@pytest.mark.parametrize("variant, dtype, shard", [
    ("grouped", torch.float32, "20KB"), ("grouped", torch.bfloat16, "1GB"), ("grouped", torch.float16, "1GB"),
    ("qwen2", torch.bfloat16, "20KB"), ("phi", torch.float16, "20KB")])
def test_sharded_and_half_precision_checkpoints_load(variant, dtype, shard, tmp_path):
    theirs = reference(variant, seed=9, dtype=dtype)
    tokens = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(10))
    with torch.no_grad():
        expected = theirs(tokens).logits                             # before .to(), which rounds transformers' RoPE too
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    ours = llm_class(theirs.config.model_type, tmp_path).from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    with torch.no_grad():
        assert relative_error(ours(tokens), expected) < 1e-5


def test_rows_end_where_those_of_transformers_end(tmp_path):
    theirs = reference("grouped", seed=11)
    prompts, mask = prompts_of(torch.Generator().manual_seed(12), 61, 4, 8)
    free = continuation(theirs, prompts, mask, 16)
    for end in ([free[0, 3].item()], [free[1, 5].item(), free[2, 0].item()], free[:, 6].unique().tolist()):
        theirs.generation_config.eos_token_id = theirs.config.eos_token_id = end
        theirs.save_pretrained(tmp_path)
        ours = Llama.from_pretrained(tmp_path)
        expected = continuation(theirs, prompts, mask, 16, pad_token_id=end[0])
        assert torch.equal(ours.generate(prompts, 16, attention_mask=mask), expected)


@pytest.mark.parametrize("settings", [
    dict(), dict(num_key_value_heads=2, tie_word_embeddings=True),
    dict(head_dim=10, attention_bias=True, mlp_bias=True),
    dict(rope_theta=100.0, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                             original_max_position_embeddings=64)),
    dict(sliding_window=6), dict(eos_token_id=[3, 4]),
    dict(qkv_bias=True, tie_word_embeddings=True), dict(qkv_bias=True, sliding_window=6, max_window_layers=1),
    dict(partial_rotary_factor=0.75, rope_theta=100.0)], ids=str)
def test_transformers_reads_what_save_pretrained_writes(settings, tmp_path):
    if "partial_rotary_factor" in settings:
        ours = Phi(PhiConfig(61, 32, 40, 2, 4, **settings))
    else:
        ours = Llama(LlamaConfig(61, 32, 40, 2, 4, **settings))
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == ours.config.to_dict()["architectures"][0]
    assert theirs.dtype == torch.float32
    tokens = torch.randint(0, 61, (2, 21), generator=generator)
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-5

"""llama.py and interop/phi.py against transformers, on new random models of every variant."""

# ruff: noqa: E402
import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import relative_error
from make_llama_fixtures import VARIANTS, continuation, prompts_of, reference
from test_llama import states_and_logits

from interop.phi import Phi, PhiConfig
from llama import Llama, LlamaConfig

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_states_logits_and_greedy_ids_are_those_of_transformers(variant, tmp_path):
    """Half of the variants are read from float16 shards."""
    theirs = reference(variant, seed=7, dtype=torch.float16)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 40), generator=generator)
    expected = theirs(tokens, output_hidden_states=True)
    prompts, mask = prompts_of(generator, theirs.config.vocab_size, 4, 11)
    greedy = continuation(theirs, prompts, mask, 20)
    if sorted(VARIANTS).index(variant) % 2:
        theirs.to(torch.float16).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        theirs.save_pretrained(tmp_path)
    cls = Phi if theirs.config.model_type == "phi" else Llama
    ours = cls.from_pretrained(tmp_path)
    states, logits = states_and_logits(ours, tokens)
    assert len(states) == len(expected.hidden_states)
    for state, reference_state in zip(states, expected.hidden_states, strict=True):
        assert relative_error(state, reference_state) < 1e-5
    assert relative_error(logits, expected.logits) < 1e-5
    for row, keep, ids in zip(prompts, mask.bool(), greedy, strict=True):
        assert torch.equal(ours.generate(row[keep][None], 20)[0], ids)


@pytest.mark.parametrize(
    "settings",
    (
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "eos_token_id": [3, 4]},
        {"rope_theta": 100.0, "rope_scaling": LLAMA3},
        {"sliding_window": 6},
        {"qkv_bias": True, "tie_word_embeddings": True},
        {"qkv_bias": True, "sliding_window": 6, "max_window_layers": 1},
        {"partial_rotary_factor": 0.75, "rope_theta": 100.0},
    ),
    ids=str,
)
@torch.no_grad()
def test_transformers_reads_what_save_pretrained_writes(settings, tmp_path):
    if "partial_rotary_factor" in settings:
        ours = Phi(PhiConfig(61, 32, 40, 2, 4, **settings))
    else:
        ours = Llama(LlamaConfig(61, 32, 40, 2, 4, **settings))
    generator = torch.Generator().manual_seed(13)
    for parameter in ours.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    ours.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__ == ours.config.to_dict()["architectures"][0]
    tokens = torch.randint(0, 61, (2, 21), generator=generator)
    assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-5

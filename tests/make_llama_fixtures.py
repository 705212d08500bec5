"""Write tests/fixtures/llama_*/ and phi/: small random checkpoints, and what transformers computes.

    pip install -r requirements-dev.txt && python tests/make_llama_fixtures.py

Each folder holds a checkpoint (config.json, model.safetensors) and expected.safetensors: `tokens`
(B, T), their `logits` (B, T, V), and `prompts` (B, T), padded on the left as `mask` says, with the
`greedy` ids (B, 12) that follow. live_transformers.py compares the logits of more variants.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
# With head_dim 16, theta 100 and 64 original positions, some pairs keep their frequency, some are
# blended, and some are slowed.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)

VARIANTS = {
    "multi_head": dict(rope_parameters=DEFAULT),
    "grouped": dict(num_key_value_heads=2, rope_parameters=DEFAULT),
    "one_key_head": dict(
        num_key_value_heads=1, rope_parameters=DEFAULT | dict(rope_theta=500000.0)
    ),
    "tied": dict(tie_word_embeddings=True, rope_parameters=DEFAULT),
    "llama3_rope": dict(
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "linear_rope": dict(rope_parameters=LINEAR),
    "biases": dict(attention_bias=True, mlp_bias=True, rope_parameters=DEFAULT),
    "wide_heads": dict(
        num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-3, rope_parameters=DEFAULT
    ),
    "biases_linear_rope": dict(attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    "mistral_window": dict(
        model_type="mistral", num_key_value_heads=2, sliding_window=5, rope_parameters=DEFAULT
    ),
    "mistral_no_window": dict(model_type="mistral", sliding_window=None, rope_parameters=DEFAULT),
    "qwen2": dict(
        model_type="qwen2", num_key_value_heads=2, rope_parameters=DEFAULT | dict(rope_theta=1e6)
    ),
    "qwen2_tied": dict(model_type="qwen2", tie_word_embeddings=True, rope_parameters=DEFAULT),
    # as the public files: a window is written down, and switched off
    "qwen2_window_off": dict(
        model_type="qwen2", use_sliding_window=False, sliding_window=5, rope_parameters=DEFAULT
    ),
    "qwen2_window": dict(
        model_type="qwen2",
        num_hidden_layers=3,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        rope_parameters=DEFAULT,
    ),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=12, rope_parameters=DEFAULT),
    "qwen3_window": dict(
        model_type="qwen3",
        head_dim=8,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        rope_parameters=DEFAULT,
    ),
    "smollm3": dict(
        model_type="smollm3", num_hidden_layers=5, num_key_value_heads=2, rope_parameters=DEFAULT
    ),
    "smollm3_untied": dict(
        model_type="smollm3",
        no_rope_layers=[0, 1],
        tie_word_embeddings=False,
        rope_parameters=DEFAULT,
    ),
    # heads of 10 channels, of which RoPE turns 4, as it turns 32 of 80 in Phi-2
    "phi": dict(
        model_type="phi", hidden_size=40, rope_parameters=DEFAULT | dict(partial_rotary_factor=0.4)
    ),
    "phi_half": dict(
        model_type="phi",
        hidden_act="gelu",
        layer_norm_eps=1e-3,
        rope_parameters=LINEAR | dict(partial_rotary_factor=0.5),
    ),
    "phi_grouped": dict(
        model_type="phi",
        num_key_value_heads=2,
        rope_parameters=DEFAULT | dict(partial_rotary_factor=0.75),
    ),
}
# what is recorded: folder -> the variant and the dtype of its file
RECORDED = {
    "llama_multi_head": ("multi_head", torch.float32),
    "llama_llama3_rope": ("llama3_rope", torch.bfloat16),
    "llama_biases_linear_rope": ("biases_linear_rope", torch.float32),
    "llama_mistral_window": ("mistral_window", torch.float32),
    "llama_qwen2_window": ("qwen2_window", torch.bfloat16),
    "phi": ("phi", torch.bfloat16),
    "llama_qwen3": ("qwen3", torch.bfloat16),
    "llama_smollm3": ("smollm3", torch.bfloat16),
}


def reference(variant, seed, dtype=torch.float32):
    """Build transformers' model of a variant, with weights rounded through `dtype`.

    They are so large that attention is far from uniform. An error in a position, a mask or a head
    then shows.
    """
    settings = SMALL | VARIANTS[variant]
    name = settings.pop("model_type", "llama").capitalize().replace("lm3", "LM3")
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"  # explicit products, so not what llama.py calls
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            weight = 0.3 * noise if parameter.dim() == 2 else (parameter + 0.2 * noise)
            parameter.copy_(weight.to(dtype))
    return model


def prompts_of(generator, vocab_size, batch, width):
    """Random prompts padded on the left, the first row whole -> ids, mask, (B, T) each."""
    tokens = torch.randint(1, vocab_size, (batch, width), generator=generator)
    lengths = torch.randint(1, width, (batch,), generator=generator)
    lengths[0] = width
    mask = torch.arange(width) >= width - lengths[:, None]
    return tokens.masked_fill(~mask, 0), mask.long()


def continuation(model, prompts, mask, new, **settings):
    """transformers' greedy ids after `prompts`, (B, new)."""
    with torch.no_grad():
        ids = model.generate(
            prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, **settings
        )
    return ids[:, prompts.shape[1] :]


def main():
    for seed, (folder, (variant, dtype)) in enumerate(RECORDED.items()):
        folder = Path(__file__).resolve().parent / "fixtures" / folder
        model = reference(variant, seed, dtype)
        generator = torch.Generator().manual_seed(100 + seed)
        tokens = torch.randint(0, model.config.vocab_size, (2, 17), generator=generator)
        with torch.no_grad():
            logits = model(tokens).logits
        prompts, mask = prompts_of(generator, model.config.vocab_size, 3, 9)
        expected = {
            "tokens": tokens,
            "logits": logits,
            "prompts": prompts,
            "mask": mask,
            "greedy": continuation(model, prompts, mask, 12).contiguous(),
        }
        model.to(dtype).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file(expected, folder / "expected.safetensors")
        print(
            f"{folder.name}: {sum(path.stat().st_size for path in folder.iterdir()) / 1000:.0f} KB"
        )


if __name__ == "__main__":
    main()

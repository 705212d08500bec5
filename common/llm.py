"""Checkpoint folders of LLaMA, Mistral, Qwen2 and Phi: config.json, tensor names, saving.

The files differ in age and origin. RoPE is described in `rope_scaling`, or since transformers 5 in
`rope_parameters`; a missing key has another meaning in each family; Qwen2 writes a window that it
switches off. Whatever the models cannot compute is an InputError here, not a wrong number later.
"""

import math
from dataclasses import asdict

import torch
import torch.nn as nn

from common.errors import InputError
from common.hub import (
    fields_of,
    load_weights,
    locate,
    on_meta,
    read_config,
    read_json,
    save_checkpoint,
)

# The values that transformers takes for keys that config.json lacks.
ABSENT = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class PretrainedLLM(nn.Module):
    """Load and save. Parameters have the checkpoints' names without the prefix "model.".

    A subclass has a config_class with from_dict and to_dict.
    """

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """Load a folder or Hugging Face id. InputError names a missing or unknown tensor."""
        folder = locate(folder_or_id)
        config = cls.config_class.from_dict(read_config(folder), folder)
        # Some chat models list their end tokens only here.
        generation = folder / "generation_config.json"
        if generation.exists():
            config.eos_token_id = read_json(generation).get("eos_token_id", config.eos_token_id)
        with on_meta():
            model = cls(config)
        return load_weights(model, folder, model.name_of, dtype, device)

    def name_of(self, name):
        """Translate a checkpoint's tensor name. None: an early file's unused tensor."""
        tied = name == "lm_head.weight" and self.config.tie_word_embeddings
        if tied or name.endswith("rotary_emb.inv_freq"):
            return None
        return name.removeprefix("model.")

    def save_pretrained(self, folder):
        """Write a folder that from_pretrained and transformers' AutoModelForCausalLM read."""
        tensors = {}
        for name, parameter in self.named_parameters():
            tensors[name if name.startswith("lm_head.") else f"model.{name}"] = parameter
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        save_checkpoint(folder, tensors, self.config.to_dict() | {"torch_dtype": dtype})


def read_llama(config, where):
    """Translate config.json's object into the fields of llama.LlamaConfig."""
    model_type = config.get("model_type", "llama")
    if model_type not in ABSENT:
        raise InputError(f"{where}: model_type is {model_type!r}, not one of {', '.join(ABSENT)}")
    config = ABSENT[model_type] | config | read_rope(config, where)
    config["qkv_bias"] = model_type == "qwen2"
    switched_off = model_type == "qwen2" and not config.get("use_sliding_window")
    if model_type == "llama" or switched_off:
        config["sliding_window"] = None
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act is {config['hidden_act']!r}, must be silu")
    check_layer_types(config, where)
    return config


def check_layer_types(config, where):
    """Raise InputError if `layer_types` gives the window to layers that ours does not."""
    first = config.get("max_window_layers", 0)
    expected = []
    for layer in range(config.get("num_hidden_layers") or 0):
        windowed = config.get("sliding_window") is not None and layer >= first
        expected.append("sliding_attention" if windowed else "full_attention")
    if config.get("layer_types") not in (None, expected):
        raise InputError(
            f"{where}: layer_types must give the window to all layers from max_window_layers on"
        )


def read_rope(config, where):
    """Read {"rope_theta", "rope_scaling"} from config.json's object, of either age."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_KEYS:
        raise InputError(f"{where}: rope_type is {rope_type!r}, not one of {', '.join(ROPE_KEYS)}")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {"rope_type": rope_type}
    for key in ROPE_KEYS[rope_type]:
        if key not in rope:
            raise InputError(f"{where}: the config's {rope_type} rope lacks {key}")
        scaling[key] = rope[key]
    return {"rope_theta": theta, "rope_scaling": scaling}


def scale_rope(frequency, scaling):
    """Lower RoPE's frequencies (D/2,) for a longer context.

    scaling: config.rope_scaling, or None. llama3 is Llama 3.1's (arXiv 2407.21783).
    """
    if scaling is None:
        return frequency
    slowed = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    # llama3: pairs that turn often within the original context keep their frequency, those that
    # turn less than low_freq_factor times are slowed, and between the two they are blended.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * slowed


def make_config(cls, values, where):
    """Build the config dataclass `cls` from its fields, and check them."""
    config = fields_of(cls, values, where)
    # In the file, null means that no token ends a text.
    config.eos_token_id = values.get("eos_token_id", config.eos_token_id)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise InputError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    return config


def write_llama(config):
    """Return what config.json holds for a LlamaConfig. transformers reads it, too."""
    values = asdict(config)
    model_type = "llama" if config.sliding_window is None else "mistral"
    if config.qkv_bias:
        model_type = "qwen2"
        values["use_sliding_window"] = config.sliding_window is not None
    architecture = f"{model_type.capitalize()}ForCausalLM"
    return {"architectures": [architecture], "model_type": model_type} | values


def check_request(config, tokens, lengths, T, new, temperature=0, top_k=None, top_p=None, **_):
    """Raise InputError if Llama.stream cannot do what its arguments ask for."""
    if len(lengths) == 0 or lengths.min() < 1 or lengths.max() > T:
        raise InputError(f"empty prompt, or wrong lengths: must be between 1 and {T} tokens")
    if tokens is not None and (tokens.min() < 0 or tokens.max() >= config.vocab_size):
        raise InputError(f"tokens: an id is outside the vocabulary of {config.vocab_size}")
    if new < 1 or lengths.max() + new > config.context:
        raise InputError(
            f"max_new_tokens={new}: must be 1 or more, and together with the prompt "
            f"({lengths.max()} tokens) at most the model's context of {config.context}"
        )
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k={top_k}: must be 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: must be above 0 and at most 1")

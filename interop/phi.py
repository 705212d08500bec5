"""Phi: a language model with parallel attention and MLP.

Checkpoints: microsoft/phi-2 (2.7B, the Dense Connector's smallest), phi-1 and phi-1_5. Papers:
Textbooks Are All You Need (arXiv 2306.11644, and II: 2309.05463). The parallel block is GPT-J's,
partial rotary positions are GPT-NeoX's (2204.06745).

    tokens (B, T) --embed--> hidden[0] (B, T, C)
        each of L blocks:   y = norm(x)                       one norm for both branches
                            x = x + attention(y) + mlp(y)     LLaMA runs one after the other
    hidden[i] (B, T, C): the output of block i; hidden[L]: the same after the final norm
        --lm_head--> logits (B, T, V): position t scores token t+1

Compared with llama.py: LayerNorm instead of RMSNorm, a plain MLP with GELU, biases everywhere, also
in lm_head, and RoPE on only the first 32 of the 80 channels of a head. Everything around the blocks
is llama.py's: the forward pass, the cache, generation, loading and saving.
"""

from dataclasses import asdict, dataclass

import torch.nn as nn

import llama
from common.pretrained import make_config, read_rope
from llama import Llama, LlamaConfig, rope_frequencies
from vit import MLP


@dataclass
class PhiConfig(LlamaConfig):
    """Keys of config.json, besides LLaMA's. A default is what a missing key means."""

    partial_rotary_factor: float = 0.5  # the part of a head's channels that RoPE rotates
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu_new"  # GELU's tanh approximation, or "gelu"
    attention_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.rotary_dim = int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, config, where):
        """Read config.json's object. `where` names the folder in errors (InputError)."""
        rope = config.get("rope_parameters") or {}
        return make_config(cls, config | rope | read_rope(config, where))

    def to_dict(self):
        """Return what config.json holds for this model. transformers reads it, too."""
        return {"architectures": ["PhiForCausalLM"], "model_type": "phi"} | asdict(self)


class Attention(llama.Attention):
    """LLaMA's attention with biases. The output layer is named `dense`."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.dense = self._modules.pop("o_proj")

    @property
    def o_proj(self):
        return self.dense


class Block(nn.Module):
    """A layer, (B, T, C) -> (B, T, C): attention and MLP read the same normed input."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        act = config.hidden_act.replace("gelu_new", "gelu_pytorch_tanh")
        self.mlp = MLP(config.hidden_size, config.intermediate_size, act)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x, *attention):
        y = self.input_layernorm(x)
        return x + self.self_attn(y, *attention) + self.mlp(y)


class Phi(Llama):
    """A Llama with other parts."""

    config_class = PhiConfig

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("rope_frequencies", rope_frequencies(config), persistent=False)
        self.initialize(("dense.weight", "fc2.weight"))

    @property
    def norm(self):
        return self.final_layernorm

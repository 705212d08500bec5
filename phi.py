"""Phi: a language model whose blocks attend and think at the same time.

Checkpoints: microsoft/phi-2 (2.7B, the Dense Connector's smallest), phi-1 and phi-1_5. Papers: Textbooks Are All You Need
(arXiv 2306.11644, and II: 2309.05463); the parallel block is GPT-J's, partial rotary positions are GPT-NeoX's (2204.06745).

    tokens (B, T) --embed--> hidden[0] (B, T, C)
        each of L blocks:   y = norm(x)                       one norm, and both branches read it
                            x = x + attention(y) + mlp(y)     side by side, where LLaMA has one after the other
    hidden[i] (B, T, C): the output of block i; hidden[L]: the same after the final norm
        --lm_head--> logits (B, T, V): row t scores token t+1

Against llama.py: LayerNorm for RMSNorm, a plain MLP with GELU for the gated one, biases everywhere (lm_head has one, too),
and RoPE turns only the first 32 of the 80 channels of a head: the others carry no position. What is around the blocks is the
same, so a Phi is a Llama with other parts: the forward pass, the cache, generation, loading and saving are read there.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn

from hub import InputError, fields_of
from llama import ACTIVATIONS, Llama, LlamaConfig, attend, check_config, read_rope, rope_frequencies, rotate


@dataclass
class PhiConfig:
    """The fields are keys of config.json. The defaults are what their absence means there."""
    vocab_size: int                         # V; of Phi-2's 51200 its tokenizer uses 50295
    hidden_size: int                        # C
    intermediate_size: int                  # width inside the MLP
    num_hidden_layers: int                  # L
    num_attention_heads: int                # H, heads of the queries
    num_key_value_heads: int = None         # G, heads of keys and values; None: H
    head_dim: int = None                    # D, width of a head; None: C / H
    partial_rotary_factor: float = 0.5      # RoPE turns this part of a head's channels: 0.4 in Phi-2
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = None
    max_position_embeddings: int = 2048     # trained context, in tokens
    hidden_act: str = "gelu_new"            # GELU by its tanh approximation
    bos_token_id: int = 1
    eos_token_id: int | list = 2            # Phi-2's file says 50256, <|endoftext|>, for both

    tie_word_embeddings, sliding_window, max_window_layers = False, None, 0  # never in a Phi; Llama asks for them
    __post_init__, context = LlamaConfig.__post_init__, LlamaConfig.context  # the same as there

    @classmethod
    def from_dict(cls, config, where):
        """config.json's object -> PhiConfig; `where` names its folder in errors."""
        kind = config.get("model_type")
        if kind != "phi":
            raise InputError(f"{where}: model_type is {kind!r}, not phi" + (
                ": this is an early file with its own code, take the newest revision" if kind == "phi-msft" else ""))
        for key in ("qk_layernorm", "tie_word_embeddings"):
            if config.get(key):
                raise InputError(f"{where}: {key} is true, which no public Phi has, and phi.py does not do")
        part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
        config = config | read_rope(config, where) | {"partial_rotary_factor": part}
        return check_config(fields_of(cls, config, where), config, where)

    def to_dict(self):
        """What config.json holds for this model; transformers reads it too."""
        return {"architectures": ["PhiForCausalLM"], "model_type": "phi", "tie_word_embeddings": False} | asdict(self)

    @property
    def rotary_dim(self):
        return int(self.head_dim * self.partial_rotary_factor)       # the first so many channels of a head


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.rotary_dim = layer, config.head_dim, config.rotary_dim
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide)
        self.k_proj = nn.Linear(config.hidden_size, narrow)
        self.v_proj = nn.Linear(config.hidden_size, narrow)
        self.dense = nn.Linear(wide, config.hidden_size)             # LLaMA's o_proj

    def forward(self, x, rope, mask, positions, cache):
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D); k and v: (B, G, T, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (torch.cat((rotate(heads[..., :self.rotary_dim], *rope), heads[..., self.rotary_dim:]), dim=-1)
                for heads in (q, k))
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # (B, G, max_length, D) each, at prefill as they were
        return self.dense(attend(q, k, v, mask))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x, rope, mask, positions, cache):
        y = self.input_layernorm(x)
        return x + self.self_attn(y, rope, mask, positions, cache) + self.mlp(y)  # (B, T, C)


class Phi(Llama):
    """A Llama with other parts. Parameters are named as in the checkpoints, without their prefix "model."."""
    config_class = PhiConfig

    def __init__(self, config):
        nn.Module.__init__(self)                                     # not Llama's, which would build its own parts
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("rope_frequencies", rope_frequencies(config), persistent=False)
        self.initialize(("dense.weight", "fc2.weight"))

    @property
    def norm(self):
        return self.final_layernorm                                  # as Llama.forward calls it

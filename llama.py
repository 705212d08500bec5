"""LLaMA: the language model, a causal transformer that predicts the next token.

Papers: LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783); RMSNorm (1910.07467), rotary positions
(RoPE, 2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245), Mistral's sliding window (2310.06825),
Qwen2's biases (2407.10671).
Checkpoints: all of this shape, from 135M to 70B: LLaMA 1 and 2, Llama 3.x, lmsys/vicuna-7b-v1.5, TinyLlama, SmolLM2, Yi and
Hermes-2-Yi-34B (model_type llama), mistralai/Mistral-7B (mistral), Qwen2 and Qwen2.5 (qwen2). Phi-2 has its own file, phi.py.

    tokens (B, T) --embed--> hidden[0] (B, T, C)
        each of L blocks:   x = x + attention(norm(x))        a token looks back at those before it
                            x = x + mlp(norm(x))              each token by itself
    hidden[i] (B, T, C): the output of block i; hidden[L]: the same after the final norm
        --lm_head--> logits (B, T, V): row t scores token t+1

Against GPT-2: RMSNorm for LayerNorm, RoPE for learnt positions, a gated MLP, no biases, and fewer heads for keys and
values (G) than for queries (H), which makes the cache of generation H/G times smaller.

Training packs sequences of different lengths into one row, (1, T, C), without padding. All but attention works on each token
by itself and needs not know; attention goes sequence by sequence (`attend`), so none sees another.

Generation runs the whole prompt once (prefill), keeps every block's keys and values in a static cache, then feeds one
token a step. Prompts of different lengths are padded on the right; each row counts its own positions and writes into
the cache at its own place, over the padding. So no row sees padding, and a row in a batch says what it would say alone.
"""
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attention
from hub import InputError, fields_of, load_weights, locate, on_meta, read_config, read_json, save_checkpoint

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh")}
GROUPED = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}       # PyTorch 2.11 takes fewer heads without being told
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass
class LlamaConfig:
    """The fields are keys of config.json. The defaults are what their absence means there: early files lack some."""
    vocab_size: int                         # V
    hidden_size: int                        # C
    intermediate_size: int                  # width inside the MLP
    num_hidden_layers: int                  # L
    num_attention_heads: int                # H, heads of the queries
    num_key_value_heads: int = None         # G, heads of keys and values; None: H, which is plain multi-head attention
    head_dim: int = None                    # D, width of a head; None: C / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0             # base of the wavelengths: the longest is about 2 pi theta positions
    rope_scaling: dict = None               # {"rope_type": "linear" or "llama3", "factor": ...} stretches them
    max_position_embeddings: int = 2048     # trained context, in tokens
    tie_word_embeddings: bool = False       # True: the embedding is also lm_head
    attention_bias: bool = False            # on q, k, v and o
    qkv_bias: bool = False                  # Qwen2: on q, k and v, and never on o
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int = None              # Mistral: a token sees this many, itself included; None: all before it
    max_window_layers: int = 0              # Qwen2: the blocks before this one have no window, even so
    bos_token_id: int = 1
    eos_token_id: int | list = 2            # Llama 3's chat models have several

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config, where):
        """config.json's object -> LlamaConfig; `where` names its folder in errors."""
        kind = config.get("model_type", "llama")
        if kind not in ("llama", "mistral", "qwen2"):
            raise InputError(f"{where}: model_type is {kind!r}, not one of llama, mistral, qwen2")
        config = config | read_rope(config, where)
        absent = {"mistral": {"sliding_window": 4096}, "qwen2": {"sliding_window": 4096, "max_window_layers": 28}}
        config = absent.get(kind, {}) | config | {"qkv_bias": kind == "qwen2"}  # a window of null is none
        if kind == "llama" or kind == "qwen2" and not config.get("use_sliding_window"):
            config["sliding_window"] = None                          # as in transformers, whatever number the file has
        self = fields_of(cls, config, where)
        windows = ["full_attention" if self.sliding_window is None or layer < self.max_window_layers else "sliding_attention"
                   for layer in range(self.num_hidden_layers)]
        if config.get("layer_types") not in (None, windows):         # transformers 5 writes this list, and goes by it
            raise InputError(f"{where}: layer_types gives the window to other blocks than all from max_window_layers on")
        return check_config(self, config, where)

    def to_dict(self):
        """What config.json holds for this model; transformers reads it too."""
        name = "Qwen2" if self.qkv_bias else "Llama" if self.sliding_window is None else "Mistral"
        window = {"use_sliding_window": self.sliding_window is not None} if self.qkv_bias else {}
        return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()} | window | asdict(self)

    @property
    def rotary_dim(self):
        return self.head_dim                                         # RoPE turns all channels of a head; in phi.py some

    @property
    def context(self):
        """The longest sequence, prompt and answer. With linear scaling the config keeps the length before it (4096 in
        the 16K Vicunas); Llama 3.1's config holds the length after it."""
        linear = self.rope_scaling is not None and self.rope_scaling["rope_type"] == "linear"
        return int(self.max_position_embeddings * (self.rope_scaling["factor"] if linear else 1))


def read_rope(config, where):
    """config.json's object -> its rope_theta and rope_scaling. Since transformers 5 they are in `rope_parameters`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_KEYS:
        raise InputError(f"{where}: rope_type is {rope_type!r}, not one of {', '.join(ROPE_KEYS)}")
    for key in ROPE_KEYS[rope_type]:
        if key not in rope:
            raise InputError(f"{where}: the config's {rope_type} rope lacks {key}")
    scaling = {"rope_type": rope_type} | {key: rope[key] for key in ROPE_KEYS[rope_type]}
    return {"rope_theta": rope.get("rope_theta", config.get("rope_theta")),
            "rope_scaling": None if rope_type == "default" else scaling}


def check_config(config, read, where):
    """A config that was made of `read`, config.json's object -> the same, or InputError."""
    config.eos_token_id = read.get("eos_token_id", config.eos_token_id)  # here null means that nothing ends a text
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{where}: hidden_act is {config.hidden_act!r}, not one of {', '.join(ACTIVATIONS)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(f"{where}: num_attention_heads {config.num_attention_heads} is not a multiple of "
                         f"num_key_value_heads {config.num_key_value_heads}")
    return config


def rope_frequencies(config):
    """-> (D/2,) float32: by what angle each pair of a head's channels turns from one position to the next. Checkpoints
    do not hold it, so it is built on the CPU even where the module is built on the meta device."""
    channel = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu")
    frequency = 1.0 / config.rope_theta ** (channel / config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    # llama3: pairs that turn often within the original context stay, those that turn less than low_freq_factor times
    # are slowed by `factor`, and in between the two are blended.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rotate(x, cos, sin):
    """RoPE: turn the pairs (x[i], x[i + D/2]) of every head. x: (B, heads, T, D); cos, sin: (B or 1, 1, T, D/2).
    The tables make this float32 whatever x is: bfloat16 cannot tell position 256 from 257."""
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def visible(positions, keys, window=None):
    """Which of the places 0..keys-1 a token at each of positions (B, T) sees -> bool (B, 1, T, keys): those up to its
    own, and with a window only the last `window` of them."""
    key, position = torch.arange(keys, device=positions.device), positions[:, None, :, None]
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def band(length, window, device):
    """The mask of a text under a window, bool (1, 1, T, T); None, plain causal, where all of it fits in."""
    if window is None or length <= window:
        return None
    return visible(torch.arange(length, device=device)[None], length, window)


class Packed(NamedTuple):
    """Stands in the place of a mask where a row holds several sequences, one behind the other: each sees itself alone."""
    starts: torch.Tensor                                             # where each begins, and where the last one ends, int32
    longest: int                                                     # the length of the longest, in tokens
    window: int                                                      # how far back a token looks; None: to its sequence's start


def attend(q, k, v, mask):
    """q (B, H, T, D) looks at k, v (B, G, keys, D) -> (B, T, H·D). mask: bool (B or 1, 1, T, keys), None: causal, or Packed."""
    if q.shape[2] == 1:
        return attend_from_one(q, k, v, mask)
    if not isinstance(mask, Packed):
        x = (attention(q, k, v, causal=True) if mask is None else
             F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]))
        return x.transpose(1, 2).flatten(2)
    one_kernel = q.is_cuda and q.dtype != torch.float32
    return (attend_in_one_kernel if one_kernel else attend_each)(q, k, v, mask)


def attend_from_one(q, k, v, mask):
    """A single token's attention, a step of generation, as two products: all queries that share a head of keys are the rows of
    one. PyTorch's fused kernel on a CPU takes several times as long (docs/speed.md); CUDA's fused kernels take no mask with grouped
    heads, and what stands in for them copies every key and value H/G times, in float32."""
    q = q.reshape(*k.shape[:2], -1, k.shape[-1]) * k.shape[-1] ** -0.5  # (B, G, H/G, D), scaled first: float16 ends at 65504
    scores = q @ k.transpose(2, 3)  # (B, G, H/G, keys)
    if isinstance(mask, torch.Tensor):
        scores = torch.where(mask, scores, -torch.inf)
    return (scores.softmax(-1) @ v).flatten(1)[:, None]  # (B, 1, H·D)


def attend_in_one_kernel(q, k, v, packed):
    """Flash attention over all sequences of the row. Its kernel is CUDA's and has not been run: there was no GPU."""
    from torch.nn.attention.varlen import varlen_attn                # here, since it imports the compiler: that takes seconds
    q, k, v = (heads[0].transpose(0, 1) for heads in (q, k, v))      # (T, H, D); k and v: (T, G, D)
    back = -1 if packed.window is None else packed.window - 1        # how many before itself a token sees, -1: all
    x = varlen_attn(q, k, v, packed.starts, packed.starts, packed.longest, packed.longest, window_size=(back, 0),
                    **(GROUPED if q.shape[1] != k.shape[1] else {}))
    return x.flatten(1)[None]  # (1, T, H·D)


def attend_each(q, k, v, packed):
    """Attention sequence by sequence: a mask over the whole row would cost T² instead of the sum of their Tᵢ²."""
    lengths, pieces = packed.starts.diff().tolist(), []
    for q, k, v, length in zip(*(heads.split(lengths, dim=2) for heads in (q, k, v)), lengths):
        pieces.append(attend(q, k, v, band(length, packed.window, q.device)))
    return torch.cat(pieces, dim=1)


class KVCache:
    """Keys and values of every block, L tensors (B, G, max_length, D) each. A token's place in them is its position."""

    def __init__(self, config, batch, max_length, dtype=torch.float32, device="cpu"):
        shape = (batch, config.num_key_value_heads, max_length, config.head_dim)
        new = lambda: [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.keys, self.values = new(), new()                        # zeros, since a NaN spoils even a masked sum
        self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1)

    def write(self, layer, k, v, positions):
        """Put k, v (B, G, T, D) at `positions` (B, T) -> what to look at: all of the layer, (B, G, max_length, D) each.
        positions None: at 0..T-1 of a new cache, so that there is nothing but k and v to look at."""
        keys, values = self.keys[layer], self.values[layer]
        if positions is None:
            keys[:, :, :k.shape[2]], values[:, :, :v.shape[2]] = k, v
            return k, v
        keys[self.rows, :, positions] = k.transpose(1, 2).to(keys.dtype)
        values[self.rows, :, positions] = v.transpose(1, 2).to(values.dtype)
        return keys.to(k.dtype), values.to(v.dtype)


class RMSNorm(nn.Module):
    """x (..., C) by the root of its mean square, times a learnt weight (C,): no mean is taken off, and there is no bias."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()                                             # the mean of squares needs the precision
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RoPE, (B, T, C) -> (B, T, C): H heads ask, and H/G of them share each head of keys and values.
    rope: cosines and sines (B or 1, 1, T, D/2) of the positions; mask: what `attend` takes; cache: a KVCache, or None."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)

    def forward(self, x, rope, mask, positions, cache):
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D); k and v: (B, G, T, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # (B, G, max_length, D) each, at prefill as they were
        return self.o_proj(attend(q, k, v, mask))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU, (B, T, C) -> (B, T, C): one map to the wider middle gates, channel by channel, what another one gives."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # with SiLU this is SwiGLU


class Block(nn.Module):
    """A layer, (B, T, C) -> (B, T, C): attention and MLP, each normed before and added to the stream ("pre-norm")."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, mask, positions, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, C)


class Llama(nn.Module):
    """Parameters are named as in the checkpoints, without their prefix "model."."""
    config_class = LlamaConfig
    linear = staticmethod(F.linear)                                  # the tied head's product; linear.py puts a faster one here
    room_of = 1                                                      # the cache's length is a multiple of it; compile_step sets 512

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False                          # True: the backward pass recomputes each block
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_frequencies", rope_frequencies(config), persistent=False)
        self.initialize(("o_proj.weight", "down_proj.weight"))

    def initialize(self, branches):
        """Random weights. `branches` end the 2L branches that add up in the residual stream, so they start smaller (GPT-2)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:                               # 1 / sqrt(C): 0.016 at C = 4096, where 0.02 is usual;
                std = self.config.hidden_size ** -0.5                # a narrow model would hardly attend with 0.02. And 2L
                deep = name.endswith(branches)                       # branches add up in the residual stream
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.num_hidden_layers) if deep else std)

    def _apply(self, fn, recurse=True):
        """What .to(), .half() and .to_empty() run: the frequencies follow to the device, but stay whole and float32."""
        super()._apply(fn, recurse)
        self.rope_frequencies = rope_frequencies(self.config).to(self.rope_frequencies.device)
        return self

    def embed(self, tokens):
        return self.embed_tokens(tokens)  # (B, T, C)

    def logits(self, hidden):
        if self.config.tie_word_embeddings:
            return self.linear(hidden, self.embed_tokens.weight)  # (..., V)
        return self.lm_head(hidden)

    def forward(self, tokens=None, embeds=None, positions=None, cache=None, hidden_only=False, states=None, lengths=None):
        """tokens (B, T) or embeds (B, T, C) -> logits (B, T, V), or with hidden_only the final-normed hidden states
        (B, T, C), for a caller that needs `logits` of some of them only.

        positions: (B, T), None is 0..T-1. Without a cache they only turn the RoPE: a token sees those before it in its
        row, so padding on the right needs no mask, since no token looks ahead to it.
        cache: a KVCache. Tokens are added at `positions` and see all up to there; positions None: the cache is new.
        states: a list to which the hidden states are appended, L+1 of them.
        lengths: a list of integers, the lengths of the sequences that are packed into the one row, B = 1. Each has
        positions from 0 on and sees itself alone."""
        x = self.embed(tokens) if embeds is None else embeds  # (B, T, C)
        T, window = x.shape[1], self.config.sliding_window
        steps = torch.arange(T, device=x.device)[None]  # (1, T)
        if lengths is not None:
            starts = torch.tensor([0, *lengths]).cumsum(0)
            steps = steps - starts[:-1].repeat_interleave(torch.tensor(lengths), output_size=T).to(x.device)
            starts = starts.to(x.device, torch.int32)
        angles = (steps if positions is None else positions)[:, None, :, None] * self.rope_frequencies
        rope = angles.cos(), angles.sin()  # (B or 1, 1, T, D/2) each
        whole = near = None                                          # masks of the blocks without and with a window;
        if cache is not None and positions is not None:              # None is plain causal, which SDPA does by itself
            whole = visible(positions, cache.keys[0].shape[2])  # (B, 1, T, max_length)
            near = whole if window is None else visible(positions, cache.keys[0].shape[2], window)
        elif lengths is not None:
            whole, near = (Packed(starts, max(lengths), far) for far in (None, window))
        else:
            near = band(T, window, x.device)  # (1, 1, T, T)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            if states is not None:
                states.append(x)
            mask = near if layer >= self.config.max_window_layers else whole
            if recompute:
                x = checkpoint(block, x, rope, mask, positions, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, positions, cache)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x if hidden_only else self.logits(x)

    def step(self, token, positions, cache):
        """One token a row, (B,), each at its own of positions (B,) -> final hidden states (B, C)."""
        return self(token[:, None], positions=positions[:, None], cache=cache, hidden_only=True)[:, 0]

    @torch.no_grad()
    def stream(self, tokens=None, embeds=None, lengths=None, max_new_tokens=64, temperature=0, top_k=None, top_p=None,
               eos=None, generator=None):
        """Yield the next token of every row, (B,) a step, until all rows have ended or there are max_new_tokens.

        tokens (B, T) or embeds (B, T, C): prompts, padded on the right where `lengths` (B,) says so.
        eos: id or ids that end a row; None: the config's; []: none. A row that has ended goes on yielding eos.
        InputError: an empty prompt, one too long for the model, an id outside the vocabulary, sampling out of its range."""
        B, T = (tokens if embeds is None else embeds).shape[:2]
        device, dtype = self.embed_tokens.weight.device, self.embed_tokens.weight.dtype
        lengths = torch.full((B,), T, device=device) if lengths is None else torch.as_tensor(lengths, device=device)
        longest = lengths.max().item() if B and T else 0
        check_request(lengths, longest, T, self.config, max_new_tokens, temperature, top_k, top_p)
        if embeds is None:
            tokens, padding = tokens.to(device), torch.arange(T, device=device) >= lengths[:, None]
            strange = (tokens < 0) | (tokens >= self.config.vocab_size)
            if (strange & ~padding).any():
                raise InputError(f"token id {tokens[strange & ~padding][0]} is outside the vocabulary of "
                                 f"{self.config.vocab_size}")
            embeds = self.embed(tokens.masked_fill(strange, 0))      # some tokenizers pad with an id of no embedding
        eos = self.config.eos_token_id if eos is None else eos
        eos = torch.tensor([eos] if isinstance(eos, int) else eos or [], dtype=torch.long, device=device)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)            # the keys' and values' then, whatever the weights'

        room = -(-(longest + max_new_tokens) // self.room_of) * self.room_of
        cache = KVCache(self.config, B, room, dtype, device)
        hidden = self(embeds=embeds[:, :longest], cache=cache, hidden_only=True)  # (B, T, C)
        hidden = hidden[torch.arange(B, device=device), lengths - 1]  # (B, C), each row's last token
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            token = sample(self.logits(hidden), temperature, top_k, top_p, generator)  # (B,)
            if len(eos):
                token = torch.where(ended, eos[0], token)
                ended |= torch.isin(token, eos)
            yield token
            if step + 1 == max_new_tokens or len(eos) and ended.all():
                return
            hidden = self.step(token, lengths + step, cache)

    def generate(self, tokens=None, max_new_tokens=64, temperature=0, top_k=None, top_p=None, attention_mask=None,
                 embeds=None, lengths=None, eos=None, generator=None):
        """Prompts -> the ids after them, (B, new). Rows that end early are filled up with eos. Prompts of different
        length are padded: on the right with `lengths` (B,), or on any side with `attention_mask` (B, T), 1 for a token
        and 0 for padding. The rest, and its errors: `stream`."""
        if attention_mask is not None:
            order = attention_mask.long().argsort(dim=1, descending=True, stable=True)  # (B, T), tokens to the left
            rows, lengths = torch.arange(len(order), device=order.device)[:, None], attention_mask.long().sum(1)
            tokens = None if tokens is None else tokens[rows, order]
            embeds = None if embeds is None else embeds[rows, order]
        steps = self.stream(tokens, embeds, lengths, max_new_tokens, temperature, top_k, top_p, eos, generator)
        return torch.stack(list(steps), dim=1)  # (B, new)

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """A folder or hub id -> the model; where dtype is the file's, its tensors are the mapped file. InputError names the
        folder and what of it is missing, left over or of another shape."""
        folder = locate(folder_or_id)
        config = cls.config_class.from_dict(read_config(folder), folder)
        generation = folder / "generation_config.json"               # some chat models list their end tokens only here
        if generation.exists():
            config.eos_token_id = read_json(generation).get("eos_token_id", config.eos_token_id)
        with on_meta():
            model = cls(config)
        return load_weights(model, folder, model.name_of, dtype, device)

    def name_of(self, name):
        """A checkpoint's name of a tensor -> ours. None for what is left out: early files hold RoPE's table, and some
        hold an lm_head that is tied to the embedding anyway."""
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.config.tie_word_embeddings):
            return None
        return name.removeprefix("model.")

    def save_pretrained(self, folder):
        """Write the folder that from_pretrained and transformers' AutoModelForCausalLM read."""
        tensors = {name if name.startswith("lm_head.") else f"model.{name}": p for name, p in self.named_parameters()}
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        save_checkpoint(folder, tensors, self.config.to_dict() | {"torch_dtype": dtype})


def check_request(lengths, longest, T, config, max_new_tokens, temperature, top_k, top_p):
    """InputError where a generation cannot be what was asked for."""
    for wrong, message in (
            (longest == 0 or lengths.min() < 1, "empty prompt: each needs a token, if only the one that begins a text"),
            (longest > T, f"lengths says {longest} tokens, but the prompts are {T} wide"),
            (max_new_tokens < 1, f"max_new_tokens is {max_new_tokens}, must be 1 or more"),
            (longest + max_new_tokens > config.context, f"a prompt of {longest} tokens and max_new_tokens="
             f"{max_new_tokens} exceed the model's context of {config.context}: shorten one of them"),
            (not 0 <= temperature < math.inf, f"temperature is {temperature}, must be 0 (greedy) or more"),
            (top_k is not None and top_k < 1, f"top_k is {top_k}, must be 1 or more"),
            (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}, must be above 0 and at most 1")):
        if wrong:
            raise InputError(message)


def sample(logits, temperature=0, top_k=None, top_p=None, generator=None):
    """logits (B, V) -> token ids (B,). Temperature 0 is greedy. top_k keeps the k likeliest tokens; top_p, after it,
    the fewest likeliest ones whose probabilities sum to p or more."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)  # (B, V)
    if top_p is not None:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked                      # probability of all likelier ones
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(before >= top_p, 0))
    if generator is not None:                                        # draws happen where it lives, often on the CPU
        probabilities = probabilities.to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)

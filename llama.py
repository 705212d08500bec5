"""LLaMA: the language model, a causal transformer that predicts the next token.

Papers: LLaMA (arXiv 2302.13971), Llama 2 (2307.09288), Llama 3 (2407.21783); RMSNorm (1910.07467),
rotary positions (RoPE, 2104.09864), SwiGLU (2002.05202), grouped-query attention (2305.13245),
Mistral's sliding window (2310.06825), Qwen2's biases (2407.10671), Qwen3's QK norm (2505.09388).
Checkpoints, from 135M to 70B: LLaMA 1 and 2, Llama 3.x, lmsys/vicuna-7b-v1.5, TinyLlama, SmolLM2,
Yi and Hermes-2-Yi-34B (model_type llama), mistralai/Mistral-7B (mistral), Qwen2 and 2.5 (qwen2),
Qwen3 (qwen3), SmolLM3 (smollm3).

    tokens (B, T) --embed--> hidden[0] (B, T, C)
        each of L blocks:   x = x + attention(norm(x))        a token looks back at earlier tokens
                            x = x + mlp(norm(x))              each token by itself
    hidden[i] (B, T, C): the output of block i; hidden[L], unlike in vit.py, after the final norm
        --lm_head--> logits (B, T, V): position t scores token t+1

Compared with GPT-2: RMSNorm instead of LayerNorm, RoPE instead of learned positions, a gated MLP.
LLaMA has no biases. Fewer key/value heads (G) than query heads (H) make the cache smaller.

Training packs sequences of different lengths into one row, (1, T, C), without padding. Only
attention needs to know the boundaries: each sequence attends to itself.

Generation first runs the whole prompt (prefill) and caches every block's keys and values. Then it
feeds one token a step. Prompts of different lengths are padded on the right. Each row counts its
own positions and overwrites its padding in the cache, so padding never changes an answer.
common/speed.py has faster forms of the three attributes that are marked "plain form".
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.llm import check_request, scale_rope
from common.pretrained import PretrainedLLM, longest_text, read_llama
from common.save import write_llama


@dataclass
class LlamaConfig:
    """Keys of config.json. A default is what a missing key means."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # width inside the MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H, query heads
    num_key_value_heads: int = None  # G, key/value heads; None: H
    head_dim: int = None  # width of a head; None: C / H
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # {"rope_type": "linear" or "llama3", "factor": ...}
    max_position_embeddings: int = 2048  # tokens of the trained context
    tie_word_embeddings: bool = False  # True: lm_head is the embedding
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v only (Qwen2)
    mlp_bias: bool = False
    sliding_window: int = None  # tokens that a token sees, with itself (Mistral); None: all
    max_window_layers: int = 0  # the layers before this one have no window (Qwen2)
    qk_norm: bool = False  # RMSNorm on each head of q and k (Qwen3)
    no_rope_layers: list = None  # 1 for each layer with RoPE, else 0 (SmolLM3); None: all have it
    bos_token_id: int = 1
    eos_token_id: int | list = 2  # Llama 3's chat models have several

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rotary_dim = self.head_dim  # RoPE rotates all channels of a head; Phi's only some

    # from_dict(config, where): the object of config.json; an InputError names `where`.
    from_dict = classmethod(read_llama)
    # What config.json holds. transformers reads it, too.
    to_dict = write_llama
    # The longest prompt and answer together, in tokens.
    context = property(longest_text)


def rope_frequencies(config):
    """Return the angle per position of each pair of channels, (head_dim / 2,) float32.

    Checkpoints do not hold it, so it is on the CPU even if the model is on the meta device.
    """
    channel = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu")
    frequency = 1.0 / config.rope_theta ** (channel / config.rotary_dim)
    return scale_rope(frequency, config.rope_scaling) if config.rope_scaling else frequency


def rotate(x, cos, sin):
    """Apply RoPE: rotate the pairs (x[i], x[i + half]) of every head.

    x: (B, T, heads, head_dim); cos, sin: (B or 1, T, 1, half) float32, because bfloat16 cannot tell
    position 256 from 257. half is head_dim / 2; in Phi it is less, and the other channels stay.
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, dim=-1).type_as(x)


def causal_mask(positions, length, window):
    """Return which of the places 0..length-1 a token sees: bool (B, 1, T, length).

    positions: (B, T). A token sees the places up to its own, at most the last `window` of them.
    """
    place = torch.arange(length, device=positions.device)
    position = positions[:, None, :, None]
    mask = place <= position
    return mask if window is None else mask & (place > position - window)


def attend(sdpa, q, k, v, positions, window):
    """Compute softmax(q kᵀ / sqrt(head_dim)) v. Each token sees itself and earlier tokens.

    q: (B, H, T, head_dim); k, v: (B, G, keys, head_dim) -> (B, H, T, head_dim). Each group of H/G
    query heads shares a head of k and v. positions: (B, T), the places of q among the keys; None:
    0..T-1, all keys. Then, and without a window, the kernel needs no mask.
    """
    T, mask = q.shape[2], None
    if positions is None and window and window < T:
        positions = torch.arange(T, device=q.device)[None]
    if positions is not None:
        mask = causal_mask(positions, k.shape[2], window)
    is_grouped = q.shape[1] != k.shape[1]
    return sdpa(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped)


def attend_packed(sdpa, q, k, v, starts, longest, window):
    """Let each sequence of a packed row attend to itself: a mask of the row would cost T².

    q: (1, H, T, head_dim); k, v: (1, G, T, head_dim) -> (1, H, T, head_dim). starts:
    (sequences + 1,) int32, where each sequence begins, then T; longest: the longest length.
    """
    lengths = starts.diff().tolist()
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([attend(sdpa, *part, None, window) for part in parts], dim=2)


def pack(lengths):
    """Describe a packed row: positions (1, T) from 0 in each sequence; starts, longest."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return positions, starts, max(lengths)


class KVCache:
    """Keys and values by position: one tensor a layer, (B, G, max_length, head_dim)."""

    def __init__(self, max_length):
        self.max_length = max_length
        self.keys, self.values = [], []

    def write(self, layer, k, v, positions):
        """Store k, v (B, G, T, head_dim) at `positions` (B, T). Return what to attend to."""
        if positions is None:
            # Prefill, at positions 0..T-1: there is nothing else to attend to. The rest is zero,
            # because a NaN spoils a sum even where it is masked.
            rest = (0, 0, 0, self.max_length - k.shape[2])
            self.keys.append(F.pad(k, rest))
            self.values.append(F.pad(v, rest))
            return k, v
        keys, values = self.keys[layer], self.values[layer]
        row = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
        keys[row, :, positions] = k.transpose(1, 2)
        values[row, :, positions] = v.transpose(1, 2)
        return keys, values


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²)) * weight: LayerNorm without mean and bias."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # In float32: 300² overflows float16.
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        # A float32 weight must not make bfloat16 float32 (q and k under autocast).
        return (self.weight * x32.type_as(x)).type_as(x)


class Attention(nn.Module):
    """Attention with RoPE, H query and G key/value heads: (B, T, C) -> (B, T, C)."""

    # Plain form of attention, and of attention within a packed row.
    sdpa = staticmethod(F.scaled_dot_product_attention)
    attend_packed = staticmethod(attend_packed)

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if layer >= config.max_window_layers else None
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.has_rope = not config.no_rope_layers or config.no_rope_layers[layer]
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, rope, packed=None, positions=None, cache=None):
        """rope: cos, sin of `rotate`. packed: (starts, longest) of `attend_packed`, or None.

        cache: a KVCache. positions: the places (B, T) of x in it; None: 0..T-1.
        """
        heads = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, heads))  # (B, T, H, head_dim)
        k = self.k_norm(self.k_proj(x).unflatten(-1, heads))  # (B, T, G, head_dim)
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)  # (B, G, T, head_dim)
        if self.has_rope:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        q = q.transpose(1, 2)  # (B, H, T, head_dim)
        k = k.transpose(1, 2)  # (B, G, T, head_dim)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, positions)  # (B, G, keys, head_dim)
        if packed is None:
            x = attend(self.sdpa, q, k, v, positions, self.window)  # (B, H, T, head_dim)
        else:
            x = self.attend_packed(self.sdpa, q, k, v, *packed, self.window)
        return self.o_proj(x.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU, (B, T, C) -> (B, T, C): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each after an RMSNorm ("pre-norm"): (B, T, C) -> (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *attention):
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(PretrainedLLM):
    """All LLMs of LLaMA's kind. common/pretrained.py has from_pretrained and save_pretrained."""

    config_class = LlamaConfig
    # Plain form of the output layer that is the embedding.
    tied_head = staticmethod(F.linear)

    def __init__(self, config):
        super().__init__()
        self.config = config
        # True: the backward pass recomputes each block instead of storing its activations.
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rope_frequencies", rope_frequencies(config), persistent=False)
        self.initialize(("o_proj.weight", "down_proj.weight"))

    def initialize(self, outputs):
        """Draw random weights. outputs: the weights that write to the residual stream."""
        # 1 / sqrt(C) is 0.016 at C = 4096. The usual 0.02 would leave a narrow model's attention
        # nearly uniform. 2L branches add up in the residual stream, so they start smaller (GPT-2).
        std = self.config.hidden_size**-0.5
        branch_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=branch_std if name.endswith(outputs) else std)

    def _apply(self, fn, recurse=True):
        """Keep the frequencies float32. PyTorch calls this in .to(), .half() and .to_empty()."""
        super()._apply(fn, recurse)
        self.rope_frequencies = rope_frequencies(self.config).to(self.rope_frequencies.device)
        return self

    def embed(self, tokens):
        return self.embed_tokens(tokens)  # (B, T, C)

    def logits(self, hidden):
        """Final-normed hidden states (..., C) -> logits (..., V)."""
        if self.config.tie_word_embeddings:
            return self.tied_head(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def forward(
        self, tokens=None, embeds=None, positions=None, cache=None, packed=None, hidden_only=False
    ):
        """tokens (B, T) or embeds (B, T, C) -> logits (B, T, V).

        positions: (B, T); None: 0..T-1. Padding on the right needs no mask: attention is causal.
        cache: a KVCache, a new one if positions is None. Without a cache only RoPE uses positions.
        packed: what `pack` says of a packed row, B = 1.
        hidden_only: return the final-normed hidden states (B, T, C) instead of the logits.
        """
        x = self.embed(tokens) if embeds is None else embeds  # (B, T, C)
        places = None if cache is None else positions
        if packed is not None:
            positions, *packed = packed
        elif positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        angles = positions[..., None, None] * self.rope_frequencies  # (B or 1, T, 1, half)
        attention = ((angles.cos(), angles.sin()), packed, places, cache)
        recompute = self.gradient_checkpointing and self.training
        for block in self.layers:
            if recompute:
                x = checkpoint(block, x, *attention, use_reentrant=False)
            else:
                x = block(x, *attention)
        x = self.norm(x)
        return x if hidden_only else self.logits(x)

    def step(self, token, positions, cache):
        """One token a row (B,) at positions (B,) -> final-normed hidden states (B, C)."""
        token, positions = token[:, None], positions[:, None]
        return self(token, positions=positions, cache=cache, hidden_only=True)[:, 0]

    @torch.no_grad()
    def stream(
        self, tokens=None, embeds=None, lengths=None, max_new_tokens=64, eos=None, **sampling
    ):
        """Yield the next token of every row, (B,), until all have ended.

        A GPU may yield up to 7 tokens more, since it is asked every eighth time only.

        tokens (B, T) or embeds (B, T, C): prompts. lengths: (B,), if they are padded on the right.
        eos: id or ids that end a row; None: the config's; []: none. An ended row repeats eos.
        sampling: temperature, top_k, top_p, generator of `sample`. Raises InputError for an empty
        or too long prompt, or a wrong option.
        """
        B, T = (tokens if embeds is None else embeds).shape[:2]
        device = self.embed_tokens.weight.device
        lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=device)
        check_request(self.config, lengths, max_new_tokens, **sampling)
        embeds = self.embed(tokens.to(device)) if embeds is None else embeds  # (B, T, C)
        eos = self.config.eos_token_id if eos is None else eos
        # No token has the id -1.
        eos = torch.tensor([eos] if isinstance(eos, int) else eos or [-1], device=device)
        ended = torch.zeros(B, dtype=torch.bool, device=device)

        cache = KVCache(T + max_new_tokens)
        hidden = self(embeds=embeds, cache=cache, hidden_only=True)  # (B, T, C)
        hidden = hidden[torch.arange(B, device=device), lengths - 1]  # (B, C), last tokens
        for i in range(max_new_tokens):
            token = sample(self.logits(hidden), **sampling)  # (B,)
            token = torch.where(ended, eos[0], token)
            ended |= torch.isin(token, eos)
            yield token
            # The host waits for a GPU to read `ended`.
            is_read = device.type == "cpu" or i % 8 == 7
            if i + 1 == max_new_tokens or (is_read and ended.all()):
                return
            hidden = self.step(token, lengths + i, cache)  # (B, C)

    def generate(self, tokens=None, max_new_tokens=64, **options):
        """Return the new ids (B, new). options: embeds, lengths, eos, ... of `stream`."""
        stream = self.stream(tokens, max_new_tokens=max_new_tokens, **options)
        return torch.stack(list(stream), dim=1)


def sample(logits, temperature=0, top_k=None, top_p=None, generator=None):
    """logits (B, V) -> token ids (B,). Temperature 0 is greedy.

    top_k keeps the k most likely tokens. Then top_p (nucleus sampling, arXiv 1904.09751) keeps the
    fewest most likely tokens whose probabilities sum to p or more.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(dim=-1)  # (B, V)
    if top_p is not None:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # probability of all more likely tokens
        ranked = ranked.masked_fill(before >= top_p, 0)
        probabilities = probabilities.scatter(-1, order, ranked)
    if generator is not None:  # draw where it is, often on the CPU
        probabilities = probabilities.to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)

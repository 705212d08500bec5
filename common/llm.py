"""What only some uses of an LLM need: RoPE for a longer context, and checks of a request."""

import math

from common.errors import InputError


def scale_rope(frequency, scaling):
    """Lower RoPE's frequencies (D/2,) for a longer context.

    scaling: config.rope_scaling. llama3 is Llama 3.1's (arXiv 2407.21783).
    """
    slowed = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    # llama3: pairs that turn often within the original context keep their frequency, those that
    # turn less than low_freq_factor times are slowed, and between the two they are blended.
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * slowed


def check_request(config, lengths, new, temperature=0, top_k=None, top_p=None, **_):
    """Raise InputError if Llama.stream cannot do what its arguments ask for."""
    if lengths.min() < 1:
        raise InputError("empty prompt: lengths must be 1 or more")
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

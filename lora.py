"""LoRA: a language model learns by adding something small to each of its linear maps, which themselves stay as they are.

Paper: LoRA (arXiv 2106.09685). The Dense Connector (2405.13800) trains its 34B and 70B models so, with rank 128 and alpha 256.

    x (..., in) --+-- W (out, in) and its bias, frozen ------------------------------+--> W x + b + alpha / rank · B A x
                  '-- A (rank, in) --> (..., rank) · alpha / rank -- B (out, rank) --'    (section 4.1)

B starts at zero, so that training starts at the very model that was loaded. Every linear map of the blocks gets an A and a B
(the paper adapts attention alone), embeddings, norms and lm_head get none. What it saves is memory: a frozen number takes 2
bytes (bf16 on CUDA), a trained one 16 (itself, its gradient and AdamW's two moments, float32). Of Vicuna-7B with rank 128 that
is 13.5 GB for W and 5.1 GB for the 320M numbers of A and B, instead of 108 GB.

Afterwards `merge` adds B A to W: a plain Llama again, as fast as before, which every other file here takes.

Left out: LLaVA's dropout of 0.05 in front of A. What it draws would depend on the number of processes and on the
micro-batch, and the losses here do not.
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from hub import save_safetensors


class LoRALinear(nn.Module):
    """A linear map and its adapter. x (..., in) -> (..., out)"""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank      # named as before: checkpoints fit
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)  # torch's start is the authors': uniform, 1 / sqrt(in)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        for adapter in (self.lora_A, self.lora_B):                   # drawn on the CPU: the same start on every device
            adapter.to(linear.weight.device)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.scale * self.lora_A(x))

    @torch.no_grad()
    def merged_weight(self, whole=lambda tensor: tensor):
        """-> W + alpha / rank · B A, summed in float32, then in W's dtype. whole: gathers a tensor that is spread (shard.py)."""
        W, A, B = (whole(p) for p in (self.weight, self.lora_A.weight, self.lora_B.weight))
        return (W.float() + self.scale * (B.float() @ A.float())).to(W.dtype)  # (out, in)

    def merged(self):
        """-> nn.Linear of the merged weight."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.merged_weight()), self.bias
        return linear


def adapt(llm, rank, alpha):
    """Give every linear map in the blocks of a Llama or Phi an adapter, in place."""
    for parent in list(llm.layers.modules()):                        # q, k, v, o, gate, up, down; Phi's q, k, v, dense, fc1, fc2
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))


def merge(llm):
    """Add every adapter to its linear map, in place: after it the LLM is plain again. Without adapters it does nothing."""
    for parent in list(llm.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())


def adapters(llm):
    """{name: parameter} of all A and B; none without LoRA."""
    return {name: p for name, p in llm.named_parameters() if name.endswith((".lora_A.weight", ".lora_B.weight"))}


def save(found, folder, rank, alpha, base):
    """Write the adapters alone, as the library peft does: `found` is adapters(llm); `base` names the LLM that they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.model.{name}": p for name, p in found.items()}
    save_safetensors(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
              "target_modules": sorted({name.split(".")[-3] for name in found}), "lora_dropout": 0.0, "bias": "none",
              "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

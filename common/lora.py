"""LoRA: train a low-rank addition to each linear layer, and freeze the layer.

Paper: LoRA (arXiv 2106.09685, section 4.1). The Dense Connector (2405.13800) trains its 34B and 70B
models with rank 128 and alpha 256.

    x (..., in) --+-- W (out, in) and its bias, frozen ----------------------+--> (..., out)
                  '-- A (rank, in) -- times alpha / rank -- B (out, rank) ---'

B starts at zero, so training starts at the loaded model. Every linear layer of the blocks gets an
A and a B (the paper adapts attention only). Embeddings, norms and lm_head get none. LoRA saves
memory: a frozen parameter takes 2 bytes (bf16 on CUDA), a trained one 16 (itself, its gradient and
AdamW's two moments, in float32). For Vicuna-7B and rank 128, W takes 13.5 GB. The parameters of A
and B, 320M, take 5.1 GB instead of 108 GB.

After training, `merge` adds B A to W. The result is a plain Llama again, just as fast.

With dropout (LLaVA's is 0.05), some of the numbers that A reads are zero. Then the losses depend on
the number of processes and on the micro-batch. train.py seeds the random numbers of each step.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.save import save_safetensors, write_json


class LoRALinear(nn.Module):
    """A frozen linear layer with its adapter, (..., in) -> (..., out).

    Weight and bias keep their names, so checkpoints of the plain layer fit.
    """

    def __init__(self, linear, rank, alpha, dropout=0.0):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        # Drawn on the CPU, so that training starts the same on every device.
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.to(linear.weight.device)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.lora_B(self.scale * self.lora_A(self.dropout(x)))

    @torch.no_grad()
    def merged_weight(self, full=lambda tensor: tensor):
        """Return W + alpha / rank · B A (out, in), summed in float32, in W's dtype.

        full: gathers a tensor that is sharded over ranks (common.fsdp.full).
        """
        W, A, B = full(self.weight), full(self.lora_A.weight), full(self.lora_B.weight)
        return (W.float() + self.scale * (B.float() @ A.float())).to(W.dtype)

    def merged(self):
        """Return the plain nn.Linear with the merged weight."""
        linear = nn.Linear(*reversed(self.weight.shape), device="meta")
        linear.weight = nn.Parameter(self.merged_weight())
        linear.bias = self.bias
        return linear


def adapt(llm, rank, alpha, dropout=0.0):
    """Give every linear layer in the blocks of a Llama or Phi an adapter, in place."""
    replace(llm, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha, dropout))


def merge(llm):
    """Add every adapter to its linear layer, in place."""
    replace(llm, LoRALinear, LoRALinear.merged)


def replace(llm, cls, make):
    """Put make(module) in the place of every module of a class in the blocks."""
    for parent in list(llm.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, cls):
                setattr(parent, name, make(child))


def adapters(llm):
    """Return {name: parameter} of all A and B. Without LoRA it is empty."""
    return {name: p for name, p in llm.named_parameters() if ".lora_" in name}


def save(adapters, folder, options, base):
    """Write {name: parameter} of the adapters in the format of the library peft.

    options: has lora_rank, lora_alpha, lora_dropout. base: the name of the LLM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.model.{name}": p for name, p in adapters.items()}
    save_safetensors(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        "target_modules": sorted({name.split(".")[-3] for name in adapters}),
        "lora_dropout": options.lora_dropout,
    }
    write_json(folder / "adapter_config.json", config)

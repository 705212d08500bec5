"""Write tests/fixtures/llava/: a small random LLaVA in the public layout and its outputs.

    pip install -r requirements-dev.txt && python tests/make_llava_fixtures.py

The checkpoint's tensors are named as in llava-hf/llava-1.5-7b-hf, in float16. expected.safetensors
is computed in float32: `pixels` uint8 (1, 3, R, R), `picture.tokens` (1, T), `picture.logits`
(1, LAST, V) of the last positions, `picture.greedy` (1, 12); the same for `text`, without an image.
"""

import json
from pathlib import Path

import torch
import transformers
from make_llava_tokenizer import IMAGE_TOKEN, make_tokenizer
from safetensors.torch import save_file

LAST = 24
SIDE, PATCH, VOCABULARY = 32, 8, 384  # 358 tokens, and embedding rows beyond them, as in public
VISION = dict(
    hidden_size=16,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=PATCH,
    projection_dim=16,
)
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=357,
)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
PROMPTS = {
    "picture": f"{SYSTEM}USER: <image>\nWhat is this? ASSISTANT:",
    "text": f"{SYSTEM}USER: What is a cat? ASSISTANT:",
}
QUESTIONS = {"picture": "What is this?", "text": "What is a cat?"}
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def reference(seed, dtype=torch.float32):
    """Build LLaVA with large weights, so that every part matters."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE_TOKEN,
        text_config=transformers.LlamaConfig(**TEXT),
        projector_hidden_act="gelu",
    )
    return randomize(transformers.LlavaForConditionalGeneration(config), seed, dtype)


def randomize(model, seed, dtype=torch.float32):
    """Give a model large random weights, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                (0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise).to(dtype)
            )
    return model.eval()


def older_name(name):
    """transformers 5's name in memory -> that of the public files."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")


def save(model, folder, rename=older_name, dtype=torch.float32):
    """Write a public folder. rename None: the tensor names of save_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if rename:
        save_file(
            {rename(name): tensor.to(dtype).clone() for name, tensor in model.state_dict().items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            dict(
                image_processor_type="CLIPImageProcessor",
                do_resize=True,
                size={"shortest_edge": SIDE},
                do_center_crop=True,
                crop_size={"height": SIDE, "width": SIDE},
                resample=3,
                image_mean=[0.5, 0.4, 0.3],
                image_std=[0.25, 0.3, 0.2],
            )
        )
    )


def normalized(pixels):
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.25, 0.3, 0.2])
    )
    return (pixels.float() / 255 - mean) / std


def tokens_of(tokenizer, prompt):
    """Tokenize as transformers does: <image> is a special token, repeated for each patch."""
    ids = [1] + tokenizer.encode(prompt, add_special_tokens=False).ids
    return torch.tensor(
        [[t for i in ids for t in [i] * ((SIDE // PATCH) ** 2 if i == IMAGE_TOKEN else 1)]]
    )


@torch.no_grad()
def answers(model, tokenizer, pixels):
    """Answer both prompts with transformers; pixels (1, 3, R, R) belong to the first."""
    found = {}
    for name, prompt in PROMPTS.items():
        tokens = tokens_of(tokenizer, prompt)
        inputs = {"input_ids": tokens} | (
            {"pixel_values": normalized(pixels)} if name == "picture" else {}
        )
        found[f"{name}.tokens"], found[f"{name}.logits"] = tokens, model(**inputs).logits
        found[f"{name}.greedy"] = model.generate(
            **inputs, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False
        )[:, tokens.shape[1] :].contiguous()
    return found


def main():
    folder = Path(__file__).resolve().parent / "fixtures" / "llava"
    model, pixels = (
        reference(0, torch.float16),
        torch.randint(
            0,
            256,
            (1, 3, SIDE, SIDE),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(1),
        ),
    )
    save(model, folder, dtype=torch.float16)
    (folder / "generation_config.json").unlink(missing_ok=True)
    expected = {
        name: tensor[:, -LAST:].contiguous() if name.endswith("logits") else tensor
        for name, tensor in answers(model, make_tokenizer(), pixels).items()
    }
    save_file({"pixels": pixels} | expected, folder / "expected.safetensors")
    print(f"{folder.name}: {sum(path.stat().st_size for path in folder.iterdir()) / 1000:.0f} KB")


if __name__ == "__main__":
    main()

"""Write a model in the layout that other programs read: what we train, the tools that researchers use load again.

    python export.py --model=out/mlp/model --to=out/llava-hf        linear and mlp: transformers' LlavaForConditionalGeneration
    python export.py --model=out/dense/model --to=out/dense-llava   sti, sci, dci, efficient: the Dense Connector's own layout
    python export.py --model=out/dense/model --to=out/llm --format=llama        its LLM alone: LlamaForCausalLM (or its kind)
    python export.py --model=out/comm/model --to=out/dino --format=tower --tower=1     a tower alone: CLIPVisionModel, Dinov2Model
    python export.py --model=out/dense/checkpoints/stage2-0001500 --to=out/early        a run's checkpoint, its LoRA merged

--model is anything that sample.py takes, so a public checkpoint of one layout comes out in the other. Or it is a checkpoint of a
run, which holds only what is trained: the rest is read where that run read it. sample.py and eval.py read both layouts back.
What a layout cannot say is an error: comm has two towers, and nothing but our own folder has room for them.
"""
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, processors

import checkpoint
import cli
import lora
import train
from connector import SIDES, final_layer
from clip import CLIPVision, SigLIPVision
from dialogue import MARK, named
from hub import InputError, locate, newest_model, open_safetensors, read_json, save_checkpoint, tensor_files
from llava import DENSE, KNOWN_TOWERS, TOWER
from mllm import MLLM, replace_folder

FORMATS = ("llava-hf", "llava", "llama", "tower")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Config:
    model: str = ""                      # folder or hub id of a multimodal model, or a run's checkpoint; empty: newest under out/
    to: str = ""                         # folder to write
    format: str = ""                     # llava-hf, llava, llama, tower; empty: llava-hf for linear and mlp, llava for the others
    tower: int = 0                       # which tower, of a model that has two
    dtype: str = ""                      # float32, bfloat16, float16; empty: as the model is stored (a run's checkpoint: float32)


# --- the four formats: model -> {file name: content}, tensors, config.json's object -----------------------------------

def refuse_other_layer(model):
    layer, usual = model.connector_config.layer, final_layer(model.vision[0].config.num_hidden_layers)
    if layer not in (None, usual):
        raise InputError(f"a connector that reads hidden[{layer}] is not written: what is read back is LLaVA's, hidden[{usual}]")


def llava_hf(model):
    """LlavaForConditionalGeneration's folder, tensors named as in llava-hf/llava-1.5-*. A picture stands in the text as <image>,
    which is a token there: if the tokenizer lacks it, it gets one, and the embedding a row (nobody reads it)."""
    kind, tower = model.connector_config.kind, model.vision[0]
    if kind not in ("linear", "mlp"):
        other = ", which --format=llava has room for" if kind not in SIDES else ""
        raise InputError(f"connector {kind} has no place in the llava-hf layout, whose projector sees one layer only{other}")
    refuse_other_layer(model)
    if tower.num_prefix_tokens > 1 or tower.config.model_type == "vit_mae":
        raise InputError(f"a {tower.config.model_type} tower has no place in the llava-hf layout: transformers' LLaVA "
                         "drops one token or none in front of the patches, and shows a tower all of them")
    if "lm_head.bias" in llm_tensors(model.llm):
        raise InputError("Phi has no place in the llava-hf layout: its lm_head has a bias, and theirs has no place for it")
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(MARK, normalized=False)])
    image = tokenizer.token_to_id(MARK)
    vision, vision_config = tower.hugging_face()
    text = model.llm.config.to_dict()
    if image >= text["vocab_size"]:
        text["vocab_size"] = -(-(image + 1) // 64) * 64              # the next multiple of 64, as theirs
    tensors = {f"vision_tower.{name}": tensor for name, tensor in vision.items()}
    for name, tensor in llm_tensors(model.llm).items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            missing = text["vocab_size"] - len(tensor)               # the mean, so that no new token is ever the likeliest
            tensor = torch.cat([tensor, tensor.float().mean(0, keepdim=True).to(tensor.dtype).expand(missing, -1)])
        tensors[f"language_model.{name}"] = tensor
    projector = model.connector.state_dict()
    if kind == "linear":                                             # theirs has two maps: the second does nothing
        weight, bias = projector["mm_projector.weight"], projector["mm_projector.bias"]
        projector = {"mm_projector.0.weight": weight, "mm_projector.0.bias": bias,
                     "mm_projector.2.weight": torch.eye(len(weight)).to(weight),
                     "mm_projector.2.bias": torch.zeros_like(bias)}
    for ours, theirs in (("mm_projector.0", "linear_1"), ("mm_projector.2", "linear_2")):
        for leaf in ("weight", "bias"):
            tensors[f"multi_modal_projector.{theirs}.{leaf}"] = projector[f"{ours}.{leaf}"]
    strategy = "default" if tower.num_prefix_tokens else "full"
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": image,
              "image_seq_length": model.tokens_per_image, "projector_hidden_act": "linear" if kind == "linear" else "gelu",
              "vision_feature_layer": -2, "vision_feature_select_strategy": strategy, "text_config": text,
              "tie_word_embeddings": text.get("tie_word_embeddings", False), "vision_config": vision_config,
              "template": model.template}
    processor = {"processor_class": "LlavaProcessor", "image_token": MARK, "patch_size": tower.config.patch_size,
                 "num_additional_image_tokens": tower.num_prefix_tokens, "vision_feature_select_strategy": strategy}
    return words(model, tokenizer) | pictures(model) | {"processor_config.json": processor}, tensors, config


def llava(model):
    """The folder of liuhaotian/llava-v1.5-* and HuanjinYao/DenseConnector-v1.5-*, the tower in the file."""
    kind, tower = model.connector_config.kind, model.vision[0]
    kind = "dci" if kind == "dense" else kind
    refuse_other_layer(model)
    if kind in SIDES:
        raise InputError(f"connector {kind} has no place in LLaVA's layout, which has one tower and no merging: --format=llama "
                         "and --format=tower write its parts, and its own folder holds the whole")
    if not isinstance(tower, CLIPVision):
        raise InputError(f"a {tower.config.model_type} tower has no place in LLaVA's layout: its code reads CLIP and SigLIP")
    if kind in ("dci", "efficient") and model.connector_config.groups != 2:
        raise InputError(f"{model.connector_config.groups} groups of layers have no place in the Dense Connector's layout (2)")
    if model.spec.mode != "pad" and model.spec.resize_to:
        raise InputError("pictures that are resized to more than what is cut out of them have no place in LLaVA's layout")
    vision, vision_config = tower.hugging_face()
    idle = f"vision_model.encoder.layers.{tower.config.num_hidden_layers - 1}."
    tensors = {TOWER + name: tensor for name, tensor in vision.items()   # SigLIP's last block, which nobody reads, they drop
               if not (isinstance(tower, SigLIPVision) and name.startswith(idle))}
    tensors |= llm_tensors(model.llm) | {f"model.{name}": tensor for name, tensor in model.connector.state_dict().items()}
    known = [name for name, shape in KNOWN_TOWERS.items() if shape == tower.config]
    family = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen", "phi": "phi"}[model.llm.config.to_dict()["model_type"]]
    width = next(iter(model.connector.parameters())).shape[1]
    config = model.llm.config.to_dict() | {
        "architectures": [f"Llava{family.capitalize()}ForCausalLM"], "model_type": f"llava_{family}", "use_mm_proj": True,
        "mm_vision_tower": known[0] if known else "siglip" if isinstance(tower, SigLIPVision) else "clip",
        "mm_hidden_size": width, "mm_projector_type": "linear" if kind == "linear" else "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "is_video": False,
        "image_aspect_ratio": "pad" if model.spec.mode == "pad" else "square", "template": model.template}
    if kind in DENSE:
        config["mm_dense_connector_type"] = kind                     # their code has no "efficient", and stops at it
    if not known:
        config["mm_vision_config"] = vision_config                   # a key of ours, for a tower that has no public name
    return words(model, model.tokenizer) | pictures(model), tensors, config


def llama(model):
    """The LLM alone, with the tokenizer and template that it was trained with."""
    return words(model, model.tokenizer), llm_tensors(model.llm), model.llm.config.to_dict() | {"template": model.template}


def tower(model, index):
    """One tower alone, and how it wants its pictures."""
    if not 0 <= index < len(model.vision):
        raise InputError(f"--tower={index}: this model has {len(model.vision)} (0 is the first)")
    tower = model.vision[index]
    return pictures(model, tower), *tower.hugging_face()


# --- what they share --------------------------------------------------------------------------------------------------

def llm_tensors(llm):
    """{name in Hugging Face's causal language models: tensor}, as save_pretrained writes them."""
    return {name if name.startswith("lm_head.") else f"model.{name}": p for name, p in llm.named_parameters()}


def pictures(model, tower=None):
    """preprocessor_config.json; statistics are the tower's own."""
    normalize, spec = (tower or model.vision[0]).normalize, model.spec
    own = [tuple(numbers.flatten().tolist()) for numbers in (normalize.mean, normalize.std)]
    if torch.allclose(torch.tensor([spec.mean, spec.std]), torch.tensor(own), rtol=1e-6):
        own = spec.mean, spec.std                                    # the same, as its file writes them
    return {"preprocessor_config.json": replace(spec, mean=own[0], std=own[1]).config()}


def words(model, tokenizer):
    """The tokenizer's files. It begins every text with the template's BOS, as Hugging Face's do; the chat template renders what
    dialogue.render renders: pictures first, then the text, which may be a string or a list of parts."""
    layout, tokenizer = named(model.template), Tokenizer.from_str(tokenizer.to_str())
    bos = next((token for token in layout.bos if tokenizer.token_to_id(token) is not None), None)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B",
                                                                 special_tokens=[(bos, tokenizer.token_to_id(bos))])
    first, later, ask, reply, end = map(json.dumps, (layout.first, layout.later, layout.ask, layout.reply, layout.end))
    text = "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content if part.type == 'image' %}<image>\n" \
           "{% endfor %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
    chat = ("{% for m in messages %}{% if m.role == 'user' %}{{ " + f"{first} if loop.first else {later}" + " }}" + text +
            "{{ " + ask + " }}{% elif m.role == 'assistant' %}{{ " + reply + " }}" + text + "{{ " + end + " }}" +
            "{% endif %}{% endfor %}")
    end = layout.end.strip(" ")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": bos} if bos else {}
    settings |= {"eos_token": end, "pad_token": end} if end in layout.special else {}
    files = {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": settings}
    return files | ({"chat_template.jinja": chat} if layout.question else {})        # plain is for captions, no chat


def stored_dtype(folder):
    """The dtype of most of a checkpoint's tensors: files are read as float32 unless one says otherwise."""
    with open_safetensors(next(iter(tensor_files(folder).values()))) as file:
        found = [file.get_slice(name).get_dtype() for name in file.keys()]
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(max(set(found), key=found.count), torch.float32)


def read_run(folder):
    """A checkpoint of a run (checkpoint.py) -> the whole MLLM, float32, adapters merged."""
    state = read_json(folder / "state.json")
    model = train.build_stage(train.Config(**state["config"]), state["stage"], folder.resolve().parents[1], "cpu")
    checkpoint.load(folder, model)
    lora.merge(model.llm)
    return model.eval()


def export(model, folder, format="", index=0):
    """Write an MLLM in one of FORMATS -> the format. The folder appears whole or not at all. Raises InputError where the format
    has no place for something."""
    folder = Path(folder)
    format = format or ("llava-hf" if model.connector_config.kind in ("linear", "mlp") else "llava")
    write = {"llava-hf": llava_hf, "llava": llava, "llama": llama, "tower": lambda model: tower(model, index)}[format]
    files, tensors, config = write(model)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = str(model.llm.embed_tokens.weight.dtype).removeprefix("torch.")
    save_checkpoint(partial, tensors, config | {"dtype": dtype, "torch_dtype": dtype})
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (partial / name).write_text(text, encoding="utf-8")
    replace_folder(partial, folder)
    return format


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if not config.to:
        raise InputError("--to=FOLDER says where to write")
    if config.format not in ("", *FORMATS):
        raise InputError(f"--format={config.format}: {', '.join(FORMATS)}")
    if config.dtype not in ("", *DTYPES):
        raise InputError(f"--dtype={config.dtype}: {', '.join(DTYPES)}")
    if Path(config.to).exists() and (not Path(config.to).is_dir() or any(Path(config.to).iterdir())):
        raise InputError(f"--to={config.to}: exists already; name a new folder")
    source = locate(config.model or newest_model())
    if (source / "state.json").exists():
        model = read_run(source).to(DTYPES[config.dtype or "float32"])
    else:
        model = MLLM.from_pretrained(source, DTYPES[config.dtype] if config.dtype else stored_dtype(source))
    format = export(model, config.to, config.format, config.tower)
    print(f"wrote {config.to} ({format})")


if __name__ == "__main__":
    cli.run(main)

"""Write a trained model in a layout that other programs read.

    python -m interop.export --model=out/mlp/model --to=FOLDER        mlp, sci: llava-hf
    python -m interop.export --model=out/dense/model --to=FOLDER      the others: llava
    python -m interop.export --model=out/dense/model --to=FOLDER --format=llama
    python -m interop.export --model=out/dense/checkpoints/stage2-0001500 --to=FOLDER

    llava-hf   LlavaForConditionalGeneration of transformers, as llava-hf/llava-1.5-*; with AnyRes
               LlavaNextForConditionalGeneration, as llava-hf/llava-v1.6-*
    llava      liuhaotian/llava-v1.* and HuanjinYao/DenseConnector-v1.5-*, tower included
    llama      LlamaForCausalLM (or the class of that LLM), tokenizer and chat template

--model is whatever sample.py reads, or a run's checkpoint: the parts that it lacks are read where
that run read them, and LoRA adapters are merged. Our own commands read all three layouts.
common.save.save_tower(model.vision[0], FOLDER) writes a tower alone.
"""

import json
import string
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, processors

import train
from clip import CLIPVision
from common import checkpoint, cli, lora
from common.cli import option
from common.errors import InputError
from common.layouts import SHAPES
from common.pretrained import fields_of, locate, read_json
from common.run import Ranks
from common.save import (
    dtype_name,
    hugging_face,
    llm_tensors,
    save_checkpoint,
    statistics,
    whole,
    write_json,
)
from connector import Tower, make_connector
from dialogue import MARK, TEMPLATES
from interop.llava import DENSE, TOWER
from interop.load import load_model, newest_model

# Connectors that transformers' LLaVA has.
LLAVA_HF = ("mlp", "sci")


@dataclass
class Config:
    model: str = option("", "folder, hub id or checkpoint of a run; default: the newest under out/")
    to: str = option("", "the folder to write")
    format: str = option("", "llava-hf, llava or llama; default: llava-hf if it can, or llava")


# ---- the formats: a model -> {file name: content}, tensors, config.json --------------------------


def llava_hf(model):
    """Write mlp or sci for transformers.

    <image> becomes a token if the tokenizer lacks it.
    """
    tower = model.vision[0]
    check_connector(model, "llava-hf", LLAVA_HF)
    llm = llm_tensors(model.llm)
    # transformers drops one prefix token, and some of MAE's patches; it has no bias in lm_head
    is_mae = tower.config.model_type == "vit_mae"
    if tower.num_prefix_tokens > 1 or is_mae or "lm_head.bias" in llm:
        raise InputError("--format=llava-hf: not for MAE, register tokens, or Phi as the LLM")
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(MARK, normalized=False)])
    image_id = tokenizer.token_to_id(MARK)
    text_config = model.llm.config.to_dict()
    if image_id >= text_config["vocab_size"]:
        # The next multiple of 64, as llava-hf does.
        text_config["vocab_size"] = (image_id // 64 + 1) * 64
    vision, vision_config = hugging_face(tower)
    tensors = {f"vision_tower.{key}": tensor for key, tensor in vision.items()}
    for key, tensor in llm.items():
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            # New rows are the mean: a new token is never the most likely one.
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            missing = text_config["vocab_size"] - len(tensor)
            tensor = torch.cat([tensor, mean.expand(missing, -1)])
        tensors[f"language_model.{key}"] = tensor
    for key, tensor in model.connector.state_dict().items():
        key = key.replace("mm_projector.0", "multi_modal_projector.linear_1")
        tensors[key.replace("mm_projector.2", "multi_modal_projector.linear_2")] = tensor
    strategy = "default" if tower.num_prefix_tokens else "full"
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": tower.num_patches(model.spec.size),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": model.connector.layers[0] if model.connector.name == "sci" else -2,
        "vision_feature_select_strategy": strategy,
        "text_config": text_config,
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "vision_config": vision_config,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": tower.config.patch_size,
        "num_additional_image_tokens": tower.num_prefix_tokens,
        "vision_feature_select_strategy": strategy,
    }
    if model.spec.mode == "anyres":
        processor["processor_class"] = "LlavaNextProcessor"
        config |= {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_grid_pinpoints": [[h, w] for w, h in model.spec.pinpoints],
            "use_image_newline_parameter": True,
        }
    files = {"processor_config.json": processor}
    files |= tokenizer_files(model, tokenizer) | image_files(model)
    return files, tensors, config


def llava(model):
    """Write the authors' layout of LLaVA-1.5 and the Dense Connector."""
    tower, name = model.vision[0], model.connector.name
    check_connector(model, "llava", ("linear", "mlp", "dense", *DENSE))
    if not isinstance(tower, CLIPVision):
        raise InputError(f"--format=llava: not for a {tower.config.model_type} tower, only CLIP's")
    vision, vision_config = hugging_face(tower)
    tensors = {TOWER + key: tensor for key, tensor in vision.items()} | llm_tensors(model.llm)
    tensors |= {f"model.{key}": tensor for key, tensor in model.connector.state_dict().items()}
    shape = asdict(tower.config).items()
    names = [key for key, public in SHAPES.items() if public.items() <= shape]
    llm_config = model.llm.config.to_dict()
    family = llm_config["model_type"].replace("qwen2", "qwen")
    config = llm_config | {
        "architectures": [f"Llava{family.capitalize()}ForCausalLM"],
        "model_type": f"llava_{family}",
        "mm_vision_tower": names[0] if names else tower.config.model_type,
        "mm_hidden_size": next(model.connector.mm_projector.parameters()).shape[1],
        "mm_projector_type": "linear" if name == "linear" else "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "is_video": False,
        "image_aspect_ratio": model.spec.mode if model.spec.mode in ("pad", "anyres") else "square",
    }
    if model.spec.mode == "anyres":
        config["image_grid_pinpoints"] = list(map(list, model.spec.pinpoints))
        config["mm_patch_merge_type"] = "spatial_unpad"
    if not names:
        # A key of ours, for a tower that has no public name.
        config["mm_vision_config"] = vision_config
    if name not in ("linear", "mlp"):
        config["mm_dense_connector_type"] = name.replace("dense", "dci")
    return tokenizer_files(model) | image_files(model), tensors, config


def llama(model):
    """Write the LLM alone, with its tokenizer and template."""
    return tokenizer_files(model), llm_tensors(model.llm), model.llm.config.to_dict()


FORMATS = {"llava-hf": llava_hf, "llava": llava, "llama": llama}


# ---- shared --------------------------------------------------------------------------------------


def check_connector(model, layout, names):
    """Raise InputError if the layout cannot record this connector and its layers."""
    connector, name = model.connector, model.connector.name
    if name not in names:
        raise InputError(f"--format={layout}: not for connector {name}, only {', '.join(names)}")
    tower = Tower(*model.vision[0].shape(model.spec.size))
    usual = make_connector(name, [tower], llm_width=1)
    if connector.layers != usual.layers:
        raise InputError(
            f"--format={layout}: this model's connector reads the layers {connector.layers}, and "
            f"what loads the folder would read {usual.layers}"
        )


def image_files(model):
    """Return preprocessor_config.json with the tower's mean and standard deviation."""
    spec = replace(model.spec, **statistics(model.vision[0]))
    return {"preprocessor_config.json": spec.config()}


def tokenizer_files(model, tokenizer=None):
    """Return the tokenizer's files, which give the same prompt as dialogue.render.

    transformers' processors put BOS before a chat template's text, its tokenizers do not.
    tokenizer: for a processor, with the token <image>. None: the model's, alone.
    """
    template, files = TEMPLATES[model.template], {}
    if template.keeps_questions:
        files["chat_template.jinja"] = chat_template(template, has_bos=tokenizer is None)
    tokenizer = Tokenizer.from_str((tokenizer or model.tokenizer).to_str())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # A prompt in a batch ends at the right, where its answer begins.
        "padding_side": "left",
    }
    for bos in template.bos:
        bos_id = tokenizer.token_to_id(bos)
        if bos_id is not None:
            settings["bos_token"] = bos
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, bos_id)]
            )
            break
    end = template.end.strip(" ")
    if end in template.special:
        settings |= {"eos_token": end, "pad_token": end}
    files["tokenizer.json"] = json.loads(tokenizer.to_str())
    return files | {"tokenizer_config.json": settings}


# Images come first. A message's content is a string or a list of parts.
CHAT = """
{%- macro content(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content if part.type == "image" -%}
      {{- $image -}}
    {%- endfor -%}
    {%- for part in message.content if part.type == "text" -%}
      {{- part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set system, turns = $system, messages -%}
{%- if messages[0].role == "system" -%}
  {%- set system, turns = $other_system, messages[1:] -%}
{%- endif -%}
{{- $bos -}}
{%- for message in turns -%}
  {%- if message.role == "assistant" -%}
    {{- $reply ~ content(message) ~ $end -}}
  {%- else -%}
    {{- ($before ~ system ~ $after if loop.first else $later) ~ content(message) ~ $ask -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(template, has_bos):
    """Write a template in Jinja. has_bos: it begins with the BOS token."""
    before, place, after = template.first.partition("{system}")
    texts = vars(template) | {"before": before, "after": after}
    refusal = "raise_exception('this model has no place for a system message')"
    return string.Template(CHAT).substitute(
        {name: json.dumps(text) for name, text in texts.items()},
        bos="bos_token" if has_bos else "''",
        other_system="content(messages[0])" if place else refusal,
    )


def read_checkpoint(folder):
    """Load a run's checkpoint as a whole MLLM in float32, LoRA adapters merged."""
    state = read_json(folder / "state.json")
    config = fields_of(train.Config, state["config"] | {"bf16": False})
    run = folder.resolve().parents[1]
    model = train.build_stage(config, state["stage"], run, Ranks("cpu"))
    checkpoint.load(folder, model)
    lora.merge(model.llm)
    return model.float()


def export(model, folder, format=""):
    """Write an MLLM and return the format. The folder appears whole or not at all.

    format: one of FORMATS. Raises InputError if there is none such, or if it cannot represent
    the model.
    """
    if not format:
        format = "llava-hf" if model.connector.name in LLAVA_HF else "llava"
    files, tensors, config = cli.find_class(FORMATS, format, "--format")(model)
    dtype = dtype_name(model.llm)
    config |= {"template": model.template, "dtype": dtype, "torch_dtype": dtype}
    with whole(folder) as partial:
        save_checkpoint(partial, tensors, config)
        for name, content in files.items():
            if isinstance(content, str):
                (partial / name).write_text(content, encoding="utf-8")
            else:
                write_json(partial / name, content)
    return format


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if not config.to or Path(config.to).exists():
        raise InputError(f"--to={config.to}: give the name of a new folder")
    source = locate(config.model or newest_model())
    is_checkpoint = (source / "state.json").exists()
    # None: in the dtype that it is stored in.
    model = read_checkpoint(source) if is_checkpoint else load_model(source, None)
    format = export(model, config.to, config.format)
    print(f"wrote {config.to} ({format})")


if __name__ == "__main__":
    cli.run(main)

"""Turn a dialogue into text, and the text into tokens and labels.

    turns [(question, answer), ...]          "<image>" marks the place of an image
      |  render(turns, template)             -> text, and which character ranges are supervised
      |  encode(tokenizer, turns, template)  -> ids (one IMAGE per image), labels (IGNORE elsewhere)

Training and inference share `render`, so a prompt is always a prefix of what was trained. The
layouts are LLaVA's (arXiv 2304.08485, llava/conversation.py), with two differences. Labels come
from the character offsets of one tokenization; LLaVA tokenizes every prefix again and compares
lengths. And "<image>" stays where the text has it; LLaVA moves it to the front.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from common.chat_template import recognize
from common.cli import find_class
from common.errors import InputError
from common.pretrained import read_config, read_json
from common.records import MARK
from common.tokenizer import load_tokenizer_model, set_prefix

IMAGE = -200  # LLaVA's placeholder id for an image
IGNORE = -100  # the label of a token that is not supervised


@dataclass(frozen=True)
class Template:
    """The text around questions and answers.

    first + q1 + ask + reply + a1 + end + later + q2 + ask + reply + a2 + end ...

    A prompt stops after `ask`, and all that follows is supervised. A space before the answer is
    part of `reply`: most tokenizers merge it with the next word.
    """

    first: str  # before the first question; {system} is the place of the system prompt
    later: str  # before every other question
    ask: str  # after a question
    reply: str  # before an answer
    end: str  # after an answer; generation stops there
    system: str = ""  # the system prompt of a dialogue without its own
    special: tuple = ("<s>", "</s>")  # tokens that the tokenizer must have
    bos: tuple = ("<s>", "<|begin_of_text|>")  # at the very start: the first one that exists
    keeps_questions: bool = True  # False: only the images of a question are kept
    image: str = f"{MARK}\n"  # what an image and the newline behind it become


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"

TEMPLATES = {
    # Stage 1: image, caption, newline. LLaVA trains no end token here: a newline ends the answer.
    "plain": Template("", "", "", "", "\n", special=(), keeps_questions=False),
    "vicuna_v1": Template("{system} USER: ", "USER: ", " ASSISTANT:", " ", "</s>", VICUNA),
    "llama_2": Template(
        "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " ", " </s>", LLAVA
    ),
    # LLaVA-NeXT's for Mistral-Instruct
    "mistral_instruct": Template("[INST] ", "[INST] ", " [/INST]", " ", " </s>"),
    "llama_3": Template(
        SYSTEM + "{system}<|eot_id|>" + USER,
        USER,
        "<|eot_id|>" + ASSISTANT,
        "",
        "<|eot_id|>",
        LLAVA,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # ChatML as Qwen and Hermes write it.
    "chatml": Template(
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
        "\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
        "Answer the questions.",
        special=("<|im_start|>", "<|im_end|>"),
        bos=(),
    ),
    "tiny": Template("USER: ", "USER: ", " ASSISTANT:", " ", "</s>", special=("</s>",)),
}
# The Dense Connector's 8B: the role "system" before an answer, no newline behind an image.
TEMPLATES["llama_3_dense"] = replace(TEMPLATES["llama_3"], ask="<|eot_id|>" + SYSTEM, image=MARK)
chatml = TEMPLATES["chatml"]
# Qwen3 and SmolLM3 with thinking off: an empty thought is part of the prompt.
TEMPLATES["no_think"] = replace(chatml, ask=chatml.ask + "<think>\n\n</think>\n\n")
# ChatML as LLaVA and the Dense Connector's 34B write it: no newline between two turns.
TEMPLATES["chatml_direct"] = replace(
    chatml,
    first="<|im_start|>system\n{system}<|im_end|><|im_start|>user\n",
    later="<|im_start|>user\n",
    ask="<|im_end|><|im_start|>assistant\n",
)
# Phi-2 has no chat template. The Dense Connector trained it with Vicuna's text.
TEMPLATES["phi"] = replace(
    TEMPLATES["vicuna_v1"], end="<|endoftext|>", special=("<|endoftext|>",), bos=()
)


def render(turns, template, system=""):
    """Write turns [(question, answer), ...] as text -> text, spans.

    spans: the (start, end) character ranges that are supervised: everything after each prompt.
    An empty answer has none. The last answer may be None: the text is then the prompt for it.
    system: a system prompt in place of the template's; InputError if there is no place for one.
    """
    layout = find_class(TEMPLATES, template, "template")
    if system and "{system}" not in layout.first:
        raise InputError(f"the template {template} has no place for the system text {system!r:.80}")
    text, spans = "", []
    for i, (question, answer) in enumerate(turns):
        text += layout.later if i else layout.first.replace("{system}", system or layout.system)
        question = question.replace(f"{MARK}\n", layout.image)
        text += question if layout.keeps_questions else MARK * question.count(MARK)
        text += layout.ask
        if answer is None:
            break
        # a space at the start would merge with the prompt's last token
        answer = answer.lstrip()
        start = len(text)
        text += layout.reply + answer + layout.end
        if answer:
            spans.append((start, len(text)))
    return text, spans


def find_template(folder):
    """Find the template of a checkpoint; None if it has no chat template (a base model, Vicuna).

    It is "template" in config.json, else recognized from the chat template (or an InputError).
    """
    config = read_config(folder)
    return config.get("template") or recognize(Path(folder), config.get("model_type"))


def load_tokenizer(folder):
    """Load a checkpoint's tokenizer.json, else its tokenizer.model -> tokenizers.Tokenizer.

    Truncation, padding and the post-processor are removed. The post-processor adds a BOS token,
    which is the template's part, and trims spaces off the offsets.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.exists():
        return load_tokenizer_model(folder)
    dropped = dict.fromkeys(["truncation", "padding", "post_processor"])
    try:
        tokenizer = Tokenizer.from_str(json.dumps(read_json(file) | dropped))
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise InputError(f"{file}: not a tokenizer ({error})") from None
    # a byte-level tokenizer has none
    if tokenizer.normalizer:
        set_prefix(tokenizer, folder)
    return tokenizer


def encode(tokenizer, turns, template, images=True, system=""):
    """Turn turns into ids and labels, two lists of equal length. An image is one IMAGE.

    A label is the token itself where the token begins in a supervised range, else IGNORE. The loss
    shifts them by one. Each chunk of text between images is tokenized on its own, as in LLaVA: a
    sentencepiece tokenizer also puts a space before the first word after an image.
    images=False: "<image>" is text. Raises InputError if the tokenizer lacks a template's token.
    """
    layout = find_class(TEMPLATES, template, "template")
    for token in layout.special:
        if tokenizer.token_to_id(token) is None:
            raise InputError(
                f"the tokenizer lacks {token}, which the template {template} needs: choose the one "
                'of the LLM ("template" in its config.json, or train.py --template=)'
            )
    text, spans = render(turns, template, system)
    supervised = set()
    for start, end in spans:
        supervised.update(range(start, end))
    bos = [tokenizer.token_to_id(token) for token in layout.bos]
    ids = [token for token in bos if token is not None][:1]
    labels = [IGNORE] * len(ids)
    begin = 0  # of the chunk, in characters of the text
    for chunk in text.split(MARK) if images else [text]:
        encoding = tokenizer.encode(chunk, add_special_tokens=False)
        for token, (offset, _) in zip(encoding.ids, encoding.offsets, strict=True):
            labels.append(token if begin + offset in supervised else IGNORE)
        ids += [*encoding.ids, IMAGE]
        labels.append(IGNORE)
        begin += len(chunk) + len(MARK)
    # no image follows the last chunk
    return ids[:-1], labels[:-1]


def end_ids(tokenizer, template):
    """List the tokens that end an answer: the template's own, or all that hold a newline."""
    layout = find_class(TEMPLATES, template, "template")
    end = layout.end.strip(" ")
    if end in layout.special:
        return [tokenizer.token_to_id(end)]
    return [i for i in range(tokenizer.get_vocab_size()) if end in tokenizer.decode([i])]


def repeats(ids, image_tokens):
    """Count each id's places in the LLM's input; image_tokens: those of each image."""
    numbers = iter(image_tokens)
    return [next(numbers) if token == IMAGE else 1 for token in ids]


def cut_to_length(ids, labels, max_length, image_tokens):
    """Drop whole turns at the end until at most max_length tokens are left, images expanded.

    The result is what `encode` gives for the turns that stay, or empty if the first is too long.
    An image within an answer counts as the end of a turn.
    """
    length, end_of_turn = 0, 0
    for i, number in enumerate(repeats(ids, image_tokens)):
        if labels[i] == IGNORE and labels[i - 1] != IGNORE:
            end_of_turn = i
        length += number
        if length > max_length:
            return ids[:end_of_turn], labels[:end_of_turn]
    return ids, labels

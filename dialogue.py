"""A dialogue as text, and the text as tokens and labels: templates, one tokenisation, and the mask of what is supervised.

    turns [(question, answer), ...]           '<image>' stands in the text once a picture
      |  render(turns, template)              -> text, and the character ranges of it that are supervised
      |  encode(tokenizer, turns, template)   -> ids (one IMAGE a picture), labels (IGNORE where nothing is supervised)

One function renders for training and for inference, so a prompt is always the beginning of what was trained. The layouts are
LLaVA's (arXiv 2304.08485), with two differences: labels come from the character offsets of one tokenisation (LLaVA tokenises
every prefix again and compares lengths), and `<image>` stays where the text has it (LLaVA moves it to the front). Of ChatML
there are two: as Qwen and Hermes speak it, and as LLaVA does.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from hub import InputError, read_json
from spm import load_tokenizer_model

IMAGE = -200                                                         # LLaVA's placeholder id for a picture
IGNORE = -100                                                        # label of a token that is not supervised
MARK = "<image>"                                                     # a picture in text


# --- Templates: a dialogue as text --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """first q1 ask reply a1 end, later q2 ask reply a2 end, ...; a prompt stops after `ask`, the rest is supervised.
    A space before the answer belongs to `reply`, not to `ask`: most tokenizers glue it to the word that follows, and a
    prompt that ended in it would not be, in tokens, a prefix of what was trained."""
    first: str                                                       # before the first question: system prompt and role
    later: str                                                       # before every other question
    ask: str                                                         # after a question; the end of a prompt
    reply: str                                                       # before an answer
    end: str                                                         # after an answer; generation stops there
    special: tuple                                                   # tokens that the tokenizer must have
    bos: tuple = ("<s>", "<|begin_of_text|>")                        # at the very start: the first that there is
    question: bool = True                                            # False: of a question only its pictures are kept


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
LLAVA = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user "
         "provides, and assist the user with a variety of tasks using natural language.")
SYSTEM, USER, ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant"))

TEMPLATES = {
    # Stage 1: picture, caption, newline. LLaVA trains no end token here, so the newline ends an answer (see end_ids).
    "plain": Template("", "", "", "", "\n", (), question=False),
    "vicuna_v1": Template(f"{VICUNA} USER: ", "USER: ", " ASSISTANT:", " ", "</s>", ("<s>", "</s>")),
    "llama_2": Template(f"[INST] <<SYS>>\n{LLAVA}\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " ", " </s>",
                        ("<s>", "</s>")),
    "llama_3": Template(f"{SYSTEM}{LLAVA}<|eot_id|>{USER}", USER,
                        f"<|eot_id|>{ASSISTANT}", "", "<|eot_id|>",
                        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    # The Dense Connector's 8B was trained with answers under the system's name, not the assistant's.
    "llama_3_dense": Template(f"{SYSTEM}{LLAVA}<|eot_id|>{USER}", USER, f"<|eot_id|>{SYSTEM}", "", "<|eot_id|>",
                              ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": Template("<|im_start|>system\nAnswer the questions.<|im_end|>\n<|im_start|>user\n",
                       "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>",
                       ("<|im_start|>", "<|im_end|>"), bos=()),
    # LLaVA's (and the Dense Connector's 34B), under its name there: no newline between two turns.
    "chatml_direct": Template("<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n", "<|im_start|>user\n",
                              "<|im_end|><|im_start|>assistant\n", "", "<|im_end|>", ("<|im_start|>", "<|im_end|>"), bos=()),
    # Phi-2 was not taught to chat; the Dense Connector taught it Vicuna's words, with its own end token.
    "phi": Template(f"{VICUNA} USER: ", "USER: ", " ASSISTANT:", " ", "<|endoftext|>", ("<|endoftext|>",), bos=()),
    "tiny": Template("USER: ", "USER: ", " ASSISTANT:", " ", "</s>", ("</s>",)),     # the embedded world's
}


def named(template):
    if template not in TEMPLATES:
        raise InputError(f"no template {template!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def render(turns, template):
    """turns [(question, answer), ...] -> text, spans. The last answer may be None: the text is then the prompt for it.
    spans: the (start, end) character ranges that are supervised, each all that follows its prompt: the answer, its end
    token, and a space before them if the template has one. An empty answer teaches nothing and has no span."""
    layout, text, spans = named(template), "", []
    for i, (question, answer) in enumerate(turns):
        text += layout.later if i else layout.first
        text += (question if layout.question else MARK * question.count(MARK)) + layout.ask
        if answer is None:
            break
        answer = answer.lstrip()                                     # spaces would merge with the prompt's last token
        start, text = len(text), text + layout.reply + answer + layout.end
        if answer:
            spans.append((start, len(text)))
    return text, spans


def find_template(folder):
    """A checkpoint's own template: the one that its config.json names ("template", as we save it), or the one that its
    chat template is recognised as. None if it has no chat template (a base model; Vicuna), but for Phi."""
    folder, chat = Path(folder), None
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "template" in config:
        named(config["template"])                                    # raises if there is none of that name
        return config["template"]
    if (folder / "chat_template.jinja").exists():
        chat = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not chat and (folder / name).exists():
            chat = read_json(folder / name).get("chat_template")
    if not chat:
        return "phi" if config.get("model_type") == "phi" else None
    for name, marks in (("llama_3", ["<|start_header_id|>"]), ("chatml", ["<|im_start|>"]),
                        ("llama_2", ["[INST]", "<<SYS>>"]), ("vicuna_v1", ["USER:", "ASSISTANT:"]),
                        ("vicuna_v1", ["['role'].upper()", "ASSISTANT:"])):     # as llava-hf writes it
        if all(mark in str(chat) for mark in marks):                 # a text, or a list of named ones
            return name
    others = {"Mistral's": "[INST]", "Zephyr's": "<|user|>", "Gemma's": "<start_of_turn>", "Alpaca's": "### Instruction"}
    kind = next((name for name, mark in others.items() if mark in str(chat)), f"which begins {' '.join(str(chat).split())[:40]!r}")
    raise InputError(f"{folder}: its chat template, {kind}, is none of ours: choose one with --template= "
                     f"({', '.join(TEMPLATES)})")


# --- Tokens and labels ------------------------------------------------------------------------------------------------

def load_tokenizer(folder):
    """A checkpoint's tokenizer.json, without what it may do besides splitting text: truncation and padding (lengths are
    ours to choose), and the post-processor (it adds a BOS, the template's part, and trims spaces off offsets). Where there
    is none, its tokenizer.model."""
    path, older = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer.model"
    if not path.exists() and older.exists():
        added = Path(folder) / "added_tokens.json"
        return load_tokenizer_model(older, read_json(added) if added.exists() else {})
    if not path.exists():
        raise InputError(f"{folder}: no tokenizer.json, and no tokenizer.model: a language model needs its tokenizer")
    description = read_json(path)
    try:
        return Tokenizer.from_str(json.dumps(description | dict(truncation=None, padding=None, post_processor=None)))
    except Exception as error:                                       # the tokenizers library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer ({error})") from None


def encode(tokenizer, turns, template, pictures=True):
    """turns -> ids, labels, two lists of equal length. A picture is one IMAGE; without `pictures` '<image>' is text. A label is
    the token itself where that begins in a supervised range, else IGNORE; shifting by one is left to the loss. Raises InputError
    where a token is missing.

    Each chunk of text between pictures is tokenised once, on its own, as in LLaVA. (A sentencepiece tokenizer puts a
    space before every chunk: before the first word after a picture, too.)"""
    layout = named(template)
    for token in layout.special:
        if tokenizer.token_to_id(token) is None:
            fitting = [name for name, other in TEMPLATES.items()
                       if other.special and all(tokenizer.token_to_id(token) is not None for token in other.special)]
            raise InputError(f"the tokenizer has no token {token}, which the template {template} needs: choose the "
                             "template that the language model was trained with (--template=; it has the tokens of "
                             f"{', '.join(fitting) or 'plain only'})")
    text, spans = render(turns, template)
    supervised = {i for start, end in spans for i in range(start, end)}              # characters
    ids = [tokenizer.token_to_id(token) for token in layout.bos if tokenizer.token_to_id(token) is not None][:1]
    labels = [IGNORE] * len(ids)
    begin = 0                                                        # where the chunk begins in the text
    for i, chunk in enumerate(text.split(MARK) if pictures else [text]):
        if i:
            ids, labels, begin = ids + [IMAGE], labels + [IGNORE], begin + len(MARK)
        encoding = tokenizer.encode(chunk, add_special_tokens=False)
        ids += encoding.ids
        labels += [token if begin + start in supervised else IGNORE
                   for token, (start, _) in zip(encoding.ids, encoding.offsets)]
        begin += len(chunk)
    return ids, labels


def end_ids(tokenizer, template):
    """The tokens that end an answer: the template's end token; for plain, every token that holds a newline."""
    end = named(template).end.strip(" ")
    if end in named(template).special:
        return [tokenizer.token_to_id(end)]
    return [i for i in range(tokenizer.get_vocab_size()) if end in tokenizer.decode([i])]


def cut_to_length(ids, labels, max_length, tokens_per_image):
    """Leave out whole turns at the end until the rest, pictures expanded, has at most max_length tokens: what encode
    gives for the turns that stay. Empty if not even the first turn fits. A picture within an answer counts as a turn's end."""
    length, keep = 0, 0
    for i, token in enumerate(ids):
        length += tokens_per_image if token == IMAGE else 1
        if length > max_length:
            return ids[:keep], labels[:keep]
        if labels[i] != IGNORE and (i + 1 == len(ids) or labels[i + 1] == IGNORE):
            keep = i + 1                                             # an answer's end token: a turn ends here
    return ids, labels

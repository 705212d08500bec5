"""Read a checkpoint's chat template, and recognize which of ours it is."""

from common.errors import InputError, printable
from common.layouts import FILE
from common.pretrained import read_json


def chat_template(folder):
    """Read a chat template, Jinja or a list of named ones; "" if the checkpoint has none."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = folder / name
        chat = read_json(file).get("chat_template") if file.exists() else None
        if chat:
            return str(chat)
    return ""


def recognize(folder, model_type):
    """Return the name of the template that a checkpoint's chat template is, None without one.

    Phi-2 has no chat template, but a template of ours. Raises InputError for an unknown one.
    """
    chat = chat_template(folder)
    if not chat:
        return "phi" if model_type == "phi" else None
    for name, marks in FILE["chat_templates"].items():
        if all(mark in chat for mark in marks):
            return name
    raise InputError(
        f"{folder}: its chat template is none of ours, it begins {printable(chat)}: add "
        '"template": "vicuna_v1" (or another of dialogue.TEMPLATES) to its config.json, or give '
        "train.py --template="
    )

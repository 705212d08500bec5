"""The command line of every command: a dataclass holds the options, --key=value sets them.

    python train.py config/dense_7b.toml --lr2=1e-5 --connector.groups=3 --resume

A field is declared with `option(default, help)`, and --help prints all fields. A recipe is a TOML
file of options; flags override it. A field NAME_options of type dict collects the options
--NAME.KEY=VALUE as text. In a recipe they are "NAME.KEY" = VALUE. An unknown key or a value of the
wrong type is an InputError.
"""

import atexit
import difflib
import inspect
import os
import sys
import tomllib
import types
import typing
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from common.errors import InputError

# Errors of PyTorch that a user can do something about: words in their text, and what to do.
REMEDIES = {
    "out of memory": "use a smaller batch (--micro_batch or --batch, where there is one)",
    "DataLoader worker (pid": "a loader process was killed, mostly for memory: lower --workers",
    "address already in use": "give torchrun another --master_port",
    "socket has timed out": "no answer from --master_addr: is it the first node's address?",
}
REMEDIES |= dict.fromkeys(("gloo", "NCCL", "Connection "), "another rank was lost: see its message")
BOOLS = {"true": True, "false": False}


def option(default, help, section=None):
    """Declare a dataclass field with its help text. section: --help starts a section here."""
    metadata = {"help": help, "section": section}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The options of a command that asks a trained model."""

    model: str = option("", "folder or hub id of a model; empty: the newest under out/")
    device: str = option("auto", "auto (CUDA or CPU), cpu, cuda, cuda:1 or mps")
    bf16: bool | None = option(None, "bfloat16; default: on CUDA and for 16-bit checkpoints")
    fast: bool = option(False, "on CUDA: compile the decoding step first, which takes a minute")


def parse(cls, arguments, about=""):
    """Build cls(...) from recipes, then flags. `--key` alone means true. Raises InputError.

    A word without dashes is a TOML file or the value of the first field.
    """
    values, flags, words = {}, [], []
    for argument in arguments:
        if argument.startswith("-"):
            flags.append(argument)
        elif argument.endswith(".toml"):
            set_options(cls, values, read_recipe(argument), f"{argument}: ")
        elif words:
            raise InputError(f"{argument}: options are --key=value")
        else:
            words.append(argument)
            flags.append(f"--{fields(cls)[0].name}={argument}")
    if "-h" in arguments or "--help" in arguments:
        # a recipe's values take the place of the defaults
        print(f"{about.strip()}\n{describe(cls(**values))}")
        sys.exit(0)
    set_options(cls, values, flags)
    return cls(**values)


def read_recipe(path):
    """Return the options of a TOML file as flags."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no recipe in TOML ({error}); recipes are in config/") from None
    return [f"--{key}={as_text(value)}" for key, value in recipe.items()]


def as_text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def set_options(cls, values, flags, where=""):
    """Convert flags and put them into the dict `values`. where: a prefix of error messages."""
    hints = typing.get_type_hints(cls)
    for flag in flags:
        key, equals, text = flag.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        name, dot, inner_key = key.partition(".")
        if dot and f"{name}_options" in hints:
            values.setdefault(f"{name}_options", {})[inner_key] = text if equals else "true"
        elif key not in hints:
            known = [known.replace("_options", ".KEY") for known in hints]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise InputError(f"{where}{flag}: unknown, the nearest is --{nearest} (see --help)")
        elif not equals and hints[key] not in (bool, bool | None):
            raise InputError(f"{flag} needs a value: --{key}=VALUE")
        else:
            values[key] = convert(text if equals else "true", hints[key], f"{where}--{key}")


def convert(text, hint, where):
    """Convert text to bool, int, float, str, list[str], or one of them or None."""
    if isinstance(hint, types.UnionType):
        if text in ("", "none", "None"):
            return None
        hint = hint.__args__[0]
    if typing.get_origin(hint) is list:
        return [os.path.expanduser(item) for item in text.split(",") if item]
    if hint is str:
        # A shell leaves ~/ alone behind --key=.
        return os.path.expanduser(text)
    try:
        return BOOLS[text.lower()] if hint is bool else hint(text)
    except (KeyError, ValueError):
        raise InputError(f"{where}={text}: should be {hint.__name__}") from None


def describe(config):
    """Return the lines of --help: each field, its value, its help text."""
    lines = []
    for each in fields(config):
        name, default = each.name, as_text(getattr(config, each.name))
        if name.endswith("_options"):
            name, default = name.removesuffix("_options") + ".KEY", "VALUE"
        if each.metadata["section"]:
            lines.append(f"\n{each.metadata['section']}")
        flag = f"--{name}={default}"
        lines.append(f"  {flag:28}  {each.metadata['help']}")
    return "\n".join(lines)


# ---- classes by name, whose constructor's keywords are options -----------------------------------


def check_name(name, names, flag):
    """Raise InputError that lists all names unless `name` is one of them."""
    if name not in names:
        raise InputError(f"{flag}={name}: must be one of {', '.join(names)}")


def find_class(classes, name, flag):
    """Return classes[name]. Raises InputError."""
    check_name(name, classes, flag)
    return classes[name]


def options_of(cls):
    """Return {option: its inspect.Parameter}: the keywords with defaults of the constructor."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: p for name, p in parameters.items() if p.default is not p.empty}


def parse_options(classes, name, raw, flag):
    """Return all options of a class: {option: text} as given, else the default.

    An option without an annotation has the type of its default. Raises InputError.
    """
    known = options_of(find_class(classes, name, flag))
    options = {option: p.default for option, p in known.items()}
    for option, value in raw.items():
        if option not in known:
            names = ", ".join(known) or "none"
            raise InputError(f"{flag}.{option}: {name} has no such option (it has: {names})")
        p = known[option]
        hint = type(p.default) if p.annotation is p.empty else p.annotation
        options[option] = convert(value, hint, f"{flag}.{option}")
    return options


def class_help(classes, flag):
    """Return the options of all classes, a line for each class that has some."""
    lines = []
    for name, cls in classes.items():
        options = [f"{flag}.{option}={p.default}" for option, p in options_of(cls).items()]
        if options:
            lines.append(f"  {name:12} {' '.join(options)}")
    return "\n".join(lines)


def pick_device(name):
    """Find the torch.device of "auto" (CUDA, else CPU) or of a device's name.

    Each process that torchrun started gets a different GPU. Raises InputError.
    """
    import torch  # here, so that --help starts fast

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    check_name(name.partition(":")[0], ("auto", "cuda", "mps", "cpu"), "--device")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(f"--device={name}: cannot be used ({reason})") from None


def leave(status):
    """End the process. One of several ranks ends without Python's cleanup.

    While Python shuts down, a thread of gloo may abort the process when it frees its last tensor
    (pytorch/pytorch issue 190489).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    atexit._run_exitfuncs()  # wandb sends its last lines, temporary folders are deleted
    with suppress(OSError):  # the reader of our output may be gone
        sys.stdout.flush()
    os._exit(status)


def run(main):
    """Call main(arguments) and end the process. An InputError is one line and exit status 2.

    So are the errors of REMEDIES: a GPU's memory, or a rank that was killed.
    """
    status = 2
    try:
        main(sys.argv[1:])
        status = 0
    except SystemExit as end:  # --help, or a second Ctrl-C
        status = end.code or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # the reader (head, say) has seen enough
        status = 0
    except (InputError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
    except RuntimeError as error:
        advice = [REMEDIES[words] for words in REMEDIES if words in str(error)]
        if not advice:
            raise
        print(f"error: {str(error).splitlines()[0]}: {advice[0]}", file=sys.stderr)
    leave(status)

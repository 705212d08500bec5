"""The command line of every command here: a dataclass is the configuration, a TOML file and `--key=value` change it.

    python train.py config/dense_7b.toml --lr2=1e-5 --resume

`--help` prints the dataclass: every field, its default and the comment behind it. An unknown key or a value of the wrong
type is one line on stderr that names the nearest key, and exit status 2; so is every other InputError.
"""
import atexit
import ctypes
import difflib
import inspect
import os
import re
import sys
import tomllib
import types
import typing
from contextlib import suppress
from pathlib import Path

from hub import InputError


def parse(cls, arguments, about=""):
    """Arguments -> cls(...). A word that ends in .toml is read first, then the --key=value in order; `--key` alone means true.
    Another bare word is the value of the first field. Raises InputError."""
    values, hints = {}, typing.get_type_hints(cls)
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(f"{about.strip()}\n\n{describe(cls)}")
            sys.exit(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            key = check_key(key.replace("-", "_"), hints, "--")
            if not equals and hints[key] not in (bool, bool | None):
                raise InputError(f"--{key} needs a value: --{key}=...")
            values[key] = convert(text if equals else "true", hints[key], f"--{key}")
        elif argument.startswith("-"):
            raise InputError(f"{argument}: options begin with two dashes (--help lists them)")
        elif argument.endswith(".toml"):
            for key, value in read_toml(argument).items():
                key = check_key(key, hints, f"{argument}: ")
                values.setdefault(key, convert(value, hints[key], f"{argument}: {key}"))
        elif "=" in argument and argument.partition("=")[0].replace("-", "_") in hints:
            raise InputError(f"{argument}: options begin with two dashes: --{argument}")
        elif next(iter(hints)) not in values:
            values[next(iter(hints))] = convert(argument, hints[next(iter(hints))], argument)
        else:
            raise InputError(f"{argument!r}: options look like --key=value (--help lists them)")
    return cls(**values)


def read_toml(path):
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path}: no such file; the recipes are in config/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def check_key(key, hints, where):
    if key in hints:
        return key
    nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0)
    raise InputError(f"{where}{key}: unknown option, the nearest is {nearest[0]} (--help lists all)")


def convert(value, hint, where):
    """Text of the command line, or a TOML value -> a value of the field's type (int, float, bool, str, or a list of str)."""
    if isinstance(hint, types.UnionType):                            # "float | None": an empty value means None
        if value in ("", "none", "None"):
            return None
        hint = hint.__args__[0]
    if typing.get_origin(hint) is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise InputError(f"{where}: should be a list, got {value!r}")
        return [at_home(str(item)) for item in items if item != ""]
    if hint is bool and str(value).lower() in ("true", "false", "1", "0", "yes", "no"):
        return str(value).lower() in ("true", "1", "yes")
    try:
        if hint is bool or isinstance(value, bool) or hint is str and not isinstance(value, str):
            raise ValueError
        return int(str(value).replace("_", "")) if hint is int else at_home(value) if hint is str else hint(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: should be {hint.__name__}, got {value!r}") from None


def at_home(text):
    """~/, which a shell leaves as it is behind --key=, is the home folder; also behind the kind of a data file, rec:~/..."""
    return re.sub(r"^(\w+:)?~(?=/)", lambda found: (found[1] or "") + os.path.expanduser("~"), text)


def describe(cls):
    """The fields of a configuration with their defaults and comments, read off its source."""
    lines = []
    for line in inspect.getsource(cls).splitlines()[1:]:
        field = re.match(r"\s+(\w+): [^=]+? = (.*?)\s+# (.*)", line)
        if field:
            name, default, comment = field.groups()
            default = re.sub(r"field\(default_factory=lambda: (.*)\)", r"\1", default).strip("\"'")
            lines.append(f"  --{name}={default}".ljust(34) + f" {comment}")
        elif line.strip().startswith("#"):
            lines.append(f"\n{line.strip(' #')}")
    return "\n".join(lines)


def pick_device(name):
    """"auto" (CUDA, else MPS, else CPU) or a device's name -> torch.device; of several cards each process that torchrun started
    has its own. InputError if this machine has no such device."""
    import torch                                                     # imported here: --help need not wait for it
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:                  # torch built without CUDA asserts
        raise InputError(f"--device={name}: cannot be used ({str(error).splitlines()[0]})") from None


def keep_freed_memory():
    """glibc hands large blocks back to the system when they are freed; the next step gets them again, page by page and zeroed,
    which makes a training step on a CPU slower, the first ones most. Here it keeps them: a process's memory stays at its
    highest. Other systems' allocators are left alone."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                      # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):                     # not glibc; Windows has no CDLL(None)
        return
    mallopt(M_MMAP_THRESHOLD, 2 ** 30)                               # blocks below 1 GiB come from the heap
    mallopt(M_TRIM_THRESHOLD, -1)                                    # and the heap never shrinks


def leave(status):
    """sys.exit; but one of several ranks does not take Python down: a thread of gloo's that lets go of its last tensor meanwhile
    aborts the process, now and then, after all is done (pytorch/pytorch, issue 190489)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    atexit._run_exitfuncs()                                          # wandb sends its last lines, temporary folders go
    with suppress(OSError):                                          # nobody reads any more
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def run(main, keep=True):
    """main(arguments), then the end of the process; an InputError is one line on stderr and exit status 2.
    keep: keep_freed_memory."""
    if keep:
        keep_freed_memory()
    try:
        main(sys.argv[1:])
        status = 0
    except SystemExit as end:                                        # --help, and a second Ctrl-C
        status = end.code or 0
    except KeyboardInterrupt:                                        # Ctrl-C is how a person leaves, not a fault
        status = 130
    except BrokenPipeError:                                          # the reader (head, say) has seen enough
        status = 0
    except (InputError, OSError) as error:                           # OSError: a full disk, a folder that may not be written
        if isinstance(error, OSError) and error.errno is None:       # no word of the system's
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        status = 2
    leave(status)

"""Download a checkpoint from the Hugging Face hub.

huggingface_hub downloads, retries and caches, so its environment variables apply: HF_HOME (cache),
HF_TOKEN (gated and private repositories), HF_HUB_OFFLINE=1 (cache only), HF_ENDPOINT (mirror).
"""

import sys
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants, errors

from common.errors import InputError

NEEDED = ["*.json", "*.jinja", "tokenizer.model", "*.safetensors"]
# the same weights again, for other programs
IGNORED = ["*/*", "consolidated*", "open_clip*", "*fp16*"]


def find(name):
    """Return the folder of owner/name or owner/name@revision. Raises InputError."""
    repository, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise InputError(f"{name}: no such folder (and not a Hugging Face id, which is owner/name)")
    try:
        return download(repository, revision or None)
    except Exception as error:  # its HTTP clients raise many kinds
        raise InputError(f"{name}: {explain(error)}") from None


def download(name, revision):
    """Download the files that we need, or find them in the cache -> folder of the snapshot."""
    files = {"allow_patterns": NEEDED, "ignore_patterns": IGNORED}
    folder = Path(hub.snapshot_download(name, revision=revision, **files))
    if revision or any(folder.glob("*.safetensors")) or constants.HF_HUB_OFFLINE:
        return folder
    # openai/clip-vit-large-patch14-336, for one, has safetensors only in the hub's own pull request
    pulls = hub.get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request")
    for pull in pulls:
        print(f"{name}: using its safetensors, @{pull.git_reference}", file=sys.stderr)
        return Path(hub.snapshot_download(name, revision=pull.git_reference, **files))
    return folder


def explain(error):
    """Say in one line why huggingface_hub found no checkpoint, and what to do."""
    # This includes GatedRepoError.
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder or repository (a gated one needs its license accepted, and HF_TOKEN)"
    if constants.HF_HUB_OFFLINE:
        return "no such folder, not in the cache, and HF_HUB_OFFLINE forbids downloading: unset it"
    cause = f"{type(error).__name__}: {error}"[:120]
    return f"no such folder, and downloading it failed ({cause}): try again, or name a folder"

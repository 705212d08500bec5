"""What every test shares: the project's root on the path, two threads, and where the real inputs lie (if they do)."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                                   # no test needs the network, none may use it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                 # on shared cores, spinning threads slow each other down
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real():
    """The folder of real photographs, dialogues and tokenizers, which is not part of this repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip(f"no real inputs at {folder}")
    return folder


def relative_error(ours, reference):
    """‖a−b‖ / ‖b‖ in float64; NaN never passes a comparison with it."""
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).norm() / reference.norm()).item()


def recorded(variant):
    """tests/fixtures/<variant>: (checkpoint folder, {name: tensor} that transformers computed with it)."""
    folder = ROOT / "tests" / "fixtures" / variant
    return folder, load_file(folder / "expected.safetensors")


@pytest.fixture(scope="session")
def tiny_model():
    """A whole model of the embedded world with random weights: two blocks a tower and in the LLM, a picture of 16 patches."""
    from clip import CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig
    from data import ImageSpec
    from llama import Llama, LlamaConfig
    from mllm import MLLM
    from pretrain import BOS, EOS, make_tokenizer
    torch.manual_seed(0)
    tower = CLIPVision(CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                        image_size=64, patch_size=16))
    tokenizer = make_tokenizer()
    llm = Llama(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=BOS,
                            eos_token_id=EOS))
    return MLLM([tower], llm, ConnectorConfig(kind="mlp"), tokenizer, "tiny", ImageSpec(64)).eval()


@pytest.fixture
def model_folder(tiny_model, tmp_path, monkeypatch):
    """The working directory is an empty one, where out/tiny/model holds tiny_model. Returns that folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    tiny_model.save(tmp_path / "out" / "tiny" / "model")
    return tmp_path / "out" / "tiny" / "model"

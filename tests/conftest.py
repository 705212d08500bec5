"""What every test shares: the project's root on the path, two threads, and where the real inputs lie (if they do)."""
import json
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
def world_tokenizer():
    """The embedded world's tokenizer; it takes a few seconds to train, so all tests share it and none changes it."""
    from pretrain import make_tokenizer
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folders(world_tokenizer, tmp_path_factory):
    """Public checkpoints in small, random weights in Hugging Face layout -> {"clip", "dinov2", "llama": folder}. The towers
    have six and five blocks and see 64 x 64 pixels as a grid of 4 x 4; the LLaMA speaks the embedded world's language."""
    from clip import CLIP, CLIPTextConfig, CLIPVisionConfig
    from dinov2 import DINOv2, DINOv2Config
    from llama import Llama, LlamaConfig
    from pretrain import BOS, EOS, PREPROCESSING
    torch.manual_seed(0)
    root, vocabulary = tmp_path_factory.mktemp("tiny"), world_tokenizer.get_vocab_size()
    heads = dict(hidden_size=32, num_attention_heads=2)
    CLIP(CLIPVisionConfig(num_hidden_layers=6, intermediate_size=64, image_size=64, patch_size=16, **heads),
         CLIPTextConfig(num_hidden_layers=1, intermediate_size=64, vocab_size=vocabulary, eos_token_id=EOS, **heads),
         projection_dim=16).save_pretrained(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    DINOv2(DINOv2Config(num_hidden_layers=5, mlp_ratio=2, image_size=64, patch_size=16, **heads)).save_pretrained(root / "dinov2")
    Llama(LlamaConfig(vocab_size=vocabulary, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=512,
                      rms_norm_eps=1e-5, bos_token_id=BOS, eos_token_id=EOS, **heads)).save_pretrained(root / "llama")
    world_tokenizer.save(str(root / "llama" / "tokenizer.json"))
    config = json.loads((root / "llama" / "config.json").read_text())
    (root / "llama" / "config.json").write_text(json.dumps(config | {"template": "tiny"}))
    return {name: root / name for name in ("clip", "dinov2", "llama")}


@pytest.fixture(scope="session")
def tiny_model(world_tokenizer):
    """A whole model of the embedded world with random weights: two blocks a tower and in the LLM, a picture of 16 patches."""
    from clip import CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig
    from images import ImageSpec
    from llama import Llama, LlamaConfig
    from mllm import MLLM
    from pretrain import BOS, EOS
    torch.manual_seed(0)
    tower = CLIPVision(CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                        image_size=64, patch_size=16))
    tokenizer = world_tokenizer
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

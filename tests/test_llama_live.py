"""llama.py and interop/phi.py against transformers, on new random models of every variant."""

# ruff: noqa: E402
import pytest
import torch

transformers = pytest.importorskip("transformers")

from conftest import relative_error
from make_llama_fixtures import VARIANTS, reference

from interop.phi import Phi
from llama import Llama

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_transformers_which_reads_what_we_save(variant, tmp_path):
    """Half of the variants are read from float16 shards."""
    theirs = reference(variant, seed=7, dtype=torch.float16)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 40), generator=generator)
    expected = theirs(tokens).logits
    if sorted(VARIANTS).index(variant) % 2:
        theirs.to(torch.float16).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        theirs.save_pretrained(tmp_path)
    ours = (Phi if theirs.config.model_type == "phi" else Llama).from_pretrained(tmp_path)
    assert relative_error(ours(tokens), expected) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    auto = transformers.AutoModelForCausalLM
    again, report = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs) and not any(report.values()), report
    assert relative_error(again(tokens).logits, expected) < 1e-5

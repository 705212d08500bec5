"""bench.py train: both sides compute the same loss, at the same weights and samples, before their times are compared."""
import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import relative_error

from benches import train

transformers.logging.set_verbosity_error()
TEXTS = (30, 9, 21, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "llava"
    heads = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.SIZES, "160m", (dict(num_hidden_layers=3, image_size=64, patch_size=16, **heads),
                                            dict(vocab_size=3000, num_hidden_layers=2, **heads)))
        train.write_llava(folder)
    return folder


@pytest.mark.parametrize("stage", (1, 2))
def test_float32_loss_and_gradients_are_those_of_transformers(stage, folder):
    """Packed without padding here, padded there. The loss is a mean of 43 float32 terms; gradients sum over all of them."""
    found = {}
    for name in ("ours", "transformers"):
        model, loss_of = train.TRAINERS[name](folder, stage, "cpu", TEXTS, "float32")
        loss = loss_of()
        loss.backward()
        llm, connector = (model.llm, model.connector.mm_projector[0]) if name == "ours" else (
            model.model.language_model, model.model.multi_modal_projector.linear_1)
        found[name] = (loss.item(), connector.weight.grad, llm.embed_tokens.weight.grad, llm.layers[1].mlp.up_proj.weight.grad)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    (ours, *gradients), (theirs, *expected) = found["ours"], found["transformers"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    for i, (gradient, other) in enumerate(zip(gradients, expected)):
        if stage == 1 and i > 0:
            assert gradient is other is None
        else:
            assert relative_error(gradient, other[:len(gradient)]) < 1e-5


@pytest.mark.parametrize("stage", (1, 2))
def test_bfloat16_loss_is_near_that_of_transformers(stage, folder):
    losses = []
    for name in ("ours", "transformers"):
        with torch.autocast("cpu", torch.bfloat16):
            model, loss_of = train.TRAINERS[name](folder, stage, "cpu", TEXTS)
            losses.append(loss_of().item())
        llm = model.llm if name == "ours" else model.model.language_model
        assert {p.dtype for p in llm.parameters()} == {torch.bfloat16 if stage == 1 else torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)           # bf16 has 8 bits; the mean of many errors is smaller

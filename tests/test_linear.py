"""linear.py: its products are PyTorch's but for rounding, in generation and in training, and small models stay as they are."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import linear
import train
from conftest import relative_error
from dialogue import IGNORE, IMAGE
from linear import LinearByConvolution, LinearByRow, PackedLinear, by_convolution, by_row, one_row, pack
from test_llama import prompts, seeded, small
from train import Config, build_model, choose_trained

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def everywhere(monkeypatch):
    """As on a machine where all dtypes gain, with maps of any size."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a CPU without what oneDNN needs for bfloat16")
    monkeypatch.setattr(linear, "slow_in", lambda dtype: True)
    monkeypatch.setattr(linear, "WIDE", 1)
    monkeypatch.setattr(linear, "ROWS", 1)


def rounding(dtype, y, exact):
    """In float32 sums of random terms are off by some 1e-6 of them. bfloat16 rounds the result alone, to 8 bits."""
    if dtype == torch.float32:
        return relative_error(y, exact) < 2e-6
    return (y.double() - exact).abs().max() <= 2 ** -8 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ((1, 1), (3, 1), (8,), (2, 5), (3, 100), (0,)), ids=str)
@pytest.mark.parametrize("N, K", ((256, 64), (1, 32), (61, 37), (16, 11008)))
def test_a_packed_product_is_as_near_to_the_exact_one_as_rounding_allows(everywhere, dtype, rows, N, K):
    x, weight, bias = (torch.randn(shape, generator=seeded(seed)).to(dtype) for seed, shape in enumerate(((*rows, K), (N, K), (N,))))
    for b in (None, bias):
        y = PackedLinear(weight, b)(x)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert y.shape == exact.shape and y.dtype == dtype
        assert 0 in rows or rounding(dtype, y, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_is_to_the_bit_what_it_is_among_four(everywhere, dtype, monkeypatch):
    """Fewer are filled up, since the kernel for one row is slower than the one for four; what is asked for comes back alone."""
    x, weight = (torch.randn(shape, generator=seeded(seed)).to(dtype) for seed, shape in enumerate(((4, 512), (300, 512))))
    packed, kernel, seen = PackedLinear(weight), torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda rows, *rest: seen.append(len(rows)) or kernel(rows, *rest))
    for T in (1, 2, 3):
        assert torch.equal(packed(x[:T]), packed(x)[:T])
    assert set(seen) == {4}


@pytest.mark.parametrize("rows", ((), (1,), (1, 1), (2,), (1, 3), (0,)), ids=str)
@pytest.mark.parametrize("N, K", ((256, 64), (1, 32), (61, 37), (16, 11008)))
def test_a_row_alone_is_multiplied_without_onednn_and_as_near_to_the_exact_product(everywhere, monkeypatch, rows, N, K):
    x, weight, bias = (torch.randn(shape, generator=seeded(seed)).bfloat16() for seed, shape in enumerate(((*rows, K), (N, K), (N,))))
    seen, product = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *given: seen.append(torch.backends.mkldnn.enabled) or product(*given))
    for b in (None, bias):
        y = one_row(x, weight, b)
        exact = product(x.double(), weight.double(), None if b is None else b.double())
        assert y.shape == exact.shape and y.dtype == torch.bfloat16
        assert 0 in rows or rounding(torch.bfloat16, y, exact)
    assert seen == [rows in ((2,), (1, 3))] * 2 and torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        one_row(x, weight[:, 1:])                                    # a wrong shape leaves oneDNN as it was
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("settings", ({}, {"tie_word_embeddings": True, "qkv_bias": True}), ids=("", "tied, biases"))
def test_a_llama_by_rows_says_the_same_with_the_same_tensors(everywhere, settings, monkeypatch):
    plain, other = small(**settings).bfloat16(), small(**settings).bfloat16()
    before, rows = list(other.named_parameters()), []
    by_row(other)
    assert all(a is b for (_, a), (_, b) in zip(before, other.named_parameters(), strict=True))
    assert sum(type(module) is LinearByRow for module in other.modules()) == 14 + (not settings)
    assert other.linear is one_row                                   # which only a head that is the embedding calls
    with torch.no_grad():
        for tokens in (prompts(3, 9), prompts(1, 1)):
            assert relative_error(other(tokens), plain(tokens)) < 2e-2
    monkeypatch.setattr(linear, "one_row", lambda x, *rest: rows.append(x.numel() // x.shape[-1]) or one_row(x, *rest))
    other.generate(prompts(1, 9), 3, eos=[])
    assert rows.count(9) == 14 and rows.count(1) == 2 * 14 + (0 if settings else 3)      # the prompt, two steps, three heads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", ({}, {"tie_word_embeddings": True, "qkv_bias": True}), ids=("", "tied, biases"))
def test_a_packed_llama_says_the_same(everywhere, dtype, settings):
    plain, packed = small(**settings).to(dtype), small(**settings).to(dtype)
    assert pack(packed) == 2 * 7 + 1                                 # two blocks of seven maps, and the head
    assert pack(packed) == 0                                         # again: nothing is left to do
    assert not [name for name, _ in packed.named_parameters() if "proj" in name or "head" in name]
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 14 + (not settings)
    with torch.no_grad():
        assert relative_error(packed(prompts(3, 9)), plain(prompts(3, 9))) < (1e-5 if dtype == torch.float32 else 2e-2)
    if dtype == torch.float32:                                       # bfloat16's rounding may change a word
        for batch in (1, 3):
            assert torch.equal(packed.generate(prompts(batch, 9), 20), plain.generate(prompts(batch, 9), 20))


@pytest.mark.parametrize("rows", ((300,), (2, 200), (1, 7), (0,)), ids=str)
@pytest.mark.parametrize("learns", (True, False))
@pytest.mark.parametrize("N, C", ((96, 48), (48, 96)))
def test_a_product_by_convolution_and_its_gradients_are_those_of_linear(monkeypatch, rows, learns, N, C):
    monkeypatch.setattr(linear, "ROWS", 64)                          # the last two of `rows` are fewer
    x, weight, bias = (torch.randn(shape, generator=seeded(seed)) for seed, shape in enumerate(((*rows, C), (N, C), (N,))))
    found = []
    for product, dtype in ((linear.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [tensor.to(dtype, copy=True) for tensor in (x, weight, bias)]
        for leaf in leaves if learns else leaves[:1]:
            leaf.requires_grad_()
        y = product(*leaves)
        (y * y.detach().roll(1, -1)).sum().backward()                # any gradient that differs from row to row
        found.append([y, *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for ours, exact in zip(*found):
        assert ours.shape == exact.shape
        assert 0 in rows or relative_error(ours, exact) < 2e-6


def model_of(connector="comm"):
    """The embedded world's towers and LLM, whose head is its embedding, with a connector that starts to learn."""
    return build_model(Config(connector=connector), "cpu").train().requires_grad_(True)


def loss_and_gradients(model, lengths=(150, 90)):
    tokens = torch.randint(3, 999, (1, sum(lengths)), generator=seeded(1))
    labels = torch.cat([torch.tensor([IGNORE]), tokens[0, 1:]])[None].where(torch.rand(tokens.shape, generator=seeded(2)) < 0.5, IGNORE)
    tokens[0, 2:2 + model.tokens_per_image] = IMAGE
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=seeded(3))
    model.zero_grad()
    loss, _ = model(pixels, tokens, labels, list(lengths))
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", (["connector"], ["vision", "connector", "llm"]), ids=("stage 1", "all"))
def test_a_multimodal_model_learns_the_same_by_convolution(everywhere, parts):
    plain, other = model_of(), model_of()
    for model in (plain, other):
        choose_trained(model, parts)
    by_convolution(other)
    assert sum(type(module) is LinearByConvolution for module in other.modules()) > 80 and other.llm.linear is linear.linear
    assert list(other.state_dict()) == list(plain.state_dict())
    (loss, gradients), (other_loss, other_gradients) = loss_and_gradients(plain), loss_and_gradients(other)
    assert relative_error(other_loss, loss) < 1e-6 and gradients.keys() == other_gradients.keys()
    size = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * size, name


def test_a_frozen_map_keeps_nothing_for_the_backward_pass_but_its_weight():
    kept = []
    x, weight = torch.randn(300, 48, requires_grad=True), torch.randn(96, 48)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear.linear(x, weight)
    assert [tensor.shape for tensor in kept] == [weight.shape]


@pytest.mark.parametrize("vendor, flags, gain", (("AuthenticAMD", "avx2 avx512f", True), ("AuthenticAMD", "avx2", False),
                                                 ("GenuineIntel", "avx2 avx512f", False)))
def test_float32_gains_on_an_amd_with_avx_512_alone(monkeypatch, vendor, flags, gain):
    for backend in (torch.backends.mkldnn, torch.backends.mkl):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    monkeypatch.setattr(linear.Path, "exists", lambda path: True)
    monkeypatch.setattr(linear.Path, "read_text", lambda path: f"vendor_id : {vendor}\nflags : fpu {flags}\n")
    slow_in = linear.slow_in.__wrapped__                             # without the cache, which is this machine's
    assert slow_in(torch.float32) == gain and not slow_in(torch.float16)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not slow_in(torch.float32) and not slow_in(torch.bfloat16)


def test_small_maps_and_machines_that_gain_nothing_stay_as_they_are(monkeypatch):
    for gain in (True, False):
        monkeypatch.setattr(linear, "slow_in", lambda dtype: gain)
        monkeypatch.setattr(linear, "WIDE", linear.WIDE if gain else 1)
        model = model_of("dense")                                    # of the embedded world: the scores of README are its
        kinds = [type(module) for module in model.modules()]
        by_convolution(model), by_row(model), by_row(model.bfloat16())
        assert pack(model) == 0 and model.llm.linear is F.linear
        assert [type(module) for module in model.modules()] == kinds


def test_what_is_frozen_in_bfloat16_is_not_computed_by_convolution_nor_float32_by_rows(everywhere):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.bfloat16), small(tie_word_embeddings=True).bfloat16())
    by_convolution(model)
    assert [type(module) for module in model[:2]] == [LinearByConvolution, nn.Linear] and model[2].linear is F.linear
    by_row(model)
    assert [type(module) for module in model[:2]] == [LinearByConvolution, LinearByRow] and model[2].linear is one_row


@pytest.mark.parametrize("flags, number", (([], 1), (["--bf16=true"], 0), (["--compile=true"], 0)), ids=str)
def test_training_goes_by_convolution_in_float32_and_not_compiled(tmp_path, monkeypatch, flags, number):
    called = []
    monkeypatch.setattr(train, "by_convolution", called.append)
    monkeypatch.setattr(train, "compile_blocks", lambda blocks: None)
    train.main(["--connector=mlp", "--stage=1", "--steps1=1", "--batch1=2", "--evaluate=false", "--device=cpu",
                f"--out={tmp_path / 'run'}", *flags])
    assert len(called) == number

"""mllm.py: where pictures enter the text, what the loss sums, what is generated, and the folder that holds it all."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import recorded, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

import hub
import mllm
import world
from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from connector import ConnectorConfig, visual_tokens
from data import Batches
from dialogue import IGNORE, IMAGE, encode
from dinov2 import DINOv2, DINOv2Config
from hub import InputError
from images import ImageSpec
from llama import Llama, LlamaConfig
from mllm import MLLM
from vit import ViT, ViTConfig

KINDS = ("linear", "mlp", "sti", "sci", "dense", "efficient", "comm")
HEADS = dict(hidden_size=32, num_attention_heads=2)
SIDE = dict(image_size=64, patch_size=16)
MAKE = {"clip": lambda: CLIPVision(CLIPVisionConfig(num_hidden_layers=6, intermediate_size=64, **SIDE, **HEADS)),
        "siglip": lambda: SigLIPVision(SigLIPVisionConfig(num_hidden_layers=6, intermediate_size=64, **SIDE, **HEADS)),
        "dinov2": lambda: DINOv2(DINOv2Config(num_hidden_layers=5, mlp_ratio=2, **SIDE, **HEADS)),
        "registers": lambda: DINOv2(DINOv2Config(num_hidden_layers=5, mlp_ratio=2, num_register_tokens=4, image_size=96,
                                                 patch_size=16, use_swiglu_ffn=True, **HEADS)),
        "vit": lambda: ViT(ViTConfig(num_hidden_layers=4, intermediate_size=64, num_labels=3, **SIDE, **HEADS)),
        "deit": lambda: ViT(ViTConfig(num_hidden_layers=4, intermediate_size=64, model_type="deit", **SIDE, **HEADS)),
        "deit3": lambda: ViT(ViTConfig(num_hidden_layers=4, intermediate_size=64, model_type="deit3", **SIDE, **HEADS)),
        "mae": lambda: ViT(ViTConfig(num_hidden_layers=4, intermediate_size=64, model_type="vit_mae", **SIDE, **HEADS))}


def lively(model):
    """Wide random weights: at the usual start towers and LLM say nearly the same whatever they see."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(std=0.5 if "embed" in name else 1.5 / p[0].numel() ** 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def build(world_tokenizer):
    """build(kind, towers=...) -> a small MLLM with random weights, the same for the same arguments; its answers differ."""
    def build(kind="mlp", towers=None, template="tiny", **config):
        torch.manual_seed(1)
        towers = towers or (("clip", "dinov2") if kind == "comm" else ("clip",))
        llm = Llama(LlamaConfig(vocab_size=world_tokenizer.get_vocab_size(), intermediate_size=64, num_hidden_layers=2,
                                max_position_embeddings=384, rms_norm_eps=1e-5, **(HEADS | config)))
        return lively(MLLM([MAKE[name]() for name in towers], llm, ConnectorConfig(kind), world_tokenizer, template, ImageSpec(64)))
    return build


def picture(index):
    return world.draw(world.scene("test", index), "test", index)


def batch_of(model, *samples):
    """Samples (pictures, turns) -> data.Batch, as the loader makes it."""
    class Samples(list):
        def __getitem__(self, index):
            return [*list.__getitem__(self, index), f"sample {index}"]
    return Batches(Samples(samples), model.tokenizer, model.template, model.spec, model.tokens_per_image, 2048)[range(len(samples))]


TEXT = ([], [("What is red?", "A colour."), ("And two?", "2")])
ONE = ([0], [("<image>\nWhat is this?", "a large red circle"), ("Where is it?", "[0.10,0.20,0.30,0.40]")])
TWO = ([1, 2], [("Is <image> the same as <image>", "no")])
LATER = ([3, 4], [("<image>\nWhat is this?", "a square."), ("And this: <image>?", "a cross.")])


def with_pictures(sample):
    return [picture(index) for index in sample[0]], sample[1]


# --- forward ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_loss_is_the_cross_entropy_of_full_logits_at_answers(build, kind):
    """Each sample alone, without padding: its text tokenised between pictures, their tokens put in by hand, all logits,
    log-softmax in float64. Float32 sums over some 20 tokens differ by less than 1e-5."""
    model = build(kind)
    samples = [with_pictures(sample) for sample in (TEXT, ONE, TWO, LATER)]
    batch = batch_of(model, *samples)
    loss, number = model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)
    slow, supervised = 0.0, 0
    for images, turns in samples:
        ids, labels = encode(model.tokenizer, turns, model.template)
        pieces, targets, images = [], [], iter(images)
        for token, label in zip(ids, labels):
            if token == IMAGE:
                pixels = torch.from_numpy(next(images)).permute(2, 0, 1)[None]
                hidden = [[h[:, tower.num_prefix_tokens:] for h in (tower(pixels)[layer] for layer in layers)]
                          for tower, layers in zip(model.vision, model.layers)]
                pieces.append(model.connector(hidden)[0])
                targets += [IGNORE] * visual_tokens(model.connector_config, 16)
            else:
                pieces.append(model.llm.embed_tokens.weight[token][None])
                targets.append(label)
        logits = model.llm(embeds=torch.cat(pieces)[None])[0].double().log_softmax(-1)
        for place, target in enumerate(targets[1:]):
            if target != IGNORE:
                slow, supervised = slow - logits[place, target].item(), supervised + 1
    assert number == supervised > 20
    assert abs(loss.item() - slow) < 1e-5 * slow


def test_loss_is_float32_also_where_the_model_is_not(build):
    model = build().to(torch.bfloat16)
    batch = batch_of(model, with_pictures(ONE))
    loss, _ = model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize("kind", ("mlp", "sti", "efficient", "comm"))
@torch.no_grad()
def test_visual_tokens_take_the_places_of_their_marks_in_order(build, kind):
    model = build(kind)
    batch = batch_of(model, *map(with_pictures, (LATER, TEXT, TWO, ONE)))
    M = model.tokens_per_image
    assert M == {"mlp": 16, "sti": 20, "efficient": 4, "comm": 16}[kind] and len(batch.pixels) == 5
    visual, embeds = model.see(batch.pixels), model.embed(batch.tokens, batch.pixels)
    expected = iter([picture for i in (0, 1, 2, 3, 4) for picture in visual[i]])     # row by row, picture by picture
    for row, tokens in zip(embeds, batch.tokens):
        for vector, token in zip(row, tokens.tolist()):
            assert torch.equal(vector, next(expected) if token == IMAGE else model.llm.embed_tokens.weight[token])
    assert next(expected, None) is None


@torch.no_grad()
def test_a_picture_matters_only_to_its_own_sample_and_only_from_its_mark_on(build):
    model = build()
    batch = batch_of(model, *map(with_pictures, (LATER, TEXT, ONE)))
    changed = batch.pixels.clone()
    changed[1] = 255 - changed[1]                                    # the second picture of the first sample
    def hidden(pixels):
        return model.llm(embeds=model.embed(batch.tokens, pixels, batch.shown), lengths=batch.lengths, hidden_only=True)
    same = (hidden(batch.pixels) == hidden(changed)).all(-1)[0]
    begin = (batch.tokens[0] == IMAGE).nonzero()[16].item()          # its first token, after the sixteen of the first picture
    end = batch.lengths[0]
    assert same[:begin].all() and not same[begin:end].any() and same[end:].all()


def loss_and_gradients(model, *batches):
    """Of the sum over batches -> (loss, number, {name: gradient})."""
    model.zero_grad()
    found = [model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown) for batch in batches]
    loss, number = sum(loss for loss, _ in found), sum(number for _, number in found)
    loss.backward()
    return loss.item(), number, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ("dense", "comm"))
def test_dialogues_packed_into_a_row_give_loss_and_gradients_of_each_alone(build, kind):
    """Float32, other shapes: sums in another order, 1e-7 a sum, and up to some 1e-5 where large terms of a gradient cancel."""
    model = build(kind)
    samples = [with_pictures(sample) for sample in (TEXT, ONE, TWO, LATER)]
    loss, number, gradients = loss_and_gradients(model, batch_of(model, *samples))
    alone, count, expected = loss_and_gradients(model, *(batch_of(model, sample) for sample in samples))
    assert number == count and abs(loss - alone) < 1e-5 * loss and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # a bias on all keys alike changes no attention: its gradient is zero but for rounding
        assert relative_error(gradient, expected[name]) < 1e-4 or name.endswith("attn.k.bias"), name


def test_dialogues_padded_on_the_right_give_the_same_loss_and_gradients(build):
    model = build()
    batch = batch_of(model, *map(with_pictures, (TEXT, ONE, TWO, LATER)))
    loss, number, gradients = loss_and_gradients(model, batch)
    tokens, labels = (torch.nn.utils.rnn.pad_sequence(row[0].split(batch.lengths), batch_first=True, padding_value=filling)
                      for row, filling in ((batch.tokens, 0), (batch.labels, IGNORE)))   # (B, T)
    padded = replace(batch, tokens=tokens, labels=labels, lengths=None)
    alone, count, expected = loss_and_gradients(model, padded)
    assert number == count and abs(loss - alone) < 1e-5 * loss
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-4 or name.endswith("attn.k.bias"), name


@torch.no_grad()
def test_a_dialogue_changes_nothing_for_its_neighbours_in_the_row(build):
    """The second of three keeps its loss, bit for bit, whatever stands before and behind it in as many tokens."""
    model = build()
    batch = batch_of(model, *map(with_pictures, (TWO, ONE, LATER)))
    own = torch.arange(batch.tokens.shape[1]) - batch.lengths[0]
    own = (own >= 0) & (own < batch.lengths[1])
    labels = batch.labels.masked_fill(~own, IGNORE)
    loss, number = model(batch.pixels, batch.tokens, labels, batch.lengths, batch.shown)
    tokens = torch.where(own | (batch.tokens == IMAGE), batch.tokens, 7)
    pixels = batch.pixels.clone()
    pixels[[0, 1, 3, 4]] = 255 - pixels[[0, 1, 3, 4]]                # all but its own picture
    assert number > 10 and loss == model(pixels, tokens, labels, batch.lengths, batch.shown)[0]


@pytest.mark.parametrize("trained", ("llm", "connector"))
@pytest.mark.parametrize("logits", (1, 2000, 2 ** 26))
def test_logits_in_chunks_give_loss_and_gradients_of_all_at_once(build, trained, logits, monkeypatch):
    """One position at a time, a few, all: 1e-7 a float32 sum in another order."""
    model = build().requires_grad_(False)
    getattr(model, trained).requires_grad_(True)
    batch = batch_of(model, *map(with_pictures, (TEXT, ONE, LATER)))
    hidden = model.llm(embeds=model.embed(batch.tokens, batch.pixels, batch.shown), lengths=batch.lengths, hidden_only=True)
    expected = torch.nn.functional.cross_entropy(model.llm.logits(hidden)[0, :-1], batch.labels[0, 1:], reduction="sum")
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    monkeypatch.setattr(mllm, "LOGITS", logits)
    loss, number, ours = loss_and_gradients(model, batch)
    assert abs(loss - expected) < 1e-5 * loss and ours.keys() == gradients.keys() != set()
    assert all(relative_error(ours[name], gradients[name]) < 1e-5 for name in ours)


def test_a_frozen_llm_computes_no_gradient_of_its_weights(build):
    """Stage 1: what flows back to the connector passes the LLM; no node of the graph holds one of its weights to learn."""
    model = build().requires_grad_(False)
    model.connector.requires_grad_(True)
    batch = batch_of(model, *map(with_pictures, (TEXT, ONE)))
    loss, _ = model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)
    nodes, leaves = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        leaves |= {node.variable} if hasattr(node, "variable") else set()
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert leaves == set(model.connector.parameters())


def test_a_picture_that_two_dialogues_are_about_is_seen_once(build, tmp_path):
    model = build()
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    seen = []
    model.vision[0].register_forward_hook(lambda tower, inputs, output: seen.append(len(inputs[0])))
    file, turns = str(tmp_path / "0.png"), ONE[1]
    other = [("<image>\nIs it red?", "Yes, it is.")]
    loss, _, gradients = loss_and_gradients(model, batch_of(model, ([file], turns), ([file], other)))
    assert seen == [1]
    twice, _, expected = loss_and_gradients(model, batch_of(model, ([file], turns)), batch_of(model, ([file], other)))
    assert abs(loss - twice) < 1e-5 * loss
    assert all(relative_error(gradients[name], expected[name]) < 1e-4 for name in gradients if name.startswith("connector."))


def test_a_batch_of_text_reaches_the_connector_with_zero_gradients(build):
    """Under DDP every rank must bring a gradient for every parameter, or the others wait for it."""
    model = build("dense")
    batch = batch_of(model, TEXT, TEXT)
    assert len(batch.pixels) == 0
    for trained in ("connector", "vision"):
        model.requires_grad_(False)
        getattr(model, trained).requires_grad_(True)
        model.zero_grad()
        model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)[0].backward()
        reached = [p.grad for p in getattr(model, trained).parameters() if p.grad is not None]
        assert len(reached) > 3 and all((grad == 0).all() for grad in reached)
    model.requires_grad_(False)
    with torch.no_grad():                                            # nothing learns: nothing is looked at
        model.see = None
        assert model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)[0] > 0


@pytest.mark.parametrize("kind, read", [("mlp", [5]), ("sti", [1, 3, 5]), ("dense", [0, 1, 2, 3, 4, 5]), ("comm", [1, 2, 3, 4, 5, 6])])
def test_towers_run_no_deeper_than_the_connector_reads_and_without_gradients(build, kind, read):
    model = build(kind)
    model.requires_grad_(True)
    model.vision.requires_grad_(False)
    ran = []
    for tower in model.vision:
        for number, block in enumerate(tower.blocks):
            block.register_forward_hook(lambda module, inputs, output, number=number:
                                        ran.append((number, output.requires_grad)))
    assert model.layers[0] == read
    batch = batch_of(model, with_pictures(ONE))
    model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)[0].backward()
    assert not any(requires_grad for _, requires_grad in ran)
    assert [number for number, _ in ran] == [*range(max(read)), *(range(5) if kind == "comm" else [])]
    assert all(p.grad is not None for p in model.connector.parameters())
    assert all(p.grad is None for p in model.vision.parameters())


@pytest.mark.parametrize("kind, keeps", [("dense", 3), ("efficient", 3), ("sti", 3), ("comm", 7)])
@torch.no_grad()
def test_visual_tokens_are_those_of_all_hidden_states(build, kind, keeps):
    """dense and efficient ask the tower for means that it sums up itself; the connector, given every layer, says the same."""
    model, asked = build(kind), []
    pixels = torch.from_numpy(picture(3)).permute(2, 0, 1)[None]
    hidden = [[tower(pixels)[layer][:, tower.num_prefix_tokens:] for layer in layers]
              for tower, layers in zip(model.vision, model.layers)]
    for tower in model.vision:
        tower.register_forward_pre_hook(lambda module, inputs: asked.extend(inputs[1]))
    assert torch.equal(model.see(pixels), model.connector(hidden))
    assert len(asked) == keeps + (kind == "comm")                    # CLIP's six; DINOv2's last quarter of five: 4 and 5


# --- generation -------------------------------------------------------------------------------------------------------

PROMPTS = [([0], "What is this?"), ([], "What is red?"), ([1, 2], "<image> and <image> differ in"), ([3], "Where?\n<image>"),
           ([4], [("What is this?", "a cross."), ("Where is the small blue cross?", None)])]


def ask(model, prompts, **options):
    return model.generate([[picture(i) for i in images] for images, _ in prompts], [text for _, text in prompts], 12, **options)


@pytest.mark.parametrize("kind", ("mlp", "sti", "comm"))
def test_a_batch_answers_as_each_prompt_alone(build, kind):
    model = build(kind)
    together = ask(model, PROMPTS)
    assert together == [ask(model, [prompt])[0] for prompt in PROMPTS]
    assert len(set(together)) == len(PROMPTS)


@torch.no_grad()
def test_generation_is_greedy_decoding_by_whole_forwards(build):
    """Without a cache: every token from the logits of a forward over everything before it."""
    model = build()
    answers = ask(model, PROMPTS)
    for (images, text), answer in zip(PROMPTS, answers):
        pixels, ids = model.prompt([picture(i) for i in images], [(text, None)] if isinstance(text, str) else text)
        new = []
        while len(new) < 12 and (not new or new[-1] != model.tokenizer.token_to_id("</s>")):
            embeds = model.embed(torch.tensor([ids + new]), pixels)
            new.append(model.llm(embeds=embeds)[0, -1].argmax().item())
        assert model.text(new) == answer


def test_the_answer_depends_on_the_picture(build):
    model = build()
    answers = [ask(model, [([index], "What is this?")])[0] for index in range(4)]
    assert len(set(answers)) > 1
    assert ask(model, [([0], "What is this?")]) == answers[:1]


def test_pictures_may_be_pil_arrays_or_files_one_or_a_list_or_none(build, tmp_path):
    model = build()
    array = picture(0)
    expected = model.generate([[array]], ["What is this?"], 8)
    assert model.generate([array], ["What is this?"], 8) == expected
    assert model.generate([Image.fromarray(array)], ["What is this?"], 8) == expected
    Image.fromarray(array).save(tmp_path / "scene.png")
    assert model.generate([tmp_path / "scene.png"], ["What is this?"], 8) == expected
    assert model.generate([[str(tmp_path / "scene.png")]], ["What is this?"], 8) == expected
    with pytest.raises(InputError, match="none.png: no such image"):
        model.generate([str(tmp_path / "none.png")], ["What is this?"], 8)
    assert model.generate([(Image.fromarray(array),)], ["<image>\nWhat is this?"], 8) == expected    # where it stands unasked
    assert model.generate([None], ["What is red?"], 8) == model.generate([[]], ["What is red?"], 8)


def test_a_prompt_is_a_prefix_of_what_was_trained(build):
    for template in ("tiny", "plain"):
        model = build(template=template)
        for images, turns in (ONE, TWO, LATER, TEXT):
            if template == "plain" and not images:
                continue
            images = [picture(index) for index in images]
            batch = batch_of(model, (images, turns))
            asked = len(turns) if template == "tiny" else 1
            for length in range(1, asked + 1):
                turns_so_far = [*turns[:length - 1], (turns[length - 1][0], None)]
                shown = images[:sum(text.count("<image>") for turn in turns_so_far for text in turn if text)]
                pixels, ids = model.prompt(shown, turns_so_far)
                trained = batch.tokens[0].tolist()
                assert trained[:len(ids)] == ids and torch.equal(batch.pixels[:len(shown)], pixels)
                if template == "tiny":                               # and the very next token is the answer's first
                    assert batch.labels[0, len(ids)] != IGNORE == batch.labels[0, len(ids) - 1]


def test_dialogues_go_on_with_their_history(build):
    model, image = build(), picture(0)
    first = model.generate([image], ["What is this?"], 8)[0]
    history = [("What is this?", first), ("Where is it?", None)]
    answer = model.generate([image], [history], 8)
    assert answer != model.generate([image], ["Where is it?"], 8)
    marked = [("<image>\nWhat is this?", first), ("Where is it?", None)]
    assert model.generate([image], [marked], 8) == answer            # a picture without a mark stands before the first question


def test_sampling_obeys_its_generator(build):
    model = build()
    def draw(seed):
        return ask(model, PROMPTS[:2], temperature=1.0, top_k=50, top_p=0.9, generator=torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2)
    assert ask(model, PROMPTS[:2], temperature=1.0, top_k=1) == ask(model, PROMPTS[:2])


def test_generation_asks_no_gradients_and_leaves_the_model_as_it_was(build):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(True)
    tokens = next(model.stream([picture(0)], ["What is this?"], 3))
    assert tokens.shape == (1,) and not tokens.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("images, prompts, message", [
    ([[0]], ["<image> and <image>"], "1 more <image> marks than pictures"),
    ([[]], ["What is <image>?"], "1 more <image> marks than pictures"),
    ([[0], [1]], ["What?"], "1 prompts and 2 entries of pictures"),
    ([], [], "0 prompts and 0 entries of pictures"),
    ([[0] * 30], ["What?"], "exceed the model's context of 384")])
def test_what_cannot_be_generated_is_one_line(build, images, prompts, message):
    with pytest.raises(InputError, match=message):
        build().generate([[picture(i) for i in some] for some in images], prompts, 8)


# --- parts that do not fit --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, towers, message", [
    ("comm", ("dinov2", "clip"), "CLIP first and DINOv2 second: swap the two"),
    ("comm", ("clip",), "reads two towers"),
    ("dense", ("clip", "dinov2"), "reads one tower"),
    ("comm", ("clip", "fine"), "grids differ: CLIP gives 4x4 .* DINOv2 8x8"),
    ("comm_dino", ("odd",), "pictures of 64 x 64 for a DINOv2 with patches of 14: --image_size should be a multiple")])
def test_towers_that_do_not_fit_are_an_error(build, monkeypatch, kind, towers, message):
    for name, patch in (("fine", 8), ("odd", 14)):
        monkeypatch.setitem(MAKE, name, lambda patch=patch: DINOv2(DINOv2Config(num_hidden_layers=4, mlp_ratio=2, image_size=64,
                                                                               patch_size=patch, **HEADS)))
    with pytest.raises(InputError, match=message):
        build(kind, towers)


def test_a_tokenizer_larger_than_the_llm_is_an_error(build):
    with pytest.raises(InputError, match="the tokenizer has .* tokens, the LLM only 100"):
        model = build()
        MLLM([MAKE["clip"]()], Llama(LlamaConfig(vocab_size=100, intermediate_size=64, num_hidden_layers=1, **HEADS)),
             ConnectorConfig("mlp"), model.tokenizer, "tiny", ImageSpec(64))


def test_assemble_takes_size_template_and_pixels_from_the_checkpoints(tiny_folders):
    model = MLLM.assemble([tiny_folders["clip"]], tiny_folders["llama"], ConnectorConfig("dense"))
    assert model.template == "tiny" and model.spec.size == 64 and model.spec.mode == "pad"
    assert model.spec.mean == pytest.approx((0.33,) * 3)             # of its preprocessor_config.json
    assert model.vision[0].normalize.mean.flatten().tolist() == pytest.approx([0.33] * 3)
    timm = MLLM.assemble([recorded("deit3")[0]], tiny_folders["llama"], ConnectorConfig("mlp"))
    assert timm.vision[0].config.model_type == "deit3" and timm.spec.size == 32
    larger = MLLM.assemble([tiny_folders["dinov2"]], tiny_folders["llama"], ConnectorConfig("mlp"), "plain", 96, "stretch")
    assert (larger.template, larger.spec.size, larger.spec.mode, larger.tokens_per_image) == ("plain", 96, "stretch", 36)
    with pytest.raises(InputError, match="model_type 'llama' is not a vision tower"):
        MLLM.assemble([tiny_folders["llama"]], tiny_folders["llama"], ConnectorConfig("dense"))


def test_a_chat_models_template_is_not_forced_on_a_tokenizer_without_its_tokens(tiny_folders):
    with pytest.raises(InputError, match="has no token <.im_start.>"):
        MLLM.assemble([tiny_folders["clip"]], tiny_folders["llama"], ConnectorConfig("dense"), "chatml")


# --- one folder -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_same_model(build, kind, tmp_path):
    model = build(kind)
    model.save(tmp_path / "model")
    again = MLLM.from_pretrained(tmp_path / "model")
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ask(again, PROMPTS) == ask(model, PROMPTS)
    assert (again.template, again.spec, again.layers) == (model.template, model.spec, model.layers)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model", "model.safetensors",
                                                                 "preprocessor_config.json", "tokenizer.json"]


@pytest.mark.parametrize("tower", [name for name in MAKE if name != "clip"])
def test_every_kind_of_tower_survives_the_folder(build, tower, tmp_path):
    """Its own statistics, registers, and a resolution that it was not trained at included."""
    model = build("dense", (tower,))
    model.vision[0].normalize.mean.fill_(0.123)
    model.save(tmp_path / "model")
    again = MLLM.from_pretrained(tmp_path / "model")
    assert type(again.vision[0]) is type(model.vision[0]) and asdict(again.vision[0].config) == asdict(model.vision[0].config)
    pixels = torch.from_numpy(picture(0)).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert torch.equal(model.see(pixels), again.see(pixels))


@pytest.mark.parametrize("llm", [dict(tie_word_embeddings=True), dict(num_key_value_heads=1, head_dim=24, attention_bias=True),
                                 dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), dict(sliding_window=20)])
def test_every_shape_of_llama_survives_the_folder(build, llm, tmp_path):
    model = build("mlp", **llm)
    model.save(tmp_path / "model")
    again = MLLM.from_pretrained(tmp_path / "model")
    assert again.llm.config == model.llm.config and ask(again, PROMPTS) == ask(model, PROMPTS)


def test_a_model_is_saved_in_the_dtype_asked_for(build, tmp_path):
    model = build()
    model.save(tmp_path / "half", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert MLLM.from_pretrained(tmp_path / "half", torch.bfloat16).generate([None], ["What?"], 4)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("llm.lm_head.weight"), "tensor llm.lm_head.weight missing"),
    (lambda t: t.pop("connector.mm_projector.2.bias"), "tensor connector.mm_projector.2.bias missing"),
    (lambda t: t.update({"vision.1.patch.weight": torch.zeros(3)}), "tensor vision.1.patch.weight left over"),
    (lambda t: t.update({"llm.norm.weight": torch.zeros(31)}), "tensor llm.norm.weight has shape")])
def test_a_tensor_too_few_or_too_many_is_an_error_that_names_it(build, change, message, tmp_path):
    build().save(tmp_path / "model")
    rewrite(tmp_path / "model", change)
    with pytest.raises(InputError, match=message):
        MLLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name, change, message", [
    ("config.json", lambda c: c.update(model_type="llama"), "'llama' is not a multimodal model"),
    ("config.json", lambda c: c.pop("connector"), "KeyError.'connector'"),
    ("config.json", lambda c: c.pop("vision"), "KeyError.'vision'"),
    ("config.json", lambda c: c["vision"][0].pop("model_type"), "KeyError.'model_type'"),
    ("config.json", lambda c: c["connector"].update(depth=3), "TypeError.*'depth'"),
    ("config.json", lambda c: c["connector"].update(kind="dens"), "'dens' is unknown, nearest 'dense'"),
    ("preprocessor_config.json", lambda c: c.pop("towers"), "KeyError.'towers'")])
def test_a_config_that_lacks_something_is_an_error_that_names_it(build, name, change, message, tmp_path):
    build().save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / name).read_text())
    change(config)
    (tmp_path / "model" / name).write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        MLLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_missing_or_truncated_file_is_an_error_that_names_it(build, name, tmp_path):
    build().save(tmp_path / "model")
    whole = (tmp_path / "model" / name).read_bytes()
    (tmp_path / "model" / name).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match=name):
        MLLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(InputError, match=name):
        MLLM.from_pretrained(tmp_path / "model")


def test_a_save_that_breaks_off_leaves_the_good_folder(build, tmp_path, monkeypatch):
    """At any of its steps: while the weights are written, before the tokenizer, and between the two renames, where the former
    model lies beside its name."""
    good, other = build(), build("linear")
    good.save(tmp_path / "model")

    def break_off(*args, **kwargs):
        raise OSError("no space left")
    for owner, name in ((hub, "save_file"), (mllm, "replace_folder"), (mllm.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, break_off)
            with pytest.raises((OSError, InputError)):
                other.save(tmp_path / "model")
        assert MLLM.from_pretrained(tmp_path / "model").connector_config.kind == "mlp"
    other.save(tmp_path / "model")                                   # and what broke off is no hindrance later
    assert MLLM.from_pretrained(tmp_path / "model").connector_config.kind == "linear"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_between_the_renames_the_former_model_is_still_there(build, tmp_path, monkeypatch):
    good, other = build(), build("linear")
    good.save(tmp_path / "model")
    rename = type(tmp_path).rename

    def die_at_the_second(self, target):
        if self.name == "model.partial":
            raise KeyboardInterrupt
        return rename(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path / "model")
    assert MLLM.from_pretrained(tmp_path / "model.old").connector_config.kind == "mlp"
    assert MLLM.from_pretrained(tmp_path / "model.partial").connector_config.kind == "linear"     # whole, and not in place

"""dialogue.py: templates, tokens and labels, each against a reference written out by hand."""
import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dialogue
from data import LlavaData
from dialogue import IGNORE, IMAGE, TEMPLATES, cut_to_length, encode, end_ids, find_template, load_tokenizer, render
from hub import InputError

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
DIALOGUES = [
    [("<image>\nWhat is this?", "A cat.")],
    [("<image>\nWhat is this?", "A cat."), ("Where?", "[0.390,0.483,0.884,0.866]"), ("Sure?", "Yes")],
    [("Compare <image> with <image>", "  The first,\n\nas it   is older."), ("Naïve 日本 🎉?", "¿Qué? 日本 🎉")],
    [("What is two plus two?", "'s not five: \"4\".\n")],
]


@pytest.fixture(scope="session")
def small():
    """A byte-level BPE tokenizer made here, with merges and all special tokens: for tests that need no real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted({token for template in TEMPLATES.values() for token in template.special})
    texts = [text for turns in DIALOGUES for turn in turns for text in turn] + [VICUNA]
    tokenizer.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    return tokenizer


@pytest.fixture(scope="session", params=["small", "llama2", "llama3"])
def tokenizer(request, small):
    """Three kinds: one made here; sentencepiece's; tiktoken's. The real ones get the special tokens that they lack."""
    if request.param == "small":
        return small
    loaded = load_tokenizer(request.getfixturevalue("real") / "tokenizers" / request.param)
    loaded.add_special_tokens([token for template in TEMPLATES.values() for token in template.special])
    return loaded



def test_layouts_are_written_as_their_authors_wrote_them():
    turns = [("q1", "a1"), ("q2", "a2")]
    system = dialogue.LLAVA
    assert render(turns, "vicuna_v1")[0] == f"{VICUNA} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert render(turns, "llama_2")[0] == (
        f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert render(turns, "llama_3")[0] == (
        f"{header('system')}{system}<|eot_id|>{header('user')}q1<|eot_id|>{header('assistant')}a1<|eot_id|>"
        f"{header('user')}q2<|eot_id|>{header('assistant')}a2<|eot_id|>")
    assert render(turns, "chatml")[0] == (
        "<|im_start|>system\nAnswer the questions.<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>")
    assert render(turns, "chatml_direct")[0] == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
        "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>")
    assert render(turns, "tiny")[0] == "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert render([("Describe it.\n<image>", "A cat.")], "plain")[0] == "<image>A cat.\n"


def test_prompt_ends_where_the_answer_is_to_begin():
    assert render([("q1", "a1"), ("q2", None)], "vicuna_v1")[0].endswith("ASSISTANT: a1</s>USER: q2 ASSISTANT:")
    assert render([("<image>\nq", None)], "plain")[0] == "<image>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_spans_are_the_answers_with_their_end(template):
    layout = TEMPLATES[template]
    for turns in DIALOGUES:
        text, spans = render(turns, template)
        assert [text[a:b] for a, b in spans] == [layout.reply + answer.lstrip() + layout.end for _, answer in turns]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_tokens_are_a_prefix_of_training_tokens(tokenizer, template):
    for turns in DIALOGUES:
        for k in range(len(turns)):
            prompt, labels = encode(tokenizer, turns[:k] + [(turns[k][0], None)], template)
            trained, targets = encode(tokenizer, turns[:k + 1], template)
            assert trained[:len(prompt)] == prompt
            assert labels == targets[:len(prompt)]
            assert all(label != IGNORE for label in targets[len(prompt):])   # what is generated is what was supervised


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers_and_their_end_tokens(tokenizer, template):
    for turns in DIALOGUES:
        ids, labels = encode(tokenizer, turns, template)
        assert len(ids) == len(labels) and all(label in (token, IGNORE) for token, label in zip(ids, labels))
        assert ids.count(IMAGE) == sum(question.count("<image>") for question, _ in turns)
        supervised = tokenizer.decode([label for label in labels if label != IGNORE], skip_special_tokens=False)
        expected = "".join(answer.lstrip() + TEMPLATES[template].end for _, answer in turns)
        assert supervised.replace(" ", "") == expected.replace(" ", "")      # decoders add and drop spaces at the ends


def test_labels_survive_a_tokenizer_that_trims_its_offsets(small):
    """Llama-3's own post-processor leaves spaces out of the offsets: a token of spaces only then has an empty range."""
    trimming = Tokenizer.from_str(small.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [("q  q", "so  many   spaces 🎉  "), ("q", "  a")]
    for template in TEMPLATES:
        assert encode(trimming, turns, template) == encode(small, turns, template)


def test_an_empty_answer_is_not_supervised(small):
    ids, labels = encode(small, [("q1", " \n"), ("q2", "a2")], "vicuna_v1")
    assert small.decode([label for label in labels if label != IGNORE], skip_special_tokens=False).strip() == "a2</s>"
    assert set(encode(small, [("q1", "")], "chatml")[1]) == {IGNORE}


def test_a_template_whose_tokens_the_tokenizer_lacks_is_an_error(real):
    llama3 = load_tokenizer(real / "tokenizers" / "llama3")                  # this file has no special tokens
    for template, token in (("llama_3", "<|begin_of_text|>"), ("vicuna_v1", "<s>"), ("chatml", "<|im_start|>")):
        with pytest.raises(InputError, match=re.escape(f"no token {token}")):
            encode(llama3, DIALOGUES[0], template)
    llama3.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(InputError, match=r"no token <s>, .* it has the tokens of chatml, chatml_direct\)"):
        encode(llama3, DIALOGUES[0], "vicuna_v1")
    with pytest.raises(InputError, match="no template 'vicuna': there are plain, vicuna_v1"):
        render(DIALOGUES[0], "vicuna")


def test_generation_stops_at_what_was_trained_to_be_last(tokenizer):
    for template in TEMPLATES:
        for turns in DIALOGUES:
            assert encode(tokenizer, turns, template)[0][-1] in end_ids(tokenizer, template)
    assert end_ids(tokenizer, "vicuna_v1") == [tokenizer.token_to_id("</s>")]


def llavas_tokenizer_image_token(prompt, tokenizer):
    """LLaVA's llava/mm_utils.py: every chunk is tokenised with a BOS, which is taken off again behind a picture."""
    chunks = [[1] + tokenizer.encode(chunk, add_special_tokens=False).ids for chunk in prompt.split("<image>")]
    ids = [1]
    for i, chunk in enumerate(chunks):
        ids += ([IMAGE] if i else []) + chunk[1:]
    return ids


def llavas_vicuna_v1(turns):
    """LLaVA's llava/conversation.py, SeparatorStyle.TWO with sep " " and sep2 "</s>"."""
    text = VICUNA + " "
    for question, answer in turns:
        text += "USER: " + question + " "
        text += "ASSISTANT:" if answer is None else "ASSISTANT: " + answer + "</s>"
    return text


def llavas_mask(conversation, ids, tokenizer):
    """LLaVA's preprocess_v1: lengths of re-tokenised prefixes, less 2 for the BOS and the last space."""
    targets, place = list(ids), 1
    targets[0] = IGNORE
    for turn in conversation.split("</s>"):
        if not turn:
            break
        instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(llavas_tokenizer_image_token(turn, tokenizer))
        masked = len(llavas_tokenizer_image_token(instruction, tokenizer)) - 2
        targets[place:place + masked] = [IGNORE] * masked
        place += length
    assert place == len(ids)                                         # else LLaVA warns of a "tokenization mismatch"
    return targets


def test_vicuna_tokens_and_labels_are_llavas_own(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    dialogues = [sample.turns for sample in LlavaData(real / "llava_instruct.json", real / "images").samples]
    plain = [[(question, answer.strip()) for question, answer in turns] for turns in DIALOGUES]
    for turns in dialogues + plain:
        ids, labels = encode(tokenizer, turns, "vicuna_v1")
        conversation = llavas_vicuna_v1(turns)
        assert ids == llavas_tokenizer_image_token(conversation, tokenizer)
        assert labels == llavas_mask(conversation, ids, tokenizer)
        prompt = turns[:-1] + [(turns[-1][0], None)]
        theirs = llavas_tokenizer_image_token(llavas_vicuna_v1(prompt), tokenizer)
        assert encode(tokenizer, prompt, "vicuna_v1")[0] == theirs
    assert ids[0] == 1 and ids.count(1) == 1


def test_plain_tokens_are_llavas_stage_one(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    for sample in LlavaData(real / "llava_pretrain.json", real / "images").samples:
        caption = sample.turns[0][1]
        ids, labels = encode(tokenizer, sample.turns, "plain")
        assert ids == llavas_tokenizer_image_token(f"<image>{caption}\n", tokenizer)
        assert labels == [IGNORE, IGNORE] + ids[2:]                  # BOS and picture; then everything is learnt


def test_tokenizer_is_loaded_without_truncation_padding_and_trimming(small, tmp_path):
    dirty = Tokenizer.from_str(small.to_str())
    dirty.enable_truncation(4)
    dirty.enable_padding(length=50)
    dirty.post_processor = processors.ByteLevel(trim_offsets=True)
    dirty.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), DIALOGUES[2], "chatml") == encode(small, DIALOGUES[2], "chatml")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer.json"):
        load_tokenizer(tmp_path / "elsewhere")


def test_a_checkpoints_own_template_is_recognised(tmp_path):
    def found(chat):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat}))
        return find_template(tmp_path)
    assert find_template(tmp_path) is None and found(None) is None and found("") is None
    assert found("{{ bos_token }}{% for m in messages %}<|start_header_id|>...<|eot_id|>") == "llama_3"
    assert found([{"name": "default", "template": "{% for m in messages %}{{'<|im_start|>' + m.role}}"}]) == "chatml"
    assert found("{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}") == "chatml"
    assert found("{% if system %}<<SYS>>\\n{% endif %}[INST] {{ content }} [/INST]") == "llama_2"
    assert found("{% for m in messages %}USER: {{ m }} ASSISTANT: {% endfor %}") == "vicuna_v1"
    for chat, name in (("{{ bos_token }}{% for m in messages %}[INST] {{ m }} [/INST]{% endfor %}", "Mistral's"),
                       ("{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + eos_token }}", "Zephyr's"),  # TinyLlama
                       ("{% for m in messages %}Human: {{ m }}", "which begins '{% for m in messages %}Human: {{ m }}'")):
        with pytest.raises(InputError, match=re.escape(f"{name}, is none of ours: choose one with --template= (plain, vicuna_v1")):
            found(chat)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>")
    assert find_template(tmp_path) == "chatml"
    (tmp_path / "config.json").write_text('{"template": "tiny"}')
    assert find_template(tmp_path) == "tiny"
    (tmp_path / "config.json").write_text('{"template": "huge"}')
    with pytest.raises(InputError, match="no template 'huge'"):
        find_template(tmp_path)


def test_phi_has_no_chat_template_and_takes_the_one_that_the_dense_connector_taught_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi"}')
    assert find_template(tmp_path) == "phi"
    text = render([("q1", "a1"), ("q2", None)], "phi")[0]
    assert text == f"{VICUNA} USER: q1 ASSISTANT: a1<|endoftext|>USER: q2 ASSISTANT:"


@pytest.mark.parametrize("template", TEMPLATES)
def test_too_long_a_dialogue_is_cut_at_a_whole_turn(tokenizer, template):
    turns = [("<image>\nfirst " + "q " * 5, "a " * 4 + "end"), ("second", "yes"), ("<image> and <image>", "no, not"),
             ("last", "it is")]
    wholes = [encode(tokenizer, turns[:k], template) for k in range(1, 5)]
    lengths = [sum(10 if token == IMAGE else 1 for token in ids) for ids, _ in wholes]
    for limit in range(lengths[-1] + 2):
        fitting = [whole for whole, length in zip(wholes, lengths) if length <= limit]
        expected = fitting[-1] if fitting else ([], [])
        if template == "plain" and fitting:                          # no questions: captions in a row are one text
            expected = ([([], [])] + [whole for whole in (wholes[1], wholes[3]) if whole in fitting])[-1]
        assert cut_to_length(*wholes[-1], limit, 10) == expected

"""Models of others with tokenizers of all kinds: what ends and begins a text survives with us."""

import json
import random
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
from conftest import TINY
from test_export import gguf_file, imported, llama_folder, their_tokenizer, theirs
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from formats import hf, pretrained
from making.scoring import encode_pair
from text.tokenizer import from_saved, get_tokenizer

TEMPLATE = "chat_template.jinja"
TEXT = "the cat sat on the mat and the dog sat on the log ."


def slow(value):
    """A case that takes long beside others of its kind."""
    return pytest.param(value, marks=pytest.mark.slow)


def byte_level(*special, plain=()):
    """A byte-level BPE with GPT-2's pattern: what GGUF is written for."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": list(special), "initial_alphabet": alphabet, "show_progress": False}
    tok.train_from_iterator([TEXT] * 9, trainers.BpeTrainer(vocab_size=300, **how))
    tok.add_tokens(list(plain))
    return tok


def fallback(*special):
    """Llama 2's kind: BPE on words with a mark, unknown characters as bytes, a start token."""
    vocab = {t: i for i, t in enumerate(special)}
    vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    vocab |= {c: len(vocab) + i for i, c in enumerate(sorted(set("▁" + TEXT.replace(" ", ""))))}
    tok = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(list(special))
    return begun(tok, "<s> $A", "<s>")


def begun(tok, template, *special):
    """With a post-processor that adds tokens to every text, as most Llamas' has."""
    ids = [(t, tok.token_to_id(t)) for t in special]
    tok.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return tok


def unigram(*special):
    tok = tokenizers.Tokenizer(models.Unigram())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    how = {"special_tokens": list(special), "unk_token": "<unk>", "show_progress": False}
    tok.train_from_iterator([TEXT] * 9, trainers.UnigramTrainer(vocab_size=60, **how))
    return tok


def word_piece(*special):
    tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    how = {"special_tokens": list(special), "show_progress": False}
    tok.train_from_iterator([TEXT] * 9, trainers.WordPieceTrainer(vocab_size=120, **how))
    return begun(tok, "[CLS] $A [SEP]", "[CLS]", "[SEP]")


def words():
    """Whole words, the one that ends a text among them like any other."""
    vocab = {w: i for i, w in enumerate(["[UNK]", "END", *sorted({*TEXT.split()})])}
    tok = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tok


def token(content):
    """A special token as tokenizer_config.json of many models has it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"__type": "AddedToken", "content": content, "special": True, **flags}


class Case(NamedTuple):
    """A model: its tokenizer, what its files state, and what that comes to."""

    make: object  # of the tokenizer
    eot: str  # ends documents
    ends: str  # all that end a text, one word each
    stop: str  # the one that the model says
    bos: str | None = None
    family: str = "Llama"
    config: dict = {}  # ids by kind, as texts or lists of texts
    generation: dict | None = None
    tokenizer: dict | None = None
    map: dict | None = None  # special_tokens_map.json
    gguf: bool = False


CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CASES = {
    "chat eos, pad is the usual end of text": Case(
        lambda: byte_level(*IM),
        *("<|im_end|>", "<|im_end|>", "<|im_end|>"),
        config=dict(eos="<|im_end|>", pad="<|endoftext|>"),
        generation=dict(eos="<|im_end|>", pad="<|endoftext|>"),
        tokenizer=dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT),
        gguf=True,
    ),
    "several eos": Case(
        lambda: begun(
            byte_level("<|begin|>", "<|eot_id|>", "<|eom_id|>", "</s>"), "<|begin|> $A", "<|begin|>"
        ),
        *("<|eot_id|>", "<|eot_id|> <|eom_id|>", "<|eom_id|>", "<|begin|>"),
        config=dict(eos="<|eot_id|>", bos="<|begin|>"),
        generation=dict(eos=["<|eom_id|>", "<|eot_id|>"], bos="<|begin|>"),
        tokenizer=dict(eos_token="<|eot_id|>", bos_token="<|begin|>", pad_token="</s>"),
        gguf=True,
    ),
    "Llama 2": Case(
        lambda: fallback("<unk>", "<s>", "</s>"),
        *("</s>", "</s>", "</s>", "<s>"),
        config=dict(eos="</s>", bos="<s>"),
        generation=dict(eos="</s>", bos="<s>"),
        tokenizer=dict(eos_token=token("</s>"), bos_token=token("<s>"), add_bos_token=True),
    ),
    "Mistral, named in special_tokens_map.json": Case(
        lambda: fallback("<unk>", "<s>", "<eos>", "[END]"),
        *("[END]", "[END]", "[END]", "<s>"),
        family="Mistral",
        map=dict(eos_token="[END]", bos_token="<s>"),
    ),
    "Unigram": Case(
        lambda: unigram("<pad>", "</s>", "<unk>"),
        *("</s>", "</s>", "</s>"),
        config=dict(eos="</s>", pad="<pad>"),
    ),
    "WordPiece": Case(
        lambda: word_piece("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        *("[SEP]", "[SEP]", "[SEP]", "[CLS]"),
        config=dict(eos="[SEP]", bos="[CLS]"),
        tokenizer=dict(eos_token="[SEP]", bos_token="[CLS]", pad_token="[PAD]"),
    ),
    "a name that nobody knows, by its id alone": Case(
        lambda: byte_level("<|endoftext|>", "<|fin|>"),
        *("<|fin|>", "<|fin|>", "<|fin|>"),
        config=dict(eos="<|fin|>"),
        gguf=True,
    ),
    "generation_config.json alone": Case(
        lambda: byte_level("</s>", "<|stop|>", "<|end|>"),
        *("<|end|>", "<|end|> <|stop|>", "<|stop|>"),
        generation=dict(eos=["<|end|>", "<|stop|>"]),
        gguf=True,
    ),
    "tokenizer_config.json alone": Case(
        lambda: byte_level("<s>", "</s>", "<|done|>"),
        *("<|done|>", "<|done|>", "<|done|>", "<s>"),
        tokenizer=dict(eos_token=token("<|done|>"), bos_token="<s>"),
        gguf=True,
    ),
    "one ends documents, another one texts": Case(
        lambda: byte_level("</s>", "<|stop|>", "<|end|>"),
        *("<|end|>", "<|stop|>", "<|stop|>"),
        generation=dict(eos="<|stop|>"),
        tokenizer=dict(eos_token="<|end|>"),
        gguf=True,
    ),
    "a plain word": Case(words, *("END", "END", "END"), config=dict(eos="END")),
    "Qwen3, a list in config.json": Case(
        lambda: byte_level(*IM, plain=["<think>"]),
        *("<|im_end|>", "<|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
        family="Qwen3",
        config=dict(eos=["<|im_end|>", "<|endoftext|>"], bos="<|endoftext|>"),
        tokenizer=dict(bos_token=None, chat_template=CHAT),
        gguf=True,
    ),
}


def ids(tok, value):
    """Texts of tokens as ids, in the same form."""
    return (
        [tok.token_to_id(t) for t in value] if isinstance(value, list) else tok.token_to_id(value)
    )


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def make_model(folder, case, tok):
    """Save a tiny model that says two words and then `case.stop`, whatever the prompt."""
    import transformers

    size = max(tok.get_vocab().values()) + 1
    sizes = dict(vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    sizes |= dict(max_position_embeddings=64, tie_word_embeddings=False)
    sizes |= {"sliding_window": None} if case.family == "Mistral" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.family}Config")(**sizes)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config)
    first, second = tok.token_to_id("t") or 2, tok.token_to_id("o") or 3
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(
                ("o_proj.weight", "down_proj.weight", "lm_head.weight", "tokens.weight")
            ):
                p.zero_()
        embed, head = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, 0] = embed[first, 1] = embed[second, 2] = 4
        head[first, 0], head[second, 1], head[tok.token_to_id(case.stop), 2] = 4, 8, 8
    model.save_pretrained(folder)
    for name in ("generation_config.json", "config.json"):
        (folder / name).rename(folder / f"{name}.old")
    raw = json.loads((folder / "config.json.old").read_text(encoding="utf-8"))
    stated = {f"{kind}_token_id": None for kind in ("eos", "bos", "pad")}
    stated |= {f"{kind}_token_id": ids(tok, t) for kind, t in case.config.items()}
    write_json(folder / "config.json", raw | stated)
    if case.generation is not None:
        stated = {f"{kind}_token_id": ids(tok, t) for kind, t in case.generation.items()}
        write_json(folder / "generation_config.json", stated | {"temperature": 0.6})
    if case.tokenizer is not None:
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(folder / "tokenizer_config.json", kind | case.tokenizer)
    if case.map is not None:
        write_json(folder / "special_tokens_map.json", case.map)
    tok.save(str(folder / "tokenizer.json"))


def greedy(folder, tok, prompt):
    """What transformers adds to a prompt, the tokens before the one that ends it."""
    model = theirs(folder)
    if model.generation_config.eos_token_id is None:  # it reads no tokenizer_config.json for that
        model.generation_config.eos_token_id = their_tokenizer(folder).eos_token_id
    x = torch.tensor([prompt])
    made = model.generate(x, max_new_tokens=12, do_sample=False, temperature=1.0)[0, len(prompt) :]
    assert len(made) == 3
    return made.tolist()[:2]


def said(script, name, start="the"):
    """What sample.py adds to a prompt, and how many tokens it were."""
    flags = ["--temperature=0", "--num_samples=1", "--max_new_tokens=12", "--device=cpu"]
    result = script("sample.py", f"--init_from={name}", f"--start={start}", *flags)
    assert result.code == 0, result.err
    assert " 2 tokens, " in f" {result.err.splitlines()[-1]}"
    return result.out[len(start) :].rstrip("\n")


def check_files(folder, case, tok, trained):
    """An export's ids, by what transformers makes of them."""
    config, generation = theirs(folder).config, theirs(folder).generation_config
    stops = generation.eos_token_id
    stops = {*stops} if isinstance(stops, list) else {stops}
    wanted = {tok.token_to_id(t) for t in case.ends.split()}
    assert stops == wanted | ({tok.token_to_id(case.eot)} if trained else set())
    told = their_tokenizer(folder)
    if case.bos is not None:
        bos = tok.token_to_id(case.bos)
        assert config.bos_token_id == bos and generation.bos_token_id in (bos, None)
    elif not trained:
        assert config.bos_token_id is None
    if trained:
        assert told.eos_token == case.eot and told.bos_token == (case.bos or case.eot)


@pytest.mark.parametrize("name", CASES)
def test_what_ends_and_begins_a_text_survives(script, tmp_path, name, tiny_config):
    """Import, conversion, fine-tuning and export; a text stops where transformers stops."""
    case, base, data, tuned = CASES[name], *(tmp_path / n for n in ("base", "data", "tuned"))
    tok = case.make()
    make_model(base, case, tok)
    eot, ends = tok.token_to_id(case.eot), {tok.token_to_id(t) for t in case.ends.split()}
    begin = tok.token_to_id(case.bos or case.eot)

    came = pretrained.load(f"hf:{base}", "")
    assert (came.tok.eot, came.tok.ends, came.tok.begin) == (eot, ends, begin)
    added = tok.post_processor is not None
    assert came.tok.prefix == ((begin,) if added else ())
    assert came.tok.prompt("") == [begin] == encode_pair(came.tok, "", "the")[0]
    whole = tok.encode(TEXT).ids  # a template may end it, too, which no prompt wants
    assert came.tok.prompt(TEXT) == (whole[:-1] if "[SEP]" in name + case.eot else whole)
    wanted = came.tok.decode(greedy(base, tok, came.tok.prompt("the")))
    assert said(script, f"hf:{base}") == wanted

    converted = tmp_path / "converted"
    result = script("export.py", f"--init_from=hf:{base}", f"--output={converted}")
    assert result.code == 0, result.err
    check_files(converted, case, tok, trained=False)
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    assert (converted / "tokenizer.json").read_text(encoding="utf-8") == text
    again = pretrained.load(f"hf:{converted}", "").tok
    assert (again.eot, again.ends, again.prefix) == (eot, ends, came.tok.prefix)

    (tmp_path / "docs.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 400, encoding="utf-8")
    flags = [f"--source={tmp_path / 'docs.jsonl'}", f"--dataset={data}", "--num_proc=1"]
    result = script("data/prepare.py", *flags, f"--tokenizer={base}")
    assert result.code == 0 and "end-of-text" not in result.out, result.err
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    train = np.fromfile(data / "train.bin", dtype="<u2")
    assert meta["eot"] == train[-1] == eot and (train == eot).sum() == 380
    assert came.tok.encode(TEXT) == train[: len(train) // 380 - 1].tolist()

    flags = [str(tiny_config), f"--dataset={data}", f"--out_dir={tuned}", f"--init_from=hf:{base}"]
    flags += ["--max_iters=1", "--warmup_iters=0", "--learning_rate=1e-5", "--min_lr=1e-6"]
    result = script("train.py", *flags, "--eval_iters=1")
    assert result.code == 0, result.err
    ours = pretrained.load("resume", str(tuned)).tok
    assert (ours.eot, ours.ends, ours.begin, ours.prefix) == (eot, ends | {eot}, eot, ())
    assert (ours.bos, ours.pad) == (came.tok.bos, came.tok.pad)
    assert said(script, str(tuned)) == wanted

    assert script("export.py", f"--out_dir={tuned}").code == 0
    check_files(tuned / "hf", case, tok, trained=True)
    told = their_tokenizer(tuned / "hf")
    assert told(TEXT)["input_ids"] == ours.encode(TEXT), "training added nothing"
    assert ours.decode(greedy(tuned / "hf", tok, ours.encode("the"))) == wanted
    if "chat_template" in (case.tokenizer or {}):
        chat = told.apply_chat_template([{"content": "the"}], return_dict=False)
        assert chat == [*map(tok.token_to_id, IM[1:2]), *ours.encode("the"), tok.token_to_id(IM[2])]
    if case.gguf:
        for flags in ([f"--out_dir={tuned}"], [f"--init_from=hf:{base}"]):
            target = tmp_path / "model.gguf"
            result = script("export.py", *flags, "--to=gguf", f"--output={target}")
            assert result.code == 0, result.err
            fields = {k.removeprefix("tokenizer.ggml."): v for k, v in gguf_file(target)[0].items()}
            kinds = ("eos_token_id", "eot_token_id", "eom_token_id")
            stops = ends if "hf:" in flags[0] else ends | {eot}
            assert fields["eos_token_id"] == (eot if eot in stops else min(stops))
            assert {fields[k] for k in kinds if k in fields} == stops
            assert fields["bos_token_id"] == begin or not case.bos
            assert fields["add_bos_token"] == (added and "hf:" in flags[0])
            assert fields["token_type"][eot] == 3


def test_an_end_of_text_that_nothing_states_is_said_and_may_be_chosen(
    script, tmp_path, tiny_config
):
    case = Case(lambda: byte_level("<|endoftext|>", "<|im_end|>"), "", "", "<|im_end|>")
    base, data, tok = tmp_path / "base", tmp_path / "data", case.make()
    make_model(base, case, tok)
    for command in (
        ("sample.py", "--start=the", "--num_samples=1", "--max_new_tokens=1"),
        ("export.py", f"--output={tmp_path / 'out'}"),
    ):
        result = script(*command, f"--init_from=hf:{base}")
        assert result.code == 0, result.err
        assert "no file states one: 0 ('<|endoftext|>') (else write eos_token" in result.err

    docs = tmp_path / "docs.jsonl"
    docs.write_text(f"{json.dumps({'text': TEXT})}\n" * 400, encoding="utf-8")
    flags = [f"--source={docs}", f"--tokenizer={base}", "--eot=<|im_end|>", "--num_proc=1"]
    assert script("data/prepare.py", *flags, f"--dataset={data}").code == 0
    tuned = tmp_path / "tuned"
    flags = [str(tiny_config), f"--dataset={data}", f"--out_dir={tuned}", "--max_iters=1"]
    result = script("train.py", *flags, f"--init_from=hf:{base}", "--eval_iters=1")
    assert result.code == 0, result.err
    assert "states no end-of-text: it is the dataset's, 1 ('<|im_end|>')" in result.out
    found = pretrained.load("resume", str(tuned))
    assert (found.tok.eot, found.tok.ends, found.lines) == (1, {1}, [])


# --- models that are a Llama or a Qwen3 by another name

NO_WINDOW, ALL_ROPE = {"sliding_window": None}, {"no_rope_layers": [1] * 5, "pad_token_id": 0}
OTHERS = [
    ("Mistral", NO_WINDOW),
    ("Mistral", {"sliding_window": 64, "head_dim": 16, "rope_theta": 1e6}),
    ("Mistral", {"sliding_window": 4096, "tie_word_embeddings": True}),
    ("Ministral", {"sliding_window": 64, "head_dim": 8}),
    ("SmolLM3", ALL_ROPE),
    (
        "SmolLM3",
        {**ALL_ROPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
    ("Qwen2", {}),
    ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
]


def difference(folder, family, sizes):
    """The largest difference of our logits and transformers', and its own largest logit."""
    x = torch.randint(257, (2, 60), generator=torch.Generator().manual_seed(1))
    sizes = {"num_hidden_layers": 5, **sizes}
    other = llama_folder(folder, family, torch.float32, **sizes)
    assert type(other).__name__ == f"{family}ForCausalLM"
    ours = imported(folder)
    with torch.no_grad():
        wanted = other(x).logits
        return (ours(x, x)[0] - wanted).abs().max().item(), wanted.abs().max().item()


@pytest.mark.parametrize(("family", "sizes"), OTHERS)
def test_a_model_that_differs_by_name_alone_gives_its_logits(tmp_path, family, sizes):
    found, largest = difference(tmp_path, family, sizes)
    assert found < 1e-4 * largest


def test_a_config_with_fields_left_out_means_transformers_defaults(tmp_path):
    """Mistral's, where neither the context nor the window is Llama's."""
    llama_folder(tmp_path, "Mistral", sliding_window=None)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for name in ("num_key_value_heads", "max_position_embeddings"):
        del raw[name]
    config = hf.model_config(raw | {"num_attention_heads": 16}, "")
    assert (config.num_key_value_heads, config.max_position_embeddings) == (8, 131072)
    del raw["sliding_window"]
    with pytest.raises(ValueError, match="sliding window of 4096"):
        hf.model_config(raw, "")


REFUSED = [
    ("Mistral", {"sliding_window": 63}, ["sliding window of 63", "hf:mistralai/Mistral-7B-v0.3"]),
    ("Ministral", {"sliding_window": 32}, ["sliding window of 32"]),
    ("SmolLM3", {"num_hidden_layers": 4}, ["layers without rope", "SmolLM2"]),
    ("SmolLM3", {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3}, ["layers without rope"]),
    ("Gemma", {"head_dim": 8}, ["'gemma'", "hf:HuggingFaceTB/SmolLM2-135M"]),
    ("GPT2", {}, ["learned positions", "hf:HuggingFaceTB/SmolLM2-135M"]),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 8}, ["window of 8", "hf:Qwen/Qwen3"]),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8}, ["window of 8", "hf:Qwen/Qwen3"]),
    ("Qwen2Moe", {}, ["'qwen2_moe'", "hf:Qwen/Qwen3-0.6B-Base"]),
]


@pytest.mark.parametrize(("family", "sizes", "words"), REFUSED)
def test_a_refusal_names_the_nearest_model_that_works(tmp_path, family, sizes, words):
    import transformers

    config = getattr(transformers, f"{family}Config")(max_position_embeddings=64, **sizes)
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        hf.load(f"hf:{tmp_path}")
    for word in words:
        assert word in str(error.value)


# --- what training here does not add, its exports do not either


def prepared(script, folder, tokenizer, *flags, text=TEXT):
    """Prepare documents with a tokenizer; the result, and the dataset's folder."""
    folder.mkdir(exist_ok=True)
    lines = f"{json.dumps({'text': text})}\n" * 400
    (folder / "docs.jsonl").write_text(lines, encoding="utf-8")
    where = [f"--source={folder / 'docs.jsonl'}", f"--dataset={folder / 'data'}", "--num_proc=1"]
    return script("data/prepare.py", *where, f"--tokenizer={tokenizer}", *flags), folder / "data"


def template(tok):
    return begun(tok, "<s> $A", "<s>")


def both_ends(tok):
    return begun(tok, "<s> $A </s>", "<s>", "</s>")


def in_a_sequence(tok):
    steps = [processors.ByteLevel(trim_offsets=False), both_ends(tok).post_processor]
    tok.post_processor = processors.Sequence(steps)
    return tok


def roberta(tok):
    tok.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tok


def cut_and_padded(tok):
    tok.enable_truncation(4)
    tok.enable_padding(length=9, pad_id=1, pad_token="</s>")
    return tok


@pytest.mark.parametrize(
    "habit",
    [template, cut_and_padded, *(slow(habit) for habit in (both_ends, in_a_sequence, roberta))],
)
def test_a_model_trained_here_is_exported_as_it_was_trained(script, tmp_path, habit, tiny_config):
    """With <s> before each text the loss through AutoTokenizer was another one than ours."""
    tok = habit(byte_level("<s>", "</s>"))
    tok.save(str(tmp_path / "tokenizer.json"))
    result, data = prepared(script, tmp_path / "a", tmp_path / "tokenizer.json")
    assert result.code == 0, result.err
    assert (data / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    out = tmp_path / "out"
    flags = [*TINY, f"--dataset={data}", f"--out_dir={out}", "--eval_interval=12"]
    assert script("train.py", *flags).code == 0
    found = pretrained.load("resume", str(out))
    assert found.tok.prompt("the") == found.tok.encode("the") and found.tok.prefix == ()
    (tmp_path / "text.txt").write_text(TEXT[:40], encoding="utf-8")
    flags = [f"--out_dir={out}", "--task=text", f"--file={tmp_path / 'text.txt'}", "--stride=32"]
    result = script("evaluate.py", *flags)
    assert script("export.py", f"--out_dir={out}").code == 0
    told = their_tokenizer(out / "hf")(TEXT[:40], return_tensors="pt")["input_ids"]
    assert told[0].tolist() == found.tok.encode(TEXT[:40])
    x = torch.cat([torch.tensor([[found.tok.eot]]), told], 1)
    with torch.no_grad():
        loss = theirs(out / "hf")(x, labels=x).loss.item()
    assert loss == pytest.approx(json.loads(result.out)["loss"], abs=1e-5)
    spec = json.loads((out / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    assert not spec["truncation"] and not spec["padding"]
    stated = json.loads((out / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stated["add_bos_token"] is stated["add_eos_token"] is False
    assert script("export.py", f"--out_dir={out}", "--to=gguf").code == 0
    assert not gguf_file(out / "model-f32.gguf")[0]["tokenizer.ggml.add_bos_token"]
    # and that export is in the same tokens as the data, whatever the latter's file adds
    flags = [str(tiny_config), f"--dataset={data}", f"--init_from=hf:{out / 'hf'}", "--max_iters=1"]
    result = script("train.py", *flags, "--warmup_iters=0", f"--out_dir={tmp_path / 'next'}")
    assert result.code == 0, result.err


# --- which token ends documents


def test_an_eot_of_any_name_may_be_given(script, tmp_path):
    tok = byte_level(*IM)
    tok.save(str(tmp_path / "tokenizer.json"))
    for flags, eot in (([], 0), (["--eot=<|im_end|>"], 2), (["--eot=sat"], tok.token_to_id("sat"))):
        if eot is None:
            continue
        result, data = prepared(script, tmp_path / f"d{eot}", tmp_path / "tokenizer.json", *flags)
        assert result.code == 0, result.err
        assert ("--eot=" in result.out) == (not flags), "a guess is said"
        meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
        train = np.fromfile(data / "train.bin", dtype="<u2")
        assert meta["eot"] == eot == train[-1] and (train == eot).sum() == 380
        assert get_tokenizer("tokenizer.json", data).eot == eot, "its folder says so from now on"
        assert script("data/prepare.py", "--verify=True", f"--dataset={data}").code == 0
        result, _ = prepared(script, tmp_path / f"d{eot}", tmp_path / "tokenizer.json", *flags)
        assert "is complete already" in result.out
    result, _ = prepared(script, tmp_path / "d2", tmp_path / "tokenizer.json")
    assert result.code == 1 and "other settings" in result.err


@pytest.mark.parametrize(
    ("tokenizer", "eot", "words", "code"),
    [
        ("FILE", "<|im_edn|>", ["no token '<|im_edn|>'", "<|im_end|>"], 1),
        ("FILE", "xyz", ["no token 'xyz'", "<|endoftext|>"], 1),
        ("gpt2", "<|im_end|>", ["--eot has no effect with --tokenizer=gpt2"], 2),
        ("bytes", "<|endoftext|>", ["--eot has no effect"], 2),
        ("train:300", "a", ["--eot has no effect"], 2),
    ],
)
def test_an_eot_that_cannot_be(script, tmp_path, tokenizer, eot, words, code):
    byte_level(*IM).save(str(tmp_path / "tokenizer.json"))
    name = tmp_path / "tokenizer.json" if tokenizer == "FILE" else tokenizer
    result, _ = prepared(script, tmp_path / "d", name, f"--eot={eot}")
    assert result.code == code and len(result.err.splitlines()) == 1
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FOLDER", ["no tokenizer.json in", "save_pretrained"]),
        ("hf:no-such-folder", ["no folder 'no-such-folder'", "hf:USER/NAME"]),
        ("gtp2", ["gtp2", "its folder"]),
    ],
)
def test_a_tokenizer_that_is_not_there(script, tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    name = tmp_path / "empty" if name == "FOLDER" else name
    result, _ = prepared(script, tmp_path / "d", name)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    for word in words:
        assert word in result.err


def test_data_that_ends_documents_as_the_model_does_not(script, tmp_path, tiny_config):
    """The same tokens, but the end of text of neither is the other's: refused, and told how."""
    case = CASES["chat eos, pad is the usual end of text"]
    make_model(tmp_path / "base", case, case.make())
    case.make().save(str(tmp_path / "tokenizer.json"))
    _, guessed = prepared(script, tmp_path / "guessed", tmp_path / "tokenizer.json")
    where = f"--out_dir={tmp_path / 'out'}"
    for name, more in (("train.py", [tiny_config, where]), ("evaluate.py", [])):
        flags = [*more, f"--dataset={guessed}", f"--init_from=hf:{tmp_path / 'base'}"]
        result = script(name, *flags)
        assert result.code == 1 and "ends a text with 2 ('<|im_end|>')" in result.err
        assert "documents end with 0 ('<|endoftext|>')" in result.err
    file = tmp_path / "tokenizer.json"
    _, named = prepared(script, tmp_path / "named", file, "--eot=<|im_end|>")
    flags = [f"--dataset={named}", f"--init_from=hf:{tmp_path / 'base'}"]
    result = script("evaluate.py", *flags)
    assert result.code == 0, result.err


def tune(script, tmp_path, tiny_config, data):
    """An update of the model in tmp_path/base, into tmp_path/out."""
    where = [f"--dataset={data}", f"--out_dir={tmp_path / 'out'}"]
    what = [f"--init_from=hf:{tmp_path / 'base'}", "--max_iters=1", "--warmup_iters=0"]
    result = script("train.py", str(tiny_config), *where, *what)
    assert result.code == 0, result.err


def test_data_may_end_documents_with_any_id_that_ends_a_text(script, tmp_path, tiny_config):
    """A chat model's text ends with two ids; data of before ended with the usual one."""
    case = CASES["Qwen3, a list in config.json"]
    make_model(tmp_path / "base", case, case.make())
    case.make().save(str(tmp_path / "tokenizer.json"))
    result, data = prepared(script, tmp_path / "d", tmp_path / "tokenizer.json")
    assert "0 ('<|endoftext|>')" in result.out
    tune(script, tmp_path, tiny_config, data)
    tok = pretrained.load("resume", str(tmp_path / "out")).tok
    assert tok.eot == 0 and tok.ends == {0, 2}


def test_a_checkpoint_of_before_is_read_as_before():
    """Its entry has a name, a size and a tokenizer.json; the end of text is a usual one."""
    text = begun(byte_level(*IM, "<s>"), "<s> $A", "<s>").to_str()
    tok = from_saved({"name": "tokenizer.json", "vocab_size": 300, "json": text})
    assert (tok.eot, tok.ends, tok.begin, tok.prefix, tok.bos) == (0, {0}, 0, (), None)
    for entry in (None, {"name": "gpt2", "vocab_size": 50257, "json": None}):
        assert from_saved(entry).ends == {50256}
    assert from_saved({**tok.saved(), "ends": ["x", -1, 10**9, True, 2], "bos": "<s>"}).ends == {
        0,
        2,
    }


@pytest.mark.parametrize(
    "value", ["no token", True, -1, 10**9, 1.5, [], ["a"], {"a": 1}, [[1]], None, "<|no|>"]
)
def test_what_is_no_id_is_not_taken_for_one(tmp_path, value):
    byte_level(*IM).save(str(tmp_path / "tokenizer.json"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "meta.json"):
        keys = ("eos_token_id", "bos_token_id", "pad_token_id", "eos_token", "bos_token", "eot")
        write_json(tmp_path / name, dict.fromkeys(keys, value))
    tok = get_tokenizer("tokenizer.json", tmp_path)
    assert (tok.eot, tok.ends, tok.bos, tok.pad, tok.guessed) == (0, {0}, None, None, True)


def test_an_id_that_no_token_has_is_no_end_of_text(tmp_path):
    """A vocabulary with a hole, as some have between their words and their special tokens."""
    spec = json.loads(byte_level(*IM).to_str())
    spec["added_tokens"][2]["id"] = 400
    spec["model"]["vocab"]["<|im_end|>"] = 400
    write_json(tmp_path / "tokenizer.json", spec)
    write_json(tmp_path / "config.json", {"eos_token_id": [2, 400], "bos_token_id": 399})
    tok = get_tokenizer("tokenizer.json", tmp_path)
    assert (tok.eot, tok.ends, tok.bos, tok.vocab_size) == (400, {400}, None, 401)


def test_nested_statements_survive_a_checkpoint(script, tmp_path, tiny_config):
    """Files of strangers may hold anything: as text it is carried, not walked through."""
    case = CASES["Llama 2"]
    make_model(tmp_path / "base", case, case.make())
    path = tmp_path / "base" / "tokenizer_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(raw)[:-1] + ', "x": ' + "[" * 800 + "]" * 800 + "}", encoding="utf-8"
    )
    result, data = prepared(script, tmp_path / "d", tmp_path / "base")
    assert result.code == 0, result.err
    tune(script, tmp_path, tiny_config, data)
    entry = {"name": "bytes", "vocab_size": 257, "json": None}
    assert from_saved({**entry, "stated": '{"tokenizer": 5, "model": []}'}).stated == {}
    for damage in ({"stated": "[]"}, {"stated": 5}, {"stated": "{"}, {"name": 5}):
        with pytest.raises(ValueError, match="tokenizer"):
            from_saved({**entry, **damage})


@pytest.mark.parametrize(
    "file",
    ["tokenizer_config.json", *map(slow, ("generation_config.json", "config.json", TEMPLATE))],
)
def test_random_damage_to_what_is_stated_never_ends_in_a_traceback(script, tmp_path, file):
    """Whatever byte is wrong, the model is exported or one line tells."""
    case = CASES["several eos"]
    make_model(tmp_path / "base", case, case.make())
    path = tmp_path / "base" / file
    good = path.read_bytes() if path.exists() else CHAT.encode()
    rng, told = random.Random(0), 0
    for _ in range(40):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 3, 30])):
            data[rng.randrange(len(data))] = rng.choice(b'{}[]":,0917eEn\\ \x00\xff-tfz')
        path.write_bytes(bytes(data))
        flags = [f"--init_from=hf:{tmp_path / 'base'}", f"--output={tmp_path / 'new'}"]
        result = script("export.py", *flags)
        assert result.code in (0, 1) and len(result.err.splitlines()) == result.code
        told += result.code
    assert told > 5

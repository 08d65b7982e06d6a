"""Talking to a model, here and where it is exported to, and templates that models bring along."""

import dataclasses
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
import types

import pytest
import tokenizers
import torch
from conftest import ROOT, SLOWLY, wait_for

from configurator import ConfigError, overrides
from formats import checkpoint, pretrained
from making.sampling import stream
from model import GPT, GPTConfig
from run import before
from run.talk import Talk
from text.chat import CHATML, END, START, Template, never, with_chat
from text.tokenizer import from_saved, get_tokenizer, well_formed
from text.turns import Turn, conversation

SIZE = GPTConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=128,
)
HELLO = [Turn("user", "Hello?")]


def talker(words, seed=0):
    """A model of random weights that never ends an answer, and says only letters."""
    torch.manual_seed(seed)
    model = GPT(SIZE).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.mul_(12)
        model.embed_tokens.weight[words:] *= 0.01
        model.embed_tokens.weight[128:words] *= 0.01
    return model


def save(path, model, tok):
    path.parent.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "model_args": dataclasses.asdict(model.config)}
    checkpoint.save(path, {**state, "tokenizer": tok.saved(), "iter_num": 1})
    return path


@functools.cache
def byte_chat():
    return with_chat(get_tokenizer("bytes"))


@pytest.fixture
def out(tmp_path):
    """A run's folder with a model that says letters."""
    return save(tmp_path / "out" / "ckpt_1.pt", talker(256), byte_chat()).parent


@pytest.fixture
def typed(monkeypatch):
    """Put lines into what a script reads of the keyboard, or of a pipe."""

    def put(text, tty=True):
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
        monkeypatch.setattr(stdin, "isatty", lambda: tty, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)

    return put


def greedy(model, tok, turns, count=32):
    """The first tokens of an answer, straight from the model."""
    ids = torch.tensor([Template(tok).prompt(turns)])
    how = {"temperature": 0, "vocab_size": tok.vocab_size, "never": never(tok, True)}
    return [int(t) for t in stream(model, ids, count, **how)]


# --- what a tokenizer knows of conversations


def test_what_is_known_of_conversations_is_saved_and_read():
    tok = byte_chat()
    assert (tok.vocab_size, tok.words, tok.chat.end) == (259, 257, 258)
    again = from_saved(json.loads(json.dumps(tok.saved())))
    assert again.chat == tok.chat and again.vocab_size == 259 and again.ends == {256, 258}
    assert Template(again).prompt(HELLO) == Template(tok).prompt(HELLO)


@pytest.mark.parametrize(
    "changes",
    [
        {"added": {START: 258, END: 257}},
        {"added": {START: 257, END: 300}},
        {"added": {"": 257, END: 258}},
        {"added": [START, END]},
        {"added": {START: 10**30, END: 258}},
        {"template": 7},
        {"end": 259},
        {"end": -1},
        {"end": True},
        {"bos": None},
    ],
)
def test_a_damaged_entry_is_a_line(changes):
    entry = byte_chat().saved()
    entry["chat"] |= changes
    with pytest.raises(ValueError, match="what is said of its conversations is damaged"):
        from_saved(entry)


def test_no_special_token_is_drawn_but_the_end():
    tok = byte_chat()
    assert never(tok, True) == [257], "an answer may end by end-of-text, too"
    assert never(tok, False) == [257, 258], "a text has none"
    model = talker(256)
    with torch.no_grad():
        model.embed_tokens.weight[257] = model.embed_tokens.weight[65]
    ids = torch.tensor([Template(tok).prompt(HELLO)])
    how = {"vocab_size": tok.vocab_size, "temperature": 1e9}  # any, as likely as any other
    wild = [int(t) for t in stream(model, ids.repeat(99, 1), 20, **how) for t in t]
    tame = [int(t) for t in stream(model, ids.repeat(99, 1), 20, never=[257], **how) for t in t]
    assert 257 in wild and 257 not in tame


# --- templates of others, by what their models' cards show

LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}"
    "{% else %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
THINKING = (
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'"
    " + content.split('</think>')[-1].lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
SPECIAL = [
    *("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *(START, END, "<|user|>", "<|assistant|>", "<|system|>"),
]
OWN = {"Llama 3": LLAMA3, "Zephyr": ZEPHYR, "Mistral": MISTRAL, "Qwen 3": THINKING}
# TinyLlama's and Llama 2's, whose marks of a turn's begin are letters
OWN |= {"letters": ZEPHYR.replace("<|", "<+").replace("[INST]", "(INST)")}
OWN |= {"more letters": MISTRAL.replace("[INST]", "(INST)").replace("[/INST]", "(/INST)")}
ENDS = {name: "</s>" for name in OWN} | {"Llama 3": "<|eot_id|>", "Qwen 3": END}


@pytest.fixture
def own(tmp_path):
    """A folder with a tokenizer and a chat template of its own."""

    def make(template):
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        more = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, **more)
        tok.train_from_iterator(["assistant user system\n\n\nHello there, what is it?"], trainer)
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        tok.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


TALKS = [
    [Turn("user", "Hello?"), Turn("assistant", "It is.")],
    [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d\n\ne")],
    [Turn("user", "  blanks \n"), Turn("assistant", "\n around ")],
    [Turn("user", "世界 🙂"), Turn("assistant", "e\u0301 \u00a0")],
    [Turn("user", ""), Turn("assistant", "")],
]


@pytest.mark.parametrize("name", OWN)
def test_an_imported_template_gives_transformers_ids(own, name):
    transformers = pytest.importorskip("transformers")
    folder = own(OWN[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tok = with_chat(get_tokenizer("tokenizer.json", folder))
    template = Template(tok)
    assert tok.chat.template == OWN[name] and not tok.chat.added
    assert tok.chat.end == theirs.convert_tokens_to_ids(ENDS[name])
    for turns in TALKS:
        messages = [t._asdict() for t in turns]
        how = {"tokenize": True, "return_dict": True, "enable_thinking": False}
        ids, counts, begins = template.encode(turns)
        assert ids.tolist() == theirs.apply_chat_template(messages, **how)["input_ids"]
        ask = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **how)
        assert template.prompt(turns[:-1]) == ask["input_ids"]
        # what counts is each answer as the template has it, and the token that ends it
        spans = [
            ids[[i for i, _ in group]].tolist()
            for on, group in itertools.groupby(enumerate(counts), lambda pair: pair[1])
            if on
        ]
        answers = [t.content for t in turns if t.role == "assistant"]
        assert len(spans) == len(answers) and all(s[-1] == tok.chat.end for s in spans)
        for span, answer in zip(spans, answers, strict=True):
            assert tok.decode(span[:-1]).strip() == answer.strip()
        assert begins.sum() == sum(t.role == "user" for t in turns)


def test_a_tokenizer_without_special_tokens_has_no_end(own, tmp_path):
    folder = own(ZEPHYR)
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": []}))
    with pytest.raises(ValueError, match="no special token at the end"):
        with_chat(get_tokenizer("tokenizer.json", folder))


def test_a_template_sees_what_transformers_gives_it(own):
    template = (
        "{% if tools is none and documents is none %}{{ bos_token }}{% endif %}"
        "{% for m in messages %}{{ m | tojson(ensure_ascii=False) ~ m.content + eos_token }}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match="or repeats it"):
        with_chat(get_tokenizer("tokenizer.json", own(template)))
    template = template.replace("m | tojson(ensure_ascii=False) ~ ", "[1] | tojson ~ ")
    tok = with_chat(get_tokenizer("tokenizer.json", own(template)))
    assert Template(tok).encode(HELLO).ids[0] == 0


@pytest.mark.parametrize("special", [False, None])
def test_names_that_any_text_may_have_are_refused(own, special):
    """A vocabulary with ChatML's tokens, added but not special, or as plain words."""
    folder = own("")
    (folder / "tokenizer_config.json").unlink()
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] &= special is not False or token["content"] not in (START, END)
    if special is None:
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != END]
    text = json.dumps(spec)
    with pytest.raises(ValueError, match=r"im_(start|end)\|>, but not as a special token"):
        with_chat(get_tokenizer("tokenizer.json", json_text=text, eot="</s>"))


def test_a_vocabulary_with_a_hole_is_refused_before_it_is_used(own):
    spec = json.loads((own("") / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in (START, END)]
    spec["model"]["vocab"] = {
        k: v if v < 290 else v + 5
        for k, v in spec["model"]["vocab"].items()
        if k not in (START, END)
    }
    tok = get_tokenizer("tokenizer.json", json_text=json.dumps(spec), eot="</s>")
    with pytest.raises(ValueError, match="has ids without a token below"):
        with_chat(tok)


def test_a_model_in_gpt2s_tokens_may_have_its_own_template():
    tok = dataclasses.replace(
        get_tokenizer("bytes"), stated={"tokenizer": {"chat_template": OWN_BYTES}}
    )
    ids, counts, _ = Template(with_chat(tok)).encode([*HELLO, Turn("assistant", "Hi.")])
    assert bytes(ids[:-1].tolist()) == b"Q: Hello?\nA: Hi." and ids[-1] == 256
    assert counts.tolist() == [False] * 13 + [True] * 4


OWN_BYTES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\nA: ' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_a_bos_that_no_file_names_is_none(own):
    """As transformers has it, whatever config.json says."""
    folder = own(LLAMA3)
    config = {"eos_token": "</s>", "chat_template": LLAMA3}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 0}))
    tok = with_chat(get_tokenizer("tokenizer.json", folder, own=True))
    assert tok.chat.bos == "" and Template(tok).prompt(HELLO)[0] != 0


def test_a_model_with_its_own_template_is_not_taught_another(own):
    folder = own(LLAMA3)
    model = get_tokenizer("tokenizer.json", folder, own=True)
    text = (folder / "tokenizer.json").read_text()
    data = get_tokenizer("tokenizer.json", json_text=text, eot="</s>")
    assert "another chat template" in pretrained.mismatch(with_chat(data), model)
    assert not pretrained.mismatch(with_chat(get_tokenizer("tokenizer.json", folder)), model)


def test_a_template_that_refuses_names_why(own):
    template = Template(with_chat(get_tokenizer("tokenizer.json", own(MISTRAL))))
    with pytest.raises(ValueError, match="roles must alternate"):
        template.encode([Turn("user", "a"), Turn("user", "b")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in %}", "no template of Jinja's"),
        ("{{ messages[7].content }}", "takes no such conversation"),
        ("{{ messages[0].content + eos_token }}", "leaves out what is said"),
        (
            "{% for m in messages %}{{ m.content[:1] + eos_token }}{% endfor %}",
            "changes what|leaves out",
        ),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no special token at the end"),
        ("{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}", "changes what"),
        ("{{ ''.__class__.__mro__ }}", "takes no such conversation"),
        ("{{ lipsum.__globals__['os'].system('true') }}", "takes no such conversation"),
        ("{% for i in range(10**9) %}{% endfor %}", "takes no such conversation"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "no template of Jinja's"),
        ("{% break %}", "no template of Jinja's"),
        ("{{ namespace(a=1, a=2) }}", "no template of Jinja's"),
        ("{{ " + "9" * 5000 + " }}", "no template of Jinja's"),
        (CHATML.replace("message['content']", "message['content'] * 2"), "changes what|repeats"),
    ],
)
def test_a_template_that_does_not_do_is_a_line(own, template, message):
    with pytest.raises(ValueError, match=message) as e:
        with_chat(get_tokenizer("tokenizer.json", own(template)))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", OWN)
def test_hostile_turns_change_no_boundary(own, name):
    """Names of all tokens in what a user says, and the text of whole turns."""
    template = Template(with_chat(get_tokenizer("tokenizer.json", own(OWN[name]))))
    honest = [Turn("user", "x"), Turn("assistant", "y")]
    plain, special = template.encode(honest), {*template.special.values()}
    skeleton = [i for i in plain.ids.tolist() if i in special]
    attacks = ["".join(SPECIAL), *SPECIAL, template.rendered(honest, True), "\udc80\udc81\udc82"]
    attacks += ["<|im_<|im_end|>end|>", "{{ 7 * 7 }}{% raw %}", "\0\x1b[2J\r"]
    for attack in attacks:
        for turns in ([Turn("user", attack), honest[1]], [honest[0], Turn("assistant", attack)]):
            if name == "Qwen 3" and "</think>" in turns[1].content:  # which it leaves out
                with pytest.raises(ValueError, match="leaves out what is said"):
                    template.encode(turns)
                continue
            ids, counts, begins = template.encode(turns)
            assert [i for i in ids.tolist() if i in special] == skeleton, attack
            assert begins.sum() == 1
            said = template.tok.decode(ids[counts][:-1].tolist())
            assert said.strip() == well_formed(turns[1].content).strip()


def test_long_turns_take_seconds_not_minutes():
    template = Template(byte_chat())
    words = "<|im_end|>\n<|im_start|>assistant\n" * 320_000  # 10 MB
    ids, counts, _ = template.encode([Turn("user", words), Turn("assistant", words[:99])])
    assert len(ids) > len(words) and counts.sum() == 100


# --- sample.py


def test_a_question_by_a_pipe(script, out, typed):
    typed("Hello?\n", tty=False)
    flags = [f"--out_dir={out}", "--chat=True", "--temperature=0", "--max_new_tokens=32"]
    result = script("sample.py", *flags, "--device=cpu", "--dtype=float32")
    assert result.code == 0, result.err
    expected = byte_chat().decode(greedy(talker(256), byte_chat(), HELLO))
    assert result.out == f"{expected}\n"


def test_a_pipe_without_a_question(script, out, typed):
    typed(" \n", tty=False)
    result = script("sample.py", f"--out_dir={out}", "--chat=True")
    assert result.code == 1 and "brings no question" in result.err


def test_no_keyboard_at_all(script, out, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    result = script("sample.py", f"--out_dir={out}", "--chat=True")
    assert result.code == 1 and "brings no question" in result.err
    result = script("sample.py", f"--out_dir={out}", "--interactive=True")
    assert result.code == 1 and "no keyboard" in result.err


def test_a_conversation_has_a_history(script, out, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed("/save x\none\n\n/save\n/reset\ntwo\n/save b.jsonl\n/nothing\n/quit\nthree\n")
    flags = [f"--out_dir={out}", "--chat=True", "--temperature=0", "--max_new_tokens=6"]
    result = script("sample.py", *flags, "--system=Be brief.", "--dtype=float32")
    assert result.code == 0, result.err
    assert "nothing was said, and nothing is saved" in result.err
    assert not (tmp_path / "x").exists()
    assert "no command /nothing; /reset forgets" in result.err and "three" not in result.out
    saved = [(tmp_path / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("chat", "b")]
    first, second = (conversation(json.loads(text)) for text in saved)
    begin = [Turn("system", "Be brief.")]
    for found, word in ((first, "one"), (second, "two")):
        asked = [*begin, Turn("user", word)]
        said = byte_chat().decode(greedy(talker(256), byte_chat(), asked, 6))
        assert found == [*asked, Turn("assistant", said)]
        assert said in result.out


def test_what_was_said_is_part_of_the_question():
    talk = Talk(byte_chat(), 200, 20, "")
    assert talk.ask("one") == talk.template.prompt([Turn("user", "one")])
    talk.heard("two")
    turns = [Turn("user", "one"), Turn("assistant", "two"), Turn("user", "three")]
    assert talk.ask("three") == talk.template.prompt(turns)


def test_an_answer_that_never_began_is_an_empty_one(script, out, typed, monkeypatch):
    """Ctrl-C while the compiler works: the next question is still asked after an answer."""
    typed("one\n/save a.jsonl\n/quit\n")
    monkeypatch.chdir(out)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("making.sampling.stream", stopped)
    result = script("sample.py", f"--out_dir={out}", "--chat=True")
    assert result.code == 0, result.err
    saved = json.loads((out / "a.jsonl").read_text(encoding="utf-8"))
    assert conversation(saved) == [Turn("user", "one"), Turn("assistant", "")]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(capsys):
    talk = Talk(byte_chat(), 128, 20, "Be brief.")
    for i in range(20):
        ids = talk.ask(f"question {i}")
        assert len(ids) <= 108
        talk.heard("answer")
    text = talk.tok.decode(ids)
    assert text.startswith("system\nBe brief.\nuser\n") and "question 19" in text
    assert "question 1\n" not in text
    assert len(talk.said) == 40 > len(talk.turns), "all are saved"
    said = capsys.readouterr().err
    assert "the context is full: the 2 oldest turns are forgotten" in said
    with pytest.raises(ValueError, match="leaves no room in a context of 128"):
        talk.ask("x" * 100)
    assert talk.turns[-1] == Turn("assistant", "answer"), "as if it had not been asked"
    with pytest.raises(ValueError, match="system has too many tokens"):
        Talk(byte_chat(), 128, 20, "x" * 90)


def test_a_model_that_was_not_taught_says_so(script, tmp_path, typed):
    typed("Hello?\n", tty=False)
    path = save(tmp_path / "out" / "ckpt_1.pt", talker(256), get_tokenizer("bytes"))
    result = script("sample.py", f"--out_dir={path.parent}", "--chat=True")
    assert result.code == 1 and "was not taught to answer" in result.err
    result = script("evaluate.py", f"--out_dir={path.parent}", "--task=chat", "--file=x.jsonl")
    assert result.code == 1 and "was not taught to answer" in result.err


@pytest.mark.skipif(os.name != "posix", reason="a terminal of POSIX")
def test_ctrl_c_ends_an_answer_and_not_the_program(out, heeded):
    """On a real terminal."""
    import pty
    import signal

    ours, theirs = pty.openpty()
    flags = [f"--out_dir={out}", "--chat=True", "--max_new_tokens=1000", "--device=cpu"]
    command = [sys.executable, "-c", SLOWLY, str(ROOT), str(ROOT / "sample.py"), *flags]
    pipes = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, bufsize=0)
    os.close(theirs)

    for word in (b"one\n", b"two\n"):
        wait_for(process.stderr, b"> ")
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read(1000):  # what is left of the last answer
            pass
        os.set_blocking(process.stdout.fileno(), True)
        os.write(ours, word)
        assert process.stdout.read(1), "an answer begins"
        process.send_signal(signal.SIGINT)
    wait_for(process.stderr, b"> ")
    os.write(ours, b"/quit\n")
    _, err = process.communicate(timeout=30)
    os.close(ours)
    assert process.returncode == 0 and b"tokens/s" in err, err


# --- leaving home


def exported(script, out, to, *flags):
    result = script("export.py", f"--out_dir={out}", f"--to={to}", *flags)
    assert result.code == 0, result.err
    return out / result.out.split(" -> ")[1].split(": ")[0]


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@functools.cache
def learnt_chat():
    """A BPE of 300 tokens, and two more."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    more = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, show_progress=False, **more)
    tok.train_from_iterator(["assistant user system Hello there, what is it?"], trainer)
    return with_chat(get_tokenizer("tokenizer.json", json_text=tok.to_str()))


@pytest.mark.parametrize("make", [byte_chat, learnt_chat], ids=["bytes", "learnt"])
def test_transformers_chats_alike(script, tmp_path, make):
    transformers = pytest.importorskip("transformers")
    tok, model = make(), talker(256)
    out = save(tmp_path / "out" / "ckpt_1.pt", model, tok).parent
    folder = exported(script, out, "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [Turn(**m) for m in MESSAGES]
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"] == Template(tok).prompt(turns)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {tok.eot, tok.chat.end} == {*net.generation_config.eos_token_id}
    x = torch.tensor([ids["input_ids"]])
    made = net.generate(x, max_new_tokens=32, do_sample=False)[0, x.size(1) :].tolist()
    assert made == greedy(model, tok, turns)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "It answers in conversations" in card and '"role": "user"' in card
    back = pretrained.load(f"hf:{folder}", "")
    assert (back.tok.name, back.tok.chat) == (tok.name, tok.chat), "the one that it was before"
    assert not pretrained.mismatch(tok, back.tok)
    talk = Talk(back.tok, 128, 20, "")
    assert talk.ask("Hello?") == Template(tok).prompt(HELLO)


@pytest.mark.parametrize("make", [byte_chat, learnt_chat], ids=["bytes", "learnt"])
def test_llama_cpp_chats_alike(script, tmp_path, make):
    llama_cpp = pytest.importorskip("llama_cpp")
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tok, model = make(), talker(256)
    out = save(tmp_path / "out" / "ckpt_1.pt", model, tok).parent
    llama = llama_cpp.Llama(str(exported(script, out, "gguf")), n_ctx=128, verbose=False)
    template = llama.metadata["tokenizer.chat_template"]
    assert template == CHATML
    assert int(llama.metadata["tokenizer.ggml.eot_token_id"]) == tok.chat.end
    text = Jinja2ChatFormatter(template, "", "")(messages=MESSAGES).prompt
    turns = [Turn(**m) for m in MESSAGES]
    assert llama.tokenize(text.encode(), False, True) == Template(tok).prompt(turns)
    said = llama.create_chat_completion(MESSAGES, temperature=0, max_tokens=32)
    mine = greedy(model, tok, turns)
    whole = tok.decode(mine).replace("\ufffd", "")  # half a character is nothing there
    assert said["choices"][0]["message"]["content"] == whole
    llama.reset()
    made = itertools.islice(llama.generate(Template(tok).prompt(turns), temp=0), 32)
    assert [*made] == mine


def test_gguf_says_how_to_talk(script, tmp_path):
    import gguf

    out = save(tmp_path / "out" / "ckpt_1.pt", talker(256), byte_chat()).parent
    fields = gguf.GGUFReader(exported(script, out, "gguf")).fields
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 258
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[257] == kinds[258] == int(gguf.TokenType.CONTROL)
    assert fields["tokenizer.ggml.tokens"].contents()[257:] == [START, END]


# --- evaluate.py


def test_answers_are_measured(script, out, tmp_path):
    tok, model = byte_chat(), talker(256)
    said = tok.decode(greedy(model, tok, HELLO, 7))
    template = Template(tok)
    rows = [[*HELLO, Turn("assistant", said)], [*HELLO, Turn("assistant", "no"), *HELLO]]
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": [t._asdict() for t in row]}) + "\n" for row in rows)
    )
    flags = [f"--out_dir={out}", "--task=chat", f"--file={file}", "--device=cpu"]
    result = script("evaluate.py", *flags, f"--out={tmp_path / 'r.json'}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "r.json").read_text())
    nats = count = 0
    for row in rows:
        ids, counts, _ = template.encode(row)
        x = torch.from_numpy(ids.astype("int64"))[None]
        logits, _ = model(x, x)
        p = logits[0, :, : tok.vocab_size].float().log_softmax(-1)
        where = [i for i in range(1, len(ids)) if counts[i]]
        nats -= sum(float(p[i - 1, int(ids[i])]) for i in where)
        count += len(where)
    assert found["tokens"] == count and found["answers"] == 2
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bytes"] == len(said.encode()) + 2
    assert [r["answer"] for r in found["records"]] == [said, "no"]
    assert not found["records"][1]["exact"]
    assert script("evaluate.py", *flags, "--limit=1").code == 0
    long = [*HELLO, Turn("assistant", "x" * 200), *HELLO, Turn("assistant", "yes")]
    empty = [*HELLO, Turn("assistant", "")]
    for row, expected in (
        (long, {"answers": 1, "left_out": 1}),
        (empty, {"bytes": 0, "bits_per_byte": None}),
    ):
        file.write_text(json.dumps({"messages": [t._asdict() for t in row]}))
        result = script("evaluate.py", *flags)
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert {k: found.get(k) for k in expected} == expected
        assert ("exact_first" in found) == (row is empty)


def test_a_runs_own_conversations_are_measured(script, tmp_path):
    tok, rows = byte_chat(), []
    for i in range(40):
        rows.append({"question": f"What is {i}?", "answer": f"It is {i}."})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data"
    what = [f"--source={tmp_path / 'a.jsonl'}", f"--dataset={data}", "--tokenizer=bytes"]
    assert script("data/prepare.py", *what, "--chat=True").code == 0
    path = save(tmp_path / "out" / "ckpt_1.pt", talker(256), tok)
    flags = ["--task=chat", f"--out_dir={path.parent}", "--device=cpu"]
    found = {}
    for split in ("val", "train"):
        more = [f"--dataset={data}", f"--split={split}", f"--out={tmp_path / split}"]
        result = script("evaluate.py", *flags, *more)
        assert result.code == 0, result.err
        found[split] = json.loads((tmp_path / split).read_text())
    answers = [r["answer"] for s in found.values() for r in s["records"]]
    assert sorted(answers) == sorted(row["answer"] for row in rows)
    result = script("evaluate.py", *flags, f"--file={tmp_path / 'a.jsonl'}")
    whole = json.loads(result.out)
    nats = sum(s["loss"] * s["tokens"] for s in found.values())
    assert whole["loss"] * whole["tokens"] == pytest.approx(nats, rel=1e-5)
    more = [f"--dataset={data}", "--split=train", "--limit=5", f"--out={tmp_path / 'five'}"]
    for _ in range(2):
        assert script("evaluate.py", *flags, *more).code == 0
    five = json.loads((tmp_path / "five").read_text())
    assert five["conversations"] == 5
    assert {r["answer"] for r in five["records"]} <= {
        r["answer"] for r in found["train"]["records"]
    }


# --- before a run


@pytest.fixture
def started(monkeypatch):
    """As if a script had been started with these words."""

    def start(*argv):
        main = types.SimpleNamespace(__file__=str(ROOT / argv[0]))
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.setattr(sys, "argv", [*argv])

    return start


def test_what_a_run_starts_from_is_made_once(tmp_path, monkeypatch, started):
    calls = []

    def run(command):
        calls.append(command[1:])
        made = tmp_path / "base"
        made.mkdir(exist_ok=True)
        if "train.py" in command[1]:
            for name in ("best.pt", "ckpt_7.pt"):
                (made / name).write_bytes(b"")
            (made / "config.json").write_text('{"max_iters": 7}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(before.subprocess, "run", run)
    folder = tmp_path / "base"
    config = tmp_path / "config.py"
    words = repr((str(folder), "data/prepare.py --source=a", "train.py c.py --x=1"))
    config.write_text(f"from run.before import trained\ninit_from = trained(*{words})\n")
    for _ in range(2):
        started("train.py", str(config), "--seed=3")
        values = overrides(sys.argv[1:], {"init_from": "scratch", "seed": 1})
        assert values == {"init_from": str(folder / "best.pt"), "seed": 3}
    assert calls == [
        [str(ROOT / "data" / "prepare.py"), "--source=a"],
        [str(ROOT / "train.py"), "c.py", "--x=1"],
    ]
    (folder / "config.json").write_text('{"max_iters": 9}')
    elsewhere = ["train.py", "--init_from", "resume"]
    for argv in (["pytest"], ["train.py", "--dry_run"], ["train.py", "--dry-run=True"], elsewhere):
        started(*argv)
        before.trained(str(folder), "train.py")
    assert len(calls) == 2, "a plan starts nothing"
    started("train.py", str(config), "--sed=3")
    with pytest.raises(ConfigError, match="--sed: no such setting"):
        overrides(sys.argv[1:], {"init_from": "scratch", "seed": 1})
    assert len(calls) == 2, "a slip of the finger is found first"
    started("train.py")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="start once without torchrun"):
        before.trained(str(folder), "train.py")
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(before.subprocess, "run", lambda c: subprocess.CompletedProcess(c, 130))
    with pytest.raises(ValueError, match=re.escape("data/prepare.py ended with 130")):
        before.trained(str(folder), "data/prepare.py --source=a")

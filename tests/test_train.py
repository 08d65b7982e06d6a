"""The training script: the run it makes, what it leaves behind, and what a slip of a user gets."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from formats import checkpoint
from plan import fit
from run.microbatch import largest_divisor, windows_of_rank
from run.optim import Schedule, make_schedule
from run.settings import eval_windows


def records(tmp_path, key="loss"):
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r[key] for r in map(json.loads, lines) if key in r]


def weights(path):
    return checkpoint.load(path)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_and_what_it_leaves(script, tiny, tmp_path):
    result = script("train.py", *tiny)
    assert result.code == 0, result.err
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "best.pt",
        "ckpt_12.pt",
        "ckpt_6.pt",
        "config.json",
        "loss.png",
        "metrics.jsonl",
    ]
    assert records(tmp_path, "iter") == [0, *range(6), 6, *range(6, 12), 12]
    losses = records(tmp_path)
    assert len(losses) == 12 and losses[-1] < losses[0] - 1.5
    val = records(tmp_path, "val_loss")
    assert len(val) == 3 and val[2] < val[1] < val[0]
    bits = records(tmp_path, "val_bits_per_byte")
    assert bits[0] == pytest.approx(val[0] * 2001 / 2000 / math.log(2))
    state = checkpoint.load(out / "ckpt_12.pt")
    assert state["iter_num"] == 12 and state["best_val_loss"] == val[1]  # saved before evaluation
    steps = {int(s["step"]) for s in state["optimizer"]["state"].values()}
    assert steps == {12}, "exactly max_iters updates"
    assert state["config"]["tokens_per_step"] == 256
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["learning_rate"] == 1e-2


def test_losses_do_not_depend_on_the_micro_batch_or_on_evaluation(script, tiny, tmp_path):
    script("train.py", *tiny)
    first = records(tmp_path)
    for change in ("--batch_size=1", "--batch_size=8", "--eval_iters=1", "--eval_interval=5"):
        script("train.py", *tiny, change, "--overwrite=True")
        assert records(tmp_path) == pytest.approx(first, rel=1e-5), change


OPTIONS = ["--tie_word_embeddings=False", "--qk_norm=True", "--attention_bias=True"]


def same(a, b, at=""):
    """Equal to the bit, whatever is nested in what; the message says where not."""
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), at
    elif isinstance(a, dict):
        assert list(a) == list(b), at
        for key in a:
            same(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{at}/{i}")
    else:
        assert a == b, at


CLOCK = ("elapsed_s", "tokens_per_s", "tflops", "mfu")  # what no two runs have in common


def log_of(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in map(json.loads, lines)]


def resume_everywhere(script, flags, tmp_path, steps):
    """Run to the end once, then again from each of `steps`: all that is left must be the same."""
    out, copy = tmp_path / "out", tmp_path / "copy"
    flags = [*flags, "--checkpoint_interval=1", "--keep_last=20"]
    result = script("train.py", *flags)
    assert result.code == 0, result.err
    for step in steps:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in (f"ckpt_{step}.pt", "metrics.jsonl"):
            shutil.copy(out / name, copy)
        result = script("train.py", *flags, f"--out_dir={copy}", "--init_from=resume")
        assert result.code == 0, result.err
        assert f"at {step} updates" in result.out or step == 0
        for name in ("ckpt_12.pt", "best.pt"):
            states = [checkpoint.load(folder / name) for folder in (out, copy)]
            for state in states:
                del state["config"]  # names the folder
            same(*states, name)
        assert log_of(copy) == log_of(out)


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ([], range(12)),
        (["--dropout=0.1"], range(12)),
        (["--dtype=bfloat16", *OPTIONS], (1, 6, 11)),
        (["--dtype=bfloat16", "--dropout=0.1"], (1, 6, 11)),
        (["--skip_spike=3", "--grad_clip=0"], (1, 6, 11)),
        (["--optimizer=muon", "--lr_schedule=wsd", "--dropout=0.1"], (1, 6, 11)),
        (["--optimizer=muon", "--dtype=bfloat16", *OPTIONS], (1, 6, 11)),
    ],
)
def test_resume_goes_on_to_the_bit(script, tiny, tmp_path, more, steps):
    """nanoGPT reseeds and replays the data of step 0."""
    resume_everywhere(script, [*tiny, *more], tmp_path, steps)


@pytest.mark.slow
def test_resume_goes_on_to_the_bit_compiled(script, tiny, tmp_path):
    """A compiled run equals compiled ones, with dropout."""
    more = ["--compile=True", "--dropout=0.1", "--num_hidden_layers=1"]
    resume_everywhere(script, [*tiny, *more], tmp_path, [5])
    assert "compile  took" in script("train.py", *tiny, *more, "--overwrite=True").out


def test_resume_goes_on_to_the_bit_with_a_loss_scale(script, tiny, tmp_path, monkeypatch):
    """float16, which a CPU has no use for: the scale and its counter come back."""
    from run import machine

    monkeypatch.setattr(machine, "select_dtype", lambda *a: (torch.float16, "for this test"))
    resume_everywhere(script, tiny, tmp_path, [1, 7])
    scaler = checkpoint.load(tmp_path / "copy" / "ckpt_12.pt")["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] > 0


def test_evaluation_and_logs_never_change_the_weights(script, tiny, tmp_path):
    """In nanoGPT evaluation draws from the generator that draws the training data."""
    want = None
    for more in ([], ["--eval_interval=5"], ["--eval_iters=1"], ["--log_interval=7"]):
        assert script("train.py", *tiny, "--dropout=0.1", *more, "--overwrite=True").code == 0
        state = checkpoint.load(tmp_path / "out" / "ckpt_12.pt")
        got = {k: state[k] for k in ("model", "optimizer")}
        want = want or got
        same(got, want)


def test_resume_passes_over_a_damaged_checkpoint(script, tiny, tmp_path):
    script("train.py", *tiny)
    newest = tmp_path / "out" / "ckpt_12.pt"
    whole = weights(newest)
    newest.write_bytes(newest.read_bytes()[:1000])
    result = script("train.py", *tiny, "--init_from=resume")
    assert result.code == 0 and "passed over" in result.out and "ckpt_12.pt" in result.out
    assert equal(weights(newest), whole)


def test_a_used_folder_is_not_overwritten_by_chance(script, tiny, tmp_path):
    script("train.py", *tiny)
    before = weights(tmp_path / "out" / "ckpt_12.pt")
    result = script("train.py", *tiny, "--seed=5")
    assert result.code == 1
    for way in ("--init_from=resume", "--out_dir", "--overwrite=True"):
        assert way in result.err
    assert equal(weights(tmp_path / "out" / "ckpt_12.pt"), before)
    assert script("train.py", *tiny, "--seed=5", "--overwrite=True").code == 0
    assert not equal(weights(tmp_path / "out" / "ckpt_12.pt"), before)


def test_starting_from_a_checkpoint_is_a_new_run_on_its_weights(script, tiny, tmp_path):
    script("train.py", *tiny)
    last = records(tmp_path, "val_loss")[-1]
    flags = [*tiny, f"--out_dir={tmp_path / 'tuned'}"]
    flags += ["--max_position_embeddings=16", "--learning_rate=1e-3", "--min_lr=1e-4"]
    result = script("train.py", *flags, f"--init_from={tmp_path / 'out' / 'ckpt_12.pt'}")
    assert result.code == 0, result.err
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    val = [r["val_loss"] for r in map(json.loads, lines) if "val_loss" in r]
    assert abs(val[0] - last) < 0.3 and val[-1] < val[0]
    state = checkpoint.load(tmp_path / "tuned" / "ckpt_12.pt")
    assert state["model_args"]["num_hidden_layers"] == 2
    assert state["model_args"]["max_position_embeddings"] == 16
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {12}


def test_a_tuned_model_can_be_resumed_though_its_sizes_are_not_the_settings(script, tiny, tmp_path):
    script("train.py", *tiny)
    base = tmp_path / "out" / "best.pt"
    other = tmp_path / "other.py"
    other.write_text("num_hidden_layers = 24\n", encoding="utf-8")
    flags = [*tiny, str(other), f"--out_dir={tmp_path / 'tuned'}"]
    assert script("train.py", *flags, f"--init_from={base}").code == 0
    result = script("train.py", *flags, "--init_from=resume", "--max_iters=14")
    assert result.code == 0, result.err
    assert (
        checkpoint.load(tmp_path / "tuned" / "ckpt_14.pt")["model_args"]["num_hidden_layers"] == 2
    )


def test_a_start_from_a_checkpoint_never_deletes_its_run(script, tiny, tmp_path):
    script("train.py", *tiny)
    base = tmp_path / "out" / "ckpt_6.pt"
    for more in ([], ["--overwrite=True"]):
        result = script("train.py", *tiny, f"--init_from={base}", *more)
        assert result.code == 1 and "--out_dir" in result.err and base.exists()


def test_changed_optimizer_settings_count_on_resume(script, tiny, tmp_path):
    script("train.py", *tiny)
    flags = ["--init_from=resume", "--max_iters=13", "--weight_decay=0.5", "--beta1=0.8"]
    result = script("train.py", *tiny, *flags)
    assert result.code == 0 and "weight_decay 0.1 -> 0.5" in result.out
    groups = checkpoint.load(tmp_path / "out" / "ckpt_13.pt")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0] and groups[0]["betas"][0] == 0.8


def test_numbers_that_are_not_finite_skip_the_step_and_then_end_the_run(script, tiny, tmp_path):
    script("train.py", *tiny, "--max_iters=6")
    state = checkpoint.load(tmp_path / "out" / "ckpt_6.pt")
    state["model"]["norm.weight"][:] = math.inf
    torch.save(state, tmp_path / "out" / "ckpt_6.pt")
    flags = ["--init_from=resume", "--max_iters=30", "--max_skipped=3", "--eval_interval=100"]
    result = script("train.py", *tiny, *flags)
    assert result.code == 1 and "3 updates in a row" in result.err
    assert result.out.count("left out, not finite: loss nan") == 3
    assert not (tmp_path / "out" / "ckpt_30.pt").exists()
    report = json.loads((tmp_path / "out" / "bad_step.json").read_text(encoding="utf-8"))
    assert report["iter"] == 8 and len(report["windows"]) == 8


def test_compile_that_fails_falls_back_to_eager(script, tiny, tmp_path, monkeypatch):
    """torch.compile fails in the first step, not where it is called."""

    def broken(*args, **kwargs):
        raise RuntimeError("no working compiler")

    script("train.py", *tiny)
    eager = records(tmp_path)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", broken)
    )
    result = script("train.py", *tiny, "--compile=True", "--overwrite=True")
    assert result.code == 0 and "failed, training uncompiled" in result.out
    assert "no working compiler" in result.out
    assert records(tmp_path) == eager


def test_a_text_at_each_evaluation_moves_no_loss(script, tiny, tmp_path):
    """With dropout, whose random numbers a draw of the run's would shift."""
    tiny = [*tiny, "--dropout=0.1"]
    assert script("train.py", *tiny).code == 0
    plain = records(tmp_path), records(tmp_path, "val_loss")
    result = script("train.py", *tiny, "--sample_prompt=the cat", "--overwrite=True")
    assert result.code == 0 and result.out.count("| sample: the cat") == 3
    assert (records(tmp_path), records(tmp_path, "val_loss")) == plain
    texts = records(tmp_path, "sample")
    assert len(texts) == 3 and all(text.startswith("the cat") for text in texts)


def test_a_reference_that_is_not_there_is_told_before_any_work(script, tiny, tmp_path):
    result = script("train.py", *tiny, "--reference=nowhere.jsonl")
    assert result.code == 1 and "no curve nowhere.jsonl" in result.err
    assert not (tmp_path / "out").exists()
    result = script("train.py", *tiny, "--reference=assets/curves/easygpt.jsonl", "--max_iters=1")
    assert result.code == 0 and "to the reference's 11" in result.out


def test_learning_rate_corners():
    def lr_at(step, *schedule):
        return Schedule(*schedule).at(step)

    assert lr_at(0, 1.0, 0.1, 9, 100) == pytest.approx(0.1)
    assert lr_at(8, 1.0, 0.1, 9, 100) == pytest.approx(0.9)
    assert lr_at(9, 1.0, 0.1, 9, 99) == pytest.approx(1.0)
    assert lr_at(54, 1.0, 0.1, 9, 99) == pytest.approx(0.55)
    assert lr_at(99, 1.0, 0.1, 9, 99) == lr_at(10**6, 1.0, 0.1, 9, 99) == pytest.approx(0.1)
    assert lr_at(0, 1.0, 0.1, 0, 0) == 0.1
    rates = [lr_at(s, 1.0, 0.1, 9, 100) for s in range(9, 120)]
    assert rates == sorted(rates, reverse=True)


def test_the_stable_rate_falls_in_a_line_at_the_end():
    at = make_schedule(1.0, 0.2, 9, 100, "wsd", 0.4).at
    assert [at(s) for s in (4, 8)] == pytest.approx([0.5, 0.9])
    assert {at(s) for s in range(9, 61)} == {1.0}
    assert [at(s) for s in (61, 70, 80, 99, 100, 500)] == pytest.approx(
        [0.98, 0.8, 0.6, 0.22, 0.2, 0.2]
    )
    whole = make_schedule(1.0, 0.0, 10, 100, "wsd", 1.0)
    assert [whole.at(s) for s in (10, 55, 99)] == pytest.approx([1.0, 0.5, 1 / 90])
    never = make_schedule(1.0, 0.0, 0, 10, "wsd", 0.01)
    assert [never.at(s) for s in (0, 9, 10)] == [1.0, 1.0, 0.0]


def test_a_stable_run_is_prolonged_and_cut_short(script, tiny, tmp_path):
    """From its stable part a longer and a shorter run go on, equal to those made in one piece."""
    wsd = ["--lr_schedule=wsd", "--decay_share=0.5", "--optimizer=muon", "--checkpoint_interval=1"]
    flags = [*tiny, *wsd, "--keep_last=20", "--eval_interval=100"]
    finals = {}
    for updates in (12, 16, 10):
        out = tmp_path / f"whole{updates}"
        result = script("train.py", *flags, f"--max_iters={updates}", f"--out_dir={out}")
        assert result.code == 0, result.err
        finals[updates] = weights(out / f"ckpt_{updates}.pt")
    for updates in (16, 10):
        out = tmp_path / f"from12to{updates}"
        out.mkdir()
        shutil.copy(tmp_path / "whole12" / "ckpt_5.pt", out)
        more = [f"--max_iters={updates}", f"--out_dir={out}", "--init_from=resume"]
        result = script("train.py", *flags, *more)
        assert result.code == 0, result.err
        assert f"max_iters 12 -> {updates}" in result.out
        assert equal(weights(out / f"ckpt_{updates}.pt"), finals[updates])


def test_a_new_run_from_a_checkpoint_may_be_a_decay_alone(script, tiny, tmp_path):
    assert script("train.py", *tiny, "--lr_schedule=wsd").code == 0
    more = ["--lr_schedule=wsd", "--decay_share=1", "--warmup_iters=0", "--max_iters=8"]
    more += [f"--init_from={tmp_path / 'out' / 'ckpt_12.pt'}", f"--out_dir={tmp_path / 'cut'}"]
    result = script("train.py", *tiny, *more, "--log_interval=1", "--min_lr=0")
    assert result.code == 0, result.err
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [r["lr"] for r in map(json.loads, lines) if "lr" in r]
    assert rates == pytest.approx([1e-2 * (1 - s / 8) for s in range(8)])


def test_a_try_of_a_few_updates_has_a_short_warm_up(script, tiny):
    """Of any config: the warm-up is cut to a tenth of the run, and that is said."""
    assert make_schedule(1.0, 0.1, 800, 20).warmup == 2
    assert make_schedule(1.0, 0.1, 20, 20).warmup == 20 and make_schedule(1, 0, 5, 0).warmup == 0
    result = script("train.py", *tiny, "--warmup_iters=50")
    assert result.code == 0 and "warmup_iters=1, not 50" in result.out


def test_the_windows_of_an_update_name_what_works():
    assert windows_of_rank(491520, 1024, 1) == 480 and windows_of_rank(491520, 1024, 8) == 60
    with pytest.raises(ValueError, match="499712 or 500736"):
        windows_of_rank(500000, 1024, 1)
    with pytest.raises(ValueError, match="1024 or 2048"):
        windows_of_rank(100, 1024, 1)
    with pytest.raises(ValueError, match="480 windows .* 7 processes .* 1, 2, 3, 4, 5, 6, 8"):
        windows_of_rank(491520, 1024, 7)


def test_batch_size_is_the_most_windows_at_once(script, tiny):
    """The largest divisor of an update's windows is taken and said; the tokens stay."""
    assert [largest_divisor(480, n) for n in (1, 7, 11, 12, 480, 999)] == [1, 6, 10, 12, 480, 480]
    result = script("train.py", *tiny, "--batch_size=3", "--max_iters=1", "--warmup_iters=0")
    assert result.code == 0 and "2 x 32 x 4 micro-steps" in result.out
    assert "batch_size=2, which divides the 8 windows of a rank" in result.out


def test_a_batch_size_left_open(script, tiny, monkeypatch):
    """As many windows as are planned to fit; a resumed run takes no others, whatever fits then."""
    tiny = [*tiny, "--batch_size=0", "--eval_iters=0", "--eval_windows=4"]
    free = {"bytes": 64 * 2**30}
    monkeypatch.setattr(fit, "free_memory", lambda device: free["bytes"])
    result = script("train.py", *tiny, "--max_iters=2", "--lr_decay_iters=4")
    assert result.code == 0 and "8 x 32 x 1 micro-steps" in result.out
    assert "batch_size=0: 8 windows at once are planned to be the fastest that fit" in result.out
    free["bytes"] = 0.0
    result = script("train.py", *tiny, "--max_iters=4", "--init_from=resume")
    assert result.code == 0 and "8 x 32 x 1 micro-steps" in result.out
    result = script("train.py", *tiny, "--max_iters=1", "--warmup_iters=0", "--overwrite=True")
    assert result.code == 0 and "1 x 32 x 8 micro-steps" in result.out, "nothing fits"


def test_the_windows_of_an_evaluation_do_not_depend_on_the_micro_batch():
    assert eval_windows({"eval_iters": 0, "eval_windows": 2400, "batch_size": 5}) == 2400
    assert eval_windows({"eval_iters": 200, "batch_size": 12}) == 2400, "an old checkpoint's"


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        (["--lerning_rate=1"], ["learning_rate"], 2),
        (["--batch_size=two"], ["batch_size", "two"], 2),
        (["config/nothing.py"], ["config/nothing.py"], 2),
        (["--gradient_accumulation_steps=40"], ["tokens_per_step ="], 2),
        (["--batch_size=-1"], ["batch_size must be at least 0"], 1),
        (["--batch_size=0", "--eval_iters=2"], ["eval_iters=2 needs a batch_size"], 1),
        (["--num_hidden_layers=1001"], ["num_hidden_layers must be at most 1000"], 1),
        (["--tokens_per_step=250"], ["tokens_per_step=250", "224 or 256"], 1),
        (["--eval_interval=0", "--beta2=1"], ["eval_interval", "beta2"], 1),
        (["--eval_windows=0", "--eval_iters=-1"], ["eval_windows", "eval_iters"], 1),
        (["--min_lr=1"], ["min_lr (1.0)"], 1),
        (["--learning_rate=1e-310"], ["learning_rate must be at least 2.3e-308, not 1e-310"], 1),
        (["--weight_decay=inf"], ["weight_decay must be finite"], 1),
        (["--rope_theta=1"], ["rope_theta must be above 1 and below 2^40, not 1.0"], 1),
        (["--rope_theta=1e30", "--rms_norm_eps=inf"], ["rope_theta", "rms_norm_eps"], 1),
        (["--compile=maybe"], ["compile", "maybe"], 1),
        (["--dtype=bf16"], ["bfloat16", "bf16"], 1),
        (["--dtype=float16"], ["float16", "CPU"], 1),
        (["--device=gpu"], ["gpu", "auto"], 1),
        (["--device=cuda:99"], ["cuda:99"], 1),
        (["--head_dim=7"], ["head_dim"], 1),
        (["--vocab_size=200"], ["256", "vocab_size is 200"], 1),
        (["--dataset=no/where"], ["python data/prepare.py", "where"], 1),
        (["--init_from=resume"], ["no checkpoint", "out"], 1),
        (["--init_from=nowhere.pt"], ["nowhere.pt"], 1),
        (["--max_position_embeddings=99999", "--tokens_per_step=99999"], ["99999"], 1),
        (["--out_dir="], ["out_dir"], 1),
        (["--seed=99999999999999999999"], ["seed", "64-bit"], 2),
        (["--seed=-1", "--hidden_size=0"], ["seed must be at least 0", "hidden_size"], 1),
    ],
)
def test_mistakes_get_one_line(script, tiny, tmp_path, flags, words, code):
    result = script("train.py", *tiny, *flags)
    assert result.code == code
    assert result.err.startswith("train.py: ") and result.err.count("\n") == 1
    for word in words:
        assert word in result.err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_rate_that_jumps_at_a_resume_is_told(script, tiny):
    """As it does when a run is prolonged from a checkpoint of its decay."""
    wsd = [*tiny, "--lr_schedule=wsd", "--decay_share=0.5", "--learning_rate=1e-3", "--min_lr=0"]
    assert script("train.py", *wsd).code == 0
    result = script("train.py", *wsd, "--init_from=resume", "--max_iters=24")
    assert result.code == 0, result.err
    assert "max_iters 12 -> 24, rate of the next update 0 -> 0.001" in result.out
    again = script("train.py", *wsd, "--init_from=resume", "--max_iters=24")
    assert "WARNING" not in again.out


def test_resuming_another_model_lists_what_differs(script, tiny):
    script("train.py", *tiny)
    result = script("train.py", *tiny, "--init_from=resume", "--hidden_size=48", "--rope_theta=5e5")
    assert result.code == 1
    assert "hidden_size is 48, there 32" in result.err and "rope_theta" in result.err


def test_another_tokenizer_than_the_checkpoints_is_refused(script, tiny, tmp_path, dataset):
    script("train.py", *tiny)
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    meta = json.loads((other / "meta.json").read_text(encoding="utf-8"))
    (other / "meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}), encoding="utf-8")
    for init, out in (("resume", "out"), (tmp_path / "out" / "best.pt", "new")):
        flags = [f"--dataset={other}", f"--init_from={init}", f"--out_dir={tmp_path / out}"]
        result = script("train.py", *tiny, *flags)
        assert result.code == 1 and "bytes" in result.err and "gpt2" in result.err


def test_wandb_without_the_package_does_not_stop_a_run(script, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # makes `import wandb` fail
    result = script("train.py", *tiny, "--wandb_log=True")
    assert result.code == 0 and "wandb is off" in result.out
    assert len(records(tmp_path)) == 12


def test_bins_without_meta_json_are_gpt2(script, tiny, tmp_path):
    """nanoGPT's own data folders work as they are."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 3000).astype("<u2").tofile(
            folder / f"{split}.bin"
        )
    result = script("train.py", *tiny, f"--dataset={folder}", "--max_iters=1", "--warmup_iters=0")
    assert result.code == 0, result.err
    assert "vocab 50304" in result.out and "gpt2" in result.out


def write_checkpoint(path, **changes):
    """Again, with some of its contents changed."""
    torch.save({**checkpoint.load(path), **changes}, path)


def test_sizes_of_a_model_that_is_there_are_not_typed(script, tiny, tmp_path):
    """Equal ones are harmless, and those of a config file serve many commands."""
    assert script("train.py", *tiny).code == 0
    base, tuned = tmp_path / "out" / "best.pt", tmp_path / "tuned"
    flags = [*tiny, f"--init_from={base}", f"--out_dir={tuned}", "--max_iters=2"]
    for more in ([], ["--init_from=resume"], ["--dry_run=True"]):
        for typed in ("--hidden_size=48", "--max_position_embeddings=64", "--qk_norm=True"):
            result = script("train.py", *flags, *more, typed)
            name = typed.partition("=")[0]
            assert result.code == 1 and f"leave out {name}" in result.err, result
        equal = ["--hidden_size=32", "--vocab_size=0", "--dropout=0.1"]
        assert script("train.py", *flags, *more, *equal, "--head_dim=16").code == 0


def test_a_run_that_is_over_does_not_go_back(script, tiny, tmp_path):
    assert script("train.py", *tiny).code == 0
    for more in ([], ["--dry_run=True"]):
        result = script("train.py", *tiny, "--init_from=resume", "--max_iters=11", *more)
        assert result.code == 1 and "12 updates already, more than max_iters=11" in result.err
    assert script("train.py", *tiny, "--init_from=resume").code == 0, "done is done"


@pytest.mark.parametrize(
    "hurt",
    [
        lambda o: [m.pop("exp_avg") for m in o["state"].values()],
        lambda o: o["state"][0].update(momentum_buffer=torch.zeros(1)),
        lambda o: o["state"].clear(),
        lambda o: o["state"].pop(0),
        lambda o: o.pop("param_groups"),
    ],
)
def test_another_optimizers_state_is_told(script, tiny, tmp_path, hurt):
    assert script("train.py", *tiny, "--max_iters=6").code == 0
    path = tmp_path / "out" / "ckpt_6.pt"
    optimizer = checkpoint.load(path)["optimizer"]
    hurt(optimizer)
    write_checkpoint(path, optimizer=optimizer)
    result = script("train.py", *tiny, "--init_from=resume")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "another optimizer than adamw" in result.err and "another --out_dir" in result.err


def test_a_long_sample_prompt_is_told(script, tiny):
    result = script("train.py", *tiny, "--sample_prompt=" + "x" * 40)
    assert result.code == 0 and "sample_prompt has 40 tokens: only the last 32" in result.out


def test_the_command_that_goes_on_names_each_flag_once(script, tiny):
    flags = [*tiny, "--time_limit=0.0000001", "--max_iters=10000"]
    for more in (["--overwrite=True"], ["--init_from=resume"], ["--init-from", "auto"]):
        result = script("train.py", *flags, *more)
        assert result.code == 0 and result.out.count("--init_from=resume") == 1, result
        assert "overwrite" not in result.out and "init-from" not in result.out


def test_files_of_others_do_not_stand_in_the_way_of_auto(script, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs.pt").write_bytes(b"x")
    for times in (1, 2):
        result = script("train.py", *tiny, "--init_from=auto")
        assert result.code == 0 and ("resumed" in result.out) == (times == 2), result.err
    assert (out / "theirs.pt").read_bytes() == b"x"


def test_a_file_in_the_place_of_a_folder(script, tiny, tmp_path):
    assert script("train.py", *tiny).code == 0
    best, note = tmp_path / "out" / "best.pt", tmp_path / "note.txt"
    note.touch()
    for script_name in ("train.py", "sample.py", "evaluate.py", "export.py"):
        args = tiny if script_name == "train.py" else []
        result = script(script_name, *args, f"--out_dir={best}")
        assert result.code == 1 and f"--init_from={best} for this one" in result.err
        result = script(script_name, *args, f"--out_dir={note / 'x'}")
        assert result.code == 1 and f"{note} is a file, not a folder" in result.err
    result = script("train.py", *tiny, f"--dataset={tmp_path / 'note.txt'}")
    assert result.code == 1 and "is a file; its folder is" in result.err


def test_an_evaluation_of_fewer_windows_than_asked_says_so(script, tiny):
    """The validation text has 62 of 32 tokens."""
    short = [*tiny, "--max_iters=1", "--overwrite=True", "--eval_iters=0"]
    result = script("train.py", *short, "--eval_windows=100")
    assert "62 windows in an evaluation: all that there are, not 100" in result.out
    assert "windows in an evaluation" not in script("train.py", *short, "--eval_windows=62").out
    result = script("train.py", *tiny, "--max_iters=1", "--overwrite=True", "--eval_iters=99")
    assert "62 windows in an evaluation: all that there are, eval_iters x batch_size" in result.out
    result = script("train.py", *tiny, "--max_iters=1", "--overwrite=True", "--eval_iters=2")
    assert "8 windows in an evaluation: eval_iters x batch_size" in result.out

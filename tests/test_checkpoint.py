"""Checkpoints: what torch.save and torch.load let pass, and files of other people."""

import dataclasses
import os
import random

import pytest
import torch

from formats import checkpoint, pack, rebuild
from model import GPT, GPTConfig
from run.saver import Saver

SIZE = GPTConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=16,
)


def state(seed=0, **more):
    torch.manual_seed(seed)
    model = GPT(SIZE)
    return {"model": model.state_dict(), "model_args": dataclasses.asdict(SIZE), **more}


def logits(path):
    model = rebuild.load_model(path, checkpoint.load(path))
    return model(torch.arange(16)[None])[0]


def test_round_trip_and_equal_states_give_equal_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        checkpoint.save(tmp_path / name, state(iter_num=7, note="text", none=None))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert (loaded["iter_num"], loaded["note"], loaded["none"]) == (7, "text", None)
    for key, value in state()["model"].items():
        assert torch.equal(loaded["model"][key], value)


def test_every_single_flipped_bit_is_noticed(tmp_path):
    """torch.load takes a flipped payload bit in silence."""
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    good = path.read_bytes()
    before = logits(path)
    rng = random.Random(0)
    silent = 0
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            assert torch.equal(logits(path), before)  # padding between members may change
            silent += 1
        except ValueError as error:
            assert "a.pt" in str(error)
    assert silent < 60


def test_a_name_in_the_archive_that_is_no_text_is_damage(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    bad = bytearray(path.read_bytes())
    bad[7] |= 8  # the first member's name is said to be UTF-8
    bad[30] = 0xFD
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=r"a\.pt is truncated, damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1, -10])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"a\.pt"):
        checkpoint.load(path)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt .* could run code"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(seed=1))
    good = path.read_bytes()

    def full(*args):
        args[1].write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"a\.pt"):
        checkpoint.save(path, state(seed=2))
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["a.pt"]


def test_newest_good_one_is_taken_and_the_bad_ones_named(tmp_path):
    for step in (5, 20, 100):
        checkpoint.save(tmp_path / f"ckpt_{step}.pt", state(iter_num=step))
    (tmp_path / "ckpt_100.pt").write_bytes(b"")
    (tmp_path / "ckpt_999.pt.tmp").write_bytes(b"")
    path, found, problems = checkpoint.load_newest(tmp_path)
    assert (path.name, found["iter_num"]) == ("ckpt_20.pt", 20)
    assert len(problems) == 1 and "ckpt_100.pt" in problems[0]


def test_no_checkpoint_says_what_to_type(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.py"):
        checkpoint.load_newest(tmp_path)


def test_one_damaged_block_does_not_spoil_the_last_and_the_best(tmp_path):
    """As two names of one file they would be lost together."""
    saver = Saver(tmp_path, keep_last=2)
    saver.save(1, state())
    saver.save_best(state())
    saver.wait()
    data = bytearray((tmp_path / "ckpt_1.pt").read_bytes())
    data[2000] ^= 1
    with open(tmp_path / "ckpt_1.pt", "r+b") as f:  # in place, as a disk would
        f.write(data)
    path, _, problems = checkpoint.load_newest(tmp_path)
    assert path.name == "best.pt" and "ckpt_1.pt" in problems[0]


def test_a_packed_copy_equals_shares_nothing_and_is_few_records(tmp_path):
    """Of every type and layout; a tied tensor is copied once, and the next copy needs no memory."""
    table = torch.randn(5, 7)
    given = {
        "tied": [table, table],
        "turned": torch.randn(4, 4).T,
        "square": (torch.arange(9).view(3, 3), torch.ones(3), torch.zeros(()), torch.empty(0)),
        "half": {"a": torch.randn(3).bfloat16(), 5: None, "n": 7},
    }
    given["square_turned"] = given["square"][0].T  # the same memory, another matrix
    packed = pack.Packed()
    first = packed.copy(given)
    torch.testing.assert_close(first, given, rtol=0, atol=0)
    assert first["tied"][0] is first["tied"][1]
    pieces = {t.untyped_storage().data_ptr() for t in pack.tensors_in(first) if t.numel()}
    assert len(pieces) == 3  # float32, int64, bfloat16
    table.zero_()
    assert first["tied"][0].abs().sum() > 0
    again = packed.copy(given)
    assert again["tied"][0].data_ptr() == first["tied"][0].data_ptr()
    torch.testing.assert_close(again, given, rtol=0, atol=0)
    with_other_shapes = {"grown": torch.randn(100, 3)}
    torch.testing.assert_close(packed.copy(with_other_shapes), with_other_shapes, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_easygpts_files_load(tmp_path, prefix):
    """Its misspelt norm, its inv_freq, its norm_eps and bias, and torch.compile's prefix."""
    ours = state(seed=3)
    theirs = {
        prefix + k.replace("post_attention", "post_attetion"): v for k, v in ours["model"].items()
    }
    theirs[prefix + "layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    args = dict(ours["model_args"], norm_eps=ours["model_args"]["rms_norm_eps"], bias=False)
    del args["rms_norm_eps"]
    torch.save(
        {"model": theirs, "model_args": args, "best_val_loss": torch.tensor(2.9)},
        tmp_path / "ckpt.pt",
    )
    checkpoint.save(tmp_path / "ours.pt", ours)
    path, _, _ = checkpoint.load_newest(tmp_path)
    assert path.name == "ckpt.pt"
    assert torch.equal(logits(path), logits(tmp_path / "ours.pt"))


def test_files_from_before_a_field_existed_load(tmp_path):
    old = state()
    for name in ("tie_word_embeddings", "qk_norm", "attention_bias", "mlp_bias"):
        del old["model_args"][name]
    checkpoint.save(tmp_path / "old.pt", old)
    checkpoint.save(tmp_path / "new.pt", state())
    assert torch.equal(logits(tmp_path / "old.pt"), logits(tmp_path / "new.pt"))


def test_a_head_of_its_own_follows_the_config(tmp_path):
    torch.manual_seed(0)
    size = dataclasses.replace(SIZE, tie_word_embeddings=False)
    model = GPT(size).eval()
    untied = {"model": model.state_dict(), "model_args": dataclasses.asdict(size)}
    checkpoint.save(tmp_path / "a.pt", untied)
    assert torch.equal(logits(tmp_path / "a.pt"), model(torch.arange(16)[None])[0])
    del untied["model_args"]["tie_word_embeddings"]
    torch.save(untied, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="lm_head and embed_tokens differ"):
        logits(tmp_path / "b.pt")
    headless = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    torch.save({"model": headless, "model_args": dataclasses.asdict(size)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="it lacks lm_head"):
        logits(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {"n_layer": 2, "block_size": 16}}, ["it has block_size, n_layer"]),
        ({"model_args": None}, ["model_args"]),
        ({"model_args": dict(dataclasses.asdict(SIZE), bias=True)}, ["it lacks", "q_proj.bias"]),
        (
            {"model_args": dict(dataclasses.asdict(SIZE), hidden_size=40)},
            ["(64, 32), not (64, 40)"],
        ),
        (
            {"model": {"wte.weight": torch.ones(2)}},
            ["it lacks embed_tokens.weight", "and 17 more", "wte.weight"],
        ),
    ],
)
def test_other_peoples_files_are_refused_with_the_difference(tmp_path, change, words):
    torch.save({**state(), **change}, tmp_path / "other.pt")
    with pytest.raises(ValueError) as error:
        logits(tmp_path / "other.pt")
    for word in [*words, "other.pt"]:
        assert word in str(error.value)


def test_a_bare_state_dict_says_what_is_missing(tmp_path):
    torch.save(state()["model"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="sizes"):
        checkpoint.load(tmp_path / "bare.pt")


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight"])
def test_nan_weights_are_called_so(tmp_path, name):
    bad = state()
    bad["model"][name][3] = float("nan")
    torch.save(bad, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="NaN"):
        logits(tmp_path / "nan.pt")


def test_a_model_to_be_loaded_is_not_initialised_first(tmp_path, monkeypatch):
    """Random numbers for 303M parameters take seconds."""
    saved, drawn = state(), []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *a, **k: drawn.append(1) or self)
    model = rebuild.load_model(tmp_path / "a.pt", saved)
    assert not drawn and torch.equal(model.cos, GPT(SIZE).cos) and drawn

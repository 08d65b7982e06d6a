"""Checkpoints in parts: what is written is read, and what is damaged is not believed."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from formats import checkpoint, easygpt, listing, rebuild, sharded
from model import GPT, GPTConfig
from run.optim import configure_optimizer
from run.saver import Saver

SIZE = GPTConfig(
    vocab_size=131,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=32,
)


@pytest.fixture
def writer():
    """Of a team of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield sharded.Writer()
    dist.destroy_process_group()


def trained(**fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SIZE), **fields}))
    optimizer = configure_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
    x = torch.randint(131, (2, 16))
    model(x, x)[1].backward()
    optimizer.step()
    return model, optimizer


def state_of(model, optimizer, step=3):
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": vars(model.config).copy(),
        "iter_num": step,
        "tokenizer": {"name": "bytes", "vocab_size": 257, "json": None},
    }


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read(writer, tmp_path, tied):
    model, optimizer = trained(tie_word_embeddings=tied)
    state = state_of(model, optimizer)
    writer.save(tmp_path / "a.shards", writer.copy(state))
    back = checkpoint.load(tmp_path / "a.shards")
    assert ("lm_head.weight" in back["model"]) != tied, "tied weights are there once"
    assert rebuild.load_model(tmp_path / "a.shards", back).config == model.config
    for name, weight in state["model"].items():
        assert torch.equal(easygpt.clean_state_dict(back["model"], tied)[name], weight)
    other, fresh = trained(tie_word_embeddings=tied)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    fresh.load_state_dict({**back["optimizer"], "state": {}})
    rest = checkpoint.load(tmp_path / "a.shards", whole=False)
    assert rest["model"] == {} and rest["iter_num"] == 3
    sharded.read_into(tmp_path / "a.shards", other, fresh, rest)
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    for optimizer_state in (fresh.state_dict(), back["optimizer"]):
        assert optimizer_state["state"].keys() == state["optimizer"]["state"].keys()
        for i, states in state["optimizer"]["state"].items():
            for name, tensor in states.items():
                assert torch.equal(optimizer_state["state"][i][name], tensor)


def test_a_copy_does_not_change_as_training_goes_on(writer, tmp_path):
    model, optimizer = trained()
    copied = writer.copy(state_of(model, optimizer))
    before = model.norm.weight.clone()
    with torch.no_grad():
        model.norm.weight.add_(1)
    writer.save(tmp_path / "a.shards", copied)
    assert torch.equal(checkpoint.load(tmp_path / "a.shards")["model"]["norm.weight"], before)


def flip(folder):
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def add(folder):
    save_file({"model.x": torch.ones(2)}, folder / "more.safetensors")


def cut(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


DAMAGE = {
    "a bit": (flip, "checksum"),
    "a file too many": (add, "more.safetensors"),
    "a cut file": (cut, "of another size"),
    "no file": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "missing"),
    "not finished": (lambda folder: (folder / "rest.json").unlink(), "not a finished"),
    "no object": (
        lambda folder: (folder / "rest.json").write_text(
            (folder / "rest.json")
            .read_text()
            .replace('"model_args": {', '"model_args": [], "x": {')
        ),
        "no object",
    ),
    "no JSON": (
        lambda folder: (folder / "rest.json").write_text("{", encoding="utf-8"),
        "finished",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_passed_over(writer, tmp_path, kind):
    model, optimizer = trained()
    for step in (3, 5):
        saved = writer.copy(state_of(model, optimizer, step))
        writer.save(tmp_path / f"ckpt_{step}.shards", saved)
    damage, words = DAMAGE[kind]
    damage(tmp_path / "ckpt_5.shards")
    with pytest.raises(ValueError, match=words):
        checkpoint.load(tmp_path / "ckpt_5.shards")
    for whole in (True, False):
        path, state, problems = checkpoint.load_newest(tmp_path, whole)
        assert path.name == "ckpt_3.shards" and state["iter_num"] == 3 and len(problems) == 1


@pytest.mark.parametrize("offsets", [[1 << 50, 0], [64, 0], [-1, 0]])
def test_a_hostile_header_makes_no_room_and_no_tensor(tmp_path, offsets):
    """A file may claim that its few bytes are a part of something huge."""
    info = {"DCP_SHARDING_INFO": json.dumps({"model.x": {"saved_offsets": offsets}})}
    path = tmp_path / "a.shards" / "x.safetensors"
    path.parent.mkdir()
    save_file({"model.x": torch.ones(64, 2)}, path, metadata=info)
    rest = {
        "optimizer": {},
        "model_args": {},
        "files": {path.name: (path.stat().st_size, sharded.crc(path))},
    }
    (path.parent / "rest.json").write_text(json.dumps(rest), encoding="utf-8")
    with pytest.raises(ValueError, match="not read"):
        checkpoint.load(path.parent)


def test_a_save_that_fails_leaves_the_old_one(writer, tmp_path, monkeypatch):
    model, optimizer = trained()
    best = tmp_path / "best.shards"
    writer.save(best, writer.copy(state_of(model, optimizer, 3)))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for broken in ((sharded, "put"), (sharded.Writer, "written"), (sharded, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, full)
            with pytest.raises(OSError, match="could not write .*No space left"):
                writer.save(best, writer.copy(state_of(model, optimizer, 5)))
        assert [p.name for p in tmp_path.iterdir()] == ["best.shards"]
        assert checkpoint.load(best)["iter_num"] == 3
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(OSError, match="NaN"):
        writer.save(best, writer.copy(state_of(model, optimizer, 5)))
    assert checkpoint.load(best)["iter_num"] == 3


def test_a_name_that_cannot_be_changed_brings_the_old_one_back(writer, tmp_path, monkeypatch):
    """On Windows, where a scanner has the new files open."""
    model, optimizer = trained()
    best = tmp_path / "best.shards"
    writer.save(best, writer.copy(state_of(model, optimizer, 3)))
    real = sharded.os.replace

    def replace(a, b):
        if str(a).endswith(".tmp"):
            raise PermissionError(13, "in use")
        real(a, b)

    monkeypatch.setattr(sharded.os, "replace", replace)
    with pytest.raises(OSError, match="in use"):
        writer.save(best, writer.copy(state_of(model, optimizer, 5)))
    assert checkpoint.load(best)["iter_num"] == 3


def test_what_was_written_is_read_again(writer, tmp_path, monkeypatch):
    """A header that the disk has spoilt, other values, a file that rank 0 does not see."""
    model, optimizer = trained()
    monkeypatch.setattr(sharded.time, "sleep", lambda s: None)
    real = sharded.save

    def spoil(how):
        def save(tensors, storage_writer, process_group):
            real(tensors, storage_writer=storage_writer, process_group=process_group)
            how(tmp_path / "a.shards.tmp")

        return save

    def no_header(folder):
        next(folder.glob("*.safetensors")).write_bytes(b"\xff" * 64)

    for how in (no_header, flip):
        monkeypatch.setattr(sharded, "save", spoil(how))
        with pytest.raises(OSError, match="could not write"):
            writer.save(tmp_path / "a.shards", writer.copy(state_of(model, optimizer)))
    monkeypatch.setattr(sharded, "save", real)
    monkeypatch.setattr(sharded, "sizes", lambda folder: {})
    with pytest.raises(OSError, match="same file system"):
        writer.save(tmp_path / "a.shards", writer.copy(state_of(model, optimizer)))
    assert not any(tmp_path.iterdir())


def test_large_states_go_into_several_files(writer, tmp_path, monkeypatch):
    """A file is built in memory before it is written."""
    monkeypatch.setattr(sharded, "FILE", 20_000)
    model, optimizer = trained()
    writer.save(tmp_path / "a.shards", writer.copy(state_of(model, optimizer)))
    sizes = sharded.sizes(tmp_path / "a.shards").values()
    assert len(sizes) > 5 and max(sizes) < 50_000
    back = checkpoint.load(tmp_path / "a.shards")
    assert rebuild.load_model(tmp_path / "a.shards", back).config == model.config


def test_the_best_of_the_other_kind_goes(writer, tmp_path):
    state = state_of(*trained())
    for shards, name in ((False, "best.pt"), (True, "best.shards"), (False, "best.pt")):
        saver = Saver(tmp_path, 1, in_parts=shards)
        saver.save_best(state)
        saver.wait()
        assert [p.name for p in tmp_path.iterdir()] == [name] and not saver.unsaid


def test_killed_between_two_renames(writer, tmp_path, monkeypatch):
    """The new folder was to take the old one's name: one of them is there after tidying up."""
    model, optimizer = trained()
    best = tmp_path / "best.shards"
    writer.save(best, writer.copy(state_of(model, optimizer, 3)))
    real, calls = sharded.os.replace, []

    def replace(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(sharded.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        writer.save(best, writer.copy(state_of(model, optimizer, 5)))
    monkeypatch.undo()
    assert not best.exists()
    listing.tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best.shards"]
    assert checkpoint.load(best)["iter_num"] == 3


def test_another_model_is_refused(writer, tmp_path):
    folder = tmp_path / "a.shards"
    writer.save(folder, writer.copy(state_of(*trained())))
    rest = checkpoint.load(folder, whole=False)
    other, _ = trained(num_hidden_layers=3)
    with pytest.raises(ValueError, match="layers.2.*missing"):
        sharded.read_into(folder, other, None, rest)


def test_every_script_takes_shards(writer, tmp_path, script, dataset):
    model, optimizer = trained(vocab_size=320)
    writer.save(tmp_path / "best.shards", writer.copy(state_of(model, optimizer)))
    flags = ["--num_samples=1", "--max_new_tokens=3", "--start=a", "--device=cpu"]
    for init in (f"--init_from={tmp_path / 'best.shards'}", f"--out_dir={tmp_path}"):
        result = script("sample.py", init, *flags)
        assert result.code == 0 and result.out.startswith("a"), result.err
    for to, name in (("easygpt", "easygpt.pt"), ("hf", "hf/model.safetensors")):
        result = script("export.py", f"--to={to}", f"--init_from={tmp_path / 'best.shards'}")
        assert result.code == 0 and (tmp_path / name).exists(), result.err
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert tmp_path.name in card and ".shards" not in card
    dry = ["--dry_run=True", f"--init_from={tmp_path / 'best.shards'}", f"--dataset={dataset}"]
    dry += ["--tokens_per_step=32", "--batch_size=1", "--max_iters=1", "--warmup_iters=0"]
    result = script("train.py", *dry, "--device=RTX3090", f"--out_dir={tmp_path / 'new'}")
    assert result.code == 0 and "context 32, vocab 320" in result.out, result.err

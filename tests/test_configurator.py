"""Settings: every slip that nanoGPT and EasyGPT take in silence or answer with a traceback."""

import pytest

from configurator import ConfigError, configure, overrides, refuse, settings_of, typed, without

DEFAULTS = {
    "batch_size": 12,
    "max_position_embeddings": 1024,
    "tokens_per_step": 491520,
    "learning_rate": 3e-4,
    "wandb_log": False,
    "wandb_run_name": "",
    "compile": "auto",
}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--batch_size=8"], {"batch_size": 8}),
        (["--batch_size", "8"], {"batch_size": 8}),
        (["--batch-size=8"], {"batch_size": 8}),
        (["--batch_size=1e4"], {"batch_size": 10000}),
        (["--learning_rate=1"], {"learning_rate": 1.0}),
        (["--learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--wandb_log=tRuE"], {"wandb_log": True}),
        (["--wandb_log=0"], {"wandb_log": False}),
        (["--wandb_log"], {"wandb_log": True}),
        (["--wandb_log", "--batch_size=8"], {"wandb_log": True, "batch_size": 8}),
        (["--wandb_run_name=a=b"], {"wandb_run_name": "a=b"}),
        (["--wandb_run_name=123"], {"wandb_run_name": "123"}),
        (["--wandb_run_name="], {"wandb_run_name": ""}),
        (["--compile=False"], {"compile": "False"}),
        (["--batch_size=8", "--batch_size=9"], {"batch_size": 9}),
        ([], {}),
    ],
)
def test_flags(args, expected):
    values = overrides(args, DEFAULTS)
    assert values == expected
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bach_size=8"], ["bach_size", "did you mean batch_size"]),
        (["--batch_size=1.5"], ["batch_size", "an int", "1.5", "12"]),
        (["--batch_size=many"], ["batch_size", "many"]),
        (["--batch_size=1e400"], ["batch_size", "1e400"]),
        (["--batch_size=9223372036854775808"], ["batch_size", "64-bit"]),
        (["--batch_size=1e19"], ["batch_size", "64-bit"]),
        (["--batch_size=" + "9" * 5000], ["batch_size", "an int"]),
        (["--batch_size"], ["batch_size", "--batch_size=12"]),
        (["--learning_rate=nan"], ["learning_rate", "nan"]),
        (["--learning_rate=[1]"], ["learning_rate", "[1]"]),
        (["--wandb_log=2"], ["wandb_log", "true or false"]),
        (["nofile.py"], ["nofile.py"]),
        (["notes.txt"], ["notes.txt", ".py"]),
        (["-batch_size=8"], ["-batch_size=8"]),
        (["--block_size=64"], ["max_position_embeddings = 64"]),
        (["--msx_position_embeddings=64"], ["max_position_embeddings = 64"]),
        (["--gradient_accumulation_steps=40"], ["tokens_per_step = 491520"]),
        (["--batch_size=2", "--gradient_accumulation_steps=3"], ["tokens_per_step = 6144"]),
        (["--DEFAULTS=1"], ["DEFAULTS"]),
    ],
)
def test_mistakes_are_one_helpful_line(args, words):
    with pytest.raises(ConfigError) as error:
        overrides(args, DEFAULTS)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def write(tmp_path, text):
    path = tmp_path / "some.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_config_file_values_are_checked_as_flags_are(tmp_path):
    path = write(
        tmp_path, "import time\nbatch_size = 2\nlearning_rate = 1\ncompile = False\n_x = 3"
    )
    values = overrides([path, "--batch_size=4"], DEFAULTS)
    assert values == {"batch_size": 4, "learning_rate": 1.0, "compile": "False"}
    assert overrides(["--batch_size=4", path], DEFAULTS)["batch_size"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("msx_position_embeddings = 1024\n", ["max_position_embeddings = 1024", "some.py"]),
        (
            "batch_size = 12\ngradient_accumulation_steps = 40\n",
            ["tokens_per_step = 491520", "some.py"],
        ),
        ("batch_size = 'two'\n", ["some.py", "batch_size", "two"]),
        ("batch_size = [2]\n", ["some.py", "batch_size", "[2]"]),
        ("betas = (0.9, 0.95)\n", ["some.py", "betas"]),
        ("batch_size = \n", ["some.py", "SyntaxError"]),
        ("batch_size = 1 / 0\n", ["some.py", "ZeroDivisionError"]),
        ("import sys\nsys.exit(0)\n", ["some.py", "SystemExit: 0"]),
        ("raise SystemExit\n", ["some.py", "SystemExit"]),
        ("raise KeyboardInterrupt\n", ["some.py", "KeyboardInterrupt"]),
        (f"batch_size = {2**63}\n", ["some.py", "64-bit"]),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        overrides([write(tmp_path, text)], DEFAULTS)
    for word in words:
        assert word in str(error.value)


def test_a_config_file_cannot_reach_the_script(tmp_path):
    """nanoGPT runs config files inside the script's own globals."""
    namespace = {"__file__": __file__, "batch_size": 12, "secret": object()}
    before = dict(namespace)
    path = write(tmp_path, "batch_size = 2\nassert 'secret' not in globals()\n")
    assert configure(namespace, [path]) == {"batch_size": 2}
    assert namespace == before


def test_only_lower_case_public_plain_values_are_settings():
    names = {"a": 1, "B": 2, "_c": 3, "d": None, "e": [1], "f": 1.0, "g": "x", "h": True, "i": len}
    assert settings_of(names) == {"a": 1, "f": 1.0, "g": "x", "h": True}


def test_a_relative_config_file_is_also_looked_for_beside_the_script(tmp_path, monkeypatch):
    write(tmp_path, "batch_size = 2\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert overrides(["some.py"], DEFAULTS, tmp_path) == {"batch_size": 2}


def test_exit_codes(capsys, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("size = 3  # how many\n", encoding="utf-8")
    namespace = {"__file__": str(script), "__doc__": "What it does.", "size": 3}
    with pytest.raises(SystemExit) as done:
        configure(namespace, ["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "What it does." in out and "--size=3  how many" in out
    with pytest.raises(SystemExit) as failed:
        configure(namespace, ["--sise=4"])
    assert failed.value.code == 2
    assert capsys.readouterr().err == ("script.py: --sise: no such setting: did you mean size?\n")


def test_only_a_typed_flag_is_refused(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("batch_size = 6\n", encoding="utf-8")
    namespace = {**DEFAULTS, "__file__": __file__}
    configure(namespace, [str(config), "--learning-rate=1", "--wandb_log"])
    refuse("here", "batch_size", "compile")
    for name in ("learning_rate", "wandb_log"):
        with pytest.raises(ConfigError, match=f"--{name} has no effect with --task=val; leave"):
            refuse("with --task=val", "compile", name)
    configure(namespace, [])
    refuse("here", "learning_rate")


def test_a_folder_is_no_config_file(tmp_path, monkeypatch):
    """What is in it is named; one that ends in .py, too, and one beside the script."""
    monkeypatch.chdir(tmp_path)
    for name in ("config", "mine.py"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").touch()
        with pytest.raises(ConfigError, match=f"'{name}' is a folder; .*: {name}.a.py$"):
            overrides([name], DEFAULTS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a folder"):
        overrides(["config"], DEFAULTS, tmp_path)


def test_a_config_file_in_the_home_folder(tmp_path, monkeypatch):
    """A shell does not expand what stands in quotes."""
    write(tmp_path, "batch_size = 2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert overrides(["~/some.py"], DEFAULTS) == {"batch_size": 2}


@pytest.mark.parametrize(
    "flags",
    [
        ["--wandb_log=True"],
        ["--wandb_log"],
        ["--wandb-log", "yes"],
        ["--wandb_log=0", "--wandb_log"],
    ],
)
def test_a_command_line_without_a_flag(flags):
    """However it is spelt."""
    others = ["a.py", "--batch_size", "8", "--compile=True"]
    assert without([*others[:1], *flags, *others[1:]], DEFAULTS, "wandb_log") == others
    assert without([*others, *flags], DEFAULTS, "seed") == [*others, *flags]


def test_what_was_typed_is_known():
    configure({**DEFAULTS, "__file__": __file__}, ["--batch-size", "8", "--wandb_log"])
    assert typed() == {"batch_size", "wandb_log"}
    configure({**DEFAULTS, "__file__": __file__}, [])
    assert not typed()

"""One line for every mistake made with the commands of models/ and bench/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_cases import MODULES, ROOT, tiny_arguments, train_each

from models.commands import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    return train_each(tmp_path_factory)


def complaint(command: str, arguments: list[str], capsys) -> str:
    """The one line that a mistake is answered with, and nothing else."""
    module = MODULES[command]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(getattr(module, command), module.parse(arguments))
    assert exit.value.code == 2
    streams = capsys.readouterr()
    lines = streams.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert command in ("train", "evaluate") or not streams.out
    return lines[0]


@pytest.mark.parametrize("command, arguments, message", [
    ("generate", ["{missing}", "x"], "is not a folder that `python -m models.train` wrote: No such file"),
    ("generate", ["{bert}", "x"], "holds a bert model; this command needs a gpt model"),
    ("generate", ["{gpt}", ""], "text is empty"),
    ("generate", ["{gpt}", "word " * 200], "tokens; the model has room for 96, new ones included"),
    ("generate", ["{gpt}", "x", "--tokens", "97"], "97 tokens; the model has positions for 96"),
    ("generate", ["{gpt}", "x", "--backend", "cuda"], "backend 'cuda' cannot run here"),
    ("generate", ["{gpt}", "x", "--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
    ("generate", ["{gpt}", "x", "--device", "tpu"], "argument --device: must be cpu, cuda or cuda:N, got 'tpu'"),
    ("generate", ["{gpt}", "x", "--device", "cuda:9"], "argument --device: cuda:9 is not here"),
    ("generate", ["{gpt}", "x", "--top-p", "0"], "argument --top-p: must be a number above 0 and at most 1, got '0'"),
    ("generate", ["{gpt}", "x", "--temperature", "nan"], "argument --temperature: must be a number at least 0"),
    ("generate", ["{gpt}", "x", "--tokens", "0"], "argument --tokens: must be at least 1, got 0"),
    ("generate", ["{gpt}", "\udcff"], "is not UTF-8 text"),
    ("generate", ["{gpt}"], "the following arguments are required: text"),
    ("translate", ["{translation}", " "], "there is nothing to translate"),
    ("translate", ["{translation}", "x", "--beams", "0"], "argument --beams: must be at least 1"),
    ("translate", ["{translation}", "x", "--beams", "1001"], "argument --beams: must be at least 1 and at most 1000"),
    ("classify", ["{gpt}", "x"], "holds a gpt model; this command needs a classifier model"),
    ("evaluate", ["{missing}"], "is not a folder"),
    ("evaluate", ["{classifier}", "--data", "{gpt}/data.txt"], "must have the columns text and sentiment"),
])  # fmt: skip
def test_mistakes_get_one_line(command, arguments, message, trained, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    names = {**trained, "missing": tmp_path / "nothing"}
    assert message in complaint(command, [argument.format(**names) for argument in arguments], capsys)


@pytest.mark.parametrize("options, message", [
    ("--steps 0", "argument --steps: must be at least 1, got 0"),
    ("--dim wide", "argument --dim: must be a whole number, got 'wide'"),
    ("--heads 5", "dim 32 must be a multiple of num_heads 5"),
    ("--heads 0", "argument --heads: must be at least 1"),
    ("--layers -1", "argument --layers: must be at least 1"),
    ("--context 0", "argument --context: must be at least 5"),
    ("--context 100000", "a context of 100000 needs more"),
    ("--batch-size 0", "argument --batch-size: must be at least 1"),
    ("--vocab-size 10", "argument --vocab-size: must be at least 261"),
    ("--vocab-size 1000001", "argument --vocab-size: must be at least 261 and at most 1000000, got 1000001"),
    ("--dim 4611686018427387904", "this needs more memory than there is, choose smaller sizes"),
    ("--tune last:²", "tune must be 'all', 'last:N', 'feed_forward' or 'prompt', got 'last:²'"),
    ("--dropout 2", "argument --dropout: must be a number at least 0 and at most 1, got '2'"),
    ("--learning-rate nan", "argument --learning-rate: must be a number above 0"),
    ("--learning-rate 1e30", "the loss of step 2 is nan; try a smaller learning_rate"),
    ("--learning-rate 1e40", "an option is too large a number: value cannot be converted to type float"),
    ("--prompt-tokens 100", "at most 72 prompt tokens, not 100: choose fewer --prompt-tokens"),
    ("--clip-norm 0", "argument --clip-norm: must be a number above 0"),
    ("--accumulation 0", "argument --accumulation: must be at least 1"),
    ("--seed -1", "argument --seed: must be at least 0, got -1"),
    ("--seed 99999999999999999999", "argument --seed: must be at least 0 and at most 9223372036854775807, got 9999"),
    ("--precision int4", "argument --precision: invalid choice: 'int4'"),
    ("--tune last:9", "tune 'last:9': Gpt has 2 layers; 'all' trains all of it"),
    ("--tune lora", "tune must be 'all', 'last:N', 'feed_forward' or 'prompt', got 'lora'"),
    ("--kv-heads 0", "argument --kv-heads: must be at least 1"),
    ("--share-layers 3", "num_layers 2 must be a multiple of share_layers 3"),
    ("--llama --dim 6", "head_dim must be even, got 3"),
    ("--bogus", "unrecognized arguments: --bogus"),
    ("--data /nowhere.txt", "/nowhere.txt cannot be read: No such file or directory"),
    ("--data {folder}", "cannot be read: Is a directory"),
    ("--out {folder}/data.txt", "File exists"),
    ("--start {folder}", "is not a folder that `python -m models.train` wrote"),
])  # fmt: skip
def test_training_is_refused_in_one_line(options, message, tmp_path, capsys):
    more = [word.format(folder=tmp_path) for word in options.split()]
    assert message in complaint("train", tiny_arguments("gpt", tmp_path, *more), capsys)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("command, options, message", [
    ("gpt", "--start {classifier}", "holds a classifier model; this command needs a gpt model"),
    ("gpt", "--start {gpt} --dim 64", "holds a model of another form: it differs in dim (32, not 64)"),
    ("gpt", "--start {gpt} --heads 4", "holds a model of another form: it differs in num_heads (2, not 4)"),
    ("gpt", "--start {gpt} --layers 4 --share-layers 2", "it differs in num_layers (2, not 4)"),
    ("gpt", "--start {gpt} --context 20", "holds a model of another form: it differs in position.weight"),
    ("gpt", "--start {gpt} --vocab-size 300", "has another tokenizer"),
    ("gpt", "--teacher {gpt} --context 200", "has 96 positions: choose a --context below"),
    ("bert", "--heads 5", "hidden_size 32 must be a multiple of num_attention_heads 5"),
    ("classifier", "--start {bert} --context 100", "positions for 24 tokens; --context and prompts need 100"),
    ("classifier", "--teacher {classifier} --context 100", "positions for 24 tokens; --context and prompts need 100"),
])  # fmt: skip
def test_models_that_do_not_fit_are_refused(command, options, message, trained, tmp_path, capsys):
    more = options.format(**trained).split()
    assert message in complaint("train", tiny_arguments(command, tmp_path, *more), capsys)


@pytest.mark.parametrize("name, message", [
    ("model.safetensors.partial", "model.safetensors cannot be written"), ("tokenizer.json", "tokenizer.json"),
])  # fmt: skip
def test_what_cannot_be_written_gets_one_line(name, message, tmp_path, capsys):
    """A folder is in the way of a file; a full disk is told the same way."""
    (tmp_path / name).mkdir()
    assert message in complaint("train", tiny_arguments("gpt", tmp_path, "--steps", "1"), capsys)


def test_a_teacher_of_other_classes_is_refused(trained, tmp_path, capsys):
    arguments = tiny_arguments("classifier", tmp_path, "--teacher", str(trained["classifier"]))
    (tmp_path / "data.txt").write_text("text,label\nx,a\ny,b\nz,c\n")
    assert "the data has the classes ['a', 'b', 'c']; the teacher knows ['0', '1']" in complaint(
        "train", arguments, capsys
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file, spoil, message", [
    ("model.safetensors", cut, "is damaged, or not in the safetensors format"),
    ("model.safetensors", lambda path: path.write_bytes(b""), "is damaged"),
    ("model.safetensors", lambda path: path.write_text("hello, this is no checkpoint"), "is damaged"),
    ("model.safetensors", make_folder, "is missing, or no file"),
    ("model.safetensors", Path.unlink, "is missing, or no file"),
    ("tokenizer.json", cut, "is not a tokenizer"),
    ("tokenizer.json", Path.unlink, "is not a tokenizer"),
    ("config.json", cut, "is not a folder that `python -m models.train` wrote"),
    ("config.json", lambda path: path.write_bytes(b"\xff\xfe"), "is not a folder that `python -m models.train` wrote"),
    ("config.json", lambda path: path.write_text(path.read_text().replace('"dim": 32', '"dim": "big"')),
     "does not describe a gpt model"),
    ("config.json", lambda path: path.write_text(path.read_text().replace('"dim": 32', '"dim": 64')),
     "is a checkpoint of another size"),
    ("config.json", lambda path: path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 3')),
     "is not a checkpoint of this Gpt"),
])  # fmt: skip
def test_spoilt_folders_get_one_line(file, spoil, message, trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained["gpt"], tmp_path / "copy"))
    spoil(folder / file)
    assert message in complaint("generate", [str(folder), "x"], capsys)


@pytest.mark.parametrize("kind, edit, message", [
    ("gpt", {"kind": "rnn"}, "it holds a 'rnn'"),
    ("gpt", {"config": []}, "is not as training left it"),
    ("gpt", {"context": -1}, "is not as training left it"),
    ("bert", {"objectives": None}, "is not as training left it"),
    ("gpt", {"num_heads": 0}, "does not describe a gpt model"),
    ("gpt", {"eps": -1}, "does not describe a gpt model: eps cannot be -1"),
    ("gpt", {"window": "wide"}, "window cannot be 'wide'"),
    ("translation", {"start_id": 10**30}, "stop_id below vocab_size"),
    ("translation", {"max_positions": 0}, "max_positions must be at least 1"),
])  # fmt: skip
def test_configurations_edited_by_hand_get_one_line(kind, edit, message, trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained[kind], tmp_path / "copy"))
    description = json.loads((folder / "config.json").read_text())
    (description if set(edit) <= set(description) else description["config"]).update(edit)
    (folder / "config.json").write_text(json.dumps(description))
    assert message in complaint("evaluate", [str(folder), "--data", str(folder / "data.txt")], capsys)


@pytest.mark.parametrize("options, message", [
    ("", "holds a model: go on with --resume, or choose another --out"),
    ("--resume --dim 64", "was trained otherwise (dim was 32): --resume needs the same options and data"),
    ("--resume --vocab-size 300", "was trained otherwise (vocab_size was"),
    ("--resume --tune last:1", "trained other parameters (--tune)"),
])  # fmt: skip
def test_a_folder_is_left_as_it_is_by_another_run(options, message, trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained["gpt"], tmp_path / "copy"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = tiny_arguments("gpt", folder, "--steps", "6", *options.split())
    assert message in complaint("train", arguments, capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("file, message", [
    ("training.safetensors", "is damaged"), ("model.safetensors", "is damaged"),
    ("log.csv", "is not a log that training wrote"),
])  # fmt: skip
def test_spoilt_checkpoints_are_not_resumed(file, message, trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained["gpt"], tmp_path / "copy"))
    cut(folder / file) if file.endswith("tensors") else (folder / file).write_text("step,loss\nx,y\n")
    assert message in complaint("train", tiny_arguments("gpt", folder, "--steps", "6", "--resume"), capsys)


def test_weights_alone_are_not_resumed(trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained["gpt"], tmp_path / "copy"))
    shutil.copy(folder / "model.safetensors", folder / "training.safetensors")
    message = complaint("train", tiny_arguments("gpt", folder, "--steps", "6", "--resume"), capsys)
    assert "is not what training left to go on from" in message


# The second is what Python makes standard input in the C locale.
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_not_utf8_gets_one_line(errors, trained, tmp_path, capsys, monkeypatch):
    lines = tmp_path / "lines.txt"
    lines.write_bytes(b"B\xe4r\n")
    monkeypatch.setattr("sys.stdin", lines.open(encoding="utf-8", errors=errors))
    assert "standard input is not UTF-8 text" in complaint("classify", [str(trained["classifier"])], capsys)


def run_without(packages: tuple[str, ...], command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``python -m …`` where ``packages`` are not installed, as Python sees it."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    (folder / "sitecustomize.py").write_text(hide)
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(folder)})  # fmt: skip


@pytest.mark.parametrize(
    "command, packages",
    [
        (["models.train", "--help"], ("rich", "safetensors", "tokenizers")),
        (["models.generate", "runs/gpt", "x"], ("tokenizers",)),
        (["models.translate", "runs/de", "x"], ("safetensors", "tokenizers")),
        (["models.classify", "runs/mood", "x"], ("tokenizers",)),
        (["models.evaluate", "runs/mood"], ("rich",)),
        (["bench"], ("rich", "typer")),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_missing_package_is_one_line(command, packages, tmp_path):
    outcome = run_without(packages, command, tmp_path)
    expected = f"error: this command needs what is not installed here: pip install {' '.join(packages)}\n"
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (2, "", expected)


@pytest.mark.parametrize("group", ["attention", "layer_norm", "int8_matmul", "models"])
@pytest.mark.parametrize("by_path", [False, True], ids=["module", "path"])
def test_a_bench_file_is_a_command_too(by_path, group, tmp_path):
    """It imported its cases, and ended without a word; by its path it did not find fastattn."""
    name = [str(ROOT / "bench" / f"bench_{group}.py")] if by_path else ["-m", f"bench.bench_{group}"]
    command = [sys.executable, *name, "--backend", "eager", "--match", "no such row", "--out", str(tmp_path / "out")]
    where = tmp_path if by_path else ROOT
    outcome = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=200)
    assert (outcome.returncode, outcome.stdout) == (2, "no case fits these options\n"), outcome.stderr


def test_training_needs_no_matplotlib(tmp_path):
    folder = tmp_path / "hidden"
    folder.mkdir()
    outcome = run_without(("matplotlib",), ["models.train", *tiny_arguments("gpt", tmp_path)], folder)
    assert outcome.returncode == 0, outcome.stderr
    assert "without loss.png: matplotlib is not installed" in " ".join(outcome.stdout.split())
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "loss.png").exists()

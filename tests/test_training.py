"""Training of the models: what is learned, a resumed run as the same run, real data, the commands and their errors."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import pytest
import torch
from devices import device_for

import fastattn
from models import data, measures
from models.bert import BertConfig, BertEncoder
from models.bert_heads import (
    IGNORED,
    BertClassifier,
    BertForPreTraining,
    classification_scores,
    mask_words,
    pretraining_loss,
    replace_words,
)
from models.checkpoints import load_weights, save_checkpoint
from models.distillation import distillation_loss
from models.gpt import Gpt, GptConfig, causal_lm_loss
from models.layers import set_backend
from models.training import Processes, TrainingConfig, choose_parameters, train
from models.transformer import Transformer, TransformerConfig, translation_loss

ROOT = Path(__file__).parent.parent
KERNELS = [name for name in ("cpu", "cuda", "triton") if fastattn.available_backends()[name] is None]
TINY = GptConfig(vocab_size=40, max_positions=24, dim=32, num_layers=2, num_heads=2, hidden_dim=64, dropout=0.1)
TEXT = "\n\n".join(f"Paragraph {i} counts: " + " ".join(str(i + j) for j in range(12)) for i in range(60))


def periodic(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sequences that count upwards modulo 40: easy to learn."""
    start = torch.randint(40, (8, 1), generator=generator)
    return {"input_ids": (start + torch.arange(17)) % 40}


def lm_loss(model, batch):
    return causal_lm_loss(model, batch["input_ids"])


def fresh(backend: str = "auto", config: GptConfig = TINY) -> Gpt:
    torch.manual_seed(0)
    return set_backend(Gpt(config), backend)


def where(backend: str) -> Processes:
    """One process, on the device of ``backend``."""
    return Processes(device=torch.device(device_for(backend)))


# --- The loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_train_as_eager_does(backend):
    """Dropout included: it drops the same elements. Float rounding grows with the steps, slowly at this rate."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    # Triton's interpreter takes a second a step, of two sequences.
    config = TrainingConfig(steps=3 if interpreted else 80, learning_rate=3e-3, warmup_steps=10)

    def batch(generator):
        return {"input_ids": periodic(generator)["input_ids"][: 2 if interpreted else 8]}

    losses = {}
    for name in (backend, "eager"):
        rows = train(fresh(name), lm_loss, batch, config, processes=where(backend))
        losses[name] = torch.tensor([row["loss"] for row in rows])
    torch.testing.assert_close(losses[backend][:20], losses["eager"][:20], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(losses[backend], losses["eager"], atol=2e-2, rtol=2e-2)
    assert losses[backend][0] > 3.5 and (interpreted or losses[backend][-5:].mean() < 1.1)


def tiny_models() -> dict[str, tuple]:
    """A model of each kind, its loss, and a batch."""
    torch.manual_seed(0)
    counting = (torch.arange(4)[:, None] + torch.arange(13)) % 40
    gpt = Gpt(GptConfig(**{**vars(TINY), "num_layers": 1}))
    translator = Transformer(TransformerConfig(
        vocab_size=40, max_positions=16, dim=32, num_encoder_layers=1, num_decoder_layers=1, num_heads=2,
        hidden_dim=64,
    ))  # fmt: skip
    bert = BertForPreTraining(BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
    hidden, labels = mask_words(counting, torch.Generator().manual_seed(0), 40, data.MASK, 5, share=0.5)
    hidden[1, 9:], labels[1, 9:] = data.PAD, IGNORED
    return {
        "gpt": (gpt, lm_loss, {"input_ids": counting}),
        "translation": (
            translator,
            lambda model, batch: translation_loss(model, batch["source"], batch["target"], data.PAD),
            {"source": hidden, "target": counting},
        ),
        "bert": (bert, pretraining_loss, {"input_ids": hidden, "word_labels": labels}),
    }


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind, learned", [("translation", 1.6), ("bert", 1.0)])
def test_each_model_trains_as_eager_does(kind, learned, backend):
    """In float32, step by step, until one batch is known by heart; label smoothing keeps the translator's loss up."""
    interpreted = backend == "triton" and not torch.cuda.is_available()
    config = TrainingConfig(steps=2 if interpreted else 60, learning_rate=3e-3, warmup_steps=2 if interpreted else 5)
    losses = {}
    for name in (backend, "eager"):
        model, loss, batch = tiny_models()[kind]
        if interpreted:
            batch = {field: ids[:2] for field, ids in batch.items()}
        rows = train(
            set_backend(model, name), loss, lambda generator, batch=batch: batch, config, processes=where(backend)
        )
        losses[name] = torch.tensor([row["loss"] for row in rows])
    torch.testing.assert_close(losses[backend][:20], losses["eager"][:20], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(losses[backend], losses["eager"], atol=2e-2, rtol=2e-2)
    assert losses[backend][-1] < (losses[backend][0] - 0.02 if interpreted else learned)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt", "translation", "bert"])
def test_cuda_kernels_train_as_eager_does(kind, precision):
    """The 16-bit kernels under autocast, on the emulator where there is no GPU, step by step; GPT's dropout included.

    float32 training says how much of a difference rounding to 16 bits makes.
    """
    backend = "emulated" if fastattn.available_backends()["cuda"] else "cuda"
    reason = fastattn.available_backends()[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    losses = {}
    for name, wanted in ((backend, precision), ("eager", precision), ("eager", "float32")):
        model, loss, batch = tiny_models()[kind]
        config = TrainingConfig(steps=5, learning_rate=3e-3, warmup_steps=1, precision=wanted)
        rows = train(
            set_backend(model, name), loss, lambda generator, batch=batch: batch, config, processes=where(backend)
        )
        losses[name, wanted] = torch.tensor([row["loss"] for row in rows])
    rounding = (losses["eager", precision] - losses["eager", "float32"]).abs().max()
    difference = (losses[backend, precision] - losses["eager", precision]).abs().max()
    assert difference <= 3 * rounding + 1e-3
    assert losses[backend, precision][-1] < losses[backend, precision][0] - 0.2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_the_same_run_bit_for_bit(accumulation, tmp_path):
    def config(steps: int) -> TrainingConfig:
        return TrainingConfig(steps=steps, warmup_steps=2, accumulation=accumulation, save_every=3)

    class Stop(Exception):
        pass

    def interrupt(row):
        if row["step"] == 5:
            raise Stop

    whole = fresh()
    rows = train(whole, lm_loss, periodic, config(8))
    with pytest.raises(Stop):
        train(fresh(), lm_loss, periodic, config(8), folder=tmp_path, report=interrupt)
    resumed = fresh()
    resumed_rows = train(resumed, lm_loss, periodic, config(8), folder=tmp_path, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert resumed_rows == rows


def test_accumulation_is_a_larger_batch():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    x = torch.randn(16, 4)
    halves = itertools.cycle([{"x": x[:8]}, {"x": x[8:]}])

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    other = torch.nn.Linear(4, 1)
    other.load_state_dict(model.state_dict())
    config = {"steps": 3, "warmup_steps": 0}
    train(model, loss, lambda generator: next(halves), TrainingConfig(accumulation=2, **config))
    train(other, loss, lambda generator: {"x": x}, TrainingConfig(**config))
    torch.testing.assert_close(model.weight, other.weight)


def test_mixed_precision_learns():
    config = TrainingConfig(steps=60, learning_rate=3e-3, warmup_steps=10, precision="bfloat16")
    model = fresh()
    rows = train(model, lm_loss, periodic, config)
    assert rows[-1]["loss"] < 1.5
    assert model.embedding.weight.dtype == torch.float32


def test_the_rate_warms_up_and_decays():
    config = TrainingConfig(steps=110, learning_rate=1.0, warmup_steps=10, final_share=0.1)
    assert config.rate(0) == pytest.approx(0.1)
    assert config.rate(9) == pytest.approx(1.0)
    assert config.rate(60) == pytest.approx(0.55)
    assert config.rate(110) == pytest.approx(0.1)


@pytest.mark.parametrize("precision, step", [("float32", 1), ("bfloat16", 1), ("float16", 11)])
def test_a_loss_that_is_not_finite_stops_the_run(precision, step):
    """In float16 not at once: a step that overflows is left out."""
    config = TrainingConfig(steps=20, precision=precision)
    with pytest.raises(FloatingPointError, match=f"the loss of step {step} is nan"):
        train(fresh(), lambda model, batch: lm_loss(model, batch) * math.nan, periodic, config)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_that_are_lost_are_not_saved_as_a_model(precision, tmp_path):
    """The last step of all spoils them: no loss of training shows it."""

    def spoil() -> dict[str, float]:
        return {"validation_loss": math.nan}

    config = TrainingConfig(steps=1, precision=precision)
    with pytest.raises(FloatingPointError, match="the validation_loss of step 1 is nan"):
        train(fresh(), lm_loss, periodic, config, evaluate=spoil, folder=tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = fresh()
    save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), 1, torch.amp.GradScaler(enabled=False))
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="not a checkpoint of this Gpt"):
        load_weights(Gpt(GptConfig.llama(vocab_size=40, dim=32, num_layers=2, num_heads=2, hidden_dim=64)), path)
    with pytest.raises(ValueError, match="checkpoint of another size"):
        load_weights(Gpt(GptConfig(**{**vars(TINY), "dim": 64})), path)


@pytest.mark.parametrize("tune, trained", [
    ("all", lambda name: True),
    ("last:1", lambda name: name.startswith("blocks.1.")),
    ("feed_forward", lambda name: ".feed_forward." in name),
    ("prompt", lambda name: name == "prompt"),
])  # fmt: skip
def test_tuning_changes_only_what_it_should(tune, trained):
    model = fresh(config=GptConfig(**{**vars(TINY), "prompt_tokens": 2}))
    torch.nn.init.normal_(model.prompt, std=0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    count = choose_parameters(model, tune)
    train(model, lm_loss, periodic, TrainingConfig(steps=2, warmup_steps=0))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {name for name in before if trained(name)}
    assert changed == expected
    assert count == sum(before[name].numel() for name in expected)


def test_unknown_tuning_is_refused():
    with pytest.raises(ValueError, match="tune must be"):
        choose_parameters(fresh(), "lora")
    with pytest.raises(ValueError, match="Gpt has no such parameters; --prompt-tokens gives it some"):
        choose_parameters(fresh(), "prompt")


# --- Objectives ------------------------------------------------------------------------------------------------------


def test_masked_words_are_fifteen_percent_and_mostly_hidden():
    ids = torch.randint(0, 100, (200, 100))
    hidden, labels = mask_words(ids, torch.Generator().manual_seed(0), 100, data.MASK, 5)
    asked = labels != IGNORED
    assert torch.equal(labels[asked], ids[asked])
    assert not asked[ids < 5].any()
    assert asked[ids >= 5].double().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (hidden[asked] == data.MASK).double().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (hidden[asked] == ids[asked]).double().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(hidden[~asked], ids[~asked])


def test_replaced_words_are_labelled():
    ids = torch.randint(0, 100, (50, 40))
    replaced, labels = replace_words(ids, torch.Generator().manual_seed(0), 5)
    words = ids >= 5
    assert torch.equal(labels[words], (replaced != ids)[words].long())
    assert (labels[~words] == IGNORED).all() and torch.equal(replaced[~words], ids[~words])
    assert 0.1 < labels[words].double().mean().item() < 0.16


@pytest.mark.parametrize("objective", ["masked", "next", "replaced"])
def test_each_objective_is_learned(objective):
    torch.manual_seed(0)
    paragraphs = TEXT.split("\n\n")
    tokenizer = data.train_tokenizer(paragraphs, 320, framed=True)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    examples = measures.pretraining_data(tokenizer, paragraphs, 32, 16)
    fixed = measures.corrupted(
        examples(torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2), objectives=[objective],
        vocab_size=config.vocab_size,
    )  # fmt: skip
    model = set_backend(BertForPreTraining(config))
    loop = TrainingConfig(steps=140, learning_rate=3e-3, warmup_steps=5, weight_decay=0.0)
    rows = train(model, pretraining_loss, lambda generator: fixed, loop)
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]


def test_held_out_loss_is_a_mean_over_all_tokens():
    batches = [{"values": torch.tensor(values)} for values in ([1.0, 2.0, 3.0], [6.0], *[[10.0]] * 60)]
    measured = measures.mean_losses(
        torch.nn.Linear(1, 1),
        lambda _, b: [(b["values"].mean(), b["values"].numel()), (b["values"].sum() * 0, 0)],
        batches,
    )
    assert measured == pytest.approx([612.0 / 64, 0.0])


def test_all_held_out_pairs_are_measured():
    """More than there were room for: of 60 batches, and of 100 pairs."""
    tokenizer = data.train_tokenizer(["one two three"], 300, framed=True)
    pairs = [("one", "two")] * 110 + [("one two three", "three two one")] * 10
    validation = measures.translation_data(tokenizer, pairs, 16, batch_size=2)
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=tokenizer.get_vocab_size(), max_positions=16, dim=16, num_encoder_layers=1, num_decoder_layers=1,
        num_heads=2, hidden_dim=16,
    )  # fmt: skip
    model = Transformer(config).eval()
    values = measures.translation_measure(validation, tokenizer)(model)
    rows = validation.rows(range(len(validation)))
    expected = translation_loss(model, rows["source"], rows["target"], data.PAD, 0.0).item()
    assert values["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", ["masked", "next", "replaced"])
def test_a_batch_that_asks_nothing_trains_nothing(objective):
    """Not NaN: of the few words of a small batch, none may be hidden."""
    model = tiny_models()["bert"][0]
    model.train_for([objective])
    ids = torch.tensor([[5, 6, 7]])
    nothing = {"masked": ("word_labels", (1, 3)), "next": ("sentence_labels", (1,)),
               "replaced": ("replaced_labels", (1, 3))}  # fmt: skip
    name, shape = nothing[objective]
    labels = torch.zeros(shape, dtype=torch.long) if objective == "next" else torch.full(shape, IGNORED)
    loss = pretraining_loss(model, {"input_ids": ids, name: labels})
    loss.backward()
    assert loss.isfinite() and (objective == "next" or loss == 0)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in model.named_parameters() if parameter.grad is None}


def test_distillation_follows_the_teacher():
    teacher, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([2])
    student = torch.zeros(1, 3, requires_grad=True)
    only_teacher = torch.autograd.grad(distillation_loss(student, teacher, labels, alpha=1.0), student)[0]
    assert only_teacher[0, 0] < 0 < only_teacher[0, 2]
    only_label = torch.autograd.grad(distillation_loss(student, teacher, labels, alpha=0.0), student)[0]
    torch.testing.assert_close(only_label, torch.tensor([[1 / 3, 1 / 3, -2 / 3]]))
    assert distillation_loss(teacher, teacher, torch.tensor([0]), alpha=1.0).item() == pytest.approx(0.0, abs=1e-6)
    ignored = distillation_loss(torch.cat([student, student]), teacher.repeat(2, 1), torch.tensor([2, IGNORED]))
    torch.testing.assert_close(ignored, distillation_loss(student, teacher, labels))


def test_bleu_is_the_papers():
    """Its section 2.1: clipped counts; its brevity penalty; 100 for the reference itself."""
    reference = "The cat is on the mat, and it sleeps."
    assert measures.bleu([reference], [reference]) == pytest.approx(100.0)
    # 2 of 7, clipped; no bigram.
    assert measures.bleu(["the the the the the the the"], ["the cat is on the mat"], longest=1) == pytest.approx(
        100 * 2 / 7
    )
    assert measures.bleu(["the the the"], ["the cat is"]) == 0.0
    half = measures.bleu(["a b c d"], ["a b c d e f g h"])
    assert half == pytest.approx(100 * math.exp(1 - 8 / 4))
    # Precisions 3/4, 2/3, 1/2, of the corpus, not the mean of sentences.
    assert measures.bleu(["a b c x"], ["a b c d"], longest=3) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3))


def test_classification_scores():
    scores = classification_scores([0, 0, 1, 2], [0, 1, 1, 1], 3)
    assert scores["accuracy"] == 0.5
    assert scores["precision"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert scores["recall"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert scores["f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)


def test_a_prompt_stands_in_front_of_a_classified_text():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertClassifier(BertEncoder(config), 3, prompt_tokens=4).eval()
    ids = torch.tensor([[7, 8, 9, 0, 0], [7, 8, 9, 10, 11]])
    padded, alone = model(ids)[0], model(ids[:1, :3])[0]
    torch.testing.assert_close(padded, alone)
    with torch.no_grad():
        model.prompt.normal_()
    assert not torch.allclose(model(ids)[0], padded)


# --- Data ------------------------------------------------------------------------------------------------------------


def test_real_text_is_there():
    assert sum(map(len, data.load_text(None))) > 300_000
    pairs = data.load_pairs(None)
    assert len(pairs) > 500 and ("Please enter a valid email address or phone number." not in dict(pairs))
    french = dict(data.load_pairs(None, "fr"))
    assert len(french) > 500 and french["Add"] == "Ajouter" and french["Delete"] == "Supprimer"
    with pytest.raises(data.DataError, match="Django has no messages in 'xx'"):
        data.load_pairs(None, "xx")
    texts, labels, classes = data.load_labelled(None)
    assert len(texts) == len(labels) > 38_000 and classes == ["negative", "neutral", "positive"]


def test_the_users_own_files_are_read(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    assert len(data.load_text(tmp_path / "text.txt")) == 60
    (tmp_path / "pairs.tsv").write_text("one\teins\ntwo\tzwei\n")
    assert data.load_pairs(tmp_path / "pairs.tsv") == [("one", "eins"), ("two", "zwei")]
    (tmp_path / "labels.csv").write_text('text,label\n"good, really",pos\nbad,neg\n')
    assert data.load_labelled(tmp_path / "labels.csv") == (["good, really", "bad"], [1, 0], ["neg", "pos"])
    for name, text in (("pos", "fine"), ("neg", "dull")):
        (tmp_path / "aclImdb" / "train" / name).mkdir(parents=True)
        (tmp_path / "aclImdb" / "train" / name / "0_1.txt").write_text(text)
    assert data.load_labelled(tmp_path / "aclImdb") == (["dull", "fine"], [0, 1], ["neg", "pos"])


def test_a_text_of_a_table_may_be_long(tmp_path):
    before, text = csv.field_size_limit(), "long " * 40_000
    (tmp_path / "table.csv").write_text(f"text,label\n{text},good\nshort,bad\n")
    assert data.load_labelled(tmp_path / "table.csv") == ([text, "short"], [1, 0], ["bad", "good"])
    assert csv.field_size_limit() == before


def test_files_may_begin_with_a_mark_and_have_no_empty_lines(tmp_path):
    path = tmp_path / "file"
    path.write_bytes("\ufefftext,label\nx,1\ny,0\n".encode())
    assert data.load_labelled(path)[0] == ["x", "y"]
    path.write_bytes("\ufeffone\teins\r\ntwo\tzwei\r\n".encode())
    assert data.load_pairs(path) == [("one", "eins"), ("two", "zwei")]
    lines = [f"line {i}" for i in range(250)]
    path.write_text("\n".join(lines))
    parts = data.load_text(path)
    assert len(parts) == 84 and "\n".join(parts).split("\n") == lines


@pytest.mark.parametrize("load, content, message", [
    (data.load_pairs, b"one\teins\nalone\n", "2: expected source<tab>target, found 1 fields"),
    (data.load_text, b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
    (data.load_text, b"one line", "has 1 lines of text"),
    (data.load_text, b"", "has 0 lines of text"),
    (data.load_pairs, b"", "has 0 pairs"),
    (data.load_pairs, b"one\teins\n", "has 1 pairs"),
    (data.load_pairs, b"one\teins\n\n \tzwei\n", ":3: expected source<tab>target, found an empty field"),
    (data.load_labelled, b"", "must have the columns text and sentiment"),
    (data.load_labelled, b"text,label\n", r"must have the columns text and sentiment \(or label\), and rows"),
    (data.load_labelled, b"text,label\nB\xe4r,1\n", "cannot be read as UTF-8 text"),
    (data.load_labelled, b"text,label\nx,1\ny\n", ":3: expected 2 columns"),
    (data.load_labelled, b"a,b\n1,2\n", "must have the columns text and sentiment"),
    (data.load_labelled, b"text,label\nx,y\n", "has 1 classes"),
])  # fmt: skip
def test_bad_files_are_named(load, content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        load(path)


def test_split_holds_out_every_tenth():
    training, held_out = data.split(list(range(25)))
    assert held_out == [0, 10, 20] and sorted(training + held_out) == list(range(25))

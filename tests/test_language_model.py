"""The language model: its loss against the plain form, its memory, its draws, and its training."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastseq
from fastseq.models import (
    LanguageModel,
    LanguageModelTrainer,
    TrainingSettings,
    Vocabulary,
    cross_entropy,
    evaluate,
    linear_cross_entropy,
    load_language_model,
    sample,
)
from fastseq.models.training import streams
from fastseq.testing import compare_tensor

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(params=["torch", "blocks"])
def chunked(request, monkeypatch):
    """Few logits at a time, by torch's own operation where it has it, and by the blocks that stand in elsewhere."""
    if request.param == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy: the other parameter tests what serves")
    if request.param == "blocks":
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
def test_cross_entropy_is_the_plain_form(chunked, reduction, dtype, biased, monkeypatch, seed):
    monkeypatch.setattr(cross_entropy, "LOGITS", 7 * 11)  # 7 rows at a time
    inputs = [2 * torch.rand(shape, dtype=torch.float64) - 1 for shape in ((40, 5), (11, 5), (11,))]
    target = torch.randint(11, (40,))
    target[[3, 39]] = cross_entropy.IGNORED

    def run(function, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in inputs]
        value = function(*leaves)
        used = leaves if biased else leaves[:2]
        return [value.detach(), *torch.autograd.grad(value, used)]

    def ours(x, w, b):
        return linear_cross_entropy(x, w, target, b if biased else None, reduction=reduction)

    def plain(x, w, b):
        return F.cross_entropy(F.linear(x, w, b if biased else None), target, reduction=reduction)

    got, ref, truth = run(ours, dtype), run(plain, dtype), run(plain, torch.float64)
    for name, *three in zip(("loss", "input", "weight", "bias"), got, ref, truth, strict=False):
        result = compare_tensor(name, *three)
        assert result.ok, str(result)


def test_cross_entropy_under_autocast(chunked, monkeypatch, seed):
    monkeypatch.setattr(cross_entropy, "LOGITS", 7 * 11)
    model, tokens = LanguageModel(11, 8, 8), torch.randint(11, (20, 3))
    exact = torch.autograd.grad(model.loss(tokens), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        value = model.loss(tokens)
    for got, want in zip(torch.autograd.grad(value, list(model.parameters())), exact, strict=True):
        assert (got - want).norm() < 0.05 * want.norm()


MEMORY = """
import sys, torch
import torch.nn.functional as F
from fastseq.models import LanguageModel
form = sys.argv[1]
if form == "blocks" and hasattr(F, "linear_cross_entropy"):
    del F.linear_cross_entropy
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
torch.manual_seed(0)
model = LanguageModel(20000, 16, 16)
model.loss(torch.randint(20000, (9, 40))).backward()  # what the first call alone needs
tokens = torch.randint(20000, (65, 32))
before = peak()
if form == "plain":
    logits, _ = model(tokens[:-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten()).backward()
else:
    model.loss(tokens).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(chunked):
    """64 · 32 · 20000 logits are 156 MiB, and the plain form holds them at least twice."""

    def grown(form):
        done = subprocess.run([sys.executable, "-c", MEMORY, form], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert grown(chunked) < 60
    if chunked == "torch":
        assert grown("plain") > 300


@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu", "sigmoid"])
def test_loss_is_the_cross_entropy_of_the_logits(cell, seed):
    model = LanguageModel(13, 6, 6, 2, cell=cell, tie_weights=cell == "tanh")
    tokens = torch.randint(13, (9, 4))
    logits, state = model(tokens[:-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
    assert torch.allclose(model.loss(tokens), expected)
    value, carried = model.loss(tokens, reduction="sum", return_state=True)
    assert torch.allclose(value, expected * 32)
    pairs = zip(carried, state, strict=True) if cell == "lstm" else [(carried, state)]
    assert all(torch.equal(*pair) for pair in pairs)


def test_tied_weights_are_one_parameter():
    model = LanguageModel(13, 6, 6, tie_weights=True)
    assert model.output_weight is model.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "weight" not in names
    model.loss(torch.randint(13, (5, 2))).backward()
    assert model.embedding.weight.grad.abs().sum(dim=1).min() > 0  # every row: the output reads them all


def test_bfloat16(seed):
    model = LanguageModel(13, 8, 8)
    tokens = torch.randint(13, (20, 4))
    exact = model.loss(tokens).item()
    with torch.autocast("cpu", torch.bfloat16):
        value = model.loss(tokens)
    value.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert value.item() == pytest.approx(exact, abs=0.02)
    half = model.bfloat16()
    assert half.loss(tokens).item() == pytest.approx(exact, abs=0.02)
    assert half.generate(tokens[0], 3, seed=0).shape == (3,)


def test_dropout_is_off_in_evaluation(seed):
    model = LanguageModel(13, 8, 8, 2, dropout=0.5)
    tokens = torch.randint(13, (6, 3))
    assert model.loss(tokens).item() != model.loss(tokens).item()
    model.eval()
    assert model.loss(tokens).item() == model.loss(tokens).item()


def test_generation_streams_and_repeats(seed):
    model = LanguageModel(13, 8, 8, 2)
    prompt = torch.tensor([1, 2, 3])
    first = model.generate(prompt, 20, temperature=0.8, top_k=9, top_p=0.9, seed=5)
    torch.rand(1)
    assert torch.equal(first, model.generate(prompt, 20, temperature=0.8, top_k=9, top_p=0.9, seed=5))
    assert model.training
    # Each token is what the whole sequence before it says.
    greedy = model.generate(prompt, 10, temperature=0)
    whole = torch.cat([prompt, greedy])
    logits, _ = model(whole.unsqueeze(1))
    assert torch.equal(logits[2:-1, 0].argmax(dim=1), greedy)
    assert torch.equal(greedy, fastseq.to_torch(model).generate(prompt, 10, temperature=0))
    assert model.generate(prompt, 0).shape == (0,)
    assert model.generate(prompt.repeat(4, 1).t(), 5, seed=1).shape == (5, 4)


def test_sampling_follows_its_limits(seed):
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(2000, 4)
    assert set(sample(logits, top_k=2).tolist()) == {1, 3}
    p = logits[0].softmax(0)  # 0.032, 0.644, 0.087, 0.237
    assert set(sample(logits, top_p=0.8).tolist()) == {1, 3}
    assert set(sample(logits, top_p=0.6).tolist()) == {1}
    assert set(sample(logits, top_p=1e-9).tolist()) == {1}
    assert set(sample(logits, temperature=0).tolist()) == {1}
    counts = sample(logits.repeat(10, 1)).bincount(minlength=4) / 20000
    assert torch.allclose(counts, p, atol=4 * 0.5 / 20000**0.5)
    cold = sample(logits.repeat(10, 1), temperature=0.5).bincount(minlength=4) / 20000
    assert torch.allclose(cold, (logits[0] / 0.5).softmax(0), atol=4 * 0.5 / 20000**0.5)


def test_refusals():
    with pytest.raises(ValueError, match="tie_weights: expected embedding_dim = hidden_size, got 4 and 5"):
        LanguageModel(3, 4, 5, tie_weights=True)
    with pytest.raises(ValueError, match="cell: expected 'lstm', 'tanh'"):
        LanguageModel(3, 4, 5, cell="gru")
    with pytest.raises(ValueError, match="vocab_size"):
        LanguageModel(0, 4, 5)
    model = LanguageModel(3, 4, 5)
    with pytest.raises(fastseq.ShapeError, match=r"tokens: expected shape \[T, B\] with T at least 2, got \[1, 4\]"):
        model.loss(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="tokens: expected a Tensor of integers"):
        model(torch.zeros(2, 2))
    with pytest.raises(fastseq.ShapeError, match="targets"):
        model.loss(torch.zeros(3, 4, dtype=torch.int64), targets=torch.zeros(2, 4, dtype=torch.int64))
    prompt = torch.zeros(1, dtype=torch.int64)
    for name, bad in {"temperature": -1.0, "top_k": 0, "top_p": 0.0}.items():
        with pytest.raises(ValueError, match=name):
            model.generate(prompt, 1, **{name: bad})
    with pytest.raises(ValueError, match="length"):
        model.generate(prompt, -1)
    with pytest.raises(fastseq.ShapeError, match="prompt"):
        model.generate(prompt[:0], 1)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(torch.zeros(1, 2), torch.zeros(3, 2), prompt, reduction="none")


def test_vocabularies():
    characters = Vocabulary.of_characters("hëllo\n𝄞")
    assert "".join(characters.tokens) == "\nhloë𝄞"
    assert characters.decode(characters.encode("ollëh𝄞\n")) == "ollëh𝄞\n"
    with pytest.raises(ValueError, match=r"the character 'x' \(U\+0078\) at position 2 of the text is none of the 6"):
        characters.encode("hox")
    assert characters.encode("").tolist() == []
    words = Vocabulary.of_words("a b b\nb c c\n", size=4)
    assert words.tokens == ("<unk>", "<eos>", "b", "c")
    assert words.encode("b a\n\nc").tolist() == [2, 0, 1, 1, 3]
    assert words.decode(torch.tensor([2, 0, 1, 1, 3])) == "b <unk>\n\nc"
    for vocabulary in (characters, words):
        assert Vocabulary.of_state(vocabulary.state()) == vocabulary
    with pytest.raises(ValueError, match="size"):
        Vocabulary.of_words("a", 2)


@pytest.mark.parametrize(("count", "batch"), [(2, 1), (2, 8), (11, 3), (12, 4), (13, 4), (101, 100)])
def test_streams_hold_every_token_once(count, batch):
    tokens = torch.arange(count)
    inputs, targets = streams(tokens, batch)
    counted = targets >= 0
    assert sorted(targets[counted].tolist()) == list(range(1, count))
    assert torch.equal(targets[counted], inputs[counted] + 1)
    assert torch.equal(inputs[1:][counted[1:]], targets[:-1][counted[1:]])


def test_evaluation_is_the_mean_over_the_text(seed):
    vocabulary = Vocabulary.of_characters(TEXT)
    tokens = vocabulary.encode(TEXT[:301])
    model = LanguageModel(len(vocabulary), 8, 8, dropout=0.5)
    found = evaluate(model, tokens, vocabulary, batch=1, window=64)
    exact = model.eval().loss(tokens.unsqueeze(1)).item()
    assert found.nats == pytest.approx(exact, rel=1e-5)
    assert found.tokens == found.characters == 300
    assert found.perplexity == pytest.approx(math.exp(exact), rel=1e-5)
    assert found.bits_per_character == pytest.approx(exact / math.log(2), rel=1e-5)
    assert evaluate(model, tokens, vocabulary, batch=7).nats == pytest.approx(exact, rel=0.1)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluate(model, tokens[:1], vocabulary)


def make_trainer(folder=None, **changes):
    vocabulary = Vocabulary.of_characters(TEXT)
    tokens = vocabulary.encode(TEXT)
    torch.manual_seed(3)
    model = LanguageModel(len(vocabulary), 16, 16, 2, dropout=0.1)
    settings = TrainingSettings(**{"batch": 4, "window": 16, "epochs": 2, "learning_rate": 1e-2, "warmup": 5} | changes)
    return LanguageModelTrainer(
        model, vocabulary, tokens[:1500], tokens[1500:], settings, folder=folder, progress=False
    )


def test_training_learns_and_keeps_the_best(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path / "made", evaluate_every=20)
    history = trainer.run(on_step=seen.append)
    assert trainer.finished
    assert seen == list(range(trainer.steps))
    assert [record["step"] for record in history] == [20, 40, trainer.steps]
    assert history[-1]["bits_per_character"] < 0.9 * history[0]["bits_per_character"]
    model, vocabulary, facts = load_language_model(tmp_path / "made")
    best = min(history, key=lambda record: record["nats"])
    assert facts["evaluation"] == best
    assert evaluate(model, trainer.valid, vocabulary, batch=4).nats == pytest.approx(best["nats"], rel=1e-6)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["best.safetensors", "last.safetensors"]


def test_resuming_gives_the_same_bits(tmp_path):
    whole = make_trainer(evaluate_every=10)
    whole.run()
    part = make_trainer(tmp_path, evaluate_every=10)
    part.run(on_evaluation=lambda record: record["step"] == 30)
    torch.manual_seed(99)
    resumed = LanguageModelTrainer.resume(tmp_path, part.train, part.valid, progress=False)
    resumed.run()
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    nats = [[record["nats"] for record in trainer.history] for trainer in (whole, resumed)]
    assert nats[0] == nats[1]
    with pytest.raises(ValueError, match="not those that"):
        LanguageModelTrainer.resume(tmp_path, part.valid, part.train)


def test_training_stops_early_or_in_time():
    impatient = make_trainer(epochs=50, evaluate_every=5, patience=1, learning_rate=1e-9)
    impatient.model.eval()
    history = impatient.run(on_evaluation=lambda record: False)
    assert len(history) < 20
    late = make_trainer(epochs=1000)
    assert len(late.run(seconds=1e-3)) == 1


def test_a_gradient_that_is_not_finite_stops_it():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.run()


def test_learning_rates():
    settings = TrainingSettings(learning_rate=1.0, warmup=3)
    assert settings.rate(0, 100) == pytest.approx(0.25)
    assert settings.rate(50, 100) == pytest.approx(0.55)
    assert settings.rate(100, 100) == pytest.approx(0.1)
    assert TrainingSettings(learning_rate=1.0, warmup=0, schedule="constant").rate(70, 100) == 1.0
    for bad in ({"batch": 0}, {"clip": 0.0}, {"schedule": "linear"}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainingSettings(**bad)


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_language_model(tmp_path)
    fastseq.checkpoint.save(tmp_path / "best.safetensors", {"kind": "autoencoder"})
    with pytest.raises(ValueError, match="not of a language model"):
        load_language_model(tmp_path)
    state = {"kind": "language model", "config": LanguageModel(3, 4, 5).config, "model": {}, "facts": {}}
    fastseq.checkpoint.save(tmp_path / "best.safetensors", state)
    with pytest.raises(ValueError, match="not a whole checkpoint") as error:
        load_language_model(tmp_path)
    assert "\n" not in str(error.value)

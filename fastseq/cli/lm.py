"""``python -m fastseq lm train | generate | eval``: a language model of your own text."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastseq.cli import console
from fastseq.models.language_model import LanguageModel
from fastseq.models.saving import BEST, LAST, load_language_model
from fastseq.models.text import Vocabulary
from fastseq.models.training import SCHEDULES, LanguageModelTrainer, TrainingSettings, evaluate

HELD_OUT = 0.1  # share of the text, its end, that validates where no other text is given
SAMPLE = 200  # tokens shown after a training


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the command and its three own."""
    parser = commands.add_parser(
        "lm",
        help="train a language model on a text, let it write, judge it",
        description="Trains a recurrent language model on a text, character by character or word by word, lets it "
        "write, and tells how well it predicts another text. `lm train --help` and so on list the options.",
    )
    console.add_json_argument(parser)
    actions = parser.add_subparsers(dest="action", required=True, metavar="train | generate | eval")
    _add_train(actions)
    _add_generate(actions)
    _add_eval(actions)


def _add_train(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "train",
        help="train a model, or go on with a training",
        description="Trains a language model and writes it to DIR: best.safetensors, the best on held-out text, and "
        "last.safetensors, from which --resume goes on with the same bits. Both are replaced in one step, so that a "
        "kill leaves whole files.",
    )
    parser.add_argument("--out", dest="folder", type=Path, metavar="DIR", required=True, help="where the model goes")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to learn (default: the documentation inside Python)"
    )
    parser.add_argument(
        "--valid", type=Path, metavar="FILE", help="text to validate on (default: the end of --text, a tenth)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from DIR, with the settings and the texts that it began with"
    )
    parser.add_argument("--seconds", type=console.positive_float, help="stop after this time; --resume goes on")
    model = parser.add_argument_group("model")
    model.add_argument("--level", choices=("char", "word"), default="char", help="what a token is (%(default)s)")
    model.add_argument("--words", type=console.positive_int, metavar="N", help="keep the N most frequent words")
    model.add_argument("--cell", choices=("lstm", "tanh", "relu", "sigmoid"), default="lstm", help="(%(default)s)")
    model.add_argument("--hidden", type=console.positive_int, default=256, help="hidden size (%(default)s)")
    model.add_argument("--layers", type=console.positive_int, default=2, help="recurrent layers (%(default)s)")
    model.add_argument("--embedding", type=console.positive_int, help="width of a token's vector (64; hidden if tied)")
    model.add_argument("--tie", action="store_true", help="let the output use the embedding's weights")
    model.add_argument("--dropout", type=float, default=0.0, help="between layers, at input and output (%(default)s)")
    training = parser.add_argument_group("training")
    default = TrainingSettings()
    for name, what in (
        ("batch", "streams side by side"),
        ("window", "steps of truncated backpropagation through time"),
        ("epochs", "passes over the text"),
        ("evaluate-every", "steps between evaluations and checkpoints (an epoch)"),
        ("patience", "evaluations without a better one before it stops (never)"),
    ):
        value = getattr(default, name.replace("-", "_"))
        shown = "" if value is None else f" ({value})"
        training.add_argument(f"--{name}", type=console.positive_int, default=value, metavar="N", help=what + shown)
    training.add_argument(
        "--learning-rate", type=console.positive_float, default=default.learning_rate, help="of Adam (%(default)s)"
    )
    training.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help="(%(default)s)")
    training.add_argument("--warmup", type=int, default=default.warmup, metavar="N", help="steps (%(default)s)")
    training.add_argument(
        "--clip", type=console.positive_float, default=default.clip, help="norm of the gradient (%(default)s)"
    )
    training.add_argument("--bfloat16", action="store_true", help="compute under autocast to bfloat16")
    training.add_argument("--seed", type=int, default=default.seed, help="of weights and dropout (%(default)s)")
    _finish(parser, _train)


def _add_generate(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "generate", help="let a model write", description="Continues the prompt and prints both."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `lm train` wrote")
    parser.add_argument("--prompt", required=True, help="what the text begins with")
    parser.add_argument("--length", type=console.positive_int, default=500, help="tokens to write (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=console.positive_int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that reach probability P")
    parser.add_argument("--seed", type=int, help="makes the text repeatable")
    _finish(parser, _generate)


def _add_eval(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "eval", help="how well a model predicts a text", description="Prints perplexity and bits per character."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `lm train` wrote")
    parser.add_argument("--text", type=Path, metavar="FILE", required=True, help="UTF-8 text")
    parser.add_argument(
        "--batch",
        type=console.positive_int,
        default=32,
        metavar="N",
        help="streams that the text is cut into; 1 for none (%(default)s)",
    )
    _finish(parser, _eval)


def _finish(parser: argparse.ArgumentParser, run: Any) -> None:
    # SUPPRESS: the option of `lm` itself sets the default, and is not to be overwritten by this parser's.
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="write the results to FILE as JSON too"
    )
    parser.set_defaults(run=run)


def _read(path: Path, least: int = 2) -> str:
    try:
        # newline="": a line feed after a carriage return is what the file says.
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise console.CommandError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    except OSError as error:
        raise console.CommandError(f"cannot read {path}: {error.strerror or error}") from None
    if len(text) < least:
        raise console.CommandError(f"{path}: expected text of at least {least} characters, got {len(text)}")
    return text


def _encoded(vocabulary: Vocabulary, text: str, source: object) -> Tensor:
    try:
        tokens = vocabulary.encode(text)
    except ValueError as error:
        raise console.CommandError(f"{source}: {error}") from None
    return tokens


def _load(folder: Path) -> tuple[LanguageModel, Vocabulary, dict[str, Any]]:
    try:
        return load_language_model(folder)
    except (OSError, ValueError) as error:
        raise console.CommandError(str(error)) from None


def _texts(args: argparse.Namespace) -> tuple[str, str]:
    """What to train on and what to validate on."""
    text = console.default_text("lm train") if args.text is None else _read(args.text)
    if args.valid is not None:
        return text, _read(args.valid)
    cut = len(text) - int(len(text) * HELD_OUT)
    if cut < 2 or len(text) - cut < 2:
        raise console.CommandError(
            f"{args.text}: expected enough text to hold {HELD_OUT:.0%} out, got {len(text)} characters"
        )
    return text[:cut], text[cut:]


def _check_folder(folder: Path) -> None:
    """That ``folder`` can be made or written to, without making it."""
    if folder.exists() and not folder.is_dir():
        raise console.CommandError(f"cannot write {folder}: it is a file")
    place = folder if folder.exists() else folder.parent
    if not place.is_dir():
        raise console.CommandError(f"cannot write {folder}: there is no folder {place}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise console.CommandError(f"cannot write {folder}: Permission denied")


def _new_trainer(args: argparse.Namespace, text: str, held_out: str) -> LanguageModelTrainer:
    if args.words is not None and args.level != "word":
        raise console.CommandError("--words needs --level word")
    if (args.folder / LAST).exists():
        raise console.CommandError(f"{args.folder} holds a training already: add --resume, or name another folder")
    try:
        if args.level == "word":
            vocabulary = Vocabulary.of_words(text, args.words)
        else:
            # Of held-out text that is part of the same file too: a rare character there is no reason to stop.
            vocabulary = Vocabulary.of_characters(text if args.valid is not None else text + held_out)
        embedding = args.embedding or (args.hidden if args.tie else 64)
        settings = TrainingSettings(**{each.name: getattr(args, each.name) for each in fields(TrainingSettings)})
        torch.manual_seed(args.seed)
        options = {"cell": args.cell, "dropout": args.dropout, "tie_weights": args.tie}
        model = LanguageModel(len(vocabulary), embedding, args.hidden, args.layers, **options)
        train = _encoded(vocabulary, text, args.text)
        valid = _encoded(vocabulary, held_out, args.valid or args.text)
        return LanguageModelTrainer(model, vocabulary, train, valid, settings, folder=args.folder)
    except ValueError as error:
        raise console.CommandError(str(error)) from None


def _old_trainer(args: argparse.Namespace, text: str, held_out: str) -> LanguageModelTrainer:
    try:
        _, vocabulary, _ = load_language_model(args.folder / LAST)
        train = _encoded(vocabulary, text, args.text)
        valid = _encoded(vocabulary, held_out, args.valid or args.text)
        return LanguageModelTrainer.resume(args.folder, train, valid)
    except (OSError, ValueError) as error:
        raise console.CommandError(str(error)) from None


def _train(args: argparse.Namespace) -> int:
    _require_packages()
    text, held_out = _texts(args)
    _check_folder(args.folder)
    trainer = (_old_trainer if args.resume else _new_trainer)(args, text, held_out)
    model, vocabulary = trainer.model, trainer.vocabulary
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = {"char": "characters", "word": "words"}[vocabulary.level]
    print(
        f"{parameters:,} parameters; {len(trainer.train):,} {kind} to learn, {len(trainer.valid):,} held out, "
        f"{len(vocabulary):,} different; {trainer.steps:,} steps of "
        f"{trainer.settings.batch} × {trainer.settings.window}"
    )
    if trainer.finished:
        print("This training is at its end already.")
    try:
        trainer.run(seconds=args.seconds or float("inf"), on_evaluation=_show)
    except (FloatingPointError, OSError) as error:
        raise console.CommandError(str(error)) from None
    best = min(trainer.history, key=lambda record: record["nats"])
    print(f"Best: step {best['step']}, {_figures(best)}. The model is in {args.folder / BEST}")
    # From the first token of the held-out text, which no user has to type.
    sample = model.generate(trainer.valid[:1], SAMPLE, temperature=0.8, seed=trainer.settings.seed)
    print(vocabulary.decode(torch.cat([trainer.valid[:1], sample])))
    if args.json is not None:
        console.write_json(args.json, {"config": model.config, "best": best, "history": trainer.history})
    return 0


def _show(record: Mapping[str, Any]) -> None:
    from tqdm import tqdm

    tqdm.write(f"step {record['step']:>6}  {record['seconds']:7.1f} s  {_figures(record)}", file=sys.stdout)
    sys.stdout.flush()


def _figures(record: Mapping[str, Any]) -> str:
    return f"{record['bits_per_character']:.4f} bits per character, perplexity {record['perplexity']:.3f}"


def _generate(args: argparse.Namespace) -> int:
    _require_packages()
    model, vocabulary, _ = _load(args.folder)
    if not args.prompt:
        raise console.CommandError("--prompt: expected at least one character")
    prompt = _encoded(vocabulary, args.prompt, "--prompt")
    if len(prompt) == 0:
        raise console.CommandError("--prompt: expected at least one word")
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    try:
        written = model.generate(prompt, args.length, **options)
    except ValueError as error:
        raise console.CommandError(str(error)) from None
    text = vocabulary.decode(torch.cat([prompt, written]))
    print(text)
    if args.json is not None:
        console.write_json(args.json, {"prompt": args.prompt, "text": text})
    return 0


def _eval(args: argparse.Namespace) -> int:
    _require_packages()
    model, vocabulary, _ = _load(args.folder)
    tokens = _encoded(vocabulary, _read(args.text), args.text)
    try:
        found = evaluate(model, tokens, vocabulary, batch=args.batch)
    except ValueError as error:
        raise console.CommandError(f"{args.text}: {error}") from None
    print(f"{found.tokens:,} tokens: {_figures(found.summary())}")
    if args.json is not None:
        console.write_json(args.json, found.summary())
    return 0


def _require_packages() -> None:
    for name in ("safetensors", "tqdm"):
        console.require(name, "lm", extra="train")

"""How long a language model takes to reach a goal: fastseq against torch.nn, and against that under torch.compile.

    python -m benchmarks.language_model shakespeare --text input.txt
    python -m benchmarks.language_model words --text valid.txt --valid test.txt

All start from the same weights, see the same windows and draw the same dropout, and train in turns of some steps, so
that a machine that slows down does so for all. A turn ends with an evaluation, which counts as time too, and so does
compiling. One stops when it has reached the goal (bits per character), and all at the end of their epochs or of their
time.
"""

import argparse
import copy
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastseq
from fastseq.models import LanguageModel, LanguageModelTrainer, TrainingSettings, Vocabulary

TASKS: dict[str, dict[str, Any]] = {
    "shakespeare": {
        "level": "char",
        "target": 2.35,
        "model": {"embedding_dim": 64, "hidden_size": 256, "num_layers": 2},
        "settings": {"batch": 32, "window": 64, "epochs": 8, "learning_rate": 3e-3, "evaluate_every": 100},
    },
    "words": {
        "level": "word",
        "target": None,
        "model": {"embedding_dim": 256, "hidden_size": 256, "num_layers": 2, "dropout": 0.4, "tie_weights": True},
        "settings": {"batch": 20, "window": 35, "epochs": 8, "learning_rate": 2e-3, "evaluate_every": 155},
    },
}
RIVALS = ("fastseq", "nn.LSTM", "nn.LSTM, compiled")


def make_trainers(args: argparse.Namespace, task: Mapping[str, Any]) -> dict[str, LanguageModelTrainer]:
    """One trainer for each rival, from the same weights."""
    text = args.text.read_text(encoding="utf-8")
    if args.valid is None:
        cut = int(0.9 * len(text))
        learnt, held_out = text[:cut], text[cut:]
    else:
        learnt, held_out = text, args.valid.read_text(encoding="utf-8")
    of_characters = task["level"] == "char"
    vocabulary = Vocabulary.of_characters(text) if of_characters else Vocabulary.of_words(learnt)
    train, valid = vocabulary.encode(learnt), vocabulary.encode(held_out)
    changes = {name: getattr(args, name) for name in ("epochs", "evaluate_every") if getattr(args, name) is not None}
    settings = TrainingSettings(**task["settings"] | changes, bfloat16=args.bfloat16)
    torch.manual_seed(args.seed)
    model = LanguageModel(len(vocabulary), **task["model"])
    trainers = {}
    for name in args.rivals:
        mine = copy.deepcopy(model)
        if name != "fastseq":
            fastseq.to_torch(mine)
        trainers[name] = LanguageModelTrainer(mine, vocabulary, train, valid, settings, progress=False)
        if name == "nn.LSTM, compiled":
            mine.hidden = torch.compile(mine.hidden)  # type: ignore[method-assign]
    return trainers


def race(trainers: Mapping[str, LanguageModelTrainer], target: float, seconds: float, seed: int) -> None:
    """Trains all of them in turns, to the target or the end."""

    def over(trainer: LanguageModelTrainer) -> bool:
        history = trainer.history
        done = bool(history) and (history[-1]["bits_per_character"] <= target or history[-1]["seconds"] >= seconds)
        return done or trainer.finished

    turn = 0
    while not all(map(over, trainers.values())):
        for name in list(trainers)[:: 1 if turn % 2 == 0 else -1]:
            trainer = trainers[name]
            if over(trainer):
                continue
            torch.manual_seed(seed + turn)  # the same dropout for all
            trainer.run(on_evaluation=lambda record: True)
            last = trainer.history[-1]
            print(
                f"{name:>18}: step {last['step']:>6}, {last['seconds']:7.1f} s, "
                f"{last['bits_per_character']:.4f} bits per character, perplexity {last['perplexity']:.3f}",
                flush=True,
            )
        turn += 1


def results(trainers: Mapping[str, LanguageModelTrainer], target: float) -> dict[str, dict[str, Any]]:
    """Of each rival: what it has reached when, and its time over fastseq's for the same steps."""
    found = {}
    for name, trainer in trainers.items():
        reached = next((each for each in trainer.history if each["bits_per_character"] <= target), None)
        best = min(trainer.history, key=lambda record: record["nats"])
        found[name] = {
            "seconds_to_target": None if reached is None else reached["seconds"],
            "steps_to_target": None if reached is None else reached["step"],
            "best_bits_per_character": best["bits_per_character"],
            "best_perplexity": best["perplexity"],
            "steps": trainer.history[-1]["step"],
            "seconds_a_step": trainer.history[-1]["seconds"] / trainer.history[-1]["step"],
            "history": trainer.history,
        }
    return found


def report(found: Mapping[str, Mapping[str, Any]]) -> None:
    """The table."""
    print("| layers | seconds to the target | steps to it | best bits per character | perplexity | ms a step | ratio |")
    print("|---|---|---|---|---|---|---|")
    own = found.get("fastseq")
    for name, one in found.items():
        to_target = "–" if one["seconds_to_target"] is None else f"{one['seconds_to_target']:.1f}"
        ratio = "–" if own is None else f"{one['seconds_a_step'] / own['seconds_a_step']:.2f}"
        if own is not None and own["seconds_to_target"] and one["seconds_to_target"]:
            ratio = f"{one['seconds_to_target'] / own['seconds_to_target']:.2f}"
        print(
            f"| {name} | {to_target} | {one['steps_to_target'] or '–'} | {one['best_bits_per_character']:.4f} | "
            f"{one['best_perplexity']:.3f} | {1e3 * one['seconds_a_step']:.1f} | {ratio} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_model", description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to learn")
    parser.add_argument("--valid", type=Path, metavar="FILE", help="text to validate on (the last tenth of --text)")
    parser.add_argument("--target", type=float, help="bits per character to stop at (shakespeare: 2.35)")
    parser.add_argument("--seconds", type=float, default=900.0, help="for each (%(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over the text, which set the learning rates too")
    parser.add_argument("--evaluate-every", type=int, help="steps a turn")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="NAME", help=str(RIVALS))
    parser.add_argument("--bfloat16", action="store_true", help="all compute under autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    args = parser.parse_args()
    task = TASKS[args.task]
    target = args.target if args.target is not None else task["target"] or -math.inf
    trainers = make_trainers(args, task)
    race(trainers, target, args.seconds, args.seed)
    found = results(trainers, target)
    report(found)
    if args.json is not None:
        environment = {"info": fastseq.info(), "machine": platform.platform(), "threads": torch.get_num_threads()}
        chosen = asdict(trainers[args.rivals[0]].settings)
        goal = target if math.isfinite(target) else None
        shown = {"task": args.task, "target": goal, **chosen, **task["model"], "seed": args.seed}
        text = json.dumps({"environment": environment, "settings": shown, "results": found}, indent=2, default=str)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

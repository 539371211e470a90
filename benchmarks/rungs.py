"""Rungs of asha with and without cooldowns, over recorded learning curves of real trials.

    python benchmarks/rungs.py record             # half an hour on 2 cores: 24 settings with three schedules each
    python benchmarks/rungs.py                    # plays 10,000 sweeps on the curves of rungs.jsonl, in a minute

The text is the built-in experiment's, the model half as wide, the budget half as long; its space is the built-in one.
Each setting is trained with train.lr_scheduler_type cosine, linear and warmup_stable_decay, the last with a cooldown of
10 % at 1/9 and 1/3 of the budget, the rungs of the built-in sweep. docs/sweeps.md has what was found.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import trainings

CURVES = Path(__file__).with_suffix(".jsonl")
SCHEDULES = ("cosine", "linear", "warmup_stable_decay")
BATCH, BUDGET = 512, 368_640
RUNGS = (BUDGET // 9, BUDGET // 3)
COOLDOWN = 0.1
SETTINGS = (
    f"train.max_tokens={BUDGET}",
    f"train.eval_every_tokens={RUNGS[0]}",
    "model.config.n_embd=64",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["record", "play"], default="play")
    parser.add_argument("--settings", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    if args.what == "record":
        record(args)
    else:
        play(args)


# Playing

WAYS = {
    "asha, cosine": ("cosine", None),
    "asha, linear": ("linear", None),
    "asha, warmup_stable_decay": ("warmup_stable_decay", None),
    "asha with cooldowns": ("warmup_stable_decay", COOLDOWN),
}
ETA = 3.0
MOST, TRIALS = range(5, 13), 8
"""Trials of the sweeps that are played, and of the one whose tokens the others are compared at."""
SWEEPS = 50


def play(args: argparse.Namespace) -> None:
    """Print the regret of each way at equal tokens, over sweeps of settings drawn from the recorded ones."""
    curves: dict[tuple[str, int], dict[tuple[int, bool], float]] = {}
    for curve in read(args.curves):
        points = {(point["tokens"], point["cooled"]): point["perplexity"] for point in curve["points"]}
        curves[curve["schedule"], curve["setting"]] = points
    settings = sorted({setting for _, setting in curves if all((each, setting) in curves for each in SCHEDULES)})
    print(f"{len(settings)} settings; {args.resamples * SWEEPS:,} sweeps of {MOST[0]} to {MOST[-1]} trials of each way")
    for rung in RUNGS:
        agreement = [f"{name} {_agreement(curves, settings, rung, *way):.2f}" for name, way in WAYS.items()]
        print(f"rank correlation of scores at {rung:,} tokens with those at the end: {', '.join(agreement)}")
    random = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(args.resamples):  # of the settings, so that the intervals allow for which ones were recorded
        drawn_from = np.unique(random.choice(settings, len(settings)))
        draws = [random.permutation(drawn_from)[: MOST[-1]] for _ in range(SWEEPS)]
        limit = None
        for name, (schedule, cooldown) in WAYS.items():
            of_numbers = np.array([_of_number(curves, draws, schedule, cooldown, number) for number in MOST])
            tokens, own, whole = of_numbers.T
            limit = limit or tokens[MOST.index(TRIALS)]
            found[name].append((np.interp(limit, tokens, own), np.interp(limit, tokens, whole)))
    print(f"regret in % of perplexity at the tokens of {TRIALS} trials of the first way, to the best")
    print(f"{'':<28}{'of its schedule':<26}of all schedules")
    of_all = {name: np.array(values) for name, values in found.items()}
    for name, values in of_all.items():
        print(f"{name:<28}{interval(values[:, 0]):<26}{interval(values[:, 1])}")
    *others, (_, fair) = of_all.items()
    for name, values in others:
        print(f"with cooldowns beside {name}: {interval(fair[:, 1] - values[:, 1])}")


def _agreement(curves: dict, settings: list[int], rung: int, schedule: str, cooldown: float | None) -> float:
    """The rank correlation (Spearman) of the scores at a rung with those at the end."""
    ranks = [
        np.argsort(np.argsort([curves[schedule, each][tokens, cooled] for each in settings]))
        for tokens, cooled in ((rung, cooldown is not None), (BUDGET, False))
    ]
    return float(np.corrcoef(ranks)[0, 1])


def _of_number(
    curves: dict, draws: list[np.ndarray], schedule: str, cooldown: float | None, number: int
) -> tuple[float, float, float]:
    """The means over sweeps of so many trials: tokens, and regret to the best setting of the draw, of its schedule and
    of all schedules."""
    found = []
    for draw in draws:
        score, tokens = swept([curves[schedule, each] for each in draw[:number]], cooldown)
        best = min(curves[schedule, each][BUDGET, False] for each in draw)
        best_of_all = min(curves[each, setting][BUDGET, False] for each in SCHEDULES for setting in draw)
        found.append((tokens, 100 * math.log(score / best), 100 * math.log(score / best_of_all)))
    return tuple(np.mean(found, axis=0))


def swept(curves: list[dict[tuple[int, bool], float]], cooldown: float | None) -> tuple[float, int]:
    """The best score of a sweep of trials with these curves, one after another, and the tokens that it took."""
    from ray.tune.experiment import Trial

    from raylm.sweep.asha import Asha

    scheduler = Asha(list(RUNGS), ETA, "best_perplexity", cooldown=cooldown)
    trials = [SimpleNamespace(trial_id=str(number), status=Trial.PAUSED) for number in range(len(curves))]
    at, stopped = dict.fromkeys(range(len(curves)), 0), set()
    queue = SimpleNamespace(is_full=False, busy=0, has_more=True)
    controller = SimpleNamespace(
        search_alg=queue, get_trials=lambda: trials, stop_trial=lambda trial: stopped.add(trial.trial_id)
    )
    spent, best, number = 0, math.inf, -1
    waiting = list(range(len(curves)))
    while True:
        queue.has_more = bool(waiting)
        chosen = scheduler.choose_trial_to_run(controller)
        if chosen is not None:
            scheduler.promote(chosen.trial_id)
            number = int(chosen.trial_id)
        elif waiting:
            number = waiting.pop(0)
        else:
            return best, spent
        for tokens in [each for each in (*RUNGS, BUDGET) if each > at[number]]:
            spent, at[number] = spent + tokens - at[number], tokens
            is_cooled = cooldown is not None and tokens < BUDGET
            spent += round(tokens * (cooldown or 0)) if is_cooled else 0
            seen = [
                value
                for (after, cooled), value in curves[number].items()
                if after <= tokens and (is_cooled or not cooled)
            ]
            score = min(seen)
            best = min(best, score)
            result = {"tokens": tokens, "budget_tokens": BUDGET, "best_perplexity": score}
            result |= {"cooldown_step": tokens, "step": tokens} if is_cooled else {}
            if scheduler.on_trial_result(controller, trials[number], result) == scheduler.PAUSE:
                break
        else:
            scheduler.on_trial_complete(controller, trials[number], {})


def interval(values: np.ndarray) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


# Recording


def record(args: argparse.Namespace) -> None:
    """Append the curves that are not in the file yet."""
    known = {(curve["setting"], curve["schedule"], curve["seed"]) for curve in read(args.curves)}
    with tempfile.TemporaryDirectory() as place, args.curves.open("a", encoding="utf-8") as file:
        trainings.prepare(place, *SETTINGS)
        jobs = [
            (place, args.seed, number, schedule)
            for number in range(args.settings)
            for schedule in SCHEDULES
            if (number, schedule, args.seed) not in known
        ]
        for curve in trainings.in_two_processes(trained, jobs):
            file.write(json.dumps(curve) + "\n")
            file.flush()
            print(f"{curve['setting']:>3} {curve['schedule']:<20} {curve['points'][-1]['perplexity']}", flush=True)


def trained(place: str, seed: int, number: int, schedule: str) -> dict[str, Any]:
    """The curve of one setting: its evaluations and those of its cooldowns."""
    from raylm import config
    from raylm import sweep as sweeps

    searcher = sweeps.searcher(config.load(None, ["tune.num_samples=64"]).tune, 0)
    for _ in range(number + 1):
        settings = searcher.draw("")
    steps = [rung // BATCH for rung in RUNGS] if schedule == "warmup_stable_decay" else []
    changes = {**settings, "train.lr_scheduler_type": schedule, "train.seed": seed}
    found = trainings.scores(place, SETTINGS, changes, {step: round(step * COOLDOWN) for step in steps})
    points = [
        {"tokens": tokens, "cooled": cooled, "perplexity": round(perplexity, 3)}
        for (tokens, cooled), perplexity in found.items()
    ]
    shown = {key: float(f"{value:.6g}") for key, value in settings.items()}
    return {"setting": number, "schedule": schedule, "seed": seed, "settings": shown, "points": points}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()

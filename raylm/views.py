"""What commands show of plans and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import cleaning, corpus, derived, runs, statistics, tokens, tracking
from raylm.config import Experiment, TrackingConfig, from_environment
from raylm.console import command, counted, format_estimate, format_size, key_values, label
from raylm.results import choices, tables, trial_table
from raylm.results import runs as listing

if TYPE_CHECKING:
    from raylm.estimate import Estimate
    from raylm.pipeline.evaluation import EvaluationPlan
    from raylm.pipeline.proposal import Proposal
    from raylm.pipeline.sweep import SweepPlan, SweepResult
    from raylm.pipeline.training import TrainResult
    from raylm.plan import Plan, TokensPlan
    from raylm.tokens import Store


def plan(planned: Plan, estimated: Estimate) -> str:
    """The plan of a training, a line each; what was taken from the environment says so."""
    record = planned.record()
    pairs = {label(name): value for name, value in record.items() if name != "corpus"}
    if passes := pairs.pop(label("passes_over"), None):
        pairs["passes"] = ", ".join(f"{number:.2g} over {name}" for name, number in passes.items())
    share = record["evaluation_share"]
    if planned.resources is not None:
        pairs["resources per worker"] = planned.resources.described
    pairs["evaluation share"] = None if share is None else f"{share:.1%} of the run"
    section = planned.experiment.corpus
    if planned.prepared is None and "test" in section.splits:
        fraction = f"{section.test_fraction:g} of the {section.split_by or 'document'}s"
        pairs["test split"] = ", ".join(section.test_paths) or fraction
    for key, variable in from_environment(planned.experiment).items():
        name = {"tracking.uri": "tracking", "tracking.experiment": "experiment"}[key]
        pairs[name] = f"{pairs[name]} (from {variable})"
    others = corpus.left_out(planned.tokens.sources)
    files = f"{counted(planned.tokens.num_files, 'file')}, {format_size(planned.tokens.num_bytes)}"
    corpus_line = files + (f"; left out: {others}" if others else "")
    return key_values({"corpus": corpus_line, **pairs, **estimated.facts()})


def tokens_plan(plan: TokensPlan) -> tuple[dict[str, Any], str]:
    """What preparing tokens would do, as a record and for the screen."""
    faults = tokens.damage(plan.store)
    state = "to be written"
    if faults is not None:
        state = f"damaged, to be written again: {tokens.shown(faults)}" if faults else "there already"
    lines = [
        f"{source.label}: {counted(len(source.files), 'file')}, {format_size(source.num_bytes)}"
        for source in plan.sources
    ]
    if others := corpus.left_out(plan.sources):
        lines.append(f"left out: {others}")
    record = {
        "store": plan.store,
        "fingerprint": plan.fingerprint,
        "reused": faults == [],
        "sources": [
            {"name": source.label, "files": len(source.files), "bytes": source.num_bytes} for source in plan.sources
        ],
    }
    return record, "\n".join([*lines, f"store: {plan.store} ({state})"])


def store(store: Store, reused: bool) -> tuple[Any, ...]:
    """The splits in numbers, and what became of the documents that were read."""
    ledger = store.manifest["ledger"]
    facts = {
        "store": f"{store.path} ({'there already' if reused else 'written'})",
        "kept": f"{100 * corpus.kept_fraction(ledger):.2f}% of data after filtering",
        "read": ", ".join(f"{what} {count:,}" for what, count in ledger.items()),
        "split": corpus.counted_as(ledger),
        "ids by": store.manifest["tokenizer"]["encoder"]["name"],
    }
    return tables.splits({name: store.manifest[name] for name in store.splits}), "", key_values(facts)


def training(result: TrainResult, section: TrackingConfig) -> str:
    """The result of a training, and what to do next."""
    return key_values(
        {
            label(result.measure): format_estimate(result.score, result.score_low, result.score_high),
            "bits per byte": format_estimate(result.bits_per_byte, result.bits_per_byte_low, result.bits_per_byte_high),
            "test": result.test.sentence if result.test is not None else None,
            "before training": result.untrained_score,
            f"{label(result.measure)} of keywords": result.keyword_score,
            "incomparable": result.incomparable,
            "kept by filters": f"{100 * result.kept_fraction:.2f}% of the documents"
            if result.kept_fraction < 1
            else None,
            "tokens": result.tokens,
            "tokens/s": result.tokens_per_second,
            "checkpoint": result.checkpoint,
            "training": trial_table.overfitting(result.best_perplexity, result.last_perplexity, result.best_tokens),
            "generate": f'{command("generate", result.checkpoint)} --prompt "..."',
            **tracking.how_to_open(section.uri, result.mlflow_path, "MLflow"),
        }
    )


def sweep_plan(planned: SweepPlan) -> str:
    """The plan of a sweep, a line each."""
    from raylm.sweep import ladder, shown  # with Ray Tune
    from raylm.sweep.space import LADDER

    section = planned.experiment.tune
    fewest, most = planned.repeats
    lines = {
        "trials": planned.trials,
        "repeats": f"{fewest} to {most} more trials, {section.repeats} of each of the best settings" if most else None,
        **{f"  {key}": shown(sampler) for key, sampler in section.space.items() if key != LADDER},
        **ladder.lines(planned.experiment),
        **_start(planned),
        "scheduler": section.scheduler.kind,
        "tokens of all trials": f"at most {planned.most_tokens:,}" if planned.most_tokens else None,
        "  of cooldowns": f"at most {planned.most_cooldown_tokens:,}" if planned.most_cooldown_tokens else None,
    }
    return f"{plan(planned.plan, planned.estimate)}\n{key_values(lines)}"


def _start(planned: SweepPlan) -> dict[str, str]:
    """A line for each thing that a sweep starts from."""
    if planned.start is None:
        return {"starts from": "known once the tokens are prepared"}
    return {f"starts from{' ' * number}": note for number, note in enumerate(planned.start.notes)}


def sweep(result: SweepResult, experiment: Experiment) -> tuple[Any, ...]:
    """The ranked trials of a sweep that has ended, and what to do next."""
    measure, best = label(result.measure), result.best
    model = str(best.checkpoint)
    ranked_by = experiment.tune.ranked_by
    ranking = measure if ranked_by == "perplexity" else label(ranked_by)
    notes = [f"ranked by {ranking} on {result.scored_on}", *filter(None, [result.significance])]
    notes += [result.repeats.sentence] if result.repeats is not None else []
    notes += [result.incomparable] if result.incomparable is not None else []
    notes += [f"best trial: {result.test.sentence}"] if result.test is not None else []
    notes += result.failures
    next_steps = key_values(
        {
            "best trial": best.trial_id,
            measure: best.perplexity,
            "checkpoint": model,
            "repeat it": command("train", "--config", f"{model}/experiment.yaml"),
            "try it": f'{command("generate", model)} --prompt "..."',
            "report": result.report,
            "on disk": _on_disk(result, experiment),
            **tracking.how_to_open(experiment.tracking.uri, result.mlflow_path, "compare trials"),
        }
    )
    found = [part for choice in choices.of(result.trials) for part in ("", *tables.choice(choice, measure))]
    table = trial_table.RankedTable(result.trials, measure, result.untrained)
    return table, "\n".join(notes), *found, "", next_steps


def proposal(found: Proposal, file: Path) -> str:
    """What was seen of a text, the experiment that was written for it, and the command that runs it."""
    experiment, profile, record = found.experiment, found.profile, found.record(str(file))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in profile.formats.items())
    documents = f"{profile.seen:,} looked at, median {profile.median_chars:,} characters"
    if profile.duplicates:
        documents += f"; {profile.duplicates:.1%} repeat another exactly"
    if profile.near_duplicates > profile.duplicates:
        documents += f"; {profile.near_duplicates:.1%} repeat another at least nearly"
    train, tune, why = experiment.train, experiment.tune, found.reasons

    def explained(what: str, *keys: str) -> str:
        return "; ".join([what, *(why[key] for key in keys if key in why)])

    columns = explained(json.dumps(experiment.corpus.text), "corpus.text")
    return key_values(
        {
            "text": f"{counted(record['files'], 'file')} ({kinds}), {format_size(record['bytes'])}",
            "left out": record["left_out"],
            "columns": columns if "corpus.text" in why else None,
            "documents": documents,
            "script": ", ".join(f"{name.capitalize()} {share:.0%}" for name, share in profile.scripts.items()),
            "model": explained(derived.shown(experiment.model), "model.config", "model.lora"),
            "training": explained(f"{train.max_tokens or 0:,} tokens", "train.max_tokens"),
            "sweep": explained(f"{tune.num_samples} trials of {', '.join(tune.space)}", "tune.num_samples"),
            "written": file,
            "next": command("tune", "--config", str(file)),
        }
    )


def _on_disk(result: SweepResult, experiment: Experiment) -> str:
    """How large a sweep is, and how much of it nobody may need."""
    directory = f"{runs.directory_of(experiment)}/{result.sweep}"
    total = format_size(listing.num_bytes(directory))
    lost = sum(leftover.num_bytes for leftover in cleaning.lost_checkpoints(directory))
    if not lost:
        return total
    return (
        f"{total}, of which {format_size(lost)} are checkpoints of trials that lost; tune.keep=best or raylm clean "
        "removes them"
    )


def evaluation_plan(planned: EvaluationPlan) -> str:
    """How many documents would be scored."""
    counts = {f"documents of {name}": len(numbers) for name, numbers in planned.sets.items()}
    of_tasks = {"tasks": ", ".join(planned.tasks.names)} if planned.tasks is not None else {}
    return key_values({"model": planned.model, **counts, **of_tasks})


def evaluation(record: dict[str, Any]) -> tuple[Any, ...]:
    """The figures of all, a table of sets and sources where there are several, and one of tasks."""
    of_tasks = ("", tables.tasks(record["tasks"])) if "tasks" in record else ()
    if "sets" not in record:
        return (key_values({name: value for name, value in record.items() if name != "tasks"}), *of_tasks)
    texts = [source for found in record["sets"].values() for source in found["sources"]]
    what = "the validation split" if "validation" in record["sets"] else ", ".join(dict.fromkeys(texts))
    hidden = ("model", "sets", "keywords", "document_ids", "tasks")
    total = {name: value for name, value in _with_intervals(record).items() if name not in hidden}
    total = {"model": record["model"], "text": what, **total, "nll": round(record["nll"])}
    total["unknown_tokens"] = total["unknown_tokens"] or None
    count = sum(found["documents"] for found in record["sets"].values())
    total["documents"] = _with_brackets(count, record["bits_per_byte_low"] is not None)
    of_keywords = {f"{name}_of_keywords": value for name, value in _with_intervals(record.get("keywords", {})).items()}
    rows: list[tuple[str, dict[str, Any]]] = []
    several = len(record["sets"]) > 1
    for name, found in record["sets"].items():
        rows += [(name, found)] if several else []
        if len(found["sources"]) > 1:
            rows += [(f"{'  ' * several}{source}", each) for source, each in found["sources"].items()]
    facts = key_values({**total, **of_keywords})
    of_sets = ("", tables.evaluations([*rows, ("total", record)])) if rows else ()
    return (facts, *of_sets, *of_tasks)


def _with_intervals(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose scores are text with their intervals."""
    ends = [name for name in record if name.endswith(("_low", "_high"))]
    scores = dict.fromkeys(name.rpartition("_")[0] for name in ends)
    found = {name: value for name, value in record.items() if name not in ends}
    return found | {
        name: format_estimate(record[name], record[f"{name}_low"], record[f"{name}_high"])
        for name in scores
        if record[name] is not None
    }


def _with_brackets(documents: int, has_intervals: bool) -> str:
    """How many documents were scored, and what stands in brackets, or why nothing does."""
    if has_intervals:
        return f"{documents:,}; in brackets 95 % intervals, from their spread"
    return (
        f"{documents:,}, too few for an interval, which takes {statistics.FEWEST_DOCUMENTS}; give more text, or cut it "
        "into documents with corpus.separator"
    )

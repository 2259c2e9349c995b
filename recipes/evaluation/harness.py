"""The suite `lm-eval`: any of its tasks, through its own Python API, sparse beside dense."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from rich.table import Table

from nsa_hf.errors import NsaError

from .subject import WAYS, Settings, Subject

BATCH = 8  # of a GPU; elsewhere questions are answered one by one

Result = dict[str, Any]


def harness(subject: Subject, settings: Settings) -> Result:
    """Runs the tasks both ways.

    Returns:
        `rows`, for each task and figure what each way got, and its standard error where there is one; the version of
        lm-eval and the settings.

    Raises:
        NsaError: there is no such task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = task_manager(settings)
    size = BATCH if subject.model.device.type == "cuda" else 1
    model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, backend="causal", batch_size=size)
    figures: dict[str, dict[tuple[str, str], tuple[float, float | None]]] = {}
    for way in WAYS:
        with subject.run(way):
            ran = simple_evaluate(
                model=model,
                tasks=list(settings.tasks),
                task_manager=manager,
                num_fewshot=settings.few_shot,
                limit=settings.limit,
                log_samples=False,
            )
        figures[way] = figures_of(ran["results"])
    rows: list[Result] = []
    for task, metric in figures["dense"]:
        row: Result = {"task": task, "metric": metric}
        for way in WAYS:
            row[way], row[f"{way}_error"] = figures[way][task, metric]
        rows.append(row)
    return {
        "version": version("lm-eval"),
        "tasks": list(settings.tasks),
        "few_shot": settings.few_shot,
        "limit": settings.limit,
        "rows": rows,
    }


def task_manager(settings: Settings) -> Any:
    """What knows the tasks: those of `include_path` alone where they are all there, for lm-eval's own are thousands.

    Raises:
        NsaError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    own = None if settings.include_path is None else str(settings.include_path)
    unknown = list(settings.tasks)
    for with_defaults in (False, True) if own else (True,):
        manager = TaskManager(include_path=own, include_defaults=with_defaults)
        unknown = [task for task in settings.tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise NsaError(
        f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists its own, --include-path adds more"
    )


def figures_of(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """By task and figure its value and standard error, of lm-eval's own "acc,none" and "acc_stderr,none"."""
    figures = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{kind}")
                shown = metric if kind == "none" else f"{metric}, {kind}"
                figures[task, shown] = float(value), float(error) if isinstance(error, int | float) else None
    return figures


def render_harness(result: Result, name: str) -> Iterator[Table]:
    """Every task's figures."""
    table = Table("task", "figure", "dense", "sparse", title=f"{name}: lm-eval {result['version']}")
    for row in result["rows"]:
        cells = [f"{row[way]:.4f}" + ("" if (e := row[f"{way}_error"]) is None else f" ± {e:.4f}") for way in WAYS]
        table.add_row(row["task"], row["metric"], *cells)
    yield table

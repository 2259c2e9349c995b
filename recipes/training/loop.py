"""Continued pretraining of a converted model, against its own dense self.

    nsa-hf train recipes/runs/adapt.yaml model=build/nsa out=build/trained
    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 -m nsa_hf.recipes.train RUN.yaml ...
    (a toy size: steps=2 length=1088 held_out_documents=1)

loss = ce_weight * CE(next token) + kl_weight * KL(teacher || student), and more where settings ask for it. The teacher
has the converted model's own weights, frozen, and runs with dense attention, so it is the dense source; a model that is
trained from scratch has none. A run has one stage or several, each with a fresh optimizer and rates of its own. It
lives in `OUT.unfinished` until it is done; then OUT appears whole. A run that was killed goes on from its last
checkpoint when it is started again with the same settings, within a stage or between two, and ends with the same
weights.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nsa_hf.conversion.files.loading import read_config
from nsa_hf.conversion.plan import training_hindrance
from nsa_hf.conversion.sources import open_source
from nsa_hf.errors import NsaError
from nsa_hf.heads import check_next_token

from ..evaluation.share import Share
from ..load import load_nsa_model
from .attention_losses import loss_model
from .checkpoints import Checkpoints, step_of
from .compiling import compile_layers, room_for_graphs
from .config import RunConfig
from .folder import check_out, noted_revisions, open_run_folder, save_trained, settings_fingerprint
from .held_out import HeldOut, print_figures
from .launch import deterministic, make_accelerator, on_main_process, prepare_model
from .logs import Log, check_trackers, draw
from .optimizer import make_optimizer
from .result import as_result, measure_result, stage_records
from .sharding import call_whole, gather_weights
from .stages import Stage, settle_machine, settle_stages, stage_at, stages_of
from .steps import Prepared, Schedule, run_steps, save
from .texts import StageText, Texts, read_texts, revisions_of
from .trained import AdapterFiles, check_stage, choose_trained, is_all_that_is_trained, merge


def train(config: RunConfig) -> Path:
    """Runs, or goes on with, the run of `config`.

    Returns:
        The folder of the trained model.

    Raises:
        NsaError: what is in the way (folders, settings, text too short, a loss that is not finite).
    """
    try:
        return run(config)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        raise


def run(config: RunConfig) -> Path:
    """`train`, without a word to somebody who stops it."""
    out = Path(config.out)
    check_out(config)
    check_trackers(config.trackers)
    model = check_model(config)
    config = settle_machine(config)
    accelerator = make_accelerator(config)
    config = settle_stages(config, model, accelerator.num_processes)
    stages = stages_of(config)
    with deterministic(config.deterministic), room_for_graphs(), ExitStack() as stack:
        fingerprint = settings_fingerprint(config)
        revisions = on_main_process(accelerator, lambda: revisions_of(config, stages, noted_revisions(config)))
        texts = read_texts(config, stages, revisions)
        fingerprint |= {**texts.fingerprint(), "processes": accelerator.num_processes, "sharded": accelerator.is_fsdp2}
        # locked by the main process until the run ends
        opened = open_run_folder(config, fingerprint, revisions)
        folder = on_main_process(accelerator, lambda: stack.enter_context(opened))
        if folder is None:
            accelerator.print(f"{out} holds this run already, finished: nothing to do")
            return out
        teacher, student = load_models(config, accelerator)
        share = Share(accelerator.process_index, accelerator.num_processes)
        held_out = HeldOut(texts.held_out_windows, teacher, accelerator.autocast, share)
        checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        log = Log(accelerator, folder, config, texts.held_out_windows[0][1])
        state, adapter = run_stages(accelerator, teacher, student, stages, texts, held_out, checkpoints, log)
        log.finish()
        result = measure_result(student, config, stages, texts, held_out, state)
        processes = accelerator.num_processes
        result |= {"stages": stage_records(stages, texts, processes), "processes": processes}
        result |= {"sharded": accelerator.is_fsdp2, "revisions": revisions}
        gather_weights(student, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            beside = [log.save, *([] if adapter is None else [adapter.save])]
            save_trained(student, config, fingerprint, result, beside)
            if result["warning"]:
                print(result["warning"])
            print_figures(result["held_out"], out)
            draw(out, result)
        accelerator.wait_for_everyone()
    return out


def check_model(config: RunConfig) -> Any:
    """The config of the model, which can be trained, and whose other files can go along with the result.

    Raises:
        NsaError: why not.
    """
    model = read_config(Path(config.model))
    check_next_token(model, config.model)
    if hindrance := training_hindrance(model):
        raise NsaError(f"{config.model}: {hindrance}")
    open_source(config.model)
    return model


def load_models(config: RunConfig, accelerator: Any) -> tuple[Any | None, Any]:
    """The teacher, frozen, if the run has one, and the student, on Accelerate's device.

    Raises:
        NsaError: the model cannot be loaded, or does not have what a stage, maybe a late one, trains.
    """
    teacher = None
    if config.teacher != "none":
        teacher = load_nsa_model(config.model, accelerator.device, config.teacher_dtype).requires_grad_(False)
    student = load_nsa_model(config.model, accelerator.device).train()
    for number, stage_config, _ in stages_of(config):
        try:
            check_stage(student, stage_config, accelerator.is_fsdp2, number)
        except NsaError as error:
            raise NsaError(f"stage {number}: {error}" if config.stages else str(error)) from None
    if config.compile == "yes":
        for model in (teacher, student):
            if model is not None:
                compile_layers(model)
    return teacher, student


def run_stages(
    accelerator: Any,
    teacher: Any | None,
    student: Any,
    stages: list[Stage],
    texts: Texts,
    held_out: HeldOut,
    checkpoints: Checkpoints,
    log: Log,
) -> tuple[dict[str, Any], AdapterFiles | None]:
    """Runs the stages that are left, from the last checkpoint on if there is one.

    Returns:
        The state of the finished run: "step", "curve" (a row for each step), "before" (the held-out rows before
        training); and the adapter, where that is the whole difference to the converted model.

    Raises:
        NsaError: a checkpoint cannot be read or written, or is none of a run with so many steps.
    """
    schedule = Schedule(student, stages)
    latest = on_main_process(accelerator, checkpoints.latest)
    begin = stage_at(stages, step_of(latest) if latest else 0)
    if begin is None:
        raise NsaError(f"{latest} says that {step_of(latest)} of {stages[-1].end} steps are done: remove it")
    state: dict[str, Any] = {}
    files: AdapterFiles | None = None
    for stage in stages[begin.number - 1 :]:
        adapter, prepared = prepare(accelerator, teacher, student, stage, texts.stages[stage.number - 1])
        if state:
            save(checkpoints, accelerator, state)
        elif latest is None:
            with as_result(student, stages):
                before = call_whole(student, lambda: held_out.compare(student))
            accelerator.print(f"held-out text before training: {held_out.told(before)}")
            state = {"step": 0, "curve": [], "before": before}
        else:
            state = checkpoints.restore(accelerator, latest)
            accelerator.print(f"going on from {latest}")
        if stage is begin:
            log.go_on(state["curve"])
        run_steps(prepared, stage, schedule, state, checkpoints, log)
        files = merge(adapter) if adapter is not None else None
        del prepared  # with it go the hooks of DDP on the student, before the next stage adds its own
    return state, files if len(stages) == 1 and is_all_that_is_trained(stages[0].config) else None


def prepare(accelerator: Any, teacher: Any | None, student: Any, stage: Stage, text: StageText) -> tuple[Any, Prepared]:
    """Makes what a stage begins with: what is trained of the student, its losses, an optimizer and the text.

    Returns:
        The adapter (see trained.py) or None; and the rest.

    Raises:
        NsaError: the model does not have what is to be trained.
    """
    config = stage.config
    accelerator.free_memory()  # of the stage before
    accelerator.gradient_accumulation_steps = config.accumulate
    adapter = choose_trained(student, config)
    model, optimizer = prepare_model(
        accelerator,
        loss_model(student, teacher, config),
        student,
        make_optimizer(student, config),
    )
    return adapter, Prepared(accelerator, student, model, optimizer, text)

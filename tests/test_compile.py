"""The compile gate: every kernel compiles for its targets and uses no more than recorded.

After a change that is meant to use more, update the record with each Triton that is in it and
commit it: ``python tests/compile/measure.py --update``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles with Triton, which is for Linux")

ROOT = Path(__file__).parents[1]
MEASURE = ROOT / "tests/compile/measure.py"
RECORD = ROOT / "tests/compile/resources.json"
UPDATE = "python tests/compile/measure.py --update"


def differences(taken, recorded):
    """Describe where the two differ; [] if nothing grew."""
    found = []
    for key in sorted(taken.keys() - recorded.keys()):
        found.append(f"{key}: not in the record; {UPDATE}")
    for key in sorted(recorded.keys() - taken.keys()):
        found.append(f"{key}: in the record, but no longer compiled; {UPDATE}")
    for key in sorted(taken.keys() & recorded.keys()):
        for what, now in taken[key].items():
            before = recorded[key].get(what, 0)
            if now > before:
                found.append(f"{key}: {what} grew from {before} to {now}")
    return found


@pytest.fixture(scope="module")
def measured():
    # this process may run the interpreter, which compiles nothing
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, MEASURE], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_variant_compiles(measured):
    assert measured["errors"] == {}
    assert 0 < len(measured["taken"]) <= measured["max_compilations"]


def test_every_family_is_compiled(measured):
    families = {path.parent.name for path in ROOT.glob("kernels/llmfast_kernels/*/kernel.py")}
    assert {key.split("/")[0] for key in measured["taken"]} == families


def test_shared_memory_fits_the_gpus_it_is_meant_for(measured):
    too_much = {
        key: f"{taken['shared']} of {measured['limits'][key]} bytes"
        for key, taken in measured["taken"].items()
        if taken["shared"] > measured["limits"][key]
    }
    assert too_much == {}


def test_nothing_grew(measured):
    recorded = json.loads(RECORD.read_text())
    if measured["triton"] not in recorded:
        pytest.skip(f"no record for Triton {measured['triton']}; to have one: {UPDATE}")
    assert differences(measured["taken"], recorded[measured["triton"]]) == []


def test_growth_is_seen():
    same = {"a": {"stack": 0, "shared": 64}, "b": {"stack": 8, "shared": 0}}
    assert differences(same, same) == []
    assert differences({**same, "a": {"stack": 0, "shared": 32}}, same) == []
    assert differences({**same, "a": {"stack": 16, "shared": 64}}, same) == [
        "a: stack grew from 0 to 16"
    ]
    assert differences({**same, "b": {"stack": 8, "shared": 1}}, same) == [
        "b: shared grew from 0 to 1"
    ]
    (missing,) = differences({**same, "c": {"stack": 0, "shared": 0}}, same)
    assert missing.startswith("c: not in the record") and "--update" in missing
    (stale,) = differences({"a": same["a"]}, same)
    assert stale.startswith("b: in the record, but no longer compiled")

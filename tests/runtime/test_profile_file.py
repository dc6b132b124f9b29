"""Profiles that come from anywhere: nothing in them is believed, and none is kept outside its folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import profiles

from dynamo_runtime import load_bundle
from dynamo_runtime.device.costs import Knowledge, MeasuredCosts, MeasuredDrafterCosts
from dynamo_runtime.device.profile import Profile, cached_path, profiles_folder
from dynamo_runtime.device.records import DrafterRuns
from dynamo_runtime.errors import ProfileError
from dynamo_runtime.manifest import FileRecord

DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "400 digits": (lambda p: p.update(bandwidth=10**400), "'bandwidth' is 1000"),
    "infinite": (lambda p: p.update(drafting=float("inf")), "'drafting' is inf, which is not a number to go by"),
    "no number": (lambda p: p["passes"][0]["time"].update(p50=float("nan")), "'p50' is nan"),
    "a list as a text": (lambda p: p["device"].update(processor=["x"] * 10_000), "'processor' is ['x'"),
    "a text as an object": (lambda p: p["device"].update(caches="L1"), "'caches' is not an object"),
    "true as a number": (lambda p: p.update(threads=True), "'threads' is True"),
    "unknown field": (lambda p: p.update(novelty=1), "'novelty' is 1"),
    "only with heads": (lambda p: [each.update(heads=True) for each in p["passes"]], "does not say what passes cost"),
    "no rows": (lambda p: p["passes"][0].update(rows=0), "passes: rows or past is too small"),
    "confidence beyond 1": (lambda p: p["acceptance"][0].update(confidence=2.0), "acceptance: depth, confidence"),
    "more accepted than seen": (lambda p: p["acceptance"][0].update(seen=-1), "acceptance: depth, confidence"),
    "another version": (lambda p: p.update(schema_version="1" * 1000), "has schema version '111"),
    "a version that is none": (lambda p: p.update(schema_version=True), "has schema version True"),
    "a drafter that is none": (lambda p: p.update(drafter=[]), "'drafter' is not an object"),
    "half a drafter": (lambda p: p["drafter"].pop("drafts"), "drafts"),
    "a drafter without runs": (lambda p: p["drafter"].update(drafts=[]), "drafter: it does not say"),
    "a run that costs nothing": (lambda p: p["drafter"]["drafts"][0]["time"].update(p50=0.0), "not more than 0"),
    "no positions": (lambda p: p["drafter"]["layers"][0].update(positions=0), "drafter: positions or past"),
    "more changed than compared": (lambda p: p["widths"].update(changed=225), "widths: rows, compared or changed"),
    "nothing compared": (lambda p: p["widths"].update(compared=0, changed=0), "widths: rows, compared or changed"),
    "a width of one": (lambda p: p["widths"].update(rows=1), "widths: rows, compared or changed"),
    "a difference below 0": (lambda p: p["widths"].update(difference=-1.0), "widths: a logit is less than 0"),
    "a depth below 0": (lambda p: p["drafter"]["drafts"][0].update(depth=-1), "drafter: depth"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_value_is_believed(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    content = json.loads(replace(profiles.full(), drafter=profiles.runs()).to_json())
    change(content)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError) as error:
        Profile.load(path)
    assert message in str(error.value) and len(str(error.value)) < len(str(path)) + 200


@pytest.mark.parametrize(("version", "lacks"), [(1, ("drafter", "widths")), (2, ("widths",))])
def test_a_profile_of_an_older_schema(tmp_path: Path, version: int, lacks: tuple[str, ...]) -> None:
    """It lacks what came later, is planned with as before, and is of this schema when it is kept again."""
    content = json.loads(profiles.full().to_json())
    for section in lacks:
        del content[section]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content | {"schema_version": version}))
    found = Profile.load(path)
    assert found == profiles.full(widths=None)
    curve = MeasuredCosts.of(found)
    assert curve.making is None and curve.resume(64) == pytest.approx(0.733)
    assert curve.step(2, True, 64) == pytest.approx(profiles.cost(2, 64, True))
    found.save(path)
    assert json.loads(path.read_text())["schema_version"] == 3


@pytest.mark.parametrize(
    ("content", "message"), [("[" * 200_000, "nested too deeply"), (" " * (17 << 20), "more than")]
)
def test_no_profile_at_all(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


def test_the_same_pass_twice(multi: Path) -> None:
    """No curve goes through two points above each other."""
    profile = profiles.full()
    twice = replace(profile, passes=profile.passes * 2, resume=profile.resume * 2)
    assert MeasuredCosts.of(twice).step(20, True, 5000) == MeasuredCosts.of(profile).step(20, True, 5000)
    assert MeasuredCosts.of(twice).resume(20) == MeasuredCosts.of(profile).resume(20)
    drafter = profiles.runs()
    again = DrafterRuns(drafter.layers * 2, drafter.drafts * 2)
    assert MeasuredDrafterCosts.of(again).begin(500, 5000) == MeasuredDrafterCosts.of(drafter).begin(500, 5000)
    assert Knowledge.of(load_bundle(multi), twice).acceptances(2, 0.0)


@pytest.mark.parametrize("sha256", ["/../../../pwn", "../x", "a\0b", ""])
def test_a_profile_is_kept_in_its_folder(multi: Path, tmp_path: Path, sha256: str) -> None:
    bundle = replace(load_bundle(multi), folder=tmp_path / "..", files={"model.onnx": FileRecord(1, sha256)})
    path = cached_path("cpu", bundle, None)
    assert path.parent == profiles_folder() and path.name == path.resolve().name and "\0" not in path.name

"""Stored results know their recipe and commit; those that today's code would not make are listed, and made again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dmq_ao import recipes
from dmq_ao.benchmarks import provenance
from dmq_ao.benchmarks.provenance import Standing, recipe_digest, standing
from dmq_ao.config import Override

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import results

    return results


def stored(folder: Path, variant: str, **changes: Any) -> Path:
    file = folder / "demo" / "w4a8" / f"{variant.replace(' ', '_')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"model": "demo", "bits": "w4a8", "variant": variant, "seed": 0, "date": "2026-11-28"}
    file.write_text(json.dumps({**result, "one_step_error": 0.0123, **changes}))
    return file


def test_a_digest_is_of_everything_a_recipe_says() -> None:
    builds = [build(bits) for build in recipes.ALL_RECIPES.values() for bits in ("w8a8", "w4a8", "w3a6")]
    builds += [dataclasses.replace(one, num_samples=7) for one in builds]
    assert len({recipe_digest(one) for one in builds}) == len(builds)
    assert recipe_digest(recipes.default("w4a8")) == recipe_digest(recipes.default("w4a8"))
    assert len(recipe_digest(recipes.minmax("w8a8"))) == 64


def test_results_stand_as_their_recipes_do() -> None:
    recipe, other = recipes.default("w4a8"), recipes.default("w4a6")
    assert standing({"recipe_digest": recipe_digest(recipe)}, recipe) is Standing.CURRENT
    assert standing({"recipe_digest": recipe_digest(other), "recipe": recipe.to_dict()}, recipe) is Standing.STALE
    assert standing({"recipe": recipe.to_dict()}, recipe) is Standing.UNSIGNED
    assert standing({"recipe": other.to_dict()}, recipe) is Standing.STALE
    assert standing({"recipe": {"name": "of another version"}}, recipe) is Standing.STALE
    assert standing({}, recipe) is Standing.UNKNOWN


def test_what_calibration_protected_is_no_other_recipe() -> None:
    recipe = recipes.default("w4a8")
    protected = (*recipe.config.overrides, Override("mid", keep_float=True))
    after = dataclasses.replace(
        recipe, protection=None, config=dataclasses.replace(recipe.config, overrides=protected)
    )
    assert standing({"recipe": after.to_dict()}, recipe) is Standing.UNSIGNED
    plain = recipes.minmax("w4a8")
    changed = dataclasses.replace(plain, config=dataclasses.replace(plain.config, overrides=protected))
    assert standing({"recipe": changed.to_dict()}, plain) is Standing.STALE


def test_the_commit_is_that_of_the_code(tmp_path: Path) -> None:
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
    assert provenance.commit(tmp_path / "nowhere") is None
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = provenance.commit(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert provenance.commit(tmp_path) == f"{clean}-dirty"


def test_provenance_is_of_one_recipe_or_several() -> None:
    recipe = recipes.minmax("w8a8")
    assert provenance.provenance(recipe)["recipe_digest"] == recipe_digest(recipe)
    assert provenance.provenance({"ours": recipe})["recipe_digests"] == {"ours": recipe_digest(recipe)}


def test_rows_that_are_not_current_are_listed(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, "default", **provenance.provenance(recipes.default("w4a8")))
    stored(tmp_path, "min-max per step", recipe=recipes.default("w4a8").to_dict())
    stored(tmp_path, "a variant that is gone", **provenance.provenance(recipes.default("w4a8")))
    assert example.main(["--folder", str(tmp_path)]) == 0
    *lines, totals = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-4].split("/")[-1] for line in lines] == [
        "a_variant_that_is_gone.json",
        "min-max_per_step.json",
    ]
    assert totals.startswith("1 current, 0 no digest, recipe as today's, 2 another recipe")
    example.main(["--folder", str(tmp_path), "--all"])
    assert "demo/w4a8/default.json  0.0123" in capsys.readouterr().out


def test_the_stored_results_can_be_listed(example: ModuleType) -> None:
    counted = [row.standing for row in example.rows(example.STORED)]
    assert len(counted) >= 164
    assert Standing.UNKNOWN not in counted


@pytest.mark.parametrize("works", [True, False])
def test_a_row_is_measured_again_in_its_place(
    works: bool, example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stored(tmp_path, "default")
    before, commands = file.read_text(), []

    def ablation(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert not file.exists()  # or it would be skipped
        commands.append(command)
        if works:
            file.write_text("new")
        return subprocess.CompletedProcess(command, 0 if works else 1)

    monkeypatch.setattr(example.subprocess, "run", ablation)
    code = example.main(["--folder", str(tmp_path), "--rerun", "demo/w4a8/default.json", "--", "--samples", "80"])
    assert (code, file.read_text()) == ((0, "new") if works else (1, before))
    assert [path.name for path in file.parent.iterdir()] == ["default.json"]
    [command] = commands
    assert command[0] == sys.executable
    assert command[2:] == ["--models", "demo", "--bits", "w4a8", "--variants", "default", "--seeds", "0",
                           "-o", str(tmp_path), "--samples", "80"]  # fmt: skip


def test_an_unknown_row_is_a_usage_error(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path, "gone")
    for name, words in (("demo/w4a8/x.json", "is no stored result"), ("demo/w4a8/gone.json", "has no variant 'gone'")):
        with pytest.raises(SystemExit):
            example.main(["--folder", str(tmp_path), "--rerun", name])
        assert words in capsys.readouterr().err

"""Where a measured figure comes from: the commit, and the recipes by digest, so that stale results are noticed."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from dmq_ao.config import Recipe

COMMIT, DIGEST, DIGESTS = "commit", "recipe_digest", "recipe_digests"
_CHECKOUT = Path(__file__).resolve().parents[2]


class Standing(str, Enum):
    """How a stored result stands to today's code."""

    CURRENT = "current"
    UNSIGNED = "no digest, recipe as today's"
    STALE = "another recipe"
    UNKNOWN = "no recipe, no digest"


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256, in hex, of all that a recipe says: of its JSON with sorted keys. Equal recipes have equal digests."""
    text = json.dumps(recipe.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def commit(folder: Path = _CHECKOUT) -> str | None:
    """The commit of the code that runs, with ``-dirty`` where files of it were changed; None outside a repository."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return revision + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def provenance(recipes: Recipe | Mapping[str, Recipe]) -> dict[str, Any]:
    """What every stored result carries: the commit, and the digest of its recipe, or of each of several by name."""
    if isinstance(recipes, Recipe):
        return {COMMIT: commit(), DIGEST: recipe_digest(recipes)}
    return {COMMIT: commit(), DIGESTS: {name: recipe_digest(recipe) for name, recipe in recipes.items()}}


def standing(result: Mapping[str, Any], recipe: Recipe) -> Standing:
    """How a stored result of one recipe stands to ``recipe``, as today's code makes it.

    Results of before digests were stored hold the recipe as calibration left it: its protection turned into overrides.
    Both are left out of the comparison.
    """
    if DIGEST in result:
        return Standing.CURRENT if result[DIGEST] == recipe_digest(recipe) else Standing.STALE
    if "recipe" not in result:
        return Standing.UNKNOWN
    try:
        stored = Recipe.from_dict(result["recipe"])  # fields that are newer than the result get their defaults
    except (TypeError, ValueError):
        return Standing.STALE
    if recipe.protection is not None:
        overrides = stored.config.overrides[: len(recipe.config.overrides)]
        stored = replace(stored, config=replace(stored.config, overrides=overrides), protection=None)
        recipe = replace(recipe, protection=None)
    return Standing.UNSIGNED if stored == recipe else Standing.STALE

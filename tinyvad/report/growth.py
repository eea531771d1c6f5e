"""What grew since a baseline: two profiles in (see ``profile``), a line for each figure that grew too much out."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from tinyvad.errors import InputError
from tinyvad.report.profile import profiles_of
from tinyvad.report.text import flat

_AGAIN = "`tinyvad profile BUILD --format json`"


def compare_all(current: dict[str, Any], baseline: dict[str, Any], max_growth: float) -> list[str]:
    """Set every profile of ``current`` against the baseline's of the same target and runtime.

    Each profile gets 'baseline', the totals there (None if the baseline has no such profile), and 'growth', the lines of
    ``compare``. A baseline of one target, or of several, holds as many as it has; a profile that it lacks is new.

    Args:
        current: ``{profiles: [...]}``. baseline: what ``to_json`` wrote, of this version or an earlier one.

    Returns:
        The lines of all profiles, with target and runtime in front where there are several.

    Raises:
        InputError: as ``compare``; the baseline has none of the profiles.
    """
    before = {_key(profile): profile for profile in _checked(baseline)}
    known = [key for key in (_key(profile) for profile in current["profiles"]) if key in before]
    if not known:
        there, here = (
            ", ".join(f"{target} {runtime}" for target, runtime in keys)
            for keys in (before, [_key(profile) for profile in current["profiles"]])
        )
        raise InputError(
            f"the baseline is of target {there}, this profile of {here}: write a baseline for each target with {_AGAIN}"
        )
    problems = []
    for profile in current["profiles"]:
        old = before.get(_key(profile))
        profile["baseline"] = old and {key: old["budget"].get(key) for key in ("ram_used", "flash_used")}
        profile["growth"] = compare(profile, old, max_growth) if old else []
        name = " ".join(_key(profile)) + ": " if len(current["profiles"]) > 1 else ""
        problems += [name + line for line in profile["growth"]]
    return problems


def compare(current: dict[str, Any], baseline: dict[str, Any], max_growth: float) -> list[str]:
    """What grew too much since a baseline: one line an owner or total of RAM and flash, [] if nothing did.

    Something grew too much if its bytes are more than (1 + max_growth) times the baseline's, computed exactly; what
    the baseline does not have grew from 0.

    Args:
        current, baseline: profiles, as ``to_json`` writes them.
        max_growth: fraction, 0.03 for 3 %.

    Raises:
        InputError: ``max_growth`` is negative or not finite; a profile has no budget; they are of two targets.
    """
    if not (math.isfinite(max_growth) and max_growth >= 0):
        raise InputError(f"max-growth {max_growth} must be 0 or more, e.g. 3% or 0.03")
    new, old = (_owners(profile, name) for profile, name in ((current, "this profile"), (baseline, "the baseline")))
    targets = [flat(profile["budget"].get("target")) for profile in (current, baseline)]
    if targets[0] != targets[1]:
        raise InputError(
            f"the baseline is of target {targets[1]}, this profile of {targets[0]}: write a baseline for each target "
            f"with {_AGAIN}"
        )
    share = Fraction(str(max_growth))
    problems = []
    for name, nbytes in new.items():
        before = old.get(name, 0)
        allowed = math.floor(before * (1 + share))
        if nbytes > allowed:
            grown = f"{before:,} B + {float(100 * share):g} %" if before else "0 B: it is new"
            problems.append(
                f"{flat(name)} {nbytes:,} B > {allowed:,} B allowed (baseline {grown}): make it smaller, or accept "
                f"it with a new baseline from {_AGAIN}"
            )
    return problems


def _checked(baseline: Any) -> list[dict[str, Any]]:
    """The profiles of a baseline, each with a budget that can be read."""
    found = profiles_of(baseline) if isinstance(baseline, dict) else [{}]
    for profile in found:
        _owners(profile, "the baseline")
    return found


def _key(profile: dict[str, Any]) -> tuple[str, str]:
    """Target and runtime; profiles that name no runtime are older than the choice, and of TFLM."""
    return flat(profile["budget"].get("target")), flat(profile.get("runtime") or "tflm")


def _owners(profile: dict[str, Any], name: str) -> dict[str, int]:
    """'RAM arena' -> bytes, and the totals; items of one owner are added up."""
    budget = profile.get("budget") if isinstance(profile, dict) else None
    try:
        if not isinstance(budget, dict):
            raise KeyError("budget")
        found: dict[str, int] = {}
        for key, label in (("ram", "RAM"), ("flash", "flash")):
            for item in budget[key]:
                owner = f"{label} {item['owner']}"
                found[owner] = found.get(owner, 0) + int(item["nbytes"])
            found[f"{label} total"] = int(budget[f"{key}_used"])
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{name}: field {error} is missing or of another kind; write it with {_AGAIN}"
        ) from error

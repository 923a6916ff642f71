"""Rules that several sections of a configuration share: what breaks one, as `key: what is wrong`."""

from __future__ import annotations

import re

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def not_positive(section: object, *keys: str) -> list[str]:
    return [f"{key}={x} must be positive" for key in keys if (x := getattr(section, key)) is not None and x <= 0]


def negative(section: object, *keys: str) -> list[str]:
    return [f"{key}={getattr(section, key)} must not be negative" for key in keys if getattr(section, key) < 0]


def mixture_problems(mixture: dict[str, float]) -> list[str]:
    found = [f"mixture.{name}={weight} must not be negative" for name, weight in mixture.items() if not weight >= 0]
    if mixture and not any(weight > 0 for weight in mixture.values()):
        found.append("mixture gives every source the weight 0; give one more")
    return found

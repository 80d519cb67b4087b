"""What changed between two runs of the benchmarks: ``gradclust bench --compare A B``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str], dict[str, Any]]


def load(source: Path) -> tuple[dict[str, Any], Rows]:
    """Machine and rows of a results directory or of its kernels.json."""
    path = source / "kernels.json" if source.is_dir() else source
    try:
        content = json.loads(path.read_text())
        return content["machine"], {(row["op"], row["label"]): row for row in content["rows"]}
    except FileNotFoundError:
        raise SystemExit(f"--compare: no {path}; name a results directory or its kernels.json") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise SystemExit(f"--compare: {path} holds no benchmark results ({type(error).__name__}: {error})") from None


def verdict(old: dict[str, float], new: dict[str, float]) -> str:
    """``faster`` or ``slower`` when the quartile ranges are apart, else nothing."""
    return "faster" if new["high"] < old["low"] else "slower" if new["low"] > old["high"] else ""


def comparison(old: Rows, new: Rows) -> list[str]:
    """A line for every baseline that both runs have: our ratio to it, so that a slower machine is no slower kernel."""
    lines = [f"{'op':<18} {'sizes':<44} {'ours ÷':<32} {'A':>7} {'B':>7} {'B/A':>6}"]
    for key in [*old, *(key for key in new if key not in old)]:
        op, label = key
        if key not in old or key not in new:
            lines.append(f"{op:<18} {label:<44} only in {'A' if key in old else 'B'}")
            continue
        before, after = old[key].get("ratios", {}), new[key].get("ratios", {})
        if "error" in old[key] or "error" in new[key]:
            lines.append(f"{op:<18} {label:<44} failed in {'A' if 'error' in old[key] else 'B'}")
            continue
        for name in (name for name in before if name in after):
            a, b = before[name], after[name]
            change = b["median"] / a["median"]
            lines.append(
                f"{op:<18} {label:<44} {name:<32} {a['median']:7.3f} {b['median']:7.3f} {change:6.2f} {verdict(a, b)}"
            )
    return lines


def compare(first: Path, second: Path) -> None:
    """Prints the comparison; both machines are named, for ratios of different machines tell little."""
    (machine_a, old), (machine_b, new) = load(first), load(second)
    for letter, machine, path in (("A", machine_a, first), ("B", machine_b, second)):
        print(f"{letter}: {path}: {machine.get('gpu') or machine.get('cpu')}, torch {machine.get('torch')}")
    print("ours ÷ baseline of the same run, medians; faster or slower where the quartiles are apart\n")
    print("\n".join(comparison(old, new)))

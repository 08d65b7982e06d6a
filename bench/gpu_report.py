"""The report of bench/gpu.py: results of steps in a JSON file, and the tables made of them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.gpu_probe import GIB
from plan.fit import RESERVE
from text.files import whole

# Figures in bytes, of which the table of memory is made
MEMORY = ("planned", "peak", "context", "gaps", "eager_peak", "eager_context", "eager_gaps")
Result = dict[str, Any]  # of a step: facts, checks, figures, note; in the file with KEYS
KEYS: dict[str, Any] = {
    **{"step": int, "name": str, "card": str, "tiny": bool, "torch": str, "seconds": int | float},
    **{"passed": bool | None, "missed": str, "facts": list, "checks": dict, "figures": dict},
}


def read_report(path: Path) -> list[Result]:
    """The results so far. Raises ValueError for a file that is not such a report."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError("not a list of results")
        for i, row in enumerate(found, 1):
            if bad := [k for k, kind in KEYS.items() if not isinstance(row.get(k), kind)]:
                raise ValueError(f"result {i} has no {', '.join(bad)}, or another kind of it")
            if not is_result(row):
                raise ValueError(f"result {i} has values that no step measures")
    except (ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is no report of this bench ({e}); choose another --report") from e
    return found


def is_result(row: Any) -> bool:
    """Whether a row out of a file has what the tables are made of."""
    if not isinstance(row, dict) or not isinstance(row.get("figures"), dict):
        return False
    given = {k: v for k in MEMORY if (v := row["figures"].get(k)) is not None}
    measured = [p for p in ("", "eager_") if f"{p}peak" in given]
    seconds = row.get("seconds", 0)
    facts, checks = row.get("facts", []), row.get("checks", {})
    return (
        whole(row.get("step"))
        and isinstance(row.get("card"), str)
        and isinstance(row.get("tiny"), bool)
        and isinstance(row.get("name", ""), str)
        and "passed" in row
        and isinstance(row["passed"], bool | None)
        and type(seconds) in (int, float)
        and 0 <= seconds < 2**48
        and isinstance(facts, list)
        and isinstance(checks, dict)
        and all(isinstance(f, str) for f in facts)
        and all(type(v) in (int, float) and 0 <= v < 2**63 for v in given.values())
        and all(f"{p}{k}" in given for p in measured for k in ("context", "gaps"))
        and ("planned" not in row["figures"] or given.get("planned", 0) > 0)
    )


def newest(results: Iterable[Result], card: str, tiny: bool) -> dict[int, Result]:
    """The last result of each step on a card, in the steps' order."""
    found = {r["step"]: r for r in results if r["card"] == card and r["tiny"] == tiny}
    return dict(sorted(found.items()))


def judge(found: Result) -> tuple[bool | None, str]:
    """Whether a step passed, None for one that was skipped, and what was missed."""
    missed = "; ".join(name for name, holds in found["checks"].items() if not holds)
    if found["note"] or missed:
        return False, "; ".join(filter(None, (found["note"], missed)))
    return (True if found["checks"] else None), ""


def table(shown: dict[int, Result]) -> Iterator[str]:
    """The newest results in Markdown; nothing for none."""
    if not shown:
        return
    first = next(iter(shown.values()))
    versions = {"torch": first["torch"]} | shown.get(0, first)["figures"]
    known = ("torch", "cuda", "driver", "triton", "transformers")
    yield ", ".join([first["card"], *(f"{k} {versions[k]}" for k in known if versions.get(k))])
    yield "\n| step | what | measured | expected | passed | s |\n|---|---|---|---|---|---|"
    for n, r in shown.items():
        word = {True: "yes", False: f"**no**: {r['missed']}", None: "skipped"}[r["passed"]]
        cells = [str(n), r["name"], "; ".join(r["facts"]), "; ".join(r["checks"]), word]
        yield f"| {' | '.join(c.replace('|', '/') for c in cells)} | {r['seconds']:.0f} |"


def memory_table(shown: dict[int, Result]) -> Iterator[str]:
    """Planned and measured peaks in GiB, and what the planner's reserve should be."""
    rows = {r["name"]: r["figures"] for r in shown.values() if "planned" in r["figures"]}
    eager = {name: f.get("peak", f.get("eager_peak")) for name, f in rows.items()}
    if not any(eager.values()):
        return
    yield "| memory, GiB | batch | planned | measured | ratio | context | allocator's gaps |"
    yield "|---|---|---|---|---|---|---|"
    contexts = [0.0]
    for name, f in rows.items():
        peak, part = eager[name], "" if "peak" in f else "eager_"
        if peak:
            rest = f[f"{part}context"], f[f"{part}gaps"]
            contexts.append(rest[0] / GIB)
            sizes = (f["planned"], peak, GIB * peak / f["planned"], *rest)
            cells = " | ".join(f"{x / GIB:.3f}" for x in sizes)
            yield f"| {name} | {f.get('batch_size', 1)} | {cells} |"
    reserve = RESERVE["cuda"] / GIB
    context = f"contexts take at most {max(contexts):.2f} GiB; gaps are filled when memory is short"
    yield f"\nthe planner reserves {reserve:.2f} GiB: {context}"

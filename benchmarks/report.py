"""Tables and pictures of what the benches measured.

python benchmarks/report.py            renews the tables of docs/kernels.md, and the results' pictures
python benchmarks/report.py FOLDER     prints the tables of a folder, also of runs that were cut off
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rows import Document, documents
from training_rows import place

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "kernels.md",)
# A comment that names a table, and what stands below it up to the next comment.
MARKED = re.compile(r"^<!-- ((?:cpu|gpu) \w+) -->\n(.*?)^<!-- end -->", re.MULTILINE | re.DOTALL)
NAMED = ("ours", "compile", "liger")  # contenders with a column of their own
TRAININGS = ("training", "deep")  # documents of trainings, not of ops
Row = dict[str, Any]
Key = tuple[str, str]  # case and dtype


def by_case(rows: Iterable[Row], figure: str, combine: Callable[[list[float]], float] = sum) -> dict[Key, Any]:
    """Return a figure by case and contender, of forward and backward together."""
    parts: dict[Key, dict[str, list[float]]] = {}
    for row in rows:
        if row.get(figure) is not None:
            parts.setdefault((row["case"], row["dtype"]), {}).setdefault(row["contender"], []).append(row[figure])
    return {case: {name: combine(values) for name, values in each.items()} for case, each in parts.items()}


def speedup(rows: list[Row], other: str) -> str:
    """Return how many times faster ours is than another contender: geometric mean and, in parentheses, worst case."""
    times = by_case(rows, "ms_50").values()
    ratios = [case[other] / case["ours"] for case in times if other in case and "ours" in case]
    return f"{statistics.geometric_mean(ratios):.1f}x ({min(ratios):.1f}x)" if ratios else ""


def memory(rows: list[Row]) -> str:
    """Return ours against eager's highest allocation, over the cases where eager allocates anything."""
    peaks = [case for case in by_case(rows, "peak_mib", max).values() if "ours" in case]
    ratios = [case["ours"] / case["eager"] for case in peaks if (case.get("eager") or 0) > 0.01]
    return f"{statistics.geometric_mean([max(r, 1e-3) for r in ratios]):.2f}x" if ratios else ""


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n{rows}"


def cpu_kernels(found: list[Document]) -> str:
    """Return a line an op: against eager, torch.compile and Liger, bandwidth, memory."""
    lines = []
    for document in found:
        rows = document["rows"]
        shares = [row["of_copy"] for row in rows if row["contender"] == "ours" and row.get("of_copy") is not None]
        if shares:
            gains = [speedup(rows, other) for other in ("eager", "compile", "liger")]
            lines.append([f"`{document['op']}`", *gains, f"{statistics.median(shares):.2f}", memory(rows)])
    head = [
        "op",
        "against eager",
        "torch.compile",
        "Liger",
        "bandwidth, share of a copy's",
        "peak memory against eager",
    ]
    return table(head, lines)


def figure(row: Row) -> float | None:
    """Return a row's speed: TFLOP/s where the work is counted, else the share of a copy's bandwidth."""
    return row.get("tflop_per_s") or row.get("of_copy")


def spread(values: list[float]) -> str:
    """Return one value, or the lowest and the highest."""
    digits = 0 if max(values) >= 10 else 2
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def cell(rows: list[Row], contender: str) -> str:
    """Return a contender's speeds, forward / backward or both together; its note where it has none."""
    own = [row for row in rows if row["contender"] == contender]
    parts = []
    for direction in ("forward", "backward", "both"):
        values = [value for row in own if row.get("direction", "both") == direction and (value := figure(row))]
        parts.append(spread(values) if values else "")
    if parts[1]:
        return f"{parts[0] or '–'} / {parts[1]}"
    notes = [row["note"] for row in own if row.get("note")]
    return parts[0] or parts[2] or (notes[0] if notes else "")


def speeds(rows: list[Row]) -> list[str]:
    """Return the cells of a line of speeds: ours, torch.compile, Liger, others."""
    others = [name for name in dict.fromkeys(row["contender"] for row in rows) if name not in NAMED]
    texts = [(name, cell(rows, name)) for name in others]
    return [*(cell(rows, name) for name in NAMED), "; ".join(f"{name}: {text}" for name, text in texts if text)]


def unit(document: Document) -> str:
    """Return an op's name, and its unit where it isn't a share of a copy's bandwidth."""
    return f"`{document['op']}`" + (", TFLOP/s" if any(row.get("tflop_per_s") for row in document["rows"]) else "")


def timed(document: Document) -> list[Row]:
    """Return the rows of an op that aren't the host's."""
    return [row for row in document["rows"] if row.get("host_us") is None]


def gpu_kernels(found: list[Document]) -> str:
    """Return a line an op: the range of its speeds over the cases, and the host's time against eager's."""
    lines = [
        [unit(document), *speeds(timed(document)), host_ratio(document)]
        for document in found
        if document["op"] not in TRAININGS and any(figure(row) for row in timed(document))
    ]
    return table(["op", "ours", "torch.compile", "Liger", "others", "host time against eager"], lines)


def gpu_cases(found: list[Document]) -> str:
    """Return a line a case."""
    lines = []
    for document in found:
        rows = timed(document)
        if document["op"] in TRAININGS:
            continue
        for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
            own = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
            lines.append([unit(document), case, dtype, *speeds(own)])
    return table(["op", "case", "dtype", "ours", "torch.compile", "Liger", "others"], lines)


def host_times(document: Document) -> dict[str, dict[str, float]]:
    """Return microseconds by what is called and contender: forward, and forward and backward together."""
    found: dict[str, dict[str, float]] = {}
    rows = [row for row in document["rows"] if row.get("host_us") is not None]
    apart = any(row["direction"] == "forward" for row in rows)
    for row in rows:
        if row["direction"] == "forward":
            found.setdefault(f"{row['case']}, forward", {})[row["contender"]] = row["host_us"]
        name = f"{row['case']}, forward + backward" if apart else row["case"]
        if row["direction"] != "forward" or any(
            r["direction"] == "backward" and r["contender"] == row["contender"] for r in rows
        ):
            whole = found.setdefault(name, {})
            whole[row["contender"]] = whole.get(row["contender"], 0) + row["host_us"]
    return found


def host_ratio(document: Document) -> str:
    """Return ours against eager's time of the host, over its cases."""
    ratios = [
        times["ours"] / times["eager"] for times in host_times(document).values() if {"ours", "eager"} <= {*times}
    ]
    return f"{spread(ratios)}x" if ratios else ""


def gpu_host(found: list[Document]) -> str:
    """Return a line a tiny case: the host's time to enqueue it, in microseconds."""
    lines = []
    for document in found:
        for case, times in host_times(document).items():
            named = [f"{times[name]:.0f}" if name in times else "" for name in ("ours", "eager", "compile", "liger")]
            others = [f"{n}: {us:.0f}" for n, us in times.items() if n not in ("ours", "eager", "compile", "liger")]
            lines.append([f"`{document['op']}`", case, *named, "; ".join(others)])
    return table(["op", "call", "ours", "eager", "torch.compile", "Liger", "others"], lines)


def trainings(found: list[Document]) -> str:
    """Return a table a case: memory, time of equal work, both against training all layers at once; and the remarks."""
    parts = []
    for document in found:
        if document["op"] not in TRAININGS:
            continue
        for case in dict.fromkeys(row["case"] for row in document["rows"]):
            rows = [row for row in document["rows"] if row["case"] == case]
            parts.append(f"{case}:\n\n{training_table(sorted(rows, key=lambda row: place(row['contender'])))}")
        parts += [f"Note: {document['note']}.\n"] * bool(document["note"])
    return "\n".join(parts)


def training_table(rows: list[Row]) -> str:
    """Return a line a technique; columns that no row has a figure for are left out."""
    base = next((row for row in rows if row["contender"] == "end to end"), {})

    def against(figure: str, row: Row) -> str:
        value, whole = row.get(figure), base.get(figure)
        return "" if not value or not whole else f"{value / whole:.2f}"

    def number(figure: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
        return lambda row: "" if row.get(figure) is None else form.format(row[figure] * factor)

    columns: dict[str, Callable[[Row], str]] = {
        "training": lambda row: row["contender"],
        "device, GiB allocated": number("peak_mib", "{:.2f}", 2**-10),
        "reserved": number("reserved_mib", "{:.2f}", 2**-10),
        "share": lambda row: against("peak_mib", row),
        "host, MiB": number("host_mib", "{:.0f}"),
        "ms of equal work": number("equal_ms", "{:.0f}"),
        "ratio": lambda row: against("equal_ms", row),
        "waiting": number("waited", "{:.1%}"),
        "ms per step": number("ms_50", "{:.1f}"),
        "GB/s each way": number("gb_per_s", "{:.1f}"),
        "of a copy's": number("of_copy", "{:.2f}"),
        "of its kernels' time": number("of_kernels", "{:.2f}"),
        "remarks": lambda row: row.get("note", ""),
    }
    cells = {head: [cell(row) for row in rows] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if any(column)}
    return table([*cells], [list(line) for line in zip(*cells.values(), strict=True)])


def heading(found: list[Document]) -> str:
    """Return what ran where and when."""
    lines = []
    for document in found:
        machine = document["machine"]
        text = f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit']}"
        remark = f": {document['remark']}" if document.get("remark") else ""
        lines.append(f"{text}, {machine['date']}{remark}.")
    return "\n".join(dict.fromkeys(lines)) + "\n"


GPU_TABLES: dict[str, Callable[[list[Document]], str]] = {
    "gpu kernels": gpu_kernels, "gpu cases": gpu_cases, "gpu host": gpu_host, "gpu training": trainings,
}  # fmt: skip


def section(name: str) -> str:
    """Return a page's table by the name in its comment."""
    if name == "cpu kernels":
        return cpu_kernels(documents(RESULTS / "cpu-2core"))
    if name == "cpu training":
        found = [document for document in documents(RESULTS / "cpu-2core") if document["op"] in TRAININGS]
        return f"{heading(found)}\n{trainings(found)}"
    machines = [documents(folder) for folder in sorted(RESULTS.iterdir()) if not folder.name.startswith("cpu")]
    return "\n".join(f"{heading(found)}\n{GPU_TABLES[name](found)}" for found in machines)


def renewed(page: str) -> str:
    """Return a page with its tables made anew."""
    return MARKED.sub(lambda match: f"<!-- {match.group(1)} -->\n{section(match.group(1))}<!-- end -->", page)


def print_tables(folder: Path) -> None:
    """Print the tables of a folder."""
    found = documents(folder)
    if any(document["machine"].get("type") == "cuda" for document in found):
        print(heading(found), *(make(found) for make in GPU_TABLES.values()), sep="\n")
    else:
        print(cpu_kernels(found), trainings(found), sep="\n")


def renew() -> None:
    """Renew the pages and the pictures of the CPU's results."""
    from pictures import draw

    for path in PAGES:
        path.write_text(renewed(path.read_text()))
    for document in (d for d in documents(RESULTS / "cpu-2core") if d["op"] not in TRAININGS):
        draw(document, RESULTS / "cpu-2core" / f"{document['op']}.png")


if __name__ == "__main__":
    print_tables(Path(sys.argv[1])) if len(sys.argv) > 1 else renew()

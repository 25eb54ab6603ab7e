"""Write docs/results.md, and the table in the README, from the records in results/.

    python benchmarks/results_page.py [--check]

With --check nothing is written; the exit code is 1 if a page is not what the records give.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wikitext2_page
from markup import MISSING, rough, rounded_up, table
from unrecurrent.files import write_text
from unrecurrent.records import Record, read_records

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, README = ROOT / "results", ROOT / "docs" / "results.md", ROOT / "README.md"
START, END = "<!-- jsb table: made by benchmarks/results_page.py -->", "<!-- end of table -->"
#: published levels of the JSB chorales, test nats a step: Bai, Kolter and Koltun 2018, table 1
PUBLISHED = {"rnn": 8.91, "lstm": 8.45, "tcn": 8.10}

#: column title → key of the record
COLUMNS = {
    "task": "task",
    "model": "model",
    "variant": "variant",
    "k": "k",
    "metric": "metric",
    "split": "split",
    "mean": "mean",
    "± s.d.": "std",
    "seeds": "seeds",
    "baseline": "baseline",
    "hidden": "hidden_size",
    "parameters": "params",
    "epochs": "epochs",
    "minutes": "minutes",
    "train tokens/s": "train_tokens_per_s",
    "score tokens/s": "score_tokens_per_s",
    "recurrence alone, tokens/s": "recurrence_tokens_per_s",
    "generate steps/s": "generate_steps_per_s",
    "peak MiB": "peak_memory_mib",
    "k* (1 %, estimate)": "k_star",
    "rate (proved)": "certified_rate",
    "horizon 10⁻² (proved)": "certified_horizon",
    "local rate (estimate)": "local_rate",
    "ran": "mode",
    "sweeps": "sweeps",
    "steps that wait": "sequential_depth",
    "mismatch (measured)": "max_mismatch",
    "error of any output (proved)": "bound",
}


def shown(value: object) -> str:
    """Return a value as it stands in a table."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def cell(key: str, value: Any) -> str:
    """Return a value of one column: what is proved is never shown as less than that."""
    return shown(rounded_up(value) if key == "certified_rate" else value)


def with_evidence(record: Record) -> Record:
    """Return a record beside what a parallel run showed about itself, where that is kept with it."""
    evidence = record.get("evidence")
    return {**evidence, **record} if isinstance(evidence, dict) else record


def section(path: Path) -> str:
    """Return one file of records as a titled table with its commands below."""
    records = [with_evidence(record) for record in read_records(path)]
    used = {title: key for title, key in COLUMNS.items() if any(r.get(key) is not None for r in records)}
    rows = [[cell(key, record.get(key)) for key in used.values()] for record in records]
    commands = dict.fromkeys(f"`{r['command']}` ({r['machine']}; {r['date']}; {r['commit']})" for r in records)
    made = "\n".join(f"- {command}" for command in commands)
    return f"## {path.relative_to(RESULTS).with_suffix('')}\n\n{table(list(used), rows)}\n\nMade by\n\n{made}\n"


def results_page() -> str:
    """Return the page of all results."""
    about = (
        "# Results\n\nEvery table is generated from the records in `results/` by `make results`; do not edit this"
        " page.\nWhat is headed *proved* holds for all inputs within the certificate's assumptions; what is headed\n"
        "*estimate* was measured. How each file is made is in `results/README.md`.\n"
    )
    return "\n".join([about, *(section(path) for path in sorted(RESULTS.rglob("*.json")))])


def jsb_table(records: Sequence[Record]) -> str:
    """Return the table the README shows."""
    header = ["model", "sees", "test nats a step", "published", "scores, steps/s", "uses (k*)", "proved horizon"]
    rows = []
    for record in records:
        name = record["model"] if record["k"] is None else f"{record['model']} (k = {record['k']})"
        rows.append(
            [
                name,
                shown(record.get("receptive_field")) if record.get("receptive_field") else "all",
                f"{record['mean']:.2f} ± {record['std']:.2f}",
                shown(PUBLISHED.get(record["model"])),
                rough(record["score_tokens_per_s"]),
                shown(record["k_star"]),
                shown(record["certified_horizon"]),
            ]
        )
    return table(header, rows)


def readme() -> str:
    """Return the README with its table made anew."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{jsb_table(read_records(RESULTS / 'jsb.json'))}\n{END}{after}"


def main() -> int:
    """Write the pages, or check them."""
    pages = {PAGE: results_page(), README: readme()}
    if wikitext2_page.records():
        pages[wikitext2_page.PAGE] = wikitext2_page.page()
    if (drawing := wikitext2_page.figure()) is not None:
        pages[wikitext2_page.FIGURE] = drawing
    if "--check" not in sys.argv[1:]:
        for path, text in pages.items():
            write_text(path, text)
        return 0
    stale = [str(path.relative_to(ROOT)) for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    for name in stale:
        print(f"{name} is not what the records give: run `make results`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables and charts of a result: `python benchmarks/report.py RESULT.json`.

pytest benchmarks/ --benchmark-json=RESULT.json      measures; on a GPU gpu_run.sh, in parts: give them all
python benchmarks/report.py RESULT.json              writes RESULT.md and a PNG for each chart
python benchmarks/report.py RESULT.json --publish N  keeps the result and those files as results/N.*, writes the tables
                                                     into docs/benchmarks.md and four ratios into README.md, between
                                                     the marks for N
"""

import argparse
import json
import re
from pathlib import Path

from charts import draw
from figures import markdown, short
from provenance import RESULTS, ROOT


def merged(results):
    """One result of several, which parts of one run wrote: on one machine, with the same code."""

    def origin(result):
        machine, commit = result["machine_info"], result["commit_info"]
        return result["code"], machine["gpu"], machine["versions"], commit["id"], commit["dirty"]

    for part in results[1:]:
        if origin(part) != origin(results[0]):
            raise SystemExit("the results do not belong together: another machine, other versions or another commit")
    return results[0] | {"benchmarks": [benchmark for result in results for benchmark in result["benchmarks"]]}


def published(result):
    """A result without the time of every single round and without the name of the computer."""
    result = json.loads(json.dumps(result))
    result["machine_info"].pop("node", None)
    for benchmark in result["benchmarks"]:
        benchmark["stats"].pop("data", None)
    return result


def page_with(page, kind, name, figures):
    """A page's text with `figures` between its marks for `name`: <!-- KIND: NAME --> and <!-- end of KIND -->."""
    pattern = re.compile(rf"(<!-- {kind}: {re.escape(name)} -->\n).*?(<!-- end of {kind} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"there are no marks for {name}: put <!-- {kind}: {name} --> and <!-- end of {kind} --> in")
    return pattern.sub(lambda marks: marks[1] + figures + marks[2], page)


def pages(result, name):
    """The pages that show a result, by their paths in the repository: the kind of their marks, and the text there."""
    return {
        "README.md": ("ratios", short(result)),
        "docs/benchmarks.md": ("figures", markdown(result, f"../benchmarks/results/{name}")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "result", type=Path, nargs="+", help="what pytest wrote with --benchmark-json, in parts or whole"
    )
    parser.add_argument(
        "--publish", metavar="NAME", help="keep it as benchmarks/results/NAME.json, and show it in docs/ and README.md"
    )
    options = parser.parse_args()
    result = merged([json.loads(file.read_text(encoding="utf-8")) for file in options.result])
    stem = options.result[0].with_suffix("")
    if options.publish:
        if result["commit_info"]["dirty"] and options.result[0].parent.resolve() != RESULTS:
            raise SystemExit("measured on changes that are not committed: commit, and measure again")
        stem, result = RESULTS / options.publish, published(result)
        texts = {}
        for page, (kind, figures) in pages(result, options.publish).items():
            texts[ROOT / page] = page_with((ROOT / page).read_text(encoding="utf-8"), kind, options.publish, figures)
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for file, text in texts.items():
            file.write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(result, stem.name, with_details=True), encoding="utf-8")
    print(f"{stem}.md", *draw(result, stem), sep="\n")


if __name__ == "__main__":
    main()

"""Tables and charts of a result: `python benchmarks/report.py RESULT.json`.

pytest benchmarks/ --benchmark-json=RESULT.json      measures; on a GPU gpu_run.sh, in parts: give them all
python benchmarks/report.py RESULT.json              writes RESULT.md, RESULT-speedup.png and RESULT-limit.png
python benchmarks/report.py RESULT.json --publish N  keeps the result and those files as results/N.*, and writes the
                                                     figures into the README, between its marks for N
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "ptuning-fast"
COMMANDS = {"cpu": "pytest benchmarks/ --benchmark-json=RESULT.json", "cuda": "benchmarks/gpu_run.sh OUT"}


def code(device):
    """The files that the stage runs on a device ("cuda" or "cpu"), and a SHA-256 over them."""
    if device == "cuda":
        files = sorted(ROOT.glob("kernels/prompt_embedding/*.py"))
    else:
        files = [ROOT / "ptuning_fast" / name for name in ("functional.py", "torch_path.py")]
    names = [file.relative_to(ROOT).as_posix() for file in files]
    return {"files": names, "sha256": digest(names)}


def digest(names):
    """SHA-256 over files of the repository, named by their paths in it."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def is_current(result):
    """Whether the code that was measured is the code that is here."""
    return digest(result["code"]["files"]) == result["code"]["sha256"]


# The tables. Each is a title and a list of rows of cells, the first of them the header.


def tables(infos):
    """The ratios, from the `extra_info` of each case: one table a direction and kind of time, one for whole steps."""
    stage = [info for info in infos if info["benchmark"] == "stage"]
    out = []
    for direction in dict.fromkeys(info["direction"] for info in stage):
        cases = [info for info in stage if info["direction"] == direction]
        for figure, kind in (("gpu_times_fast", "GPU time"), ("times_fast", "wall time")):
            found = [info for info in cases if figure in info]
            if found:
                out.append((f"Stage, {direction}, {kind}: how many times as long as {OURS}", _ratios(found, figure)))
    steps = [info for info in infos if info["benchmark"] == "training step"]
    for encoder in dict.fromkeys(info["shape"] for info in steps):
        out.append((f"Training step, {encoder}", _steps([info for info in steps if info["shape"] == encoder])))
    for info in infos:
        if info["benchmark"] == "host cost":
            where = "on a GPU" if info["device"] == "GPU" else "a stub of a GPU, torch.cat on the CPU"
            out.append(
                (f"Host time of an eager call of 16 tokens and 10 prompt rows, d = 768, B = 1; {where}", _host(info))
            )
    return out


def _host(info):
    rows = [["", "launches", f"{OURS}, us", "of torch.cat's", "of its dispatch alone (d = 8)"]]
    for case in info["cases"]:
        figures = _spread(case["us"], 1), _spread(case["of_torch_cat"]), _spread(case["of_dispatch"])
        rows.append([case["case"], str(case["launches"]), *figures])
    parts = ", ".join(f"{name} {time:.1f}" for name, time in info["cases"][0]["parts"].items())
    rows.append([f"of which, us: {parts}", *[""] * 4])
    return rows


def _ratios(cases, figure):
    names = [name for name in dict.fromkeys(info["implementation"] for info in cases) if name != OURS]
    rows = [["shape (B, n, m, d)", *names, "noise", "GB/s", "share of a copy", "memory", "results"]]
    for shape, dtype in dict.fromkeys((info["shape"], info["dtype"]) for info in cases):
        of = {info["implementation"]: info for info in cases if (info["shape"], info["dtype"]) == (shape, dtype)}
        ours, plain = of.get(OURS), of.get("torch.cat")
        one = next(iter(of.values()))
        memory = "" if None in (ours, plain) else f"{ours['peak_mib'] / plain['peak_mib']:.2f} of torch.cat's"
        rows.append(
            [
                f"{shape} ({', '.join(str(size) for size in one['sizes'].values())}) {dtype}",
                *(_spread(of[name][figure]) if name in of else "" for name in names),
                f"{ours[figure][0]:.2f} to {ours[figure][2]:.2f}" if ours else "",
                f"{ours['gb_per_s']:.1f}" if ours else "",
                _spread(ours["share_of_copy"]) if ours else "",
                memory,
                "all equal" if all(info["match"].startswith("equal") for info in of.values()) else "see the details",
            ]
        )
    return rows


def _steps(cases):
    plain = next((info for info in cases if info["implementation"] == "torch.cat"), None)
    in_all = plain and plain.get("times_fast_in_all")  # batches are not of one size; older results do not have it
    rows = [["implementation", "examples/s", "times as fast as torch.cat", "peak memory, MiB", "first step"]]
    if in_all:
        rows[0].insert(3, "in all")
    for info in cases:
        # Both were measured in pairs with the same third.
        ratio = [plain["times_fast"][1] / time for time in reversed(info["times_fast"])] if plain else None
        rows.append(
            [
                info["implementation"],
                f"{info['examples_per_s']:.1f}",
                "1" if info is plain else _spread(ratio) if ratio else "",
                f"{info['peak_mib']:.0f}",
                info["match"],
            ]
        )
        if in_all:
            rows[-1].insert(3, "1" if info is plain else f"{in_all / info['times_fast_in_all']:.2f}")
    return rows


def details(infos):
    """Every case of the stage by itself."""
    rows = [["case", "implementation", "time, us", "GB/s", "share of a copy", "peak memory, MiB", "result"]]
    for info in infos:
        if info["benchmark"] == "stage":
            rows.append(
                [
                    f"{info['shape']} {info['dtype']} {info['direction']}",
                    info["implementation"],
                    _spread(info.get("gpu_us", info["wall_us"]), 1),
                    f"{info['gb_per_s']:.1f}",
                    _spread(info["share_of_copy"]),
                    f"{info['peak_mib']:.2f}",
                    info["match"],
                ]
            )
    return "The stage, case by case", rows


def _spread(quartiles, digits=2):
    low, median, high = (f"{value:.{digits}f}" for value in quartiles)
    return f"{median} ({low} to {high})"


def text(infos):
    """The tables for a terminal."""
    lines = []
    for title, rows in tables(infos):
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["", f"{title} (median, quartiles)"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def markdown(result, name, with_details=False):
    """The tables, the machine and the charts of a result, for a Markdown file that lies beside the charts."""
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    command = COMMANDS["cuda" if result["machine_info"]["gpu"] else "cpu"]
    lines = [f"Measured on {_machine(result)}", f"by `{command}`.", ""]
    if not is_current(result):
        lines += [f"The code has changed since: these figures belong to commit {_commit(result)}.", ""]
    for title, rows in [*tables(infos), *([details(infos)] if with_details else [])]:
        head, *body = ("| " + " | ".join(row) + " |" for row in rows)
        lines += [f"{title} (median, quartiles):", "", head, "|" + " --- |" * len(rows[0]), *body, ""]
    for chart, words in CHARTS.items():
        lines += [f"![{words}]({name}-{chart}.png)", ""]
    return "\n".join(lines)


def _machine(result):
    machine, versions = result["machine_info"], result["machine_info"]["versions"]
    where = machine["gpu"] or f"{machine['cpu']['brand_raw']} ({machine['threads']} threads)"
    packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    return f"{where} with {packages}, at commit {_commit(result)}"


def _commit(result):
    return result["commit_info"]["id"][:10] + (" with changes" if result["commit_info"]["dirty"] else "")


# The charts.

CHARTS = {"speedup": "Speedup over each opponent", "limit": "Distance from the bandwidth limit"}


def draw(result, stem):
    """Write `stem`-speedup.png and `stem`-limit.png."""
    import matplotlib

    matplotlib.use("Agg")
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    stage = [info for info in infos if info["benchmark"] == "stage"]
    speedup = "gpu_times_fast" if all("gpu_times_fast" in info for info in stage) else "times_fast"
    kind = "GPU time" if speedup == "gpu_times_fast" else "wall time"
    others = [info for info in stage if info["implementation"] != OURS]
    _bars(others, speedup, f"times as long as {OURS} ({kind})", f"{OURS} = 1", f"{stem}-speedup.png")
    _bars(stage, "share_of_copy", "share of the bandwidth of a copy", "a copy of as many bytes", f"{stem}-limit.png")


def _bars(infos, figure, words, line, path):
    from matplotlib import pyplot

    directions = list(dict.fromkeys(info["direction"] for info in infos))
    names = list(dict.fromkeys(info["implementation"] for info in infos))
    places = list(dict.fromkeys(f"{info['shape']}\n{info['dtype']}" for info in infos))
    chart, panels = pyplot.subplots(
        1, len(directions), figsize=(2.5 + 5.5 * len(directions), 4), sharey=True, squeeze=False
    )
    for panel, direction in zip(panels[0], directions):
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            found = {
                f"{info['shape']}\n{info['dtype']}": info[figure]
                for info in infos
                if (info["implementation"], info["direction"]) == (name, direction)
            }
            x = [places.index(place) + (number - (len(names) - 1) / 2) * width for place in found]
            low, middle, high = zip(*found.values()) if found else ((), (), ())
            ends = [[m - lo for m, lo in zip(middle, low)], [hi - m for m, hi in zip(middle, high)]]
            panel.bar(x, middle, width, yerr=ends, label=name, error_kw={"linewidth": 0.8})
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--", label=line)
        panel.set_xticks(range(len(places)), places, fontsize=8)
        panel.set_title(direction, fontsize=10)
    panels[0][0].set_ylabel(words)
    panels[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    chart.tight_layout()
    chart.savefig(path, dpi=110)
    pyplot.close(chart)


# The files.


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


def readme_with(readme, name, figures):
    """The README's text with `figures` between its marks for `name`."""
    pattern = re.compile(rf"(<!-- figures: {re.escape(name)} -->\n).*?(<!-- end of figures -->)", re.DOTALL)
    if not pattern.search(readme):
        raise SystemExit(
            f"README.md has no marks for {name}: put <!-- figures: {name} --> and <!-- end of figures --> in"
        )
    return pattern.sub(lambda marks: marks[1] + figures + marks[2], readme)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "result", type=Path, nargs="+", help="what pytest wrote with --benchmark-json, in parts or whole"
    )
    parser.add_argument(
        "--publish", metavar="NAME", help="keep it as benchmarks/results/NAME.json, and show it in README.md"
    )
    options = parser.parse_args()
    result = merged([json.loads(file.read_text(encoding="utf-8")) for file in options.result])
    stem = options.result[0].with_suffix("")
    if options.publish:
        if result["commit_info"]["dirty"] and options.result[0].parent.resolve() != RESULTS:
            raise SystemExit("measured on changes that are not committed: commit, and measure again")
        stem, result = RESULTS / options.publish, published(result)
        readme = ROOT / "README.md"
        figures = markdown(result, f"benchmarks/results/{options.publish}")
        text = readme_with(readme.read_text(encoding="utf-8"), options.publish, figures)
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        readme.write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(result, stem.name, with_details=True), encoding="utf-8")
    draw(result, stem)
    print(*(f"{stem}{end}" for end in (".md", "-speedup.png", "-limit.png")), sep="\n")


if __name__ == "__main__":
    main()

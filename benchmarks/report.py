"""Tables and charts of a result: `python benchmarks/report.py RESULT.json`.

pytest benchmarks/ --benchmark-json=RESULT.json      measures; on a GPU gpu_run.sh, in parts: give them all
python benchmarks/report.py RESULT.json              writes RESULT.md and a PNG for each chart
python benchmarks/report.py RESULT.json --publish N  keeps the result and those files as results/N.*, writes the tables
                                                     into docs/benchmarks.md and four ratios into README.md, between
                                                     the marks for N
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "ptuning-fast"
AUTOCAST = "torch.cat, bf16 autocast"
COMMANDS = {"cpu": "pytest benchmarks/ --benchmark-json=RESULT.json", "cuda": "benchmarks/gpu_run.sh OUT"}


def code(device):
    """The files that the stage runs on a device ("cuda" or "cpu"), and a SHA-256 over them."""
    if device == "cuda":
        files = sorted(ROOT.glob("kernels/prompt_embedding/*.py"))
    else:
        files = sorted(ROOT.glob("ptuning_fast/op/*.py"))
    names = [file.relative_to(ROOT).as_posix() for file in files]
    return {"files": names, "sha256": digest(names)}


def digest(names):
    """SHA-256 over files of the repository, named by their paths in it."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def is_current(result):
    """Whether the code that was measured is the code that is here; it is not where one of its files is gone."""
    names = result["code"]["files"]
    return all((ROOT / name).is_file() for name in names) and digest(names) == result["code"]["sha256"]


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
    for kind in ("training step", "first token"):
        steps = [info for info in infos if info["benchmark"] == kind]
        for shape in dict.fromkeys(info["shape"] for info in steps):
            cases = [info for info in steps if info["shape"] == shape]
            out.append((f"{kind.capitalize()}, {_case(cases[0])}", _steps(cases)))
    for info in infos:
        if info["benchmark"] == "host cost":
            where = "on a GPU" if info["device"] == "GPU" else "a stub of a GPU, torch.cat on the CPU"
            out.append(
                (f"Host time of an eager call of 16 tokens and 10 virtual tokens, d = 768, B = 1; {where}", _host(info))
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
    rows = [["shape (B, n, m, d)", *names, "noise", "GB/s", "fraction of memcpy bandwidth", "memory", "results"]]
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
    overall = plain and plain.get("times_fast_in_all")  # batches are not of one size; older results do not have it
    rows = [["implementation", "examples/s", "times as fast as torch.cat", "peak memory, MiB", "first step"]]
    if overall:
        rows[0].insert(3, "overall")
    for info in cases:
        ratio = _times_as_fast(info, plain) if plain else None
        rows.append(
            [
                info["implementation"],
                f"{info['examples_per_s']:.1f}",
                "1" if info is plain else _spread(ratio) if ratio else "",
                f"{info['peak_mib']:.0f}",
                info["match"],
            ]
        )
        if overall:
            rows[-1].insert(3, "1" if info is plain else f"{overall / info['times_fast_in_all']:.2f}")
    return rows


def _times_as_fast(info, plain):
    """Quartiles of the speed of a step beside torch.cat's: both were measured in pairs with the same third."""
    return [plain["times_fast"][1] / time for time in reversed(info["times_fast"])]


# What the README shows: the first four of these that a result has.
RATIOS = {
    f"{OURS}, packed and pruned": "packed and pruned, fp32",
    f"{OURS}, packed, pruned, bf16 weights": "packed and pruned, frozen weights in bf16 (`torch.cat` in fp32)",
    f"{OURS}, auto": "auto, head on labelled rows",
    "host cost": "host time of an eager call of the op",
    f"{OURS}, shared": "shared",
    f"{OURS}, packed": "packed, fp32",
    f"{OURS}, prepend": "prepend, fp32",
}


def ratios(infos):
    """Up to four rows: [mode, case, how many times as fast as torch.cat, or how many times as long on the host]."""
    rows, steps = [], _with_plain(infos)
    for name, words in RATIOS.items():
        if name == "host cost":
            host = next((info for info in infos if info["benchmark"] == "host cost"), None)
            if host is not None:
                where = "a GPU" if host["device"] == "GPU" else "a stub GPU driver, torch.cat on the CPU"
                case = host["cases"][0]
                times = f"{_spread(case['of_torch_cat'])} times the time"
                rows.append(
                    [words, f"{case['case']}, on {where}", f"{times}; {case['of_dispatch'][1]:.2f} of its dispatch"]
                )
            continue
        for info, plain in steps:
            if info["implementation"] == name:
                times = f"{_spread(_times_as_fast(info, plain))} times as fast"
                same = next((one for one, of in steps if of is plain and one["implementation"] == AUTOCAST), None)
                if "bf16" in name and same:
                    ratio = same["times_fast"][1] / info["times_fast"][1]
                    times += f"; {ratio:.2f} times as fast as its bf16 autocast"
                rows.append([words, _case(info), times])
                break
    return rows[:4]


def _with_plain(infos):
    """The training steps in fp32 and others, each beside torch.cat's of the same case."""
    steps = [info for info in infos if info["benchmark"] == "training step"]
    plain = {info["shape"]: info for info in steps if info["implementation"] == "torch.cat"}
    return [(info, plain[info["shape"]]) for info in steps if info["shape"] in plain]


def _case(info):
    """The shape with the sizes that its name does not say."""
    sizes = [f"{name}={size}" for name, size in info.get("sizes", {}).items() if f"{name}=" not in info["shape"]]
    return ", ".join([info["shape"], *sizes]).replace("=<=", "<=").replace("<= ", "≤ ").replace("n≤", "n ≤")


def details(infos):
    """Every case of the stage by itself."""
    rows = [
        ["case", "implementation", "time, us", "GB/s", "fraction of memcpy bandwidth", "peak memory, MiB", "result"]
    ]
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
    for chart in charts(infos):
        lines += [f"![{CHARTS[chart]}]({name}-{chart}.png)", ""]
    return "\n".join(lines)


def short(result):
    """Four ratios with their machine, commit and command, for the README."""
    machine, infos = result["machine_info"], [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    command = COMMANDS["cuda" if machine["gpu"] else "cpu"]
    lines = ["| mode | case | beside `torch.cat` |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(row) + " |" for row in ratios(infos)]
    lines += ["", f"Median (quartiles) on {_where(machine)} with torch {machine['versions']['torch']}, at commit"]
    lines += [f"{_commit(result)}, by `{command}`.", ""]
    if not is_current(result):
        lines[-2] += " The code has changed since."
    return "\n".join(lines)


def _machine(result):
    machine, versions = result["machine_info"], result["machine_info"]["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    return f"{_where(machine)} with {packages}, at commit {_commit(result)}"


def _where(machine):
    return machine["gpu"] or f"{machine['cpu']['brand_raw']} ({machine['threads']} threads)"


def _commit(result):
    return result["commit_info"]["id"][:10] + (" with changes" if result["commit_info"]["dirty"] else "")


# The charts.

CHARTS = {
    "steps": "Training steps, times as fast as torch.cat",
    "speedup": "Speedup over each opponent",
    "limit": "Distance from the bandwidth limit",
}


def charts(infos):
    """The names of the charts that there are cases for."""
    stage = [info for info in infos if info["benchmark"] == "stage"]
    others = [info for info in stage if info["implementation"] != OURS]
    shown = {
        "steps": [info for info, plain in _with_plain(infos) if info is not plain],
        "speedup": others,
        "limit": stage,
    }
    return [chart for chart in CHARTS if shown[chart]]


def draw(result, stem):
    """Write `stem`-CHART.png of each chart that there are cases for; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    where, drawn = _where(result["machine_info"]), charts(infos)
    paths = {chart: f"{stem}-{chart}.png" for chart in drawn}
    if "steps" in drawn:
        _step_bars(_with_plain(infos), f"Training steps, wall time, on {where}", paths["steps"])
    stage = [info for info in infos if info["benchmark"] == "stage"]
    if "speedup" in drawn:
        speedup = "gpu_times_fast" if all("gpu_times_fast" in info for info in stage) else "times_fast"
        kind = "GPU time" if speedup == "gpu_times_fast" else "wall time"
        others = [info for info in stage if info["implementation"] != OURS]
        words = f"times as long as {OURS}", f"{OURS} = 1", f"Embedding stage, {kind}, on {where}"
        _bars(others, speedup, *words, paths["speedup"])
    if "limit" in drawn:
        words = "fraction of memcpy bandwidth", "memcpy of as many bytes", f"Embedding stage, bandwidth, on {where}"
        _bars(stage, "share_of_copy", *words, paths["limit"])
    return list(paths.values())


def _step_bars(steps, title, path):
    """A panel a case, a bar an implementation; ours in colour, torch.cat the line at 1."""
    from matplotlib import pyplot

    cases = {}
    for info, plain in steps:
        if info is not plain:
            cases.setdefault(_case(info), []).append((info["implementation"], _times_as_fast(info, plain)))
    chart, panels = pyplot.subplots(
        len(cases),
        1,
        figsize=(9, 0.8 + sum(0.75 + 0.26 * len(bars) for bars in cases.values())),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [1.2 + len(bars) for bars in cases.values()]},
    )
    for panel, (case, bars) in zip(panels[:, 0], cases.items()):
        names, quartiles = zip(*bars)
        low, middle, high = zip(*quartiles)
        ends = [[m - lo for m, lo in zip(middle, low)], [hi - m for m, hi in zip(middle, high)]]
        colours = ["tab:blue" if name.startswith(OURS) else "silver" for name in names]
        panel.barh(range(len(bars)), middle, 0.75, xerr=ends, color=colours, error_kw={"linewidth": 0.8})
        for place, (value, end) in enumerate(zip(middle, high)):
            panel.text(max(value, end) + 0.03, place, f"{value:.2f}", va="center", fontsize=8)
        panel.axvline(1, color="black", linewidth=0.8, linestyle="--")
        panel.set_yticks(range(len(bars)), names, fontsize=8)
        panel.set_ylim(len(bars) - 0.4, -0.6)
        panel.margins(x=0.08)
        panel.set_title(case, fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1][0].set_xlabel("times as fast as torch.cat (dashed line: torch.cat = 1); median, quartiles", fontsize=9)
    chart.suptitle(title, fontsize=11)
    chart.tight_layout()
    chart.savefig(path, dpi=110)
    pyplot.close(chart)


def _bars(infos, figure, words, line, title, path):
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
    chart.suptitle(title, fontsize=11)
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

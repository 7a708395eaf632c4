"""The tables of a result, for a terminal, docs/benchmarks.md and the README.

Each is a title and a list of rows of cells, the first of them the header.
"""

from charts import CHARTS, case_name, charts, times_as_fast, with_plain
from provenance import AUTOCAST, COMMANDS, OURS, commit_name, is_current, machine_name, measured_on


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
            out.append((f"{kind.capitalize()}, {case_name(cases[0])}", _steps(cases)))
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
        ratio = times_as_fast(info, plain) if plain else None
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
    rows, steps = [], with_plain(infos)
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
                times = f"{_spread(times_as_fast(info, plain))} times as fast"
                same = next((one for one, of in steps if of is plain and one["implementation"] == AUTOCAST), None)
                if "bf16" in name and same:
                    ratio = same["times_fast"][1] / info["times_fast"][1]
                    times += f"; {ratio:.2f} times as fast as its bf16 autocast"
                rows.append([words, case_name(info), times])
                break
    return rows[:4]


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
    lines = [f"Measured on {measured_on(result)}", f"by `{command}`.", ""]
    if not is_current(result):
        lines += [f"The code has changed since: these figures belong to commit {commit_name(result)}.", ""]
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
    lines += ["", f"Median (quartiles) on {machine_name(machine)} with torch {machine['versions']['torch']}, at commit"]
    lines += [f"{commit_name(result)}, by `{command}`.", ""]
    if not is_current(result):
        lines[-2] += " The code has changed since."
    return "\n".join(lines)

"""The charts of a result, with matplotlib."""

from provenance import OURS, machine_name

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
        "steps": [info for info, plain in with_plain(infos) if info is not plain],
        "speedup": others,
        "limit": stage,
    }
    return [chart for chart in CHARTS if shown[chart]]


def draw(result, stem):
    """Write `stem`-CHART.png of each chart that there are cases for; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    where, drawn = machine_name(result["machine_info"]), charts(infos)
    paths = {chart: f"{stem}-{chart}.png" for chart in drawn}
    if "steps" in drawn:
        _step_bars(with_plain(infos), f"Training steps, wall time, on {where}", paths["steps"])
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
            cases.setdefault(case_name(info), []).append((info["implementation"], times_as_fast(info, plain)))
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


def times_as_fast(info, plain):
    """Quartiles of the speed of a step beside torch.cat's: both were measured in pairs with the same third."""
    return [plain["times_fast"][1] / time for time in reversed(info["times_fast"])]


def with_plain(infos):
    """The training steps in fp32 and others, each beside torch.cat's of the same case."""
    steps = [info for info in infos if info["benchmark"] == "training step"]
    plain = {info["shape"]: info for info in steps if info["implementation"] == "torch.cat"}
    return [(info, plain[info["shape"]]) for info in steps if info["shape"] in plain]


def case_name(info):
    """The shape with the sizes that its name does not say."""
    sizes = [f"{name}={size}" for name, size in info.get("sizes", {}).items() if f"{name}=" not in info["shape"]]
    return ", ".join([info["shape"], *sizes]).replace("=<=", "<=").replace("<= ", "≤ ").replace("n≤", "n ≤")

"""The benchmarks' report, and that the pages' figures are what it made of the results that are kept."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import charts
    import figures
    import provenance
    import report
finally:
    sys.path.pop(0)


@pytest.fixture
def result():
    return json.loads(RESULTS[0].read_text(encoding="utf-8"))


def test_the_pages_show_what_the_report_makes_of_the_results():
    """Made by `report.py --publish`, not typed; and where the code has changed since, it says so."""
    for page in ("README.md", "docs/benchmarks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = dict(re.findall(r"<!-- (?:ratios|figures): (.*?) -->\n(.*?)<!-- end of", text, re.DOTALL))
        assert sorted(blocks) == sorted(file.stem for file in RESULTS)
        for file in RESULTS:
            _, expected = report.pages(json.loads(file.read_text(encoding="utf-8")), file.stem)[page]
            assert blocks[file.stem] == expected, (
                f"run: python benchmarks/report.py benchmarks/results/{file.name} --publish {file.stem}"
            )


def test_what_is_kept_beside_a_result():
    for file in RESULTS:
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert file.with_suffix(".md").read_text(encoding="utf-8") == figures.markdown(kept, file.stem, True)
        for chart in charts.charts([benchmark["extra_info"] for benchmark in kept["benchmarks"]]):
            assert (file.parent / f"{file.stem}-{chart}.png").read_bytes().startswith(b"\x89PNG")


def test_results_name_their_commit_and_no_computer():
    for file in RESULTS:
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert re.fullmatch("[0-9a-f]{40}", kept["commit_info"]["id"])
        assert not kept["commit_info"]["dirty"]
        assert "node" not in kept["machine_info"]
        assert kept["code"]["files"]


def test_changed_code_is_said(result):
    result["code"] = provenance.code("cpu")
    assert result["code"]["files"]
    assert "has changed since" not in figures.markdown(result, "x") + figures.short(result)
    commit = result["commit_info"]["id"][:10]
    for other in ({"sha256": "0" * 64}, {"files": ["ptuning_fast/gone.py"]}):
        changed = result | {"code": result["code"] | other}
        assert f"The code has changed since: these figures belong to commit {commit}." in figures.markdown(changed, "x")
        assert "The code has changed since." in figures.short(changed)


def test_ratios():
    """Each cell from the case that it belongs to; a case that was not measured leaves its cell empty."""

    def case(name, shape, ratio, **more):
        sizes = {"B": 1, "n": 2, "m": 3, "d": 4}
        info = {"benchmark": "stage", "implementation": name, "shape": shape, "sizes": sizes, "dtype": "fp32"}
        info |= {"direction": "forward", "times_fast": ratio, "peak_mib": 2.0, "gb_per_s": 5.0}
        return info | {"share_of_copy": [0.8, 0.9, 1.0], "match": "equal"} | more

    infos = [
        case("torch.cat", "one", [1.1, 1.5, 1.9], peak_mib=4.0),
        case("PEFT", "one", [0.1, 0.2, 0.3]),
        case("ptuning-fast", "one", [0.98, 1.0, 1.02]),
        case("PEFT", "two", [3.0, 4.0, 5.0], match="not quite"),
    ]
    ((title, (head, one, two)),) = figures.tables(infos)
    assert title == "Stage, forward, wall time: how many times as long as ptuning-fast"
    row = dict(zip(head, one))
    assert row["shape (B, n, m, d)"] == "one (1, 2, 3, 4) fp32"
    assert row["torch.cat"] == "1.50 (1.10 to 1.90)"
    assert row["PEFT"] == "0.20 (0.10 to 0.30)"
    assert row["noise"] == "0.98 to 1.02"
    assert row["fraction of memcpy bandwidth"] == "0.90 (0.80 to 1.00)"
    assert row["memory"] == "0.50 of torch.cat's"
    assert row["results"] == "all equal"
    row = dict(zip(head, two))
    assert (row["torch.cat"], row["PEFT"], row["results"]) == ("", "4.00 (3.00 to 5.00)", "see the details")


def test_steps():
    """Speed beside torch.cat, from two ratios to the same third."""

    def case(name, ratio):
        info = {"benchmark": "training step", "implementation": name, "shape": "e", "dtype": "fp32"}
        return info | {"times_fast": ratio, "examples_per_s": 10.0, "peak_mib": 7.0, "match": "equal"}

    ((title, (head, plain, other)),) = figures.tables([case("torch.cat", [2, 3, 4]), case("x", [1.0, 1.5, 2.0])])
    assert title == "Training step, e"
    assert dict(zip(head, plain))["times as fast as torch.cat"] == "1"
    assert dict(zip(head, other))["times as fast as torch.cat"] == "2.00 (1.50 to 3.00)"
    assert "overall" not in head
    cases = case("torch.cat", [2, 3, 4]) | {"times_fast_in_all": 3.3}, case("x", [1, 1, 1]) | {"times_fast_in_all": 1.1}
    ((_, (head, _, other)),) = figures.tables(cases)
    assert dict(zip(head, other))["overall"] == "3.00"


def test_host_cost():
    host = {"us": [1, 2, 3], "of_torch_cat": [0.1, 0.2, 0.3], "of_dispatch": [0.4, 0.5, 0.6]}
    cases = [{"case": "forward", "launches": 1, "parts": {"checks": 1.25}} | host]
    ((title, (head, row, parts)),) = figures.tables([{"benchmark": "host cost", "device": "stub", "cases": cases}])
    assert "stub" in title
    row = dict(zip(head, row))
    assert (row[""], row["launches"], row["ptuning-fast, us"]) == ("forward", "1", "2.0 (1.0 to 3.0)")
    assert row["of torch.cat's"] == "0.20 (0.10 to 0.30)"
    assert row["of its dispatch alone (d = 8)"] == "0.50 (0.40 to 0.60)"
    assert parts[0] == "of which, us: checks 1.2"


def test_four_ratios():
    """The first four that a result has, in the order of figures.RATIOS, each beside torch.cat of the same shape."""

    def case(name, shape, *ratio):
        info = {"benchmark": "training step", "implementation": name, "shape": shape, "sizes": {"B": 8, "m": 10}}
        return info | {"times_fast": ratio}

    infos = [
        case("torch.cat", "x, m=10", 2, 2, 2),
        case("ptuning-fast, prepend", "x, m=10", 2, 2, 2),
        case("ptuning-fast, shared", "x, m=10", 1, 1, 1),
        case("torch.cat", "y", 3, 3, 3),
        case("ptuning-fast, packed and pruned", "y", 0.75, 1, 1.5),
        case("ptuning-fast, packed", "y", 1.5, 1.5, 1.5),
        case("ptuning-fast, packed", "no torch.cat", 1, 1, 1),
    ]
    first, second, third, fourth = figures.ratios(infos)
    assert first == ["packed and pruned, fp32", "y, B=8, m=10", "3.00 (2.00 to 4.00) times as fast"]
    assert second == ["shared", "x, m=10, B=8", "2.00 (2.00 to 2.00) times as fast"]
    assert (third[0], fourth[0]) == ("packed, fp32", "prepend, fp32")
    host = {"benchmark": "host cost", "device": "stub"}
    host["cases"] = [{"case": "forward", "of_torch_cat": [0.8, 0.84, 0.9], "of_dispatch": [0.9, 0.95, 1]}]
    rows = figures.ratios([*infos, host])
    assert len(rows) == 4
    assert rows[1][2] == "0.84 (0.80 to 0.90) times the time; 0.95 of its dispatch"
    half = [
        case("torch.cat, bf16 autocast", "y", 2, 2, 2),
        case("ptuning-fast, packed, pruned, bf16 weights", "y", 1, 1, 1),
    ]
    rows = figures.ratios([*infos, *half])
    assert rows[1][2] == "3.00 (3.00 to 3.00) times as fast; 2.00 times as fast as its bf16 autocast"


def test_pages_without_marks_are_refused():
    page = "a\n<!-- ratios: x -->\nold\n<!-- end of ratios -->\nb\n"
    assert report.page_with(page, "ratios", "x", "new\n") == page.replace("old", "new")
    with pytest.raises(SystemExit, match="no marks for y"):
        report.page_with(page, "ratios", "y", "new\n")


def test_parts_of_one_run(result):
    """What gpu_run.sh writes in parts is one result; parts of other runs are refused."""
    first, second = (result | {"benchmarks": result["benchmarks"][some]} for some in (slice(2), slice(2, 5)))
    assert report.merged([first, second])["benchmarks"] == result["benchmarks"][:5]
    for key, other in (("code", {}), ("commit_info", result["commit_info"] | {"id": "0"})):
        with pytest.raises(SystemExit, match="do not belong together"):
            report.merged([first, second | {key: other}])


def test_gpu_times_are_sums_from_mark_to_mark():
    """Without the gaps between kernels, in the order of the clock, and without what ran before the first mark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu_time
    finally:
        sys.path.pop(0)
    events = [
        (0, 9, "warm-up"),
        (10, 60, "erfinv_kernel"),
        (90, 94, "copy"),
        (60, 63, "cat"),
        (100, 150, "erfinv_kernel"),
    ]
    assert gpu_time.sums_between([*events, (151, 152, "cat")]) == [7, 1]


def test_command(tmp_path, result):
    """Markdown and charts beside any result, one case alone included; a chart without cases is left out."""
    pytest.importorskip("matplotlib", reason="the charts need matplotlib: pip install 'ptuning-fast[bench]'")

    def drawn(name, some):
        part = result | {"benchmarks": copy.deepcopy(some)}
        (tmp_path / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
        command = [sys.executable, ROOT / "benchmarks/report.py", tmp_path / f"{name}.json"]
        subprocess.run(command, check=True, capture_output=True)
        charts = sorted(tmp_path.glob(f"{name}-*.png"))
        assert all(chart.read_bytes().startswith(b"\x89PNG") for chart in charts)
        text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert re.findall(r"\((.*?png)\)", text) == [chart.name for chart in charts][::-1]
        return text, [chart.stem.partition("-")[2] for chart in charts]

    def of(benchmark):
        return [one for one in result["benchmarks"] if one["extra_info"]["benchmark"] == benchmark]

    text, charts = drawn("stage", of("stage")[:1])
    assert "| shape (B, n, m, d) |" in text
    assert charts == ["limit", "speedup"]
    assert drawn("steps", of("training step")[:2])[1] == ["steps"]


def test_uncommitted_figures_are_not_published(tmp_path, result):
    result["commit_info"]["dirty"] = True
    (tmp_path / "mine.json").write_text(json.dumps(result), encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks/report.py", tmp_path / "mine.json", "--publish", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "not committed" in run.stderr

"""The benchmarks' report, and that the README's figures are what it made of the results that are kept."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import report
    finally:
        sys.path.pop(0)
    return report


@pytest.fixture
def result():
    return json.loads(RESULTS[0].read_text(encoding="utf-8"))


def test_the_readme_shows_what_the_report_makes_of_the_results(report):
    """Made by `report.py --publish`, not typed; and where the code has changed since, it says so."""
    blocks = dict(re.findall(r"<!-- figures: (.*?) -->\n(.*?)<!-- end of figures -->", README, re.DOTALL))
    assert sorted(blocks) == sorted(file.stem for file in RESULTS)
    for file in RESULTS:
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert blocks[file.stem] == report.markdown(kept, f"benchmarks/results/{file.stem}"), (
            f"run: python benchmarks/report.py benchmarks/results/{file.name} --publish {file.stem}"
        )
        assert file.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(kept, file.stem, True)
        for chart in report.CHARTS:
            assert (file.parent / f"{file.stem}-{chart}.png").read_bytes().startswith(b"\x89PNG")


def test_results_name_their_commit_and_no_computer():
    for file in RESULTS:
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert re.fullmatch("[0-9a-f]{40}", kept["commit_info"]["id"])
        assert not kept["commit_info"]["dirty"]
        assert "node" not in kept["machine_info"]
        assert kept["code"]["files"]


def test_changed_code_is_said(report, result):
    result["code"]["sha256"] = report.digest(result["code"]["files"])
    assert "has changed since" not in report.markdown(result, "x")
    result["code"]["sha256"] = "0" * 64
    commit = result["commit_info"]["id"][:10]
    assert f"The code has changed since: these figures belong to commit {commit}." in report.markdown(result, "x")


def test_ratios(report):
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
    ((title, (head, one, two)),) = report.tables(infos)
    assert title == "Stage, forward, wall time: how many times as long as ptuning-fast"
    row = dict(zip(head, one))
    assert row["shape (B, n, m, d)"] == "one (1, 2, 3, 4) fp32"
    assert row["torch.cat"] == "1.50 (1.10 to 1.90)"
    assert row["PEFT"] == "0.20 (0.10 to 0.30)"
    assert row["noise"] == "0.98 to 1.02"
    assert row["share of a copy"] == "0.90 (0.80 to 1.00)"
    assert row["memory"] == "0.50 of torch.cat's"
    assert row["results"] == "all equal"
    row = dict(zip(head, two))
    assert (row["torch.cat"], row["PEFT"], row["results"]) == ("", "4.00 (3.00 to 5.00)", "see the details")


def test_steps(report):
    """Speed beside torch.cat, from two ratios to the same third."""

    def case(name, ratio):
        info = {"benchmark": "training step", "implementation": name, "shape": "e", "dtype": "fp32"}
        return info | {"times_fast": ratio, "examples_per_s": 10.0, "peak_mib": 7.0, "match": "equal"}

    ((title, (head, plain, other)),) = report.tables([case("torch.cat", [2, 3, 4]), case("x", [1.0, 1.5, 2.0])])
    assert title == "Training step, e"
    assert dict(zip(head, plain))["times as fast as torch.cat"] == "1"
    assert dict(zip(head, other))["times as fast as torch.cat"] == "2.00 (1.50 to 3.00)"
    assert "in all" not in head
    cases = case("torch.cat", [2, 3, 4]) | {"times_fast_in_all": 3.3}, case("x", [1, 1, 1]) | {"times_fast_in_all": 1.1}
    ((_, (head, _, other)),) = report.tables(cases)
    assert dict(zip(head, other))["in all"] == "3.00"


def test_host_cost(report):
    figures = {"us": [1, 2, 3], "of_torch_cat": [0.1, 0.2, 0.3], "of_dispatch": [0.4, 0.5, 0.6]}
    cases = [{"case": "forward", "launches": 1, "parts": {"checks": 1.25}} | figures]
    ((title, (head, row, parts)),) = report.tables([{"benchmark": "host cost", "device": "stub", "cases": cases}])
    assert "stub" in title
    row = dict(zip(head, row))
    assert (row[""], row["launches"], row["ptuning-fast, us"]) == ("forward", "1", "2.0 (1.0 to 3.0)")
    assert row["of torch.cat's"] == "0.20 (0.10 to 0.30)"
    assert row["of its dispatch alone (d = 8)"] == "0.50 (0.40 to 0.60)"
    assert parts[0] == "of which, us: checks 1.2"


def test_parts_of_one_run(report, result):
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
    """Markdown and charts beside any result, one case alone included."""
    pytest.importorskip("matplotlib", reason="the charts need matplotlib: pip install 'ptuning-fast[bench]'")
    stage = [one for one in result["benchmarks"] if one["extra_info"]["benchmark"] == "stage"]
    result["benchmarks"] = copy.deepcopy(stage[:1])
    (tmp_path / "mine.json").write_text(json.dumps(result), encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks/report.py", tmp_path / "mine.json"]
    subprocess.run(command, check=True, capture_output=True)
    assert "| shape (B, n, m, d) |" in (tmp_path / "mine.md").read_text(encoding="utf-8")
    for chart in ("speedup", "limit"):
        assert (tmp_path / f"mine-{chart}.png").read_bytes().startswith(b"\x89PNG")


def test_uncommitted_figures_are_not_published(tmp_path, result):
    result["commit_info"]["dirty"] = True
    (tmp_path / "mine.json").write_text(json.dumps(result), encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks/report.py", tmp_path / "mine.json", "--publish", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "not committed" in run.stderr

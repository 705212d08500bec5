"""findings.py: two arms end to end with a budget of one step, going on after a stop, refusals, and the page's numbers."""
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest

import cli
import findings
from conftest import ROOT
from connector import ConnectorConfig
from hub import InputError
from train import Config as Flags

BUDGET = ["--seeds=1", "--steps1=1", "--steps2=1", "--count=2"]


@pytest.fixture
def two_arms(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(findings, "ARMS", [("clip-layer2", "--connector=linear --layer=2"),
                                           ("dinov2-merged-mlp1", "--connector=comm_dino --dino_depth=1")])
    shutil.copy(ROOT / "docs" / "findings.md", "page.md")


def invented(arm, seed, rec, folder="out/findings", **changes):
    """A finished run that never ran: REC is `rec`, everything else 0.5."""
    budget = {"steps1": 1, "steps2": 1, "count": 2}
    flags = dict(findings.ARMS)[arm]
    result = {"arm": arm, "seed": seed, "command": findings.command_of(flags, budget, seed), "flags": flags, "budget": budget,
              "weights": findings.weights_of(flags), "tokens": 64, "flops": 2e8,
              "scores": {"rec": rec, "reg": 0.5, "presence": 0.5, "count": 0.5},
              "seconds_per_step": 0.1} | changes
    if arm.startswith("video-"):
        result["scores"] = {f"{task}, {key}": 0.25 for tasks, shown in findings.VIDEO for task in tasks for key in shown}
        result["scores"]["count, eight frames"] = rec
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{arm}-{seed}.json").write_text(json.dumps(result))


def row(label, page="page.md"):
    """The cells of a table's row."""
    line, = (line for line in Path(page).read_text().splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_two_arms_end_to_end_go_on_after_a_stop_and_refuse_other_flags(two_arms, monkeypatch, capsys):
    findings.main(BUDGET)
    files = sorted(Path("out/findings").iterdir())
    assert [file.name for file in files] == ["clip-layer2-0.json", "dinov2-merged-mlp1-0.json"]       # and no model is left
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["command"] == ("python train.py --connector=linear --layer=2 --steps1=1 --steps2=1 --bf16=true --evaluate=false "
                                "--seed=0")
    assert set(first["scores"]) == set(findings.TASKS) and all(0 <= value <= 1 for value in first["scores"].values())
    assert first["tokens"] == 64 and first["seconds_per_step"] >= 0 and second["flops"] > first["flops"] > 0      # 6 blocks, 2

    before = files[0].stat().st_mtime_ns                             # one finished, one torn: one is run, the other left alone
    files[1].write_text(files[1].read_text()[:100])
    ran = []
    monkeypatch.setattr(findings, "run_arm", lambda arm, *rest: ran.append(arm) or second)
    findings.main(BUDGET)
    assert ran == ["dinov2-merged-mlp1"] and files[0].stat().st_mtime_ns == before
    assert "2 runs of 2 arms, 1 of them finished before" in capsys.readouterr().out

    with pytest.raises(InputError, match="clip-layer2-0.json: holds a run of .*'steps2': 1.* now .*'steps2': 7.* another --out"):
        findings.main([*BUDGET, "--steps2=7"])
    monkeypatch.setattr(findings, "ARMS", [("clip-layer2", "--connector=linear --layer=3")])
    with pytest.raises(InputError, match="holds a run of --connector=linear --layer=2 with"):
        findings.main(BUDGET)


def test_the_reports_numbers_are_the_mean_and_spread_of_the_files(two_arms):
    values = [0.25, 0.5, 0.9]
    for seed, value in enumerate(values):
        invented("clip-layer2", seed, value)
    invented("dinov2-merged-mlp1", 0, 0.125)
    Path("out/findings/clip-layer2-9.json").write_text('{"arm": "clip-la')        # torn: left out
    findings.main(["--report", "--page=page.md"])
    rec, reg, presence, count, tokens, flops, seconds, seeds, paper = row("CLIP hidden[2]")
    assert rec == f"{100 * sum(values) / 3:.1f} ± {100 * statistics.stdev(values):.1f}" == "55.0 ± 32.8"
    assert (reg, tokens, flops, seconds, seeds, paper) == ("50.0 ± 0.0", "64", "200", "0.100", "0, 1, 2", "–")
    cells = row("DINOv2, merged, one MLP")
    assert (cells[0], cells[-1]) == ("12.5", '73.1, 83.3 (as "DINOv2 with merging": 72.8, 83.3)')              # one seed has no spread
    assert row("CLIP hidden[3]")[0] == row("MAE, one layer")[0] == "not run"
    text = Path("page.md").read_text()
    assert "python train.py --connector=comm_dino --dino_depth=1 --steps1=1 --steps2=1 --bf16=true --evaluate" in text
    others = lambda text: [text.partition(f"<!-- {name}: findings.py")[2].partition(f"<!-- {name}: end")[0] for name in ("dense", "video")]
    assert others(text) == others((ROOT / "docs" / "findings.md").read_text())     # tables of which nothing was run stay as they were
    findings.main(["--report", "--page=page.md"])
    assert Path("page.md").read_text() == text                       # once more changes nothing


def test_without_matplotlib_there_are_tables_and_a_line_that_says_so(two_arms, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    invented("clip-layer2", 0, 0.5)
    findings.main(["--report", "--page=page.md"])
    assert "No figure: matplotlib is not installed" in Path("page.md").read_text() and not list(Path(".").glob("*.png"))
    assert row("CLIP hidden[2]")[0] == "50.0"


def test_figures_are_drawn_of_every_table_that_has_runs(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "docs" / "findings.md", "page.md")
    for i, (arm, _) in enumerate(findings.ARMS):
        for seed in range(2):
            invented(arm, seed, (i + seed) / 50)
    findings.main(["--report", "--page=page.md"])
    assert sorted(path.name for path in Path(".").glob("*.png")) == sorted(
        f"findings-{name}.png" for name in [*findings.TABLES, "video-frames"])
    assert "Not run" not in Path("page.md").read_text().partition("## 1.")[2]


def test_the_video_table_has_a_row_a_question_and_arm_and_is_reported_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shutil.copy(ROOT / "docs" / "findings.md", "page.md")
    before = Path("page.md").read_text().partition("## 5.")[0]
    for seed, value in enumerate((0.25, 0.75)):
        invented("video-dci", seed, value)
    invented("video-efficient", 0, 0.625)
    del (result := json.loads(Path("out/findings/video-efficient-0.json").read_text()))["scores"]["count, eight frames, unpooled"]
    Path("out/findings/video-efficient-0.json").write_text(json.dumps(result))     # it has no more tokens to show
    findings.main(["--report", "--table=video", "--page=page.md"])
    assert Path("page.md").read_text().partition("## 5.")[0] == before       # the other tables stay as they were
    lines = Path("page.md").read_text().partition("<!-- video: findings.py --report -->")[2].splitlines()
    tables = [line.split(" | ")[1:-1] for line in lines if line.startswith("| | ")]
    assert tables == [list(shown) for _, shown in findings.VIDEO]
    dci, efficient = ([line.strip("| ").split(" | ")[1:] for line in lines if line.startswith(f"| count, {arm} |")]
                      for arm in ("DCI", "Efficient"))                # a row in each of two tables
    at = tables[0].index("eight frames")
    assert dci[0][at] == "50.0 ± 35.4" and dci[0][0] == "25.0 ± 0.0" and dci[0][-1] == "0, 1"
    assert efficient[0][at] == "62.5" and efficient[1] == ["–", "25.0", "25.0", "25.0", "0"]
    assert row("direction, DCI")[0] == "25.0 ± 0.0" and row("direction, MLP")[0] == "not run"


def test_runs_that_differ_are_not_put_into_one_table(two_arms):
    invented("clip-layer2", 0, 0.5)
    invented("clip-layer2", 1, 0.5, budget={"steps1": 2})
    with pytest.raises(InputError, match="clip-layer2-1.json: was run with budget .* runs that differ are not compared"):
        findings.main(["--report", "--page=page.md"])
    invented("clip-layer2", 1, 0.5, weights={"clip": "0", "llama": "1"})
    with pytest.raises(InputError, match="clip-layer2-1.json: was run with clip 0; other runs had .* are not compared"):
        findings.main(["--report", "--page=page.md"])


def test_an_arm_depends_on_the_checkpoints_that_it_starts_from_and_on_no_other():
    flags = dict(findings.ARMS)
    assert set(findings.weights_of(flags["clip-dci"])) == {"clip", "llama"}
    for arm in ("dinov2-dci", "dinov2-merged-mlp2"):
        assert set(findings.weights_of(flags[arm])) == {"dinov2", "llama"}
    assert set(findings.weights_of(flags["comm"])) == {"clip", "dinov2", "llama"}


def test_every_arm_of_every_table_is_a_command_that_train_takes():
    arms = dict(findings.ARMS)
    assert len(arms) == len(findings.ARMS) and set(findings.QUICK) <= set(arms)
    assert {arm for _, rows in findings.TABLES.values() for _, arm, _ in rows} == set(arms)
    for flags in arms.values():
        told = cli.parse(Flags, flags.split())
        ConnectorConfig(told.connector, told.groups, told.merge, told.dino_depth, told.dino_expansion, told.layer)
    own = [flags for arm, flags in arms.items() if not arm.startswith("video-")]       # those are asked other questions
    assert len(set(own)) == len(own)                                 # no arm is run twice under two names


def test_a_report_of_nothing_leaves_the_page_as_it_is(two_arms):
    before = Path("page.md").read_text()
    with pytest.raises(InputError, match="out/findings: no finished run; those of the page are in runs/findings"):
        findings.main(["--report", "--page=page.md"])
    assert Path("page.md").read_text() == before


def test_a_wrong_option_and_a_failed_run_are_one_line(two_arms, monkeypatch):
    for flag, message in (("--table=layer", "there are layers, towers"), ("--seeds=-1", "--seeds=-1: should be 1 or more")):
        with pytest.raises(InputError, match=message):
            findings.main([flag])
    monkeypatch.setattr(findings, "ARMS", [("comm", "--connector=com")])
    with pytest.raises(InputError, match="ended with status 2, and said: error: connector kind 'com' is unknown"):
        findings.main(BUDGET)
    assert not list(Path("out/findings").glob("*.json"))
    Path("page.md").write_text("no marks")
    invented("comm", 0, 0.5)
    with pytest.raises(InputError, match="page.md: should have the lines <!-- towers: findings.py --report -->"):
        findings.main(["--report", "--page=page.md"])

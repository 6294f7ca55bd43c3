"""The paper's tables and figures: the plan, reuse and resuming, statistics and verdicts, and a tiny table for real."""

import dataclasses
import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import test_t2i_rewards
from benchmark import entropy, sample_captions, sample_classes
from benchmark.clusters import Estimate, estimate
from benchmark.paper import __main__ as paper
from benchmark.paper import plan, preflight, render, run, toy_metrics
from benchmark.paper.exhibits import CLAIMS, FIGURES, METRICS, TABLES, Claim, Curves, Row, Table, metrics_of
from benchmark.paper.plan import EXPERIMENTS, QUARTERS, Point, Run, Unavailable, load_config, resolve
from benchmark.paper.preflight import check_full
from benchmark.paper.render import curves_markdown, figure_png, findings_markdown, load_printed, table_markdown
from benchmark.paper.results import (
    HOLDS,
    LEANS,
    LEANS_AWAY,
    NOISE,
    NOT_MEASURABLE,
    NOT_MEASURED,
    OPPOSITE,
    find,
    jobs_of,
    judge,
    needs_of,
)
from benchmark.paper.run import GROUPS, Job, StageFailed, Workspace, execute
from toy import world

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2)
MAIN = {"c2i": "c2i_B_256", "t2i": "t2i_XL_256"}
C2I = [name for name, experiment in EXPERIMENTS.items() if experiment.task == "c2i"]


# ---------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_configuration_of_its_own_says_what_the_experiment_changes(name):
    experiment = EXPERIMENTS[name]
    if experiment.config != MAIN[experiment.task]:
        settings = load_config(experiment.config)
        assert {key: settings[key] for key in experiment.changes} == dict(experiment.changes)


def test_an_ablation_differs_from_the_main_run_in_nothing_else():
    main = resolve("c2i_B_256", "toy", 1).settings
    assert main["logps_guidance"] == "conditional"  # as the paper's configurations
    for name, changed in {
        "c2i_beta_0": {"beta"},
        "c2i_guidance_4": {"guidance_scale"},
        "c2i_realism": {"reward_funcs"},
        "c2i_guided": {"logps_guidance"},
        "c2i_two_passes": {"num_iterations"},
        "c2i_long": {"max_steps", "save_steps"},
    }.items():
        settings = resolve(name, "toy", 1).settings
        assert _differences(settings, main) == changed


def test_the_upper_clip_is_compared_where_clipping_can_happen():
    # with one pass over a rollout every ratio is 1 and neither bound of the clip is ever met
    two_passes, upper = (resolve(name, "toy", 1).settings for name in ("c2i_two_passes", "c2i_epsilon_high"))
    assert two_passes["num_iterations"] == 2 and _differences(two_passes, upper) == {"epsilon_high"}
    (claim,) = (one for claims in CLAIMS.values() for one in claims if one.point.experiment == "c2i_epsilon_high")
    assert claim.other.experiment == "c2i_two_passes"


def _differences(settings: dict, other: dict) -> set[str]:
    return {key for key in settings.keys() | other.keys() if settings.get(key) != other.get(key)}


def test_what_the_toy_world_lacks_is_said_and_not_faked():
    with pytest.raises(Unavailable, match="has no maniqa"):
        resolve("c2i_quality", "toy", 1)
    with pytest.raises(
        Unavailable, match="nothing changes in the toy world, whose rewards are clip, hpsv2, qwen_label"
    ):
        resolve("c2i_no_quality", "toy", 1)
    with pytest.raises(Unavailable, match="which has no maniqa"):
        resolve("t2i_no_quality", "toy", 1)
    assert resolve("c2i_B_384", "full", 1).policy == "weights/c2i_B_384.pt"


def test_equal_experiments_share_a_run():
    # without MANIQA in the toy world, "without realism" is "alignment alone"
    assert resolve("c2i_no_realism", "toy", 1) == resolve("c2i_alignment", "toy", 1)
    assert resolve("c2i_no_realism", "full", 1) != resolve("c2i_alignment", "full", 1)
    # the toy world's main run with captions has the judge alone; its CLIP and HPSv2 join in Table 7
    assert resolve("t2i_no_alignment", "toy", 1) == resolve("t2i_realism", "toy", 1) == resolve("t2i_XL_256", "toy", 1)
    assert resolve("t2i_all", "toy", 1).settings["reward_funcs"] == ["clip", "hpsv2", "qwen_label"]
    assert resolve("t2i_all", "full", 1) == resolve("t2i_XL_256", "full", 1)


def test_runs_are_shared_by_tables_and_starting_policies_by_runs():
    jobs, without = jobs_of(needs_of(TABLES[5], "toy"), "toy", SEEDS)
    # by hand: per seed the starting policy, all rewards, realism, alignment, CLIP, HPSv2
    assert len(jobs) == 2 * 6 and without.keys() == {"c2i_quality", "c2i_no_quality"}
    assert [job.run.seed for job in jobs] == [1, 2] * 6  # a run's seeds side by side
    start = next(job for job in jobs if not job.trained)
    assert start.needs == {Point("c2i_B_256", 0): {"fid", "toy", "entropy"}}
    of_table_2 = {job.run.name for job in jobs_of(needs_of(TABLES[2], "toy"), "toy", SEEDS)[0] if job.trained}
    assert "c2i_B_256" in of_table_2 & {job.run.name for job in jobs}


def test_a_figure_measures_every_quarter_and_findings_every_claim():
    needs = needs_of(FIGURES[3], "toy")
    quarters = {point.quarter for point in needs if point.experiment == "c2i_beta_0"}
    assert quarters == set(range(QUARTERS + 1)) and needs[Point("c2i_beta_0", 2)] == {"entropy"}
    for claim in (claim for claims in CLAIMS.values() for claim in claims):
        assert METRICS[claim.metric].group in {*GROUPS, "log"} and claim.direction in (1, -1)
        assert {claim.point.experiment, claim.other.experiment} <= EXPERIMENTS.keys()


def test_every_row_of_every_table_and_figure_names_an_experiment():
    for table in TABLES.values():
        assert len({row.label for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert row.point.experiment in EXPERIMENTS and metrics_of(table, row, "toy")
    assert TABLES.keys() == set(range(2, 9)) and FIGURES.keys() == {3, 4, 5, 6, 14, 15}


def test_a_dry_run_says_what_it_costs_and_does_nothing(tmp_path, capsys):
    paper.main(["--table", "2", "--dry-run", "--seeds", "2", "--jobs", "2", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    assert "c2i_B_256/seed-2: 40 steps; 0 of 3 measurements are there" in said
    assert "c2i_XL_384/seed-1: 40 steps" in said and "core minutes" in said and "GB of disk" in said
    assert "left out" not in said
    paper.main(["--table", "2", "--dry-run", "--scale", "full", "--runs", str(tmp_path / "runs")])
    # four runs of 100 steps at 19.9 GPU hours are 79.5; sampling 50,000 images comes on top
    hours = int(capsys.readouterr().out.partition("about ")[2].partition(" GPU hours")[0])
    assert 80 < hours < 130
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        # t of 2 degrees of freedom at 97.5 %: 4.303 (a printed table). Mean 2, standard error 1 / sqrt(3): 3.46 of them
        ([1.0, 2.0, 3.0], LEANS),
        ([-1.0, -2.0, -3.0], LEANS_AWAY),
        ([2.0, 3.0, 4.0], HOLDS),  # 5.2 of them
        ([-2.0, -3.0, -4.0], OPPOSITE),
        ([1.0, 2.0, 3.0, 4.0], HOLDS),  # 3.87 of them, and 3.182 will do with 3 degrees of freedom
        ([-1.0, 0.0, 2.0], NOISE),  # mean 0.333, standard error 0.882
        ([0.5, 0.5], HOLDS),  # no noise at all
        ([0.0, 0.0], NOISE),
        ([3.0], NOT_MEASURED),  # one seed has no standard error
        ([], NOT_MEASURED),
    ],
)
def test_a_verdict_follows_the_stated_rule(differences, verdict):
    assert judge(estimate(differences), 1) == verdict
    mirrored = {HOLDS: OPPOSITE, OPPOSITE: HOLDS, LEANS: LEANS_AWAY, LEANS_AWAY: LEANS}.get(verdict, verdict)
    assert judge(estimate(differences), -1) == mirrored


class Measured(Workspace):
    """A workspace whose numbers are given: (experiment, quarter, seed) -> numbers."""

    def __init__(self, root, given):
        super().__init__(root, "toy", devices="cpu")
        self.given = given

    def numbers(self, run, point):
        return self.given.get((run.name, point.quarter, run.seed), {})


def test_a_finding_pairs_seeds(tmp_path):
    given = {
        ("c2i_B_256", 0, 1): {"recall": 0.60},
        ("c2i_B_256", 0, 2): {"recall": 0.70},
        ("c2i_B_256", 0, 3): {"recall": 0.80},  # its other half is missing
        ("c2i_B_256", 4, 1): {"recall": 0.58},
        ("c2i_B_256", 4, 2): {"recall": 0.66},
    }
    claim = Claim("recall falls", "recall", -1, Point("c2i_B_256"), Point("c2i_B_256", 0))
    found = find(Measured(tmp_path, given), claim, (1, 2, 3))
    # -0.02 and -0.04: mean -0.03, standard error 0.01; the levels alone differ by far more than that. 3 standard errors
    # are not the 12.7 that 1 degree of freedom asks for
    assert found.difference == pytest.approx(Estimate(-0.03, 0.01, 2))
    assert found.verdict == LEANS
    text = findings_markdown(Measured(tmp_path, given), (1, 2, 3), "COMMAND")
    assert f"| RL lowers recall | recall | 0.620 ± 0.040 | 0.700 ± 0.058 | -0.030 ± 0.010 (n = 2) | {LEANS} |" in text
    assert f"| {NOT_MEASURABLE}: nothing changes in the toy world, whose rewards are" in text
    total = sum(map(len, CLAIMS.values()))
    counts = (
        "holds 0; does not hold, the opposite was measured 0; not measurable with these seeds 1, of which 1 lean that "
        "way, 0 the other way and 0 are within the noise; not measurable in the toy world 1; not measured yet"
    )
    assert f"In short, of {total} claims: {counts} {total - 2}." in text


def test_a_table_shows_ours_beside_printed_numbers(tmp_path):
    table = Table(
        "T",
        ("fid", "truth", "kl"),
        (
            Row("before", Point("c2i_B_256", 0)),
            Row("LlamaGen-XL, 384 px + RL", Point("c2i_B_256")),
            Row("another", Point("c2i_quality")),
        ),
    )
    given = {
        ("c2i_B_256", 0, 1): {"fid": 3.0},
        ("c2i_B_256", 4, 1): {"fid": 3.25, "truth": 0.8, "kl": 0.1},
        ("c2i_B_256", 4, 2): {"fid": 3.75, "truth": 0.9, "kl": 0.1},
    }
    text = table_markdown(Measured(tmp_path, given), 2, table, SEEDS, load_printed(), "COMMAND")
    lines = text.splitlines()
    assert "|  |  | FID | truth | KL [nats a code] |" in lines
    assert "| before | ours | 3.00 (n = 1) | not yet |  |" in lines  # before training there is no KL
    # 3.25 and 3.75: mean 3.5, standard error 0.5 / 2; the printed FID is in printed.yaml
    assert "| LlamaGen-XL, 384 px + RL | ours | 3.50 ± 0.25 | 0.850 ± 0.050 | 0.100 ± 0.000 |" in lines
    assert "|  | printed | 3.63 |  | not at hand |" in lines  # no paper prints the toy world's truth
    assert sum("| printed |" in line for line in lines) == 1
    assert "| another | ours | - | - | - |" in lines
    assert any(line.startswith("- another:") and "no maniqa" in line for line in lines)
    assert any(line.startswith("- printed: quoted from Tables 1 to 3 of VA-pi") for line in lines)


def test_printed_numbers_need_a_source_and_known_names(tmp_path):
    for row, complaint in (({"fid": 1.0}, "needs a source"), ({"source": "a", "fit": 1.0}, "no metric of ours")):
        path = tmp_path / "printed.yaml"
        path.write_text(yaml.safe_dump({"sources": {"a": "A"}, "tables": {2: {"B": row}}}))
        with pytest.raises(ValueError, match=complaint):
            load_printed(path)
    labels = {number: {row.label for row in table.rows} for number, table in TABLES.items()}
    for number, rows in load_printed().tables.items():
        assert rows.keys() <= labels[number]


def test_a_curve_is_a_mean_over_seeds_with_its_error(tmp_path):
    class Logged(Measured):
        def log(self, run):
            return [{"step": step, "reward": step + 2.0 * run.seed, "kl": 0.1} for step in (1, 2)]

    figure = Curves("F", (("all", "c2i_B_256"), ("none", "c2i_quality")), ("reward",), ("truth",))
    given = {("c2i_B_256", quarter, seed): {"truth": 0.1 * quarter} for quarter in (0, 2) for seed in SEEDS}
    picture, data = figure_png(Logged(tmp_path, given), figure, SEEDS)
    # rewards 3 and 5 at step 1: mean 4, standard error 1
    assert data["reward"] == {"all": [(1, pytest.approx(4.0), pytest.approx(1.0)), (2, 5.0, pytest.approx(1.0))]}
    assert data["truth"] == {"all": [(0.0, 0.0, 0.0), (20.0, pytest.approx(0.2), 0.0)]}  # quarters of 40 steps
    assert picture.startswith(b"\x89PNG")
    text = curves_markdown(data)
    assert "| all | 4.000 ± 1.000 | 5.000 ± 1.000 |" in text and "**truth**" in text
    assert "|  | step 0 | step 20 |" in text and "printed curves' numbers are not at hand" in text
    with pytest.raises(ValueError, match="nothing of this figure"):
        figure_png(Measured(tmp_path, {}), dataclasses.replace(figure, logged=()), SEEDS)


def test_a_figure_of_pictures_takes_a_few_of_each_of_some_classes_in_their_order(tmp_path):
    labels = np.array([3, 1, 3, 1, 2, 2, 3, 1])
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    (tmp_path / "names.txt").write_text("zero\none\ntwo\nthree\n")
    found = render._pictures(tmp_path / "samples.npz", str(tmp_path / "names.txt"))
    assert {name: pictures[:, 0, 0, 0].tolist() for name, pictures in found.items()} == {
        "one": [1, 3, 7],
        "two": [4, 5],
        "three": [0, 2, 6],
    }
    assert render._spread(range(1000)) == range(0, 996, 166)
    with pytest.raises(FileNotFoundError, match="run the figure without --dry-run first"):
        render._pictures(tmp_path / "nowhere", None)


# ---------------------------------------------------------------------------------------------------- reuse


class Stubbed(Workspace):
    """A workspace whose commands are written down and faked."""

    def __init__(self, root, scale="toy"):
        super().__init__(root, scale, devices="cpu")
        self.calls, self.stops_at, self.broken = [], None, ()

    def call(self, command, folder):
        words = [str(word) for word in command]
        self.calls.append(words)
        if any(word in self.broken for word in words):
            raise StageFailed(f"{words[1]} ended with 1")
        if words[1] == "train_c2i.py":
            self._train(Path(words[words.index("--config") + 1]))
        elif words[1] == "test.sh":
            Path(words[words.index("--output") + 1]).write_bytes(b"samples")
        elif words[1] == "test_t2i.sh":
            Path(words[words.index("--output") + 1]).mkdir()
        elif words[1] == "test_t2i_rewards.py" or words[1].endswith("drawbench.sh"):
            images = Path(words[words.index("--output") + 1]) if "--output" in words else Path(words[2])
            images.mkdir(exist_ok=True)
            scores = {"clip": {"mean": 0.25}, "deqa": {"mean": None}}
            (images / "rewards.json").write_text(json.dumps({"metrics": scores}))
        elif words[1:3] == ["-m", "benchmark.paper.toy_metrics"]:
            Path(words[words.index("--json") + 1]).write_text(json.dumps({"geneval_overall": 0.5}))
        elif words[1:3] == ["-m", "benchmark.entropy"]:
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir()
            measured = {"conditional": {"mean": 1.5}, "guided": {"mean": 1.25}}
            (folder / "entropy.json").write_text(json.dumps({"checkpoints": [measured]}))
        elif words[1] == "fid_evaluation.py":
            result = {"fid": 2.0, "sfid": None, "inception_score": 3.0, "precision": 0.5, "recall": 0.25}
            Path(words[-1]).write_text(json.dumps(result))

    def _train(self, config):
        settings = yaml.safe_load(config.read_text())
        folder = Path(settings["output_dir"])
        step = self.stops_at or settings["max_steps"]
        checkpoint = folder / f"checkpoint-{step}"
        for place in (checkpoint, folder / "final"):
            place.mkdir(parents=True, exist_ok=True)
            (place / "model.safetensors").write_bytes(f"weights {step}".encode())
        (checkpoint / "optimizer.pt").write_bytes(b"large")
        state = {"global_step": step, "log_history": [{"step": 1 + n, "kl": 0.01 * n} for n in range(step)]}
        for place in (checkpoint, folder):
            (place / "trainer_state.json").write_text(json.dumps(state))


@pytest.fixture
def stubbed(tmp_path):
    start = tmp_path / "start_policy"
    start.mkdir()
    (start / "model.safetensors").write_bytes(b"start")
    settings = {"model_name_or_path": str(start), "vq_path": str(start), "max_steps": 60, "save_steps": 15, "beta": 0.1}
    return Stubbed(tmp_path / "runs"), Run("c2i_B_256", "c2i", 1, settings)


def test_a_stopped_training_goes_on_and_a_finished_one_is_left_alone(stubbed):
    workspace, one = stubbed
    workspace.stops_at = 20
    with pytest.raises(StageFailed, match="stopped at step 20 of 60"):
        workspace.train(one)
    assert workspace.numbers(one, Point(one.name)) == {}  # half a run is no run
    workspace.stops_at = None
    workspace.train(one)
    workspace.train(one)
    assert ["--resume_from_checkpoint" in call for call in workspace.calls] == [False, True]
    assert not [*workspace.folder(one).glob("checkpoint-*/optimizer.pt")]
    # KL of the last 10 of 60 steps: 0.50 .. 0.59
    assert workspace.numbers(one, Point(one.name))["kl"] == pytest.approx(0.545)
    assert workspace.numbers(one, Point(one.name, 2))["kl"] == pytest.approx(0.245)  # steps 21 .. 30


def test_a_run_with_other_settings_is_not_taken_for_this_one(stubbed):
    workspace, one = stubbed
    workspace.train(one)
    other = dataclasses.replace(one, settings=one.settings | {"beta": 0.2})
    assert workspace.other_settings(one) is None and not workspace.is_trained(other)
    assert workspace.numbers(other, Point(one.name)) == {}
    with pytest.raises(StageFailed, match=r"beta was 0\.1, is 0\.2.*choose another --runs"):
        workspace.train(other)


def test_a_run_of_other_settings_spoils_no_plan(tmp_path, capsys):
    folder = tmp_path / "runs/toy/c2i_XL_384/seed-1"
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text('{"beta": 7}')
    paper.main(["--table", "2", "--dry-run", "--seeds", "1", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    assert "FAILS: " in said and "beta was 7, is 0.1" in said and "c2i_B_256/seed-1: 40 steps" in said
    paper.main(["--table", "2", "--write_only", "--seeds", "1", "--runs", str(tmp_path / "runs")])
    assert "| LlamaGen-XL, 384 px + RL | ours | not yet |" in capsys.readouterr().out


@pytest.mark.parametrize("state", [None, '{"global_step": 15, "log_'])
def test_a_checkpoint_that_was_cut_off_stops_nothing(stubbed, state):
    workspace, one = stubbed
    cut_off = workspace.folder(one) / "checkpoint-15"
    cut_off.mkdir(parents=True)
    if state:
        (cut_off / "trainer_state.json").write_text(state)
    (workspace.folder(one) / "experiment.json").write_text(json.dumps(workspace._trained_with(one)))
    assert workspace.steps_done(one) == 0
    workspace.train(one)
    assert "--resume_from_checkpoint" not in workspace.calls[0] and not cut_off.exists()
    assert workspace.is_trained(one)


def test_the_time_of_a_run_is_that_of_all_its_starts(stubbed, monkeypatch):
    workspace, one = stubbed
    clock = iter([100.0, 107.0, 200.0, 205.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    workspace.stops_at = 20
    with pytest.raises(StageFailed):
        workspace.train(one)
    workspace.stops_at = None
    workspace.train(one)
    assert workspace.seconds_trained(one) == 12.0


def test_a_measurement_is_made_once_and_again_for_other_weights(stubbed):
    workspace, one = stubbed
    point = Point(one.name, 0)
    assert workspace.measure(one, point, "fid") == {
        "fid": 2.0,
        "inception_score": 3.0,
        "precision": 0.5,
        "recall": 0.25,
    }
    workspace.measure(one, point, "fid")
    assert [call[1] for call in workspace.calls] == ["test.sh", "fid_evaluation.py"]
    assert workspace.calls[0][3:6] == ["cpu", "0", "2"] and "--num_per_class" in workspace.calls[0]
    workspace.measure(one, Point(one.name, 0, 4.0), "fid")  # another guidance, a place of its own
    assert len(workspace.calls) == 4 and workspace.calls[2][5] == "4"
    (Path(one.policy) / "model.safetensors").write_bytes(b"new weights")
    assert workspace.known(one, point, "fid") is None
    workspace.measure(one, point, "fid")
    assert [call[1] for call in workspace.calls[4:]] == ["test.sh", "fid_evaluation.py"]


@pytest.mark.parametrize("scale", ["toy", "full"])
def test_commands_for_captions_are_what_the_scripts_understand(stubbed, scale):
    workspace, one = Stubbed(stubbed[0].root, scale), stubbed[1]
    text = {"text_encoder": "toy/weights/t5", "caption_padding": "right", "no_cleaning": True}
    captions = Run("t2i_XL_256", "t2i", 3, one.settings | text)
    point = Point("t2i_XL_256", 0, 4.0)
    assert workspace.measure(captions, point, "drawbench") == {"drawbench_clip": 0.25}
    assert workspace.measure(captions, point, "entropy") == {"entropy_conditional": 1.5, "entropy_guided": 1.25}
    if scale == "toy":
        assert workspace.measure(captions, point, "geneval") == {"geneval_overall": 0.5}
    prompts = run.GENEVAL_PROMPTS[scale]
    for words in workspace.calls:
        if words[0] == "bash":
            parse = sample_captions.parser().parse_args if words[1] == "test_t2i.sh" else rewards_of_prompts
            understood = parse(["--model", words[2], "--guidance_scale", words[5], *words[6:]])
        elif words[1] == "test_t2i_rewards.py":
            understood = rewards_of_prompts(words[2:])
            assert understood.metrics == ["clip", "hpsv2", "qwen_label"]
            continue
        elif words[2] == "benchmark.entropy":
            understood = entropy.parser().parse_args(words[3:])
            assert understood.checkpoints == [one.policy] and understood.prompts == prompts
        else:
            continue
        assert (understood.seed, understood.guidance_scale) == (3, 4.0)
        assert (understood.text_encoder, understood.caption_padding) == ("toy/weights/t5", "right")
        assert understood.no_cleaning
    assert len(workspace.calls) == (4 if scale == "toy" else 2)


def rewards_of_prompts(words):
    return test_t2i_rewards._parse(words)[1]


def test_a_job_that_fails_does_not_stop_the_others(stubbed):
    workspace, one = stubbed
    other = dataclasses.replace(one, name="c2i_beta_0", settings=one.settings | {"beta": 0.0})
    workspace.broken = (str(workspace.folder(one) / "config.yaml"),)
    jobs = [Job(each, True, {Point(each.name): {"fid"}}) for each in (one, other)]
    (problem,) = execute(workspace, jobs, parallel=2)
    assert problem.startswith(str(workspace.folder(one))) and "train_c2i.py ended with 1" in problem
    assert workspace.numbers(other, Point(other.name))["fid"] == 2.0
    workspace.broken = ()
    assert execute(workspace, jobs) == []
    assert [call[1] for call in workspace.calls].count("train_c2i.py") == 3  # the finished one was not trained again


def test_a_failing_command_shows_the_end_of_its_output(tmp_path):
    workspace = Workspace(tmp_path, "toy", devices="cpu")
    with pytest.raises(StageFailed, match="ended with 3") as failure:
        workspace.call([sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], tmp_path)
    assert "what went wrong" in str(failure.value) and str(tmp_path / "log.txt") in str(failure.value)


def test_only_one_process_works_in_a_folder(tmp_path):
    first, second = Workspace(tmp_path, "toy", devices="cpu"), Workspace(tmp_path, "toy", devices="cpu")
    with first.locked(), pytest.raises(ValueError, match="another process works in"), second.locked():
        raise AssertionError("both work")
    with second.locked():  # the first is done
        pass


def test_the_full_scale_names_everything_that_a_table_lacks_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no weights, prompts or judges are
    monkeypatch.setattr(plan, "CONFIGS", ROOT / "configs")
    plan._settings_or_reason.cache_clear()

    def missing_for(number):
        jobs, _ = jobs_of(needs_of(TABLES[number], "full"), "full", (1,))
        with pytest.raises(FileNotFoundError) as caught:
            check_full(Workspace(tmp_path / "runs", "full", devices="0"), jobs)
        return str(caught.value)

    classes = missing_for(2)
    assert "weights/c2i_B_256.pt" in classes and "VIRTUAL_imagenet256_labeled" in classes and "Inception" in classes
    assert "GenEval" not in classes and "DrawBench" not in classes
    captions = missing_for(3)
    for expected in ("weights/t2i_XL_stage1_256.pt", "coco_captions_30000.json", "GenEval's prompts", "object names"):
        assert expected in captions
    assert "Inception" not in captions and "VIRTUAL" not in captions
    judges = missing_for(4)
    assert "DrawBench's prompts" in judges and "deqa" in judges.lower() and "sac+logos" in judges
    plan._settings_or_reason.cache_clear()


def test_a_reference_of_another_size_is_refused_at_full_scale(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="32 x 32 pixels: the reference has 256 x 256"):
        preflight._check_reference(path)


def test_numbers_of_a_text_policy_depend_on_how_it_reads_captions():
    run_left, run_right = (
        Run("t2i_XL_256", "t2i", 1, resolve("t2i_XL_256", "toy", 1).settings | {"caption_padding": side})
        for side in ("left", "right")
    )
    workspace = Workspace(Path("runs/none"), "toy", devices="cpu")
    start = Point("t2i_XL_256", 0)
    for group in ("samples", "entropy", "geneval"):
        left, right = (workspace._settings(one, start, group) for one in (run_left, run_right))
        assert left != right and left["prompts_sha256"] == right["prompts_sha256"]


# ---------------------------------------------------------------------------------------------------- for real


def test_truth_is_what_the_checker_reads(tmp_path):
    labels = np.arange(6)
    images = world.draw_classes(labels, np.random.default_rng(0))
    pictures = (images.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=pictures, arr_1=np.where(labels < 3, labels, labels + 1))  # three of six are wrong
    numbers = toy_metrics.class_scores(path, load_config("toy_c2i"))
    assert numbers["truth"] == 0.5
    assert numbers["reward"] == pytest.approx(5 * numbers["judge_clip"])  # CLIP's scale in the paper


def test_a_tiny_table_from_training_to_markdown(tmp_path, monkeypatch, capsys):
    """The real scripts, in this process, on the committed weights: two steps, five pictures, CLIP alone."""
    monkeypatch.setattr(plan, "TOY_CONFIGS", {"c2i": "toy_c2i", "t2i": "toy_t2i"})
    monkeypatch.setattr(run, "TOY_CONFIGS", plan.TOY_CONFIGS)
    tiny = {"max_steps": 2, "samples_per_step": 8, "per_device_train_batch_size": 8, "use_cpu": True}
    monkeypatch.setattr(plan, "TOY_CHANGES", plan.TOY_CHANGES | tiny | {"report_to": []})
    monkeypatch.setattr(run, "TOY_REFERENCE", {"num": 24, "seed": 1})
    drawn = ("--num_per_class", "1", "--classes", "0", "5", "10", "15", "20", "--output_size", "32")
    counted = ("--num_conditions", "2", "--num_per_condition", "1")
    small = dataclasses.replace(run.SCALES["toy"], samples={"c2i": drawn}, entropy={"c2i": counted})
    monkeypatch.setitem(run.SCALES, "toy", small)
    monkeypatch.setattr(Workspace, "call", _in_this_process)
    table = Table("Tiny", ("fid", "recall", "truth", "reward", "entropy_guided", "kl"), TABLES[2].rows[:2])
    monkeypatch.setitem(TABLES, 2, table)
    plan._settings_or_reason.cache_clear()
    try:
        paper.main(["--table", "2", "--seeds", "1", "--jobs", "1", "--runs", str(tmp_path)])  # one: argv is shared
    finally:
        plan._settings_or_reason.cache_clear()
    text = (tmp_path / "toy" / "results" / "table_2.md").read_text()
    assert text in capsys.readouterr().out
    cells = [line.split("|")[3:-1] for line in text.splitlines() if "| ours |" in line]
    before, after = ([float(cell) for cell in row if cell.strip()] for row in cells)
    assert len(before) == 5 and len(after) == 6  # the KL is one of training
    assert all(math.isfinite(value) for value in before + after) and 0 <= after[2] <= 1
    assert re.search(r"- took \d+ minutes of commands, .*: \d+ of training, \d+ of sampling", text)


def _in_this_process(workspace, command, folder):
    """Run a command of the project without a new process: what the scripts would do with the same words."""
    words = [str(word) for word in command]
    folder.mkdir(parents=True, exist_ok=True)
    if words[:2] == ["bash", "test.sh"]:
        model, _, step, guidance = words[2:6]
        sample_classes.main(["--model", model, "--step", step, "--guidance_scale", guidance, *words[6:]])
    elif words[1:3] == ["-m", "benchmark.entropy"]:
        entropy.main(words[3:])
    else:
        name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        before, sys.argv = sys.argv, [name, *rest]
        try:
            if words[1] == "-m":
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(name, run_name="__main__")
        finally:
            sys.argv = before

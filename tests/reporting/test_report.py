import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rating_sheets
from matplotlib.text import Text

from rlhf.cli import report
from rlhf.errors import UserError
from rlhf.ratings.analyse import analyse
from rlhf.ratings.collect import check_sheet
from rlhf.reporting import samples, tables
from rlhf.reporting.report import build_report, draw
from rlhf.reporting.run import labels, printable_run, read_run

ATTACK = "<script>alert(1)</script>\n\"'><img src=http://example.com/x>"
PLOTS = {f"reward_{name}" for name in ("loss", "accuracy", "calibration")} | {"evaluation_gains", "evaluation_length"}
PLOTS |= {f"ppo_{name}" for name in ("kl", "scores", "scores_kl", "length", "eos")}


class Page(HTMLParser):
    """The page as (tag, attributes) in order, and its text with white space joined."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run_dir: Path) -> Page:
    return Page(build_report(run_dir).read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_json(stage: str) -> dict[str, Any]:
    return {
        **{"status": "done", "started": "2031-05-01T10:00:00", "seconds": 3725.4},
        **{"seed": 0, "world_size": 2, "device": "cuda", "git_commit": "0123abcd"},
        "command": f"accelerate launch scripts/train.py --config {stage}.yaml",
        "versions": {"torch": "2.13.0", "trl": "1.16.0"},
        "config": {"learning_rate": 3e-6, "lora": {"r": 16}, "kl_target": None},
        "data": {"hh_rlhf": {"rows": 2000, "empty": 100, "kept": 1900}},
        "models": [{"role": "policy", "name": "tiny/<b>", "parameters": 134515008, "trainable": 1345150}],
    }


def ppo_row(step: int, kl: float) -> dict[str, Any]:
    names = ("objective/scores", "objective/response_length", "objective/eos_rate", "loss/value_avg")
    values = dict(zip(names, (step / 40, 50.0 - step / 4, step / 50, 0.0124 / step), strict=True))
    return {"step": step, "episode": 8 * step, "objective/kl_per_token": kl, "time/act": 1.25, **values}


def reward_result() -> dict[str, Any]:
    label = {"precision": 0.61, "recall": 0.62, "f1-score": 0.63, "support": 100.0}
    return {
        **{"split": "test", "n": 200, "loss_type": "margin"},
        "before": {"loss": 1.012, "accuracy": 0.485, "mean_margin": 0.003},
        "after": {"loss": 0.871, "accuracy": 0.655, "mean_margin": 0.71, "accuracy_interval": [0.59, 0.72]},
        **{"labels": ["first", "second"], "confusion_matrix": [[66, 34], [35, 65]]},
        "classification_report": {"first": label, "accuracy": 0.655, "macro avg": label},
        "calibration": {"ece": 0.08, "bins": [{"confidence": 0.55, "accuracy": 0.5, "n": 40}] * 2},
        "best": {"step": 120, "eval_loss": 0.9},
    }


def judged(outcome: str) -> dict[str, Any]:
    gold = {"gain": 0.35, "interval": [0.1, 0.6] if outcome == "rose" else [-0.1, 0.8], "p_value": 0.012}
    line = {"mean_difference": 7.5, "slope": 0.031, "slope_interval": [0.01, 0.05], "gain": 0.22}
    return {
        "gold": gold | {"in_sd": 0.44, "win_rate": 0.61},
        **{"proxy_in_sd": 0.81, "agreement": 0.27, "same_response": 0.02, "empty": 0.0},
        "length": line | {"interval": [-0.05, 0.49]},
    }


def evaluation_result() -> dict[str, Any]:
    model = {"mean_reward": 0.1, "interval": [0.0, 0.2], "response_length": 48.25, "eos_rate": 0.9}
    model |= {"distinct_1": 0.91, "distinct_2": 0.98, "repetition": 0.01, "length_correlation": -0.12}
    counts = {"p_value": 0.003, "win_rate": 0.7, "wins": 33, "ties": 4, "losses": 13}
    return {
        **{"n_prompts": 50, "confidence": 0.95},
        "models": {name: {**model, "path": f"runs/{name}"} for name in ("base", "full", "lora")},
        "gains": {
            "full": {"before": 0.1, "after": 0.912, "gain": 0.812, "interval": [0.5, 1.1], **counts},
            "lora": {"before": 0.1, "after": 0.15, "gain": 0.05, "interval": [-0.1, 0.2], **counts},
        },
        "validity": {"full": judged("rose"), "lora": judged("did not")},
        "length_groups": [
            {
                **{"from": 5, "to": 9, "n": 20},
                "gains": {
                    "full": {"gain": 0.5, "interval": [0.2, 0.8]},
                    "lora": {"gain": -0.1, "interval": [-0.3, 0.1]},
                },
            }
        ],
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    for stage in ("reward", "ppo_full", "ppo_lora", "evaluation"):
        write(run / stage / "run.json", run_json(stage))
    training = [{"step": 10 * i, "loss": 1 - i / 40, "accuracy": 0.5 + i / 80} for i in range(1, 13)]
    validation = [{"step": 40 * i, "eval_loss": 1 - i / 30, "eval_accuracy": 0.5 + i / 40} for i in (1, 2, 3)]
    write(run / "reward/metrics.jsonl", training + validation)
    write(run / "reward/evaluation.json", reward_result())
    write(run / "ppo_full/metrics.jsonl", [ppo_row(i, 0.005 * i) for i in range(1, 41)])
    write(run / "ppo_lora/metrics.jsonl", [ppo_row(i, 0.05) for i in range(1, 41)])
    write(run / "evaluation/evaluation.json", evaluation_result())
    rows = [
        {
            "prompt_id": i,
            "model": model,
            "prompt": f"Question {i}\nwhy?",
            "response": ATTACK,
            "score": 0.1 * i,
            "response_length": 5 + i,
        }
        for model in ("base", "full", "lora")
        for i in range(20)
    ]
    write(run / "evaluation/responses.jsonl", rows)
    for step, size in ((9, 7_000_000), (10, 2_500_000)):
        checkpoint = run / f"ppo_full/checkpoints/step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.bin").write_bytes(bytes(size))
    return run


def test_sections_stand_in_order_the_result_first(run_dir: Path) -> None:
    page = page_of(run_dir)
    ids = [section["id"] for section in page.all("section")]
    assert ids == ["result", "samples", "reward", "ppo", "evaluation", "ratings", "how", "appendix"]
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in ids]
    everything = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(everything) == len(set(everything))
    first = page.text[: page.text.index("Reward model on") if "Reward model on" in page.text else None]
    places = [first.index(words) for words in ("Full: a gain, confirmed", "Before and after PPO", "Prompt 2 of 20")]
    assert places == sorted(places)


def test_the_first_screen_has_three_plots_and_five_prompts(run_dir: Path) -> None:
    html = build_report(run_dir).read_text(encoding="utf-8")
    main = html[html.index('<section id="result"') : html.index('<section id="reward"')]
    assert re.findall(r'data-plot="(\w+)"', main) == ["ppo_scores", "ppo_kl", "evaluation_gains"]
    assert main.count("<article") == 5
    assert "<details" not in main
    assert "/data/" not in html[: html.index('<section id="appendix"')]


def test_numbers_are_shown_as_written(run_dir: Path) -> None:
    text = re.sub(r" (?=[,;:).])", "", page_of(run_dir).text)
    for words in [
        "Full: a gain, confirmed by the second reward model. LoRA: no gain shown.",
        "PPO on all weights (full) raised the mean reward by +0.812 (95% interval +0.500 to +1.100), and the second "
        "reward model, trained on other pairs, confirms it: +0.350 (+0.100 to +0.600).",
        "PPO with LoRA shows no gain in mean reward beyond noise, +0.050 (95% interval -0.100 to +0.200)",
        "full 0.100 +0.812 [+0.500, +1.100] +0.350 [+0.100, +0.600] 70.0% 90.0% – gain, confirmed",
        "prefers the response that the data chose in 65.5% of 200 test pairs; before training it was 48.5%",
        "Reward model, after training 200 test 0.871 (margin) 65.5% [59.0%, 72.0%] +0.710",
        "1 h 02 min",
        "134,515,008",
        "1 h 02 min – 1,345,150 2.5",  # the newest checkpoint's size, not the largest
        "1.000%",
        "33 / 4 / 13",
        "kl_target None",
        "lora.r 16",
        "empty 100 5.0%",
        "kept 1,900 95.0%",
        "full: KL growing too fast: 0.178 nats per token over the last 10 steps, 42% of all steps inside 0.02 to 0.1",
        "LoRA: KL moderate: 0.050 nats per token over the last 10 steps, 100% of all steps inside 0.02 to 0.1.",
        "full 0.100 [0.000, 0.200] 48.2 0.910 0.980 0.010 – -0.120",
        "5 to 9 tokens 20 +0.500 [+0.200, +0.800] -0.100 [-0.300, +0.100]",
        "no complete sheet yet",
        "full: The proxy rose, and so did the gold model, which was trained on other pairs",
        "Length explains the gain: responses became longer, and at equal length it is +0.220 (-0.050 to +0.490).",
        "LoRA: The proxy did not move beyond noise; the gold model did not move beyond noise",
        "full, PPO's reward model +0.812 [+0.500, +1.100] +0.810 0.003 70.0% 33 / 4 / 13",
        "full, second reward model +0.350 [+0.100, +0.600] +0.440 0.012 61.0%",
        "Rank correlation (Spearman) of both reward models' differences: full 0.27, LoRA 0.27.",
        "LoRA +7.500 +0.031 [+0.010, +0.050] +0.220 [-0.050, +0.490]",
        "Best step: 120, validation loss 0.900",
        "the first is better 100 66 34 0.610 0.620 0.630",
        "loss/value_avg Clipped value loss 0.00031 0.00031",
        "time/act Time of this phase, s 1.250 1.250",
        "git commit 0123abcd",
        "(66 + 65) / 200 = 0.655",
        "Gain (full): mean score after minus mean score before: 0.912 - 0.100 = 0.812",
    ]:
        assert words in text, words


def test_who_chose_the_better_responses_depends_on_the_data(run_dir: Path) -> None:
    for source, words in (
        ("demo:preferences.jsonl", "the authors of the demo's pairs"),
        ("Anthropic/hh-rlhf", "the crowd workers of HH-RLHF"),
        ("mine.jsonl", "the data"),
    ):
        write(run_dir / "reward/run.json", run_json("reward") | {"config": {"dataset_name": source}})
        text = page_of(run_dir).text
        assert f"prefers the response that {words} chose in 65.5%" in re.sub(r" (?=[,;:).])", "", text)
        assert "same response as people" not in text


def test_no_path_of_the_machine_is_shown(run_dir: Path) -> None:
    facts = run_json("ppo_full") | {"command": "/opt/py/bin/python -m rlhf --config /home/me/r/ppo.yaml --x=/data/a/b"}
    facts |= {"error": "OSError: /scratch/me/file", "status": "failed"}
    facts["config"] |= {"reward_model_path": "/data/runs/demo/reward", "files": ["~/a/b.json", "c/d"]}
    facts["models"] = [{"role": "policy", "name": "/home/me/model", "parameters": 2, "trainable": 1}]
    write(run_dir / "ppo_full/run.json", facts)
    text = page_of(run_dir).text
    assert "…/python -m rlhf --config …/ppo.yaml --x=…/b" in text
    assert "OSError: …/file" in text
    assert "…/reward" in text
    assert "…/b.json, c/d" in text
    assert not re.search(r"/(home|opt|data|scratch)/", text)


def test_only_settings_that_differ_are_in_the_first_table(run_dir: Path) -> None:
    write(run_dir / "ppo_full/run.json", run_json("ppo_full") | {"changed": ["learning_rate", "lora"]})
    html = build_report(run_dir).read_text(encoding="utf-8")
    part = html[html.index("Settings that differ from their defaults") : html.index("All settings, defaults included")]
    assert "learning_rate" in part
    assert "lora.r" in part
    assert "kl_target" not in part
    assert "kl_target" in html


def test_scores_that_fall_while_the_evaluation_rises_are_explained(run_dir: Path) -> None:
    rows = [ppo_row(i, 0.05) | {"objective/scores": -i / 40} for i in range(1, 41)]
    write(run_dir / "ppo_full/metrics.jsonl", rows)
    text = page_of(run_dir).text
    # means of the first and last ten: -5.5 / 40 and -35.5 / 40
    assert "the score fell during training (-0.138 to -0.887) and rose in the evaluation (+0.812)" in text
    assert "rose during training" not in text


def test_warnings_and_skipped_updates_are_shown(run_dir: Path) -> None:
    what = {"step": 9, "since": 7, "seen": "all responses are <b>empty", "helps": "a higher kl_coef"}
    write(run_dir / "ppo_full/warnings.jsonl", [what])
    left_out = {"step": 3, "not_finite": ["loss", "gradient"], "rows": [{"prompt_id": "a"}, {"prompt_id": "b"}]}
    write(run_dir / "ppo_full/skipped.jsonl", [left_out, {"step": 4, "not_finite": 5}])
    write(run_dir / "reward/skipped.jsonl", [{"step": 2, "not_finite": ["gradient"], "rows": [{"pair_id": "a"}]}])
    page = page_of(run_dir)
    assert "2 update skipped: gradient not finite, with 1 pairs" in page.text
    said = "3 update skipped: loss and gradient not finite, with 2 responses – "
    said += "4 update skipped: not finite, with 0 responses – "
    said += "9 all responses are <b>empty, since step 7 a higher kl_coef"
    assert said in page.text.replace("skipped:  not", "skipped: not")
    assert page.all("b") == []
    assert "PPO, LoRA: no warnings and no skipped updates." in page.text


def test_troubles_stand_in_the_order_of_their_steps(tmp_path: Path) -> None:
    write(tmp_path / "reward_gold/metrics.jsonl", [{"step": 1}])
    found = [{"step": step, "seen": str(step), "since": 2} for step in (7, 3, None)]
    write(tmp_path / "reward_gold/warnings.jsonl", found)
    write(tmp_path / "reward_gold/skipped.jsonl", [{"step": 5, "not_finite": ["loss"], "rows": [{}, {}, {}]}])
    rows = read_run(tmp_path).troubles["reward_gold"]
    assert [row["step"] for row in rows] == [None, 3, 5, 7]
    assert [row["words"] for row in rows][1:3] == ["3, since step 2", "update skipped: loss not finite, with 3 pairs"]


def test_each_file_of_a_run_is_read_into_its_own_place(tmp_path: Path) -> None:
    result = {"n": 1, "labels": ["a\x1b"], "confusion_matrix": [[2]], "split": None}
    write(tmp_path / "reward/evaluation.json", result)
    write(tmp_path / "reward_gold/evaluation.json", result | {"n": 2})
    (tmp_path / "ppo_full").mkdir()
    (tmp_path / "ppo_full/metrics.jsonl").write_text("\n")
    write(tmp_path / "ppo_lora/metrics.jsonl", [{"step": 1, "loss": None}])
    write(tmp_path / "evaluation/responses.jsonl", [{"prompt": "a"}])
    write(tmp_path / "evaluation/rating_responses.jsonl", [{"prompt": "b"}])
    run = read_run(tmp_path)
    assert (run.reward["n"], run.gold["n"], "split" in run.reward) == (1, 2, False)
    assert run.ppo == {"lora": [{"step": 1}]}  # without what was not measured
    assert (run.responses, run.rating_responses) == ([{"prompt": "a"}], [{"prompt": "b"}])
    assert set(run.stages) == {"reward", "reward_gold", "ppo_full", "ppo_lora", "evaluation"}
    assert labels(run.reward) == ["a\\x1b"]
    assert labels({"confusion_matrix": [[1, 2], [3, 4]]}) == ["0", "1"]


def test_names_and_texts_of_a_printable_run_have_no_control_characters(tmp_path: Path) -> None:
    write(tmp_path / "evaluation/responses.jsonl", [{"a\x1b": ["b\x1b\tc\nd", 1, None]}])
    assert printable_run(read_run(tmp_path)).responses == [{"a\\x1b": ["b\\x1b\tc\nd", 1, None]}]


def test_weights_and_checkpoints_of_either_trainer_are_measured_apart(tmp_path: Path) -> None:
    files = {"model.safetensors": 5, "adapter/adapter_model.safetensors": 3, "checkpoints/step-9/model.safetensors": 70}
    files |= {"checkpoints/step-10/model.safetensors": 7, "checkpoints/step-10/optimizer/state.bin": 11}
    files |= {"checkpoint-20/model.safetensors": 13, "checkpoint-8/model.safetensors": 1, "checkpoint-20/rng.pth": 17}
    for name, size in files.items():
        for stage, left_out in (("ppo_full", "checkpoint-"), ("reward", "checkpoints/")):
            if not name.startswith(left_out):
                path = tmp_path / stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes(size))
    run = read_run(tmp_path)
    weights = {"adapter/adapter_model.safetensors": 3, "model.safetensors": 5}
    assert (run.sizes["ppo_full"], run.sizes["reward"], run.sizes["ppo_lora"]) == (weights, weights, {})
    assert run.checkpoints == {"ppo_full": 7 + 11, "reward": 13 + 17}


def test_twenty_troubles_are_shown_and_the_others_are_counted(run_dir: Path) -> None:
    for count, more in ((20, ""), (21, "And 1 more, in warnings.jsonl and skipped.jsonl.")):
        write(run_dir / "reward/skipped.jsonl", [{"step": i, "not_finite": ["loss"], "rows": []} for i in range(count)])
        table = tables.troubles(read_run(run_dir), "reward")
        assert (len(table.rows), table.rows[-1][0], table.note) == (20, "19", more)


def test_text_of_models_and_data_is_escaped(run_dir: Path) -> None:
    html = build_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert page.all("script") == page.all("b") == []
    assert "Question 0\nwhy?" in html  # CSS keeps the line break


def test_page_asks_for_nothing_outside_itself(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "image", "img"} == set()
    names = ("src", "href", "srcset", "xlink:href")
    sources = [v for _, attributes in page.tags for k, v in attributes.items() if k in names]
    assert sources
    assert all(source and source.startswith("#") for source in sources)
    places = re.findall(r"url\(([^)]*)\)", build_report(run_dir).read_text(encoding="utf-8"))
    assert all(place.startswith("#") for place in places)


def test_page_is_accessible(run_dir: Path) -> None:
    page = page_of(run_dir)
    pictures = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == len(PLOTS)
    assert all(picture.get("aria-label") for picture in pictures)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_plots_are_files_too(run_dir: Path) -> None:
    page = build_report(run_dir)
    assert {path.name for path in page.parent.iterdir()} == {
        "report.html",
        *(f"{name}.png" for name in PLOTS),
    }
    html = page.read_bytes()
    assert set(re.findall(r'data-plot="(\w+)"', html.decode())) == PLOTS == set(draw(read_run(run_dir)))
    assert build_report(run_dir).read_bytes() == html  # the same run, the same page


def test_the_plot_of_gains_has_the_confidence_of_the_evaluation(run_dir: Path) -> None:
    write(run_dir / "evaluation" / "evaluation.json", evaluation_result() | {"confidence": 0.9})
    figure = draw(read_run(run_dir))["evaluation_gains"]
    assert any("90%" in text.get_text() for text in figure.findobj(Text))


def test_a_plot_of_the_audit(run_dir: Path) -> None:
    row = {"n": 5, "accuracy": 0.6, "interval": [0.2, 0.9]}
    groups = {"length": {"chosen is longer": row, "rejected is longer": row}, "subset": {"only one": row}}
    rule = row | {"better": 3, "worse": 1, "p_value": 0.5}
    audit = {"groups": groups, "baselines": {"longer response": rule}, "leaked": {}}
    write(run_dir / "reward/evaluation.json", reward_result() | {"audit": audit})
    run = read_run(run_dir)
    names = [text.get_text() for text in draw(run)["reward_groups"].axes[0].texts]
    shown = ["all pairs: 65.5%", "chosen is longer: 60.0%", "rejected is longer: 60.0%", "rule: longer response: 60.0%"]
    assert names == shown
    text = page_of(run_dir).text
    assert "length chosen is longer 5 60.0% [20.0%, 90.0%]" in text
    assert "longer response 60.0% [20.0%, 90.0%] 3 / 1 0.500" in text


def test_stages_that_were_not_run_are_said_to_be_missing(run_dir: Path) -> None:
    for stage in ("reward", "ppo_lora", "evaluation"):
        shutil.rmtree(run_dir / stage)
    page = page_of(run_dir)
    for name in ("Reward model", "PPO, LoRA", "Evaluation", "Sample responses"):
        assert f"{name}: not run." in page.text
    assert "PPO, full: not run." not in page.text
    assert "The policies were not evaluated" in page.text
    assert len(page.all("svg")) == 5


def test_an_empty_run_folder_still_makes_a_page_and_none_is_refused(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "No stage was run." in page.text
    assert page.all("svg") == []
    with pytest.raises(UserError, match="expected a run folder"):
        build_report(tmp_path / "none")


def test_a_failed_stage_is_named_and_a_policy_without_gain_left_out(run_dir: Path) -> None:
    write(run_dir / "ppo_full/run.json", {"status": "failed", "error": "ValueError: <i>"})
    gains = {**evaluation_result()["gains"], "lora": None, "other": {"gain": None}}
    write(run_dir / "evaluation/evaluation.json", {"gains": gains})
    page = page_of(run_dir)
    assert "PPO, full: failed, not done (ValueError: <i>)." in page.text
    assert "(full) raised" in page.text
    assert "PPO with LoRA" not in page.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ppo_full/metrics.jsonl", '{"step": 1}\n{"step": \n', r"metrics\.jsonl:2: expected JSON"),
        ("evaluation/responses.jsonl", '{"a": 1}\n\n[1]\n', r"responses\.jsonl:3: expected a JSON object"),
        ("reward/run.json", "{", r"reward/run\.json: expected JSON"),
        ("reward/evaluation.json", '{"best": 3}', r"evaluation\.json: expected best as an object, found 3"),
        ("reward/evaluation.json", '{"confusion_matrix": [[1]], "labels": ["a", "b"]}', "2 rows of 2 counts"),
        ("evaluation/evaluation.json", '{"gains": {"full": 1}}', r"expected gains\.full as an object"),
        ("evaluation/evaluation.json", '{"models": {"base": {"interval": [1]}}}', r"models\.base\.interval"),
        ("ppo_lora/metrics.jsonl", b"\xff\xfe{}", r"metrics\.jsonl:1: expected JSON"),
        ("evaluation/run.json", "[" * 10**5, r"evaluation/run\.json: expected JSON"),
        ("evaluation/run.json", '{"models": {}}', r"expected models as a list, found \{\}"),
        ("reward/evaluation.json", '{"labels": {}}', r"expected labels as a list, found \{\}"),
        ("reward/evaluation.json", '{"audit": []}', r"expected audit as an object, found \[\]"),
        ("reward/evaluation.json", '{"confusion_matrix": [[1, 2], [3, "4"]]}', "2 rows of 2 counts"),
        ("reward/evaluation.json", '{"confusion_matrix": [[1, 2], [3]]}', "2 rows of 2 counts"),
        ("reward/evaluation.json", '{"calibration": {"bins": [[1]]}}', r"calibration\.bins as a list of objects"),
        ("reward/evaluation.json", '{"calibration": {"bins": {"n": 1}}}', r"calibration\.bins as a list of objects"),
        ("evaluation/evaluation.json", '{"validity": []}', r"expected validity as an object, found \[\]"),
        ("evaluation/evaluation.json", '{"models": {"base": []}}', r"expected models\.base as an object"),
        (
            "evaluation/evaluation.json",
            '{"gains": {"full": {"interval": [0, "1"]}}}',
            r"as \[low, high\], found \[0, '1'\]",
        ),
        (
            "evaluation/evaluation.json",
            '{"gains": {"full": {"interval": [0, 1, 2]}}}',
            r"gains\.full\.interval as \[low",
        ),
        ("ratings/ratings.json", '{"words": {}}', r"ratings\.json: expected words as a list"),
    ],
)
def test_a_broken_file_is_named(run_dir: Path, file: str, content: str | bytes, message: str) -> None:
    (run_dir / file).parent.mkdir(exist_ok=True)
    (run_dir / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        build_report(run_dir)
    assert "\n" not in str(caught.value)
    assert not (run_dir / "report").exists()


def test_ratings_are_shown_with_their_prompts(run_dir: Path) -> None:
    key = rating_sheets.key(prompts=5)

    def value(item: dict[str, Any], criterion: str) -> int:
        return 4 if item["model"] == "full" else 2

    sheets = [check_sheet(key, rating_sheets.filled(key, name, value, i), "test") for i, name in enumerate(("A", "B"))]
    write(run_dir / "ratings/ratings.json", analyse(key, sheets, ["base", "full", "lora"], 0.95, 0))
    write(run_dir / "evaluation/rating_responses.jsonl", rating_sheets.responses(5))
    page = page_of(run_dir)
    text = re.sub(r" (?=[,;).])", "", page.text)
    for words in [
        "Raters gave full higher ratings than base (+2.00 points, 95% interval +2.00 to +2.00, p = 0.062, 5 prompts",
        "Coherence 2.00 [2.00, 2.00] 4.00 [4.00, 4.00] 2.00 [2.00, 2.00] 1.00",
        "full over base 10 / 0 / 0 100.0%",
        "Question <b>4</b>?",
    ]:
        assert words in text, words
    assert page.all("b") == []
    assert len(page.all("article")) == 3 + 8 + 5


def test_samples_are_spread_and_the_later_row_counts() -> None:
    rows: list[Any] = [{"prompt_id": i, "model": "base", "response": "old"} for i in range(10)]
    chosen = samples.more_samples([*rows, {"prompt_id": 5, "model": "base", "response": "new"}], count=4)
    assert [number for number, _ in chosen] == [1, 3, 6, 8]
    assert chosen[2][1]["base"]["response"] == "new"
    assert samples.more_samples([]) == []


def test_the_first_samples_are_spread_over_the_gains() -> None:
    # Gains of full and LoRA over base, prompt by prompt: 4 and 0, so 2; then 1, 9, 5, 7; the last has no base.
    gains = [(4.0, 0.0), (1.0, 1.0), (9.0, 9.0), (4.0, 6.0), (7.0, 7.0)]
    rows: list[Any] = [{"prompt_id": "x", "model": "full", "score": 3.0}]
    for i, (full, lora) in enumerate(gains):
        for model, gain in (("base", 0.0), ("full", full), ("lora", lora)):
            rows.append({"prompt_id": i, "model": model, "score": 10 + gain})
    # In order: 1 (2nd prompt of these), 2, 5, 7, 9; places 0.4, 1.2, 2, 2.8 and 3.6 of it, rounded down: 1, 2, 5, 5, 7
    assert [number for number, _ in samples.first_samples(rows)] == [3, 2, 5, 6]
    assert [number for number, _ in samples.first_samples(rows[:4])] == [2]
    assert samples.first_samples(rows[:1]) == []


def test_half_a_surrogate_pair_does_not_cost_the_page(tmp_path: Path) -> None:
    write(tmp_path / "evaluation/responses.jsonl", {"prompt_id": 1, "model": "base", "response": "a\ud800b"})
    assert "a?b" in page_of(tmp_path).text


@pytest.mark.parametrize("several", [False, True])
def test_a_stale_evaluation_is_named_on_the_page_and_on_the_console(run_dir, several, capsys, monkeypatch):
    """One policy was trained again since it was evaluated, the other one was not evaluated."""
    basis = {"given": {}, "flags": {}, "recipe": None, "data": {}, "stages": {"ppo_full": "first"}}
    write(run_dir / "ppo_full" / "run.json", run_json("ppo_full") | {"id": "second"})
    write(run_dir / "evaluation" / "run.json", run_json("evaluation") | {"id": "x", "basis": basis})
    argv, page = ["--run", run_dir.name], run_dir / "report" / "report.html"
    if several:
        other = run_dir.with_name("other")
        shutil.copytree(run_dir, other)
        write(other / "evaluation" / "run.json", run_json("evaluation") | {"id": "y", "seed": 1})
        write(other / "ppo_full" / "metrics.jsonl", [ppo_row(step, 0.07) for step in range(1, 41)])
        argv, page = ["--run", "all", "--runs", run_dir.name, "other"], run_dir.parent / "all" / "report" / "seeds.html"
    monkeypatch.setattr("sys.argv", ["rlhf", *argv, "--runs_dir", str(run_dir.parent)])
    report.main()
    line = f"{run_dir.name}: evaluation is stale, since ppo_full and ppo_lora changed: run that stage again"
    assert f"! {line}" in capsys.readouterr().out.splitlines()
    assert page.read_text().count("is stale") == Page(page.read_text()).text.count(line) == 1

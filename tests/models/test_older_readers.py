"""What is saved, read by transformers 4: by its names of fields, and by transformers 4.57 itself where it is there.

python -m venv /tmp/older && /tmp/older/bin/pip install "transformers==4.57.3"
OLDER_TRANSFORMERS=/tmp/older/bin/python python -m pytest -m slow tests/models/test_older_readers.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf.models.older_readers import write_older_names

IDS = torch.arange(5, 17).unsqueeze(0)
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
READ = """
import json, sys
sys.path.append(sys.argv[2])  # torch; this environment's own packages come first
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
logits = model.eval()(torch.arange(5, 17).unsqueeze(0)).logits[0, -1].tolist()
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
extra = tokenizer.additional_special_tokens
print(json.dumps([__version__, logits, text, tokenizer.eos_token, tokenizer("hello there")["input_ids"], extra]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose rotary embeddings are not the default, and a tokenizer with a further special token."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny.llama().config.to_dict(), "rope_parameters": ROPE})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = tiny.chat_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path)
    write_older_names(tmp_path)
    return tmp_path


def test_the_names_of_transformers_4_are_there_and_5_reads_the_same(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"] == ROPE
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<tool>"]
    assert AutoConfig.from_pretrained(folder).rope_parameters == ROPE
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tiny.CHATML
    assert again.eos_token == "<|im_end|>"
    assert again.convert_tokens_to_ids("<tool>") in again.all_special_ids


def test_a_gpt2_has_the_length_that_llama_cpps_converter_reads(tmp_path: Path) -> None:
    model = tiny.gpt2()
    model.save_pretrained(tmp_path)
    write_older_names(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == model.config.n_positions == 256


def test_a_set_of_rotary_embeddings_for_each_type_of_layer(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": rope}}))
    write_older_names(tmp_path)
    part = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (part["rope_theta"], part["rope_local_base_freq"]) == (1e6, 1e4)
    assert part["rope_scaling"] == rope["full_attention"]


def test_default_rotary_embeddings_of_a_part_of_each_head(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    write_older_names(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found == {"rope_parameters": rope, "rope_theta": 2e4, "partial_rotary_factor": 0.5}


@pytest.mark.slow
@pytest.mark.skipif("OLDER_TRANSFORMERS" not in os.environ, reason="OLDER_TRANSFORMERS names no python with 4.57")
def test_transformers_4_reads_what_5_has_written(folder: Path) -> None:
    command = [os.environ["OLDER_TRANSFORMERS"], "-c", READ, str(folder), str(Path(torch.__file__).parents[1])]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    version, logits, text, eos, ids, extra = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("4.")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)
    assert (text, eos, extra) == ("<|im_start|>user\nhi<|im_end|>\n", "<|im_end|>", ["<tool>"])
    assert ids == tiny.chat_tokenizer()("hello there")["input_ids"]

"""What vLLM is asked, what is taken from it, and what goes wrong: against a server that speaks as `vllm serve` does.

There is no vLLM here. A package of its name holds what TRL imports of it, and weights go to a list, not over NCCL.
"""

import json
import math
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import tiny
import tiny_ppo
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from urllib3.util.retry import Retry

from rlhf.errors import UserError
from rlhf.generation import vllm
from rlhf.models.lora import add_lora, merged_model

EOS = 2
PACKAGE = {
    "__init__.py": """
__version__ = "0.31.0"
SENT = []  # (name, tensor) of the last update
ENGINES = []
broken = bool  # or what raises an error on the way


class RequestOutput: ...


class SamplingParams:
    def __init__(self, **given):
        self.given = given


class LLM:
    def __init__(self, **given):
        self.given, self.asked, self.updates = given, [], 0
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self.model = self
        self.loaded = []
        ENGINES.append(self)

    def load_weights(self, weights):
        self.loaded += [(name, weight.clone()) for name, weight in weights]

    def reset_prefix_cache(self):
        self.updates += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked.append(sampling_params.given)
        return [self.answer(prompt["prompt_token_ids"], self.updates) for prompt in prompts]
""",
    "sampling_params.py": "class StructuredOutputsParams: ...",
    "utils/__init__.py": "",
    "utils/network_utils.py": "def get_ip(): return '127.0.0.1'",
    "distributed/__init__.py": "",
    "distributed/weight_transfer/__init__.py": "",
    "distributed/weight_transfer/nccl_common.py": """
from types import SimpleNamespace


def trainer_init(init_info):
    return SimpleNamespace(group=SimpleNamespace(store=1, socket=1))
""",
    "distributed/weight_transfer/packed_tensor.py": """
import vllm


def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func):
    vllm.SENT[:] = [(item[0], post_iter_func(item).clone()) for item in iterator if not vllm.broken()]
""",
}


def answer(prompt, updates, limit=6):
    """Tokens that depend on the prompt and on how often weights have come; every third one is cut at the limit."""
    key = sum(prompt) + 31 * updates
    tokens = [10 + (key * 7 + i * 13) % 300 for i in range(limit)]
    return tokens if key % 3 == 0 else [*tokens[: key % limit], EOS]


class Server(ThreadingHTTPServer):
    """Answers as `vllm serve` does what TRL's client asks; `fault` says what it does wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked, self.fault = [], None

    def of(self, path):
        return [body for asked, body in self.asked if asked == path]

    def completions(self, body):
        rows = [answer(prompt, len(self.of("/update_weights")), body["max_tokens"]) for prompt in body["prompt"]]
        rows = rows[:-1] if self.fault == "few" else rows
        rows = [] if self.fault == "none" else rows
        rows[:1] = {"empty": [[]], "short": [[11]], "unknown": [[400, EOS]], "suppressed": [[397, EOS]]}.get(
            self.fault, {"long": [[*[11] * 8, EOS]], "past EOS": [[11, EOS, 12, 13, 14, 15]]}.get(self.fault, rows[:1])
        )
        choices = [{"token_ids": row, "prompt_token_ids": [], "logprobs": None} for row in rows]
        return {"choices": choices}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(
            {
                "/health": {},
                "/v1/models": {"data": [{"id": "tiny"}]},
                "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}}},
                "/get_world_size": {"world_size": 1},
            }[self.path.partition("?")[0]]
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.server.asked.append((self.path, body))
        self.reply(self.server.completions(body) if self.path == "/v1/completions" else {"success": True})

    def reply(self, answer):
        found = json.dumps(answer).encode()
        self.send_response(500 if self.server.fault in (500, self.path) else 200)
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *_): ...


def forget():
    """TRL looks for vLLM when its two files are imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name.startswith("trl.generation")]:
        del sys.modules[name]


def install(folder, monkeypatch):
    """The fake package `vllm`, and a CPU in a GPU's place."""
    for name, text in PACKAGE.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    forget()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(vllm, "_DEVICE", "cpu")
    monkeypatch.setattr(Retry, "sleep", lambda *_: None)
    import vllm as fake
    from trl.generation.vllm_client import VLLMClient

    init = VLLMClient.init_communicator
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: init(self, "cuda"))
    return fake


@pytest.fixture
def package(tmp_path, monkeypatch):
    yield install(tmp_path / "packages", monkeypatch)
    forget()


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(package):
    with serving() as server:
        yield server


def trainer(folder, server, **options):
    where = {"vllm_mode": "server", "vllm_server_base_url": f"{server.url}/", "vllm_server_timeout": 0}
    return tiny_ppo.trainer(folder, use_vllm=True, max_steps=2, **where | options)


@pytest.mark.parametrize("lora", [False, True])
def test_two_steps_learn_from_the_servers_responses(tmp_path, server, package, lora):
    """Weights come once a step, as they are then, under the names of the plain model; the base stays as it was."""
    run = trainer(tmp_path / "run", server, lora=lora)
    policy, rollouts, weights = run.roles.trained.policy, [], []
    base = [(p, p.clone()) for name, p in policy.named_parameters() if lora and "lora_" not in name]
    collect = run.collect

    def seen(step, batch):
        plain = merged_model(policy) if lora else policy
        before = [(name, weight.detach().clone()) for name, weight in plain.named_parameters()]
        rollouts.append(collect(step, batch))
        weights.append((before, list(package.SENT)))
        return rollouts[-1]

    run.collect = seen
    run.train()
    for step, rollout in enumerate(rollouts, 1):
        assert rollout.responses == [answer(prompt.input_ids, step) for prompt in rollout.prompts]
        assert rollout.mask.sum(1).tolist() == list(map(len, rollout.responses))
    assert len(server.of("/update_weights")) == len(server.of("/reset_prefix_cache")) == len(rollouts) == 2
    for update, (before, sent) in zip(server.of("/update_weights"), weights, strict=True):
        plain = [(name, list(weight.shape)) for name, weight in tiny.llama().named_parameters()]
        info = update["update_info"]
        assert list(zip(info["names"], info["shapes"], strict=True)) == plain
        assert [name for name, _ in sent] == info["names"]
        assert_close(dict(sent), dict(before))
    assert any(not torch.equal(a, b) for (_, a), (_, b) in zip(weights[0][1], weights[1][1], strict=True))
    assert all(torch.equal(weight, before) for weight, before in base)
    for row in tiny_ppo.metrics(tmp_path / "run"):
        assert all(map(math.isfinite, row.values())), row
        assert row["perf/generate/padding"] >= 0  # 0 where our decoder would read each prompt whole, too: on a GPU


def test_what_the_server_is_asked(tmp_path, server, package):
    run = trainer(tmp_path, server, temperature=1.5, response_length=5)
    responses = run.generate([[5, 6, 7], "hello", [8]])
    (body,) = server.of("/v1/completions")
    hello = run.processing_class("hello").input_ids
    assert body["prompt"] == [[5, 6, 7], hello, [8]]
    assert responses == [answer(prompt, 1, 5) for prompt in body["prompt"]]
    eos = run.collector.eos_ids
    whole = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # nothing is taken off
    ends = {"stop_token_ids": eos, "ignore_eos": True, "max_tokens": 5, "n": 1, "temperature": 1.5, "logprobs": None}
    assert {name: body[name] for name in [*whole, *ends]} == whole | ends
    assert "seed" not in body  # it would give equal prompts equal responses
    assert "logit_bias" not in body


def test_tokens_are_read_once_but_for_the_last_and_a_servers_length_is_its_own(tmp_path, server, package):
    run = trainer(tmp_path, server, vllm_max_model_length=8)
    found = run.collector.sample(run.prompts[:2], 1)
    lengths = [len(p.input_ids) + len(r) for p, r in zip(run.prompts, found.responses, strict=False)]
    assert min(lengths) > 8
    assert found.calls == [(1, length - 1) for length in lengths]
    assert run.generate([[5] * 20])


def test_the_references_responses_are_not_those_of_the_server(tmp_path, server, package):
    run = trainer(tmp_path, server)
    scores, is_valid = run.collector.score_reference(run.prompts[:3])
    assert scores.isfinite().all()
    assert is_valid.tolist() == [True] * 3
    assert server.of("/v1/completions") == server.of("/update_weights") == []


def test_ids_without_a_token_get_the_lowest_bias(tmp_path, server, package):
    run = trainer(tmp_path, server)
    policy = run.roles.trained.policy
    one = vllm.VLLMSampler(run.args, policy, None, [EOS, 3], torch.tensor([398, 397]), run.accelerator)
    one.sample([[5]], 1.0)
    assert server.of("/v1/completions")[0]["logit_bias"] == {"397": -100.0, "398": -100.0}
    assert server.of("/v1/completions")[0]["stop_token_ids"] == [EOS, 3]
    server.fault = "suppressed"
    with pytest.raises(UserError, match="expected tokens of the policy's vocabulary, found 397"):
        one.sample([[5]], 1.0)


def test_a_response_ends_at_its_first_eos_or_at_the_limit_and_others_are_a_line(tmp_path, server):
    run = trainer(tmp_path, server)
    for fault, first in {"long": [11] * 6, "past EOS": [11, EOS]}.items():
        server.fault = fault
        assert run.generate([[5], [6]]) == [first, answer([6], len(server.of("/update_weights")))]
    for fault, words in {
        "few": "expected 2 responses, found 1",
        "none": "IndexError",
        "empty": r"end with one of the tokens \[.*2.*\] or have response_length=6 tokens, found one of 0",
        "short": "or have response_length=6 tokens, found one of 1",
        "unknown": "expected tokens of the policy's vocabulary, found 400",
        "/v1/completions": "too many 500 error responses",
        "/update_weights": "too many 500 error responses",
    }.items():
        server.fault = fault
        with pytest.raises(UserError, match=f"^vLLM server {server.url}: .*{words}") as error:
            run.generate([[5], [6]])
        assert "\n" not in str(error.value)


def test_weights_that_do_not_arrive_in_the_second_step_leave_the_first(tmp_path, server, package):
    """Adapters are not left merged: a notebook may save the policy then."""
    run = trainer(tmp_path, server, lora=True, save_strategy="steps", save_steps=1)
    base = [(p, p.clone()) for name, p in run.roles.trained.policy.named_parameters() if "lora_" not in name]
    collect = run.collect

    def failing(step, batch):
        package.broken = bool if step == 1 else lambda: 1 / 0
        return collect(step, batch)

    run.collect = failing
    with pytest.raises(UserError, match=f"^vLLM server {server.url}: ZeroDivisionError"):
        run.train()
    assert len(tiny_ppo.metrics(tmp_path)) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert all(torch.equal(weight, before) for weight, before in base)
    assert not any(getattr(module, "merged", False) for module in run.roles.trained.policy.modules())


@pytest.mark.parametrize(("fault", "found"), [("down", "Connection refused"), ("/health", "500")])
def test_a_server_that_is_not_up_in_time_is_a_line(tmp_path, server, fault, found):
    """TRL's client would ask the second one for ever."""
    server.fault = fault
    options = {"vllm_server_base_url": "http://127.0.0.1:1"} if fault == "down" else {}
    url = options.get("vllm_server_base_url", server.url)
    with pytest.raises(
        UserError, match=f"^vLLM server {url}: .* within vllm_server_timeout=0 seconds, found .*{found}"
    ):
        trainer(tmp_path, server, **options)


def test_vllm_in_the_same_process(tmp_path, package, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # TRL sets them: so that they are taken back
        monkeypatch.delenv(name)

    def one(prompt, updates):
        output = SimpleNamespace(token_ids=tuple(answer(prompt, updates)), logprobs=None)
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[output])

    package.LLM.answer = staticmethod(one)
    run = tiny_ppo.trainer(
        tmp_path, use_vllm=True, vllm_max_model_length=200, vllm_gpu_memory_utilization=0.4, max_steps=1
    )
    (engine,) = package.ENGINES
    assert (engine.given["max_model_len"], engine.given["gpu_memory_utilization"]) == (200, 0.4)
    assert run.generate([[5], [6, 7]]) == [answer([5], 1), answer([6, 7], 1)]
    assert_close(dict(engine.loaded), dict(run.roles.trained.policy.named_parameters()))
    (asked,) = engine.asked
    assert (asked["stop_token_ids"], asked["ignore_eos"], asked["max_tokens"]) == (run.collector.eos_ids, True, 6)
    with pytest.raises(UserError, match="at most 200 tokens, the vllm_max_model_length's positions"):
        run.generate([[5] * 195])


def test_what_cannot_work_is_a_line_before_training(monkeypatch):
    args = SimpleNamespace(vllm_mode="colocate", vllm_tensor_parallel_size=2)
    place = SimpleNamespace(device=torch.device("cpu"), num_processes=3)
    policy = nn.Linear(2, 2)

    def refused(words, policy=policy):
        with pytest.raises(UserError, match=words):
            vllm.check_vllm(args, policy, place)

    monkeypatch.setattr(vllm, "is_vllm_available", lambda: False)
    refused(r'^use_vllm: vLLM is not installed: pip install "trl\[vllm\]"$')
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: True)
    refused("^use_vllm: expected a CUDA device, found cpu")
    place.device = torch.device("cuda")
    refused("^vllm_tensor_parallel_size: expected a divisor of the 3 processes, found 2$")
    refused("^lora_target_modules: set c_attn", add_lora(tiny.gpt2(), tiny_ppo.LORA))
    for targets, saved in ((["wte"], None), (["lm_head"], None), (["c_attn"], ["lm_head"])):
        tied = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, modules_to_save=saved)
        refused("^lora_target_modules: leave head and embeddings out", get_peft_model(tiny.gpt2(), tied))
    args.vllm_mode = "server"  # which has processes of its own
    vllm.check_vllm(args, policy, place)
    args.vllm_mode, args.vllm_tensor_parallel_size = "colocate", 3
    whole = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    vllm.check_vllm(args, get_peft_model(tiny.gpt2(), whole), place)
    policy.is_quantized = True
    refused("^use_vllm: .*quantised")

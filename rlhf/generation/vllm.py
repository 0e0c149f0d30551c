"""Sample responses by vLLM, on a server or beside training, by TRL's VLLMGeneration: with use_vllm, off by default.

What is sampled depends on vLLM: on its version, its seed and what is in a batch. Streams per prompt, as the decoder
here has them, do not exist there.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from urllib.request import urlopen

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.import_utils import is_vllm_available

from rlhf.config import PPOConfig
from rlhf.distributed.collectives import from_main, on_all
from rlhf.errors import UserError
from rlhf.generation.decode import Samples
from rlhf.models.lora import SplitProjection
from rlhf.models.unwrap import Model, is_quantised, unwrap_peft

_DEVICE = "cuda"  # weights are sent by NCCL
_NEVER = -100.0  # the lowest logit_bias that vLLM takes: at its highest temperature, 2, a factor of e^-50


class VLLMSampler:
    """Sends vLLM the policy's weights, then has it answer. All ranks make the same calls, with equally many rows."""

    def __init__(
        self,
        args: PPOConfig,
        policy: Model,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        suppress_tokens: Tensor | None,
        accelerator: Accelerator,
    ) -> None:
        """policy: as Accelerate has prepared it. suppress_tokens: ids that are never sampled, int [K]."""
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        url = url.rstrip("/")
        self.server = url if args.vllm_mode == "server" else None
        self.policy, self.accelerator = policy, accelerator
        self.eos_ids, self.response_length = set(eos_ids), args.response_length
        self.vocabulary = unwrap_peft(policy).config.get_text_config(decoder=True).vocab_size
        self.suppressed = set() if suppress_tokens is None else set(suppress_tokens.tolist())
        check_vllm(args, policy, accelerator)
        if self.server is not None:
            from_main(lambda: wait_for_server(url, args.vllm_server_timeout))
        from trl.generation.vllm_generation import VLLMGeneration  # imports vLLM

        with self._in_one_line():
            self.vllm = VLLMGeneration(
                policy,
                accelerator,
                tokenizer,
                mode=args.vllm_mode,
                server_base_url=url,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                max_completion_length=args.response_length,
                logprobs=None,
                # Of vLLM's SamplingParams. Without ignore_eos it would also stop where its own config says so.
                generation_kwargs={
                    "stop_token_ids": list(eos_ids),
                    "ignore_eos": True,
                    **({"logit_bias": dict.fromkeys(sorted(self.suppressed), _NEVER)} if self.suppressed else {}),
                },
            )

    def sample(self, prompts: Sequence[Sequence[int]], temperature: float) -> Samples:
        """Responses from softmax(logits / temperature), each up to its first EOS or response_length tokens.

        The weights are sent before each call, since nothing here knows whether they have changed.
        """
        with self._in_one_line():
            with merged_without_loss(self.policy):
                self.vllm.sync_weights()
            self.vllm.temperature = temperature
            rows = self.vllm.generate([list(prompt) for prompt in prompts], None, num_generations=1)[1]
        responses = on_all(lambda: self._checked(rows, len(prompts)))
        # What its calls were is not known: as many token positions as there had to be.
        calls = [(1, len(p) + len(r) - 1) for p, r in zip(prompts, responses, strict=True)]
        return Samples(responses, calls)

    def _checked(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The rows up to their ends; a UserError for what this policy cannot have answered."""
        name = self._name()
        if len(rows) != count:
            raise UserError(f"{name}: expected {count} responses, found {len(rows)}")
        responses = []
        for row in rows:
            response = list(row[: self.response_length])
            end = next((i for i, token in enumerate(response) if token in self.eos_ids), self.response_length - 1)
            response = response[: end + 1]
            if len(response) <= end:
                raise UserError(
                    f"{name}: expected responses that end with one of the tokens {sorted(self.eos_ids)} or have "
                    f"response_length={self.response_length} tokens, found one of {len(response)}"
                )
            for token in response:
                if not 0 <= token < self.vocabulary or token in self.suppressed:
                    raise UserError(
                        f"{name}: expected tokens of the policy's vocabulary, found {token}: another model?"
                    )
            responses.append(response)
        return responses

    def _name(self) -> str:
        return "vLLM" if self.server is None else f"vLLM server {self.server}"

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """What goes wrong between here and the server as a UserError; TRL raises bare Exceptions among others."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.server is None or not self.accelerator.is_main_process:  # the others do not talk to it
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{self._name()}: {why}") from error


def check_vllm(args: PPOConfig, policy: nn.Module, accelerator: Accelerator) -> None:
    """A UserError if vLLM is not there, or cannot sample from this policy."""
    if not is_vllm_available():
        raise UserError('use_vllm: vLLM is not installed: pip install "trl[vllm]"')
    if accelerator.device.type != _DEVICE:
        raise UserError(f"use_vllm: expected a CUDA device, found {accelerator.device.type}; leave use_vllm out")
    if is_quantised(policy):
        raise UserError("use_vllm: expected a policy in 16 or 32 bits, found quantised weights, which cannot be sent")
    if any(isinstance(module, SplitProjection) for module in policy.modules()):
        raise UserError("lora_target_modules: set c_attn with use_vllm: vLLM has no q_proj, k_proj and v_proj of GPT-2")
    if isinstance(policy, PeftModel) and _unties(policy):
        raise UserError(
            "lora_target_modules: leave head and embeddings out with use_vllm: in this model they are one matrix"
        )
    processes, size = accelerator.num_processes, args.vllm_tensor_parallel_size
    if args.vllm_mode == "colocate" and processes % size:
        raise UserError(f"vllm_tensor_parallel_size: expected a divisor of the {processes} processes, found {size}")


def _unties(policy: PeftModel) -> bool:
    """Whether head and embeddings are one matrix, of which only one is trained: merged, both would change."""
    base = unwrap_peft(policy)
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    tied = base.config.get_text_config(decoder=True).tie_word_embeddings
    return tied and (any(isinstance(end, BaseTunerLayer) for end in ends) or ends[0].weight is not ends[1].weight)


def wait_for_server(url: str, timeout: float) -> None:
    """A UserError if the server is not up within so many seconds. TRL waits for ever for one that answers an error."""
    end = time.monotonic() + timeout
    while True:
        left = end - time.monotonic()
        try:
            with urlopen(f"{url}/health", timeout=max(left, 1)):
                return
        except (OSError, HTTPException, ValueError) as error:  # an error's status is an OSError
            why = str(error)
        if time.monotonic() >= end:
            raise UserError(
                f"vLLM server {url}: expected it to be up within vllm_server_timeout={timeout:g} seconds, found {why}; "
                "start it with vllm serve"
            )
        time.sleep(min(1.0, max(left, 0)))


@contextmanager
def merged_without_loss(policy: nn.Module) -> Iterator[None]:
    """Inside, adapters may be merged and taken out again. That rounds the weights below them, which are put back."""
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    kept = [(weight, weight.detach().clone()) for layer in layers for weight in layer.get_base_layer().parameters()]
    try:
        yield
    finally:
        for layer in layers:
            if layer.merged:  # sending them has failed half-way
                layer.unmerge()
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)

"""Embedding rows beyond the tokenizer, as Qwen2.5 has: never sampled, in no log-prob, and no row is cut off."""

import pytest
import tiny
import torch
from tiny_ppo import metrics, trainer
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from rlhf.config import EvaluationConfig
from rlhf.data.chat import prepare_tokenizer
from rlhf.data.oasst import TextPrompt
from rlhf.evaluation.generate import respond
from rlhf.generation.decode import generate
from rlhf.models.actor_critic import ids_without_token, logp_of, suppress
from rlhf.models.load import load_tokenizer, new_reward_model

CPU = torch.device("cpu")


class Words:
    def __init__(self, ids):
        self.ids = ids

    def get_vocab(self):
        return {f"word {i}": i for i in self.ids}


def wide(rows=416):
    """A policy with 16 rows more than its tokenizer has tokens, which it likes best of all."""
    config = tiny.llama().config
    config.vocab_size = rows
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for beyond in range(400, rows):
            model.lm_head.weight[beyond] = 3 * model.lm_head.weight[5 + beyond % 7]
    return model


def test_gaps_count_and_the_models_own_end_does_not():
    model = tiny.llama()
    known = [i for i in range(390) if i not in (7, 200)]
    found = ids_without_token(model, Words(known), [395], CPU)
    assert found.tolist() == [7, 200, *range(390, 395), *range(396, 400)]
    assert ids_without_token(model, tiny.chat_tokenizer(), [2], CPU) is None


def test_log_probs_are_of_the_other_tokens_and_no_gradient_reaches_these():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, kept = torch.tensor([2, 5]), [0, 1, 3, 4]
    logp, entropy = logp_of(suppress(logits * 1, ids), torch.tensor([0, 3, 4]), 0.7)
    expected = torch.distributions.Categorical(logits=logits[:, kept] / 0.7)
    assert_close(logp, expected.log_prob(torch.tensor([0, 2, 3])))
    assert_close(entropy, expected.entropy())
    logp.sum().backward()
    assert (logits.grad[:, [2, 5]] == 0).all()
    assert (logits.grad[:, kept] != 0).all()


@pytest.mark.parametrize("lora", [False, True])
def test_ppo_never_samples_them_and_counts_them_nowhere(tmp_path, lora):
    free = generate(wide(), [[1, 20, 30]] * 8, torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), [2], 0.7)
    assert any(token >= 400 for row in free for token in row)
    seen = []
    run = trainer(tmp_path, lora=lora, given={"model": wide()}, max_steps=2, learning_rate=0.0)
    complete = run.collector.complete
    run.collector.complete = lambda *given, **more: seen.append(complete(*given, **more)) or seen[-1]
    run.train()
    for row in metrics(tmp_path):
        assert row["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert row["objective/kl_exact_per_token"] == pytest.approx(0, abs=1e-6)
    model = run.roles.trained.policy.eval()
    for out in seen:
        for prompt, response, logp in zip(out.prompts, out.responses, out.logp, strict=True):
            assert max(response) < 400
            with torch.no_grad():
                logits = model(torch.tensor([prompt.input_ids + response])).logits[0, len(prompt.input_ids) - 1 : -1]
            expected = (logits[:, :400] / 0.7).log_softmax(-1)[range(len(response)), response]
            assert_close(logp[: len(response)], expected, atol=1e-5, rtol=0)


def test_nor_does_an_evaluation():
    tokenizer, policy, base = prepare_tokenizer(tiny.chat_tokenizer()), wide(), wide()
    with torch.no_grad():
        base.lm_head.weight[400:] = 0  # no difference: these have probability 0 under both
    prompts = [TextPrompt(prompt_id="p", tree_id="t", text="word word")]
    config = EvaluationConfig(base_model="unused", eval_response_length=9)
    [row] = respond("full", policy, tokenizer, tiny.llama_reward(), prompts, config, [2], base)
    assert row["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("rows", "after"), [(416, 416), (400, 401)])
def test_a_reward_model_gets_a_row_for_its_pad_and_loses_none(tmp_path, rows, after):
    wide(rows).save_pretrained(tmp_path)
    tiny.gpt2_tokenizer().save_pretrained(tmp_path)  # its only special token is EOS: a pad is added
    tokenizer = load_tokenizer(str(tmp_path))
    model = new_reward_model(str(tmp_path), tokenizer)
    assert (model.config.pad_token_id, model.get_input_embeddings().num_embeddings) == (400, after)

"""Models of another tokenizer family and of any head: their score is that of the text, by hand."""

import pytest
import tiny
import torch
from chat_families import family
from tiny_ppo import trainer
from tokenizers import processors
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rlhf.data.chat import (
    decode_response,
    encode_dialogue,
    encode_prompt,
    encode_response,
    give_distinct_pad,
    prepare_tokenizer,
)
from rlhf.data.hh_rlhf import Pair
from rlhf.errors import UserError
from rlhf.models.actor_critic import FrozenRole
from rlhf.reward.reward_functions import Completions, TextReward, TokenReward
from rlhf.reward.scoring import score_tokens
from rlhf.reward.trainer import encode_pair

ROWS = [{"prompt": [{"role": "user", "content": "a few words " * (i + 1)}]} for i in range(4)]


def collect(run):
    return run.collect(1, run.prompts[: run.batch_size])


def by_hand(model, tokenizer, run, out):
    """Scores of decoded texts in the model's own template and tokens, one at a time, without padding."""
    scores = []
    for prompt, response in zip(out.prompts, out.responses, strict=True):
        text = str(run.processing_class.decode(response, skip_special_tokens=True)).strip()
        ids = encode_response(tokenizer, prompt.content, text)
        ids = ids if response[-1] in run.collector.eos_ids else ids[:-1]
        row = torch.tensor([encode_prompt(tokenizer, prompt.content) + ids])
        with torch.no_grad():
            scores.append(score_tokens(model, row, torch.ones_like(row, dtype=torch.bool))[0])
    return torch.stack(scores)


def saved(folder, model, tokenizer=None):
    """The model as it comes from a folder, with or without tokenizer files."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def layout(single, pair, **names):
    """A byte-level tokenizer that joins a pair as `pair` says."""
    special = ["<pad>", *dict.fromkeys(names.values())]
    tokenizer = tiny._byte_level(special, pad_token="<pad>", **names)
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    return tokenizer


def bert():
    tokenizer = layout("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", cls_token="[CLS]", sep_token="[SEP]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification, BertConfig(vocab_size=400, num_labels=1, **sizes), tokenizer


def t5():
    tokenizer = layout("$A </s>", "$A </s> $B </s>", eos_token="</s>")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForSequenceClassification, T5Config(vocab_size=400, num_labels=1, **sizes, **ids), tokenizer


def bart():
    tokenizer = layout("<s> $A </s>", "<s> $A </s> </s> $B </s>", bos_token="<s>", eos_token="</s>")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForSequenceClassification, BartConfig(vocab_size=400, num_labels=1, **sizes, **ids), tokenizer


def xlnet():
    tokenizer = layout("$A <sep> <cls>", "$A <sep> $B <sep> <cls>", sep_token="<sep>", cls_token="<cls>")
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    return XLNetForSequenceClassification, XLNetConfig(vocab_size=400, num_labels=1, **sizes), tokenizer


@pytest.mark.parametrize("make", [bert, t5, bart, xlnet], ids=lambda make: make.__name__)
@pytest.mark.parametrize("given", [True, False], ids=["given", "in the folder"])
def test_a_model_without_a_decoders_head_reads_a_pair_of_texts(tmp_path, make, given):
    kind, config, tokenizer = make()
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # or every tiny model says nearly the same
    model = saved(tmp_path / "judge", model, None if given else tokenizer).eval()
    run = trainer(tmp_path, rows=ROWS, reward=model, given={"reward_processing_classes": tokenizer} if given else {})
    out = collect(run)
    expected = []
    for prompt, response in zip(out.prompts, out.responses, strict=True):
        ids = tokenizer(prompt.text, decode_response(run.processing_class, response))["input_ids"]
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits[0, 0])
    assert len({len(row) for row in out.responses} | {len(prompt.input_ids) for prompt in out.prompts}) > 1
    assert torch.stack(expected).std() > 1e-3
    assert_close(out.raw_score, torch.stack(expected), atol=1e-4, rtol=1e-4)


Q = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("prompt", "said", "decoder", "encoder"),
    [
        (Q, "  It floats.\n ", "\n\nHuman: Why?\n\nAssistant: It floats.", "[CLS]Why?[SEP]It floats.[SEP]"),
        # What goes on with the prompt's text may begin with a blank, which counts, or with none.
        ("Why?\nA:", " It floats.\n", "Why?\nA: It floats.\n", "[CLS]Why?\nA:[SEP]It floats.[SEP]"),
        ("Why? It", "s ice", "Why? Its ice", "[CLS]Why? It[SEP]s ice[SEP]"),
        (
            [*Q, {"role": "assistant", "content": "It"}],
            " floats.",
            "\n\nHuman: Why?\n\nAssistant: It floats.",
            "[CLS]Why?[SEP]It floats.[SEP]",
        ),
    ],
)
def test_a_model_of_another_family_reads_what_it_was_trained_on(prompt, said, decoder, encoder):
    policy, reads = prepare_tokenizer(tiny.chat_tokenizer()), prepare_tokenizer(tiny.gpt2_tokenizer())
    kind, config, pairs = bert()
    given = [[prompt] * 2, [[]] * 2, [[*policy(said)["input_ids"], policy.eos_token_id], policy(said)["input_ids"]]]
    completions = Completions(*given, ended=[True, False], columns=[{}] * 2)
    own = TextReward("own", FrozenRole(tiny.gpt2_reward()), 2, reads, policy).encode(completions)
    assert [reads.decode(ids) for ids in own] == [f"{decoder}{reads.eos_token}", decoder]
    if not isinstance(prompt, str):
        assert own[0] == encode_pair(reads, Pair(Q, "It floats.", "No.", "file:1"))["chosen_ids"]
    joined = TextReward("joined", FrozenRole(kind(config)), 2, pairs, policy).encode(completions)
    assert [pairs.decode(ids) for ids in joined] == [encoder, encoder]


@pytest.mark.parametrize("blank_first", [False, True], ids=["bytes", "sentencepiece"])
def test_a_text_that_goes_on_keeps_its_first_blank(blank_first):
    policy, reads = family(None, blank_first=blank_first), prepare_tokenizer(tiny.gpt2_tokenizer())
    said = encode_response(policy, "The sky", " is")
    completions = Completions(["The sky"], [[]], [said], ended=[True], columns=[{}])
    (ids,) = TextReward("own", FrozenRole(tiny.gpt2_reward()), 2, reads, policy).encode(completions)
    assert reads.decode(ids) == f"The sky is{reads.eos_token}"


def test_a_pair_too_long_for_an_encoder_is_named(tmp_path):
    kind, config, tokenizer = bert()
    given = {"reward_processing_classes": tokenizer}
    run = trainer(tmp_path, rows=ROWS, reward=kind(config), given=given)
    longest = run.rewards[0].longest([prompt.content for prompt in run.prompts], [])
    config.max_position_embeddings = longest + 5  # of 6 tokens of a response
    with pytest.raises(UserError, match=rf"fit the reward reward's {longest + 5} positions, found one of {longest};"):
        trainer(tmp_path, rows=ROWS, reward=kind(config), given=given)
    run.rewards[0].positions = longest + 1  # a text can become longer in its tokens
    with pytest.raises(UserError, match=rf"prompt and response of at most {longest + 1} tokens, found \d+; lower"):
        collect(run)


def test_positions_that_begin_behind_the_pads_are_fewer():
    _, config, tokenizer = bert()
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= {"vocab_size": 400, "intermediate_size": 32, "num_labels": 1, "max_position_embeddings": 12}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, pad_token_id=1)).eval()
    judge = TextReward("judge", FrozenRole(model), 2, tokenizer, tiny.chat_tokenizer())
    assert judge.positions == 10
    score_tokens(model, torch.full((1, 10), 7), torch.ones(1, 10, dtype=torch.bool))  # so many, and no more
    with pytest.raises((IndexError, RuntimeError), match="out of "):
        score_tokens(model, torch.full((1, 11), 7), torch.ones(1, 11, dtype=torch.bool))


def test_an_encoder_without_a_tokenizer_is_refused(tmp_path):
    kind, config, _ = bert()
    with pytest.raises(UserError, match="a BertForSequenceClassification needs its own tokenizer; save"):
        trainer(tmp_path, reward=kind(config))


def of_another_template():
    """The policy's vocabulary, and conversations as another model of its family writes them."""
    tokenizer = tiny.chat_tokenizer()
    tokenizer.chat_template = tiny.CHATML.replace("<|im_start|>", "<|im_start|>the ")
    return tiny.llama_reward(), tokenizer


def of_another_vocabulary():
    return tiny.gpt2_reward(), tiny.gpt2_tokenizer()


@pytest.mark.parametrize("make", [of_another_vocabulary, of_another_template])
def test_a_decoder_of_another_family_reads_its_own_template(tmp_path, make):
    model, tokenizer = make()
    give_distinct_pad(prepare_tokenizer(tokenizer))
    run = trainer(tmp_path, "llama", reward=model, given={"reward_processing_classes": tokenizer})
    out = collect(run)
    assert_close(out.raw_score, by_hand(model, tokenizer, run, out), atol=1e-5, rtol=0)


def test_a_model_of_the_same_family_reads_the_tokens(tmp_path):
    run = trainer(tmp_path, given={"reward_processing_classes": tiny.chat_tokenizer()})
    out = collect(run)
    rows = [torch.tensor([p.input_ids + r]) for p, r in zip(out.prompts, out.responses, strict=True)]
    with torch.no_grad():
        model = run.roles.reward.base
        expected = [score_tokens(model, row, torch.ones_like(row, dtype=torch.bool))[0] for row in rows]
    assert_close(out.raw_score, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_model_of_another_family_is_found_by_the_tokenizer_in_its_folder(tmp_path):
    """A24: TRL's constructor has no argument for it, so scripts do not say."""
    tokenizer = tiny.gpt2_tokenizer()
    model = saved(tmp_path / "judge", tiny.gpt2_reward(), tokenizer)
    run = trainer(tmp_path, "llama", reward=model)
    out = collect(run)
    assert_close(out.raw_score, by_hand(model, prepare_tokenizer(tokenizer), run, out), atol=1e-5, rtol=0)


def test_the_critic_starts_from_a_reward_model_only_if_it_reads_the_policys_tokens(tmp_path):
    other = saved(tmp_path / "judge", tiny.gpt2_reward(), tiny.gpt2_tokenizer())
    critic = trainer(tmp_path, "llama", reward=[other, tiny.llama_reward(8)]).roles.trained.critic
    assert torch.equal(critic.score.weight, tiny.llama_reward(8).score.weight)
    critic = trainer(tmp_path, "llama", reward=other).roles.trained.critic
    assert critic.config.model_type == "llama"
    assert not critic.score.weight.any()


def test_a_folder_with_the_policys_tokenizer_and_a_pad_token_of_its_own_is_the_same_family(tmp_path):
    judge = tiny.chat_tokenizer()
    give_distinct_pad(judge)
    policy = tiny.chat_tokenizer()
    policy.add_special_tokens({"pad_token": "[PAD]"})  # as TRL's example does, without a row for it
    model = saved(tmp_path / "judge", tiny.llama_reward(), judge)
    run = trainer(tmp_path, reward=model, given={"processing_class": policy, "value_model": tiny.llama_reward()})
    assert isinstance(run.collector.rewards[0], TokenReward)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (tiny.gpt2_reward(), "with EOS id 2, found 0 in its config"),
        (tiny.llama_reward(), "expected embeddings for the 400 tokens of its tokenizer, found 300"),
    ],
    ids=["eos", "rows"],
)
@pytest.mark.parametrize("role", ["reward_model", "value_model"])
def test_a_model_that_cannot_read_the_policys_tokens_and_has_no_tokenizer_is_refused(tmp_path, model, words, role):
    if model.config.vocab_size == 400:
        model.resize_token_embeddings(300)
    model = saved(tmp_path / "judge", model)
    given = {"value_model": model} if role == "value_model" else {}
    with pytest.raises(UserError, match=f"{role}.*{words}"):
        trainer(tmp_path, "llama", reward=None if given else model, given=given)


def test_a_value_model_of_another_family_is_refused(tmp_path):
    model = saved(tmp_path / "critic", tiny.gpt2_reward(), tiny.gpt2_tokenizer())
    with pytest.raises(UserError, match=r"value_model: expected .* reads the policy's tokens, found .*critic"):
        trainer(tmp_path, "llama", given={"value_model": model})


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    """What transformers makes of a folder that lacks the tokenizer's files."""
    model = saved(tmp_path / "judge", tiny.gpt2_reward())
    empty = AutoTokenizer.from_pretrained(tmp_path / "judge")
    with pytest.raises(UserError, match=r"its tokenizer has no vocabulary; put the tokenizer files into .*judge"):
        trainer(tmp_path, "llama", reward=model, given={"reward_processing_classes": empty})


def test_an_encoder_with_a_template_reads_a_dialogue_in_it():
    policy = prepare_tokenizer(tiny.chat_tokenizer())
    kind, config, pairs = bert()
    pairs.chat_template = "{{ a }}{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    said = [*policy(" It floats.")["input_ids"], policy.eos_token_id]
    completions = Completions([Q], [[]], [said], ended=[True], columns=[{}], options=[{"a": "so "}])
    (ids,) = TextReward("judge", FrozenRole(kind(config)), 2, pairs, policy).encode(completions)
    assert ids == encode_dialogue(pairs, [*Q, {"role": "assistant", "content": "It floats."}], {"a": "so "})
    assert ids != encode_dialogue(pairs, [*Q, {"role": "assistant", "content": "It floats."}], {"a": "no "})


def test_a_text_may_fill_all_positions_and_an_encoders_tokenizer_may_know_of_fewer():
    completions = Completions(["x"], [[5, 6]], [[7]], ended=[False], columns=[{}])
    judge = TokenReward("judge", FrozenRole(tiny.llama_reward()), 2)
    for judge.positions in (None, 3):
        assert judge.plan(completions)[0] == [[5, 6, 7]]
    judge.positions = 2
    with pytest.raises(UserError, match=r"reward judge: .* of at most 2 tokens, found 3; lower"):
        judge.plan(completions)
    kind, config, pairs = bert()
    pairs.model_max_length = 7
    assert TextReward("judge", FrozenRole(kind(config)), 2, pairs, tiny.chat_tokenizer()).positions == 7

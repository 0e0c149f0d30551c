"""step() and generate(): for people who sample and score themselves."""

import pytest
import tiny
import torch
from tiny_ppo import metrics, timeless, trainer
from torch.testing import assert_close

from rlhf.errors import UserError

PROMPTS = ["hello", [{"role": "user", "content": "hi there"}], [5, 6, 7], torch.tensor([8, 9])]


def own(folder, **options):
    given = {"train_dataset": None, "reward_model": None, "value_model": tiny.llama_reward()}
    return trainer(folder, given=given, max_steps=3, **options)


def test_a_loop_of_ones_own(tmp_path):
    run = own(tmp_path)
    for n in (1, 2, 3):
        responses = run.generate(PROMPTS)
        assert len(responses) == 4
        assert all(1 <= len(r) <= 6 for r in responses)
        row = run.step(PROMPTS, responses, [1.0, torch.tensor(2.0), 3, 4.0])
        assert run.state.global_step == n
        assert row["objective/scores"] == 2.5
        assert row["rewards/score/mean"] == 2.5
        assert row["objective/response_length"] == sum(map(len, responses)) / 4
    assert run.generate(PROMPTS) != responses  # another step has other random numbers


@pytest.mark.parametrize("named", [False, True], ids=["texts", "rows with ids"])
def test_what_is_asked_again_before_a_step_is_answered_anew(tmp_path, named):
    """Row by row, too: chunks of a batch share no random numbers. After a resume the same calls give the same."""
    prompts = [{"prompt": "hello", "prompt_id": "a"}] * 2 if named else ["hello"] * 2
    run, other = own(tmp_path), own(tmp_path)
    first, again = run.generate(prompts), run.generate(prompts)
    assert len({tuple(response) for response in first + again}) == 4
    assert [other.generate(prompts), other.generate(prompts)] == [first, again]
    run.step(prompts, first, [0.0, 1.0])
    other.step(prompts, first, [0.0, 1.0])
    assert other.generate(prompts[:1]) == run.generate(prompts[:1])


def test_what_has_more_tokens_than_positions_is_refused(tmp_path):
    run = own(tmp_path)
    positions = run.roles.trained.policy.config.max_position_embeddings
    fits = [5] * (positions - 6)
    run.generate([fits])
    words = f"prompts row 1: expected prompt and response of at most {positions} tokens, .*found {positions - 5} and 6"
    with pytest.raises(UserError, match=words):
        run.generate([fits, [*fits, 5]])
    run.step([fits, fits], [[7] * 6, [7]], [0.0, 1.0])
    with pytest.raises(UserError, match=f"row 0: .*found {positions - 6} and 7"):
        run.step([fits], [[7] * 7], [0.0])


def looped(run, steps):
    """Steps of a loop; the metrics of each that do not tell the time."""
    rows = []
    for _ in range(steps):
        responses = run.generate(PROMPTS)
        rows.append(timeless(run.step(PROMPTS, responses, [len(set(ids)) / 3 for ids in responses])))
    return rows


@pytest.mark.parametrize("newest", [True, False])
def test_a_loop_that_was_cut_goes_on_to_the_bit(tmp_path, newest):
    options = {"save_strategy": "steps", "save_steps": 1, "kl_target": 0.05, "use_score_scaling": True}
    options |= {"lr_scheduler_type": "linear", "optim": "adamw_torch"}
    whole, cut = (own(tmp_path / name, **options) for name in ("whole", "cut"))
    expected = looped(whole, 3)
    assert looped(cut, 2 if newest else 3) == expected[: 2 if newest else 3]
    again = own(tmp_path / "cut", **options)
    assert again.resume(True if newest else tmp_path / "cut" / "checkpoints" / "step-2") == 2
    assert again.state.global_step == 2
    assert looped(again, 1) == expected[2:]
    assert expected[2]["episode"] == 12
    assert [timeless(row) for row in metrics(tmp_path / "cut")] == [
        timeless(row) for row in metrics(tmp_path / "whole")
    ]
    for (name, one), (_, other) in zip(
        whole.roles.trained.named_parameters(), again.roles.trained.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_loop_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match=r"resume_from_checkpoint: there are no checkpoints in .* to resume from"):
        own(tmp_path).resume()


def test_step_is_the_step_of_train(tmp_path):
    """The same samples and scores give the same weights, whoever made the loop."""
    rows = [{"prompt": text, "prompt_id": f"0/{i}"} for i, text in enumerate(["a", "b c", "d e f", "g"])]
    scores = {}

    def reward(completion_ids, **_):
        values = [len(set(ids)) / 3 for ids in completion_ids]
        scores.update(zip(map(tuple, completion_ids), values, strict=True))
        return values

    whole = trainer(
        tmp_path / "train", rows=rows, reward=reward, given={"value_model": tiny.llama_reward()}, max_steps=1
    )
    seen = []
    collect = whole.collect
    whole.collect = lambda step, batch: (seen.append(collect(step, batch)), seen[-1])[1]
    whole.train()
    (rollout,) = seen
    loop = own(tmp_path / "loop")
    prompts = [prompt.content for prompt in rollout.prompts]
    loop.step(prompts, rollout.responses, [scores[tuple(r)] for r in rollout.responses])
    for (name, one), (_, other) in zip(
        whole.roles.trained.named_parameters(), loop.roles.trained.named_parameters(), strict=True
    ):
        assert_close(other, one, atol=1e-6, rtol=1e-5, msg=name)


def test_texts_are_taken_as_responses(tmp_path):
    run = own(tmp_path)
    row = run.step(PROMPTS[:2], ["fine", "very well"], [0.0, 1.0])
    assert row["objective/eos_rate"] == 1.0


@pytest.mark.parametrize(
    ("responses", "scores", "words"),
    [
        ([[5]], [1.0, 1.0], "expected 2 responses and scores, found 1 and 2"),
        ([[5], []], [1.0, 1.0], "responses row 1: expected at least 1 token"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, responses, scores, words):
    with pytest.raises(UserError, match=words):
        own(tmp_path).step(["a", "b"], responses, scores)


def test_a_loop_needs_a_number_of_steps(tmp_path):
    with pytest.raises(UserError, match="max_steps: set max_steps or total_episodes"):
        trainer(tmp_path, given={"train_dataset": None})


def test_train_without_data_or_reward_says_so(tmp_path):
    with pytest.raises(UserError, match="train_dataset: pass one"):
        own(tmp_path).train()
    with pytest.raises(UserError, match="reward_model: pass one"):
        trainer(tmp_path, given={"reward_model": None, "value_model": tiny.llama_reward()}).train()


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_the_role_with_the_fewest_positions_is_the_limit(tmp_path, role):
    models = {"ref_model": tiny.llama(3), "value_model": tiny.llama_reward(5)}
    models["ref_model" if role == "reference" else "value_model"].config.max_position_embeddings = 20
    run = trainer(tmp_path, given=models, rows=[{"prompt": "of"}])
    assert len(run.generate([[5] * 14])) == 1
    words = (
        f"^prompts row 1: expected prompt and response of at most 20 tokens, the {role}'s positions, found 15 and 6$"
    )
    with pytest.raises(UserError, match=words):
        run.generate([[5] * 14, [5] * 15])


def test_how_often_was_asked_before_a_step_does_not_matter_after_it(tmp_path):
    found = []
    for times in (1, 3):
        run = own(tmp_path / str(times))
        for _ in range(times):
            run.generate(["a", "b"])
        run.step(["a", "b"], [[7, 8], [9]], [0.0, 1.0])
        found.append(run.generate(["a", "b"]))
    assert found[0] == found[1]

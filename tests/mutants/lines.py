"""Wrong lines that a test has to notice: each was put in by hand once, and passed.

    python tests/mutants/lines.py [WORD ...]      # those whose file or new line has one of these words; all without
    python tests/mutants/lines.py --draw 20 [SEED]   # mechanical ones, drawn from the files of the list

A line is put into a copy of the package, and the tests that are named beside it run there. Prints what nobody noticed.
"""

import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    file: str  # below rlhf/
    line: str  # a part that the file has once
    wrong: str
    tests: str  # files or folders below tests/, blanks between them


LINES = [
    Mutant(
        "models/kernels/attention.py",
        "known[:, :shared] = False",
        "known[:, : shared + 1] = False",
        "models/kernels/test_packing.py",
    ),
    Mutant(
        "models/kernels/attention.py",
        "found.index_add_(0, packed.at.flatten()[packed.again], grad.index_select(0, packed.again))",
        "pass",
        "models/kernels/test_packing.py",
    ),
    Mutant(
        "models/kernels/attention.py",
        "torch.minimum(lengths.unsqueeze(1), lengths)",
        "torch.maximum(lengths.unsqueeze(1), lengths)",
        "models/kernels/test_packing.py",
    ),
    Mutant(
        "models/kernels/attention.py",
        "alike = mask is None or (mask.ndim == 4 and mask.shape[1] == 1)",
        "alike = True",
        "models/kernels/test_attention.py",
    ),
    Mutant(
        "generation/decode.py",
        "(columns - pads).clamp(min=0)",
        "columns.expand_as(ids)",
        "generation/test_decode.py",
    ),
    Mutant(
        "generation/decode.py",
        "(states.to(computed_in(states)) for states in (key_states, value_states))",
        "(key_states, value_states.to(computed_in(value_states)))",
        "generation/test_decode.py",
    ),
    Mutant(
        "models/actor_critic.py",
        "ends = packed.at.gather(1, lengths.unsqueeze(1) - 1).squeeze(1)",
        "ends = packed.at[:, -1]",
        "generation/test_decode.py",
    ),
    Mutant(
        "reward/packed.py",
        "bool((mask[:, 1:] <= mask[:, :-1]).all())",
        "True",
        "reward/test_packed.py",
    ),
    Mutant(
        "perf/work.py",
        "sum(prompts) - sum(again) + sum(answers) - n",
        "sum(prompts) + sum(answers) - n",
        "perf/test_work.py",
    ),
    Mutant(
        "functional/losses.py",
        "worst = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)",
        "worst = (clipped - returns) ** 2",
        "functional/test_losses.py",
    ),
    Mutant(
        "functional/losses.py",
        "worst = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)",
        "worst = torch.minimum((values - returns) ** 2, (clipped - returns) ** 2)",
        "functional/test_losses.py",
    ),
    Mutant(
        "functional/losses.py",
        "clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)",
        "clipped = old_values + (values - old_values).clamp(max=cliprange_value)",
        "functional/test_losses.py",
    ),
    Mutant(
        "functional/losses.py",
        "ratio.clamp(1 - cliprange, 1 + cliprange)",
        "ratio.clamp(max=1 + cliprange)",
        "functional/test_losses.py",
    ),
    Mutant(
        "functional/gae.py",
        "torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)",
        "torch.cat([mask[:, 1:], torch.ones_like(mask[:, :1])], dim=1)",
        "functional/test_gae.py",
    ),
    Mutant(
        "functional/gae.py",
        "next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)",
        "next_values = torch.cat([values[:, 1:], values[:, -1:]], dim=1)",
        "functional/test_gae.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "torch.where(rollout.ended, 0, rollout.last_value)",
        "rollout.last_value",
        "ppo/test_rollout.py",
    ),
    Mutant("ppo/optim.py", '"weight_decay": 0.0', '"weight_decay": args.weight_decay', "ppo/test_optim.py"),
    Mutant("ppo/optim.py", "p.ndim > 1]", "p.ndim > 0]", "ppo/test_optim.py"),
    Mutant(
        "ppo/rollout.py",
        "len(row) > 0 and row[-1] in self.eos_ids",
        "len(row) > 0 and row[-1] == self.eos_ids[0]",
        "ppo/test_rollout.py",
    ),
    Mutant(
        "reward/trainer.py",
        "chosen.float(), rejected.float(), args.margin)",
        "chosen.float(), rejected.float(), 1.0)",
        "reward/test_trainer.py",
    ),
    Mutant(
        "reward/trainer.py",
        "loss = preference_loss(scores[0], scores[1], args).item()",
        "loss = pairwise_margin_ranking_loss(scores[0], scores[1], 1.0).item()",
        "reward/test_trainer.py",
    ),
    Mutant("data/chat.py", "and text.strip() == response.strip():", "and text:", "data/test_chat.py"),
    Mutant("data/chat.py", "special & {*named, ", "special | {*named, ", "data/test_chat.py"),
    Mutant(
        "data/words.py",
        'rf"[{_NO_BLANKS}{_MARKS}]|',
        'rf"[{_NO_BLANKS}{_MARKS}]+|',
        "evaluation/test_text.py",
    ),
    Mutant("data/layouts.py", "turns[:-1] if answered else turns", "turns", "data/test_layouts.py"),
    Mutant("data/layouts.py", 'if turn["content"] or turn["role"] != "system"]', "]", "data/test_layouts.py"),
    Mutant("data/layouts.py", "else system + turns)", "else turns)", "data/test_layouts.py"),
    Mutant(
        "ppo/roles.py",
        "if from_reward and not (is_quantised",
        "if reward is not None and not (is_quantised",
        "ppo/test_roles.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "all_sum(_sums(score, is_valid)).cpu()",
        "all_sum(_sums(raw, is_valid)).cpu()",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/rollout.py",
        'on_tokens(seen["values"]) | (~seen["last_value"].isfinite() & is_valid)',
        'on_tokens(seen["values"])',
        "ppo/test_rollout.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "all(known.get(token) == number for token, number in _vocabulary(policy).items())",
        "all(token in known for token in _vocabulary(policy))",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "sum(known.get(token) == number for token, number in ids.items())",
        "sum(token in known for token in ids)",
        "reward/test_reward_functions.py reward/test_reward_families.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        " and _same_template(policy, tokenizer))",
        ")",
        "reward/test_reward_families.py",
    ),
    Mutant("reward/trainer.py", "found = problem_of(best)", "found = None", "reward/test_reward_resume.py"),
    Mutant(
        "ppo/metrics.py", 'total["kl"] / tokens', 'total["kl"] / n / args.response_length', "ppo/test_metrics_row.py"
    ),
    Mutant(
        "evaluation/summary.py",
        "float(np.sum(kl) / np.sum(lengths))",
        "float(np.mean(np.divide(kl, lengths)))",
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "ratings/collect.py",
        "if found.get(name) != text:",
        "if found.get(name, text) != text:",
        "ratings/test_collect.py",
    ),
    Mutant("storage/saver.py", "remove(target)\n", "pass\n", "storage/test_saver.py"),
    Mutant(
        "models/kernels/onednn_linear.py",
        "len(layer.active_adapters) == 1",
        "len(layer.active_adapters) > 0",
        "models/kernels",
    ),
    Mutant("generation/decode.py", "room[:, :, :done] = old[:, :, :done]", "pass", "generation/test_decode.py"),
    Mutant("generation/decode.py", "target, right=True)", "target)", "generation/test_decode.py"),
    Mutant(
        "functional/losses.py",
        "ratio = torch.where(mask, logp - old_logp, 0).exp()",
        "ratio = (logp - old_logp).exp()",
        "functional/test_losses.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "return Advantages(advantages, returns, raw, token_rewards, score)",
        "return Advantages(advantages, returns, raw, rewards, score)",
        "ppo/test_rollout.py",
    ),
    Mutant(
        "ppo/learner.py",
        "stop = self._exceeds_target_kl(found.approxkl.sum(), batch.n_tokens)",
        "stop = self._exceeds_target_kl(found.approxkl.sum(), batch.n_local)",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/learner.py",
        "ratio_max = torch.maximum(ratio_max, table[:, -1].max())",
        "ratio_max = table[:, -1].max()",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/learner.py",
        "(values - old_values).abs() > args.cliprange_value,",
        "(values - old_values).abs() > args.cliprange,",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/rollout.py",
        "temperature or args.temperature,",
        "args.temperature,",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "ppo/rollout.py",
        "raw.append(weighted_sum(scores, self.weights, self.abstains))",
        "raw.append(scores.sum(1))",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/rollout.py",
        "responses = self.sample(part, 0, model=self.roles.reference.base).responses",
        "responses = self.sample(part, 0).responses",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/trainer.py",
        'self.kl_control.update(row["objective/kl_per_token"], rollout.shard.n_items)',
        'self.kl_control.update(row["objective/kl_per_token"], rollout.shard.n_valid)',
        "ppo/test_ppo_trainer.py",
    ),
    Mutant(
        "ppo/optim.py",
        "int(whole) * per_epoch + math.ceil(rest * n_prompts / batch_size)",
        "int(whole) * per_epoch + int(rest * n_prompts / batch_size)",
        "ppo/test_optim.py",
    ),
    Mutant(
        "generation/decode.py",
        "scaled = logits.float()\n",
        "scaled = logits\n",
        "generation/test_decode.py",
    ),
    Mutant(
        "generation/decode.py",
        "target = (u * cumulative[:, -1]).unsqueeze(1)",
        "target = u.unsqueeze(1)",
        "generation/test_decode.py",
    ),
    Mutant(
        "reward/audit.py",
        "responses = {text_key(text) for pair in train for text in (pair.chosen, pair.rejected)}",
        "responses = {text_key(pair.chosen) for pair in train}",
        "reward/test_audit.py",
    ),
    Mutant(
        "evaluation/generate.py",
        "response_kl(policy, base, inputs, responses, config.eval_temperature, suppressed)",
        "response_kl(policy, base, inputs, responses, 1.0, suppressed)",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "ratings/analyse.py",
        "(0.5 + 0.5 * np.sign(difference)).mean(0)",
        "(0.5 + 0.5 * np.sign(difference)).ravel()",
        "ratings/test_analyse.py",
    ),
    Mutant(
        "storage/basis.py",
        "file.seek(last * i // (_BLOCKS - 1))",
        "file.seek(last * i // _BLOCKS)",
        "storage/test_basis.py",
    ),
    Mutant(
        "config/reward.py",
        "self.save_steps = self.eval_steps or self.logging_steps",
        "self.save_steps = self.logging_steps",
        "config/test_reward_config.py",
    ),
    Mutant(
        "ppo/metrics.py",
        '"kl": kl[estimator],',
        '"kl": kl["k1"],',
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "functional/gae.py",
        "return x.to(widest(x.device))",
        "return x.float()",
        "ppo/test_rollout.py ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/learner.py",
        "        self.model.train()\n",
        "",
        "ppo/test_roles.py",
    ),
    Mutant(
        "ppo/evaluation.py",
        "total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu().double()",
        "total[name] = value.cpu().double()",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "reward/trainer.py",
        "return loss if centre is None else loss + centre * ((chosen + rejected) ** 2).mean()",
        "return loss",
        "reward/test_trainer.py",
    ),
    Mutant(
        "reward/nonfinite.py",
        "self.losses.add(total / accelerator.num_processes)",
        "self.losses.add(total)",
        "reward/test_reward_nonfinite.py",
    ),
    Mutant(
        "ppo/rollout.py",
        '"logp": json_number(rollout.logp[i][mask].sum()),',
        '"logp": json_number(rollout.logp[i].sum()),',
        "ppo/test_rollout.py",
    ),
    Mutant(
        "ppo/learner.py",
        'held = [] if learns else [group for group in self.optimizer.param_groups if group.get("role") == "policy"]',
        "held = [] if learns else [*self.optimizer.param_groups]",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/metrics.py",
        '"ended": (rollout.ended & is_valid).sum(),',
        '"ended": rollout.ended.sum(),',
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "generation/static.py",
        "key = id(model), rows, length, steps, tuple(eos_ids), dtype",
        "key = id(model), rows, length, steps, dtype",
        "generation/test_static.py",
    ),
    Mutant(
        "models/load.py",
        "if missing or not has_head:",
        "if not has_head:",
        "models/test_load.py",
    ),
    Mutant(
        "reward/remote.py",
        "await asyncio.sleep(min(self.wait * 2**tried, _LONGEST_WAIT))",
        "await asyncio.sleep(min(self.wait, _LONGEST_WAIT))",
        "reward/test_calls.py",
    ),
    Mutant(
        "distributed/trained_weights.py",
        "buffers = model.named_buffers(remove_duplicate=False)",
        "buffers = []",
        "distributed/test_trained_weights.py",
    ),
    Mutant(
        "ratings/words.py",
        "elif needed > n:",
        "elif needed >= n:",
        "ratings/test_analyse.py",
    ),
    Mutant(
        "tracking/progress.py",
        'error = row["objective/scores_std"] / math.sqrt(max(1.0, row["eps"] * seconds))',
        'error = row["objective/scores_std"] / math.sqrt(max(1.0, row["eps"]))',
        "tracking/test_progress.py",
    ),
    Mutant(
        "perf/work.py",
        "weights = sum(count * min(stored, size) for count, stored in self.layers)",
        "weights = sum(count * size for count, stored in self.layers)",
        "perf/test_flops.py",
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "learning += 2 * rows * _logits(args, policy)",
        "learning += 2 * _logits(args, policy)",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "config/ppo.py",
        "every = self.eval_steps or self.logging_steps",
        "every = self.eval_steps or 1",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/batch.py",
        "if given not in (1, derived):",
        "if given > derived:",
        "config/test_batch.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "if shared < 0.9 * len(ids):",
        "if shared < 0.5 * len(ids):",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "evaluation/generate.py",
        '"eos": response[-1] in stop,',
        '"eos": response[-1] == eos_ids[0],',
        "evaluation/test_generate.py",
    ),
    Mutant(
        "distributed/collectives.py",
        "[max(everyone[i : i + world]) for i in range(0, len(everyone), world)]",
        "[everyone[i] for i in range(0, len(everyone), world)]",
        "distributed/test_collectives.py",
    ),
    Mutant(
        "ppo/learner.py",
        "                self.skips.in_a_row = 0\n",
        "                pass\n",
        "ppo/test_nonfinite.py",
    ),
    Mutant(
        "ppo/callbacks.py",
        "state.compute_steps(self.args, max_steps)",
        "state.compute_steps(self.args, self.args.max_steps)",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "step % math.ceil(self.num_total_batches / wanted) == 0",
        "step % wanted == 0",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "score.clamp(-args.score_clip, args.score_clip)",
        "score.clamp(max=args.score_clip)",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "return std if std > lost * abs(mean) else 1.0",
        "return std if std > 0 else 1.0",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/rollout.py",
        "said([response], self.ended([response]), self.end_is_text)[0]",
        "said([response], self.ended([response]))[0]",
        "ppo/test_stops.py",
    ),
    Mutant(
        "ppo/metrics.py",
        "found.setdefault(name, []).extend(values)",
        "found.setdefault(name, values)",
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "ppo/evaluation.py",
        "prompts[: collector.args.per_device_eval_batch_size * collector",
        "prompts[: collector.args.per_device_train_batch_size * collector",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "generation/decode.py",
        "hashlib.sha256(p.encode()).digest()[:8]",
        "hashlib.sha256(p.encode()).digest()[:1]",
        "generation/test_decode.py",
    ),
    Mutant(
        "generation/static.py",
        "        state.positions.zero_()  # rows beyond B count on, too, and must not leave the model's positions\n",
        "",
        "generation/test_static.py",
    ),
    Mutant(
        "models/sampling_copy.py",
        "len(layer.active_adapters) != 1 or layer.merged:",
        "len(layer.active_adapters) != 1:",
        "generation/test_static.py",
    ),
    Mutant(
        "reward/reward_functions.py",
        "columns = sorted(set().union(*completions.columns))",
        "columns = sorted(completions.columns[0])",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/reward_functions.py",
        "if spec.is_model and spec.tokenizer is None), None)",
        "if spec.is_model), None)",
        "reward/test_reward_families.py",
    ),
    Mutant(
        "data/preferences.py",
        'str(row[which]).lower().startswith("tie")',
        'str(row[which]).startswith("tie")',
        "data/test_layouts.py",
    ),
    Mutant(
        "evaluation/summary.py",
        "ending_effect(list(columns.values()), confidence)",
        "ending_effect([columns[models[0]]], confidence)",
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "evaluation/generate.py",
        "reward.longest(texts, ids, options))",
        "reward.longest(texts, ids))",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "ratings/analyse.py",
        "prompts_needed(by_prompt, confidence, DETECT)",
        "prompts_needed(difference.ravel(), confidence, DETECT)",
        "ratings/test_analyse.py",
    ),
    Mutant(
        "cli/evaluate.py",
        "{p.tree_id for p in prompts}",
        "{p.prompt_id for p in prompts}",
        "cli/test_evaluate.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "            (folder / name).unlink(missing_ok=True)\n",
        "            pass\n",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "reporting/conclusions.py",
        "variety < VARIETY * before",
        "variety < VARIETY",
        "reporting/test_conclusions.py",
    ),
    Mutant(
        "distributed/preemption.py",
        "            args.save_only_model = False  # this checkpoint is to resume from\n",
        "",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "ppo/callbacks.py",
        "max(1, round(max_steps / steps_per_epoch))",
        "max(1, int(max_steps / steps_per_epoch))",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "reward/trainer.py",
        "max(map(len, row.values())) > max_length",
        "max(map(len, row.values())) >= max_length",
        "reward/test_trainer.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "shared < 0.9 * len(ids)",
        "shared < 0.9 * len(known)",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "data/chat.py",
        "taken = {None, tokenizer.eos_token, tokenizer.bos_token}",
        "taken = {None, tokenizer.eos_token}",
        "data/test_chat.py",
    ),
    Mutant(
        "reporting/conclusions.py",
        "1 - rate >= TRUNCATED",
        "1 - rate > TRUNCATED",
        "reporting/test_conclusions.py",
    ),
    Mutant(
        "evaluation/validity.py",
        "_around(line.slope, half * line.stderr)",
        "_around(line.slope, half * line.intercept_stderr)",
        "evaluation/test_validity.py",
    ),
    Mutant(
        "evaluation/validity.py",
        '"in_sd": _in_sd(before, after)',
        '"in_sd": _in_sd(after, before)',
        "evaluation/test_validity.py",
    ),
    Mutant(
        "evaluation/summary.py",
        "validity(columns[models[0]], columns[m], confidence, seed)",
        "validity(columns[models[0]], columns[models[-1]], confidence, seed)",
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "reward/audit.py",
        "_third(np.abs(margin))",
        "_third(margin)",
        "reward/test_audit.py",
    ),
    Mutant(
        "reward/audit.py",
        "margin = chosen - rejected",
        "margin = chosen",
        "reward/test_audit.py",
    ),
    Mutant(
        "ppo/metrics.py",
        '"kl_exact": over_tokens(rollout.exact_kl)',
        '"kl_exact": over_tokens(rollout.entropy)',
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "ppo/metrics.py",
        '"advantages": advantages.raw_advantages',
        '"advantages": advantages.advantages',
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "ppo/metrics.py",
        "max(update.minibatches - update.skipped, 1)",
        "max(update.updates, 1)",
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "ppo/metrics.py",
        "max(total[place] for place in places)",
        "total[places[0]]",
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "ppo/metrics.py",
        "torch.where(rollout.is_valid, advantages.score, 0).sum()",
        "advantages.score.sum()",
        "ppo/test_metrics_row.py",
    ),
    Mutant(
        "ppo/advantages.py",
        'self.mean, self.std, self.sums = state["mean"].item(), state["std"].item(), state["sums"]',
        'self.mean, self.sums = state["mean"].item(), state["sums"]',
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/learner.py",
        "advantages.advantages, advantages.returns]).flatten(1)",
        "advantages.raw_advantages, advantages.returns]).flatten(1)",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/learner.py",
        "(self.args.seed * 1_000_003 + step) * 1_009 + epoch",
        "self.args.seed * 1_000_003 + epoch",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/prompts.py",
        "for token, real in zip(found, mask, strict=True) if real]",
        "for token, real in zip(found, mask, strict=True)]",
        "ppo/test_prompts.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "if step % per_epoch == 1 % per_epoch:",
        "if step % per_epoch == 1:",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "reward/trainer.py",
        "for rows in splits.values() for row in rows for side",
        "for rows in list(splits.values())[:1] for row in rows for side",
        "reward/test_trainer.py",
    ),
    Mutant(
        "reward/trainer.py",
        "self.accelerator.process_index * n_pairs, 1), n_pairs)",
        "self.accelerator.process_index * n_pairs, 0), n_pairs)",
        "reward/test_trainer.py",
    ),
    Mutant(
        "reward/order.py",
        "[max(map(len, sides)) for sides",
        "[len(sides[0]) for sides",
        "reward/test_trainer.py",
    ),
    Mutant(
        "reward/trainer.py",
        "(chosen > rejected).float().mean()",
        "(chosen > 0).float().mean()",
        "reward/test_trainer.py",
    ),
    Mutant(
        "evaluation/generate.py",
        "return {**(config.chat_template_kwargs or {}), **prompt.options}",
        "return {**prompt.options, **(config.chat_template_kwargs or {})}",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "storage/basis.py",
        "for name in _listed(asked.get(one)) if",
        "for name in _listed(asked.get(one))[:1] if",
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/basis.py",
        'found = rows * parts * (asked.processes or facts.get("world_size") or 1)',
        "found = rows * parts * (asked.processes or 1)",
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/basis.py",
        'then = facts["precision"]["taken"] if "precision" in facts else kept',
        "then = kept",
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/basis.py",
        'kept = any(folder.glob("checkpoint*")) or (folder / ANSWERED).exists()',
        'kept = any(folder.glob("checkpoint*"))',
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/basis.py",
        "report_page(run).is_file() and says_done(facts) and",
        "report_page(run).is_file() and",
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/stages.py",
        "if one in found and one not in changed]",
        "if one in found]",
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/checkpoint.py",
        '_DATA = ("train_dataset", "seed", "data_seed", "optim", "score_norm_samples")',
        '_DATA = ("train_dataset", "seed", "optim", "score_norm_samples")',
        "storage/test_checkpoint.py",
    ),
    Mutant(
        "storage/disk.py",
        "_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)",
        "_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)",
        "storage/test_storage_disk.py",
    ),
    Mutant(
        "ratings/analyse.py",
        '"models": {model: _means(x[:, :, m], confidence, seed)',
        '"models": {model: _means(x[:, :, m], 0.95, seed)',
        "ratings/test_analyse.py",
    ),
    Mutant(
        "ratings/analyse.py",
        "x[:, :, :, c].reshape(len(complete), -1)",
        "x[:, :, 0, c].reshape(len(complete), -1)",
        "ratings/test_analyse.py",
    ),
    Mutant(
        "ratings/analyse.py",
        "self_consistency(x[r][twice[r]], again[r][twice[r]])",
        "self_consistency(x[0][twice[r]], again[r][twice[r]])",
        "ratings/test_analyse.py",
    ),
    Mutant(
        "ratings/collect.py",
        'names = {sheet["rater"].casefold(): sheet["rater_id"] for sheet in stored.values()}',
        "names: dict[str, str] = {}",
        "ratings/test_collect.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "verbatim(text), step)",
        "verbatim(text), 0)",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "keep_events(self.folder / board_folder(args.run_name), last)",
        "pass",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/skipped_updates.py",
        "if self.in_a_row < self.limit:",
        "if self.in_a_row <= self.limit:",
        "tracking/test_skipped_updates.py",
    ),
    Mutant(
        "config/ppo.py",
        'lambda x: x is None or x > 0, "a positive',
        'lambda x: x is None or x >= 0, "a positive',
        "config/test_edges.py",
    ),
    Mutant(
        "config/stages.py",
        "lambda x: 0 <= x < 65536",
        "lambda x: 0 < x < 65536",
        "config/test_edges.py",
    ),
    Mutant(
        "reporting/conclusions.py",
        "if (after - before) * gain >= 0:",
        "if (after - before) * gain > 0:",
        "reporting/test_conclusions.py",
    ),
    Mutant(
        "distributed/launch.py",
        "if accelerator.num_processes > 1 and not together:",
        "if not together:",
        "distributed/test_launch.py",
    ),
    Mutant(
        "ppo/self_check.py",
        'same("states change in training mode", alone, _states(base).float() / size)',
        'same("states change in training mode", alone, alone)',
        "ppo/test_self_check.py",
    ),
    Mutant(
        "generation/decode.py",
        "calls.append((ids.shape[0], ids.shape[1]))",
        "calls.append((batch, ids.shape[1]))",
        "generation/test_decode.py",
    ),
    Mutant(
        "models/lora.py",
        '_NOT_FUSIBLE = ("use_dora", "rank_pattern", "alpha_pattern",',
        '_NOT_FUSIBLE = ("use_dora", "rank_pattern",',
        "models/test_lora.py",
    ),
    Mutant(
        "models/older_readers.py",
        '("rope_theta", "partial_rotary_factor")',
        '("rope_theta",)',
        "models/test_older_readers.py",
    ),
    Mutant(
        "models/kernels/recompute.py",
        '{"use_reentrant": False} | (options or {})',
        '{"use_reentrant": False}',
        "models/kernels/test_packing.py",
    ),
    Mutant(
        "models/adapters.py",
        '    "kasa_config",\n',
        "",
        "models/test_adapters.py",
    ),
    Mutant(
        "models/actor_critic.py",
        '    "output_logit_soft_cap",\n',
        "",
        "models/test_token_logprobs.py",
    ),
    Mutant(
        "reward/packed.py",
        '    "position_ids",\n',
        "",
        "reward/test_packed.py",
    ),
    Mutant(
        "reward/packed.py",
        '    "output_attentions",\n',
        "",
        "reward/test_packed.py",
    ),
    Mutant(
        "reward/trainer.py",
        '("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")',
        '("optimizer.pt", "optimizer_0", "latest")',
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "models/master_weights.py",
        " or (autocast and wants_deepspeed())",
        "",
        "models/test_master_weights.py",
    ),
    Mutant(
        "reward/named.py",
        "sys.path.append(here)",
        "sys.path.insert(0, here)",
        "cli/test_function_rewards.py",
    ),
    Mutant(
        "models/lora.py",
        "    config.modules_to_save = None\n",
        "",
        "models/test_lora.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "args.per_device_train_batch_size * args.gradient_accumulation_steps *",
        "args.per_device_train_batch_size *",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "            state.best_model_checkpoint = str(self.folder",
        "            str(self.folder",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "ppo/prompts.py",
        "        and stop not in stop_ids(unwrap_peft(model), tokenizer)\n",
        "",
        "ppo/test_stops.py",
    ),
    Mutant(
        "ppo/rollout.py",
        "if self._vllm is not None and model is None:",
        "if self._vllm is not None:",
        "generation/test_vllm.py",
    ),
    Mutant(
        "ppo/trainer.py",
        'if self.args.use_vllm and self.args.vllm_mode == "colocate":',
        "if self.args.use_vllm:",
        "generation/test_vllm.py",
    ),
    Mutant(
        "generation/static.py",
        "key = len(state.ids), temperature",
        "key = len(state.ids)",
        "generation/test_static.py",
    ),
    Mutant(
        "generation/vllm.py",
        "calls = [(1, len(p) + len(r) - 1)",
        "calls = [(1, len(p) + len(r))",
        "generation/test_vllm.py",
    ),
    Mutant(
        "models/kernels/attention.py",
        "scale = query.shape[-1] ** -0.5 if scaling is None else scaling",
        "scale = query.shape[-1] ** -0.5",
        "models/kernels/test_attention.py",
    ),
    Mutant(
        "models/kernels/attention.py",
        "plain = not dropout and all",
        "plain = all",
        "models/kernels/test_attention.py",
    ),
    Mutant(
        "reward/calls.py",
        "for column, values in self.columns.items() if i < len(values)}",
        "for column, values in self.columns.items()}",
        "reward/test_calls.py",
    ),
    Mutant(
        "reward/remote.py",
        "        completion_ids: Any = None,\n        trainer_state",
        "        trainer_state",
        "reward/test_calls.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "needed > 1.01 * rows or",
        "needed > rows or",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "(policy is not None and min(needed, _rows(policy)) > rows)",
        "(policy is not None and needed > rows)",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/trainer.py",
        "    model.train(was_training)\n",
        "",
        "reward/test_trainer.py",
    ),
    Mutant(
        "ppo/checkpointing.py",
        "(value > best if self.args.greater_is_better",
        "(value >= best if self.args.greater_is_better",
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/evaluation.py",
        "rollout.logged.row(i) | row",
        "row | rollout.logged.row(i)",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "ppo/export.py",
        "            write_older_names(aside)\n",
        "            pass\n",
        "ppo/test_export.py",
    ),
    Mutant(
        "ppo/learner.py",
        'row["advantage"] = json_number(advantages.advantages[i].abs().max())',
        'row["advantage"] = json_number(advantages.advantages[i].max())',
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/learner.py",
        "if finite or self.args.fp16:",
        "if finite:",
        "ppo/test_learner.py",
    ),
    Mutant(
        "ppo/prompts.py",
        "return encode_response(tokenizer, prompt.content, text, prompt.options)",
        "return encode_response(tokenizer, prompt.content, text, {})",
        "ppo/test_prompts.py",
    ),
    Mutant(
        "ppo/roles.py",
        "ref_model.dtype == loaded != model.dtype and",
        "loaded != model.dtype and",
        "ppo/test_roles.py",
    ),
    Mutant(
        "ppo/roles.py",
        "adapter {frozen.adapter or 'off'}",
        "adapter off",
        "ppo/test_roles.py",
    ),
    Mutant(
        "ppo/evaluation.py",
        '[f"eval_{name}" if name else "eval" for name in sets]',
        '["eval" for name in sets]',
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/prompts.py",
        'if "content" not in message and "tool_calls" not in message:',
        'if "content" not in message:',
        "ppo/test_prompts.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "role, positions = min(self._positions().items()",
        "role, positions = max(self._positions().items()",
        "ppo/test_own_loop.py",
    ),
    Mutant(
        "generation/static.py",
        "length, steps, tuple(eos_ids), dtype\n",
        "length, steps, tuple(eos_ids)\n",
        "generation/test_static.py",
    ),
    Mutant(
        "models/load.py",
        'options | {"revision": "main"} if revision else options)',
        "options)",
        "models/test_load.py",
    ),
    Mutant(
        "models/kernels/autocast_cache.py",
        ' and "forward" not in vars(layer):',
        ":",
        "models/kernels/test_autocast_cache.py",
    ),
    Mutant(
        "ppo/callbacks.py",
        "                self.control = answer\n",
        "                pass\n",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "set().union(*(prompt.columns for prompt in prompts))",
        "prompts[0].columns",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "generation/vllm.py",
        'if args.vllm_mode == "colocate" and processes % size:',
        "if processes % size:",
        "generation/test_vllm.py",
    ),
    Mutant(
        "models/adapters.py",
        'if os.path.isdir(path) or path.count("/") == 1 else None',
        "if os.path.isdir(path) else None",
        "models/test_adapters.py",
    ),
    Mutant(
        "models/load.py",
        'if len(missing) > 3 else ""',
        'if len(missing) >= 3 else ""',
        "models/test_load.py",
    ),
    Mutant(
        "reward/reward_functions.py",
        "if isinstance(value, list | dict) else value",
        "if isinstance(value, list) else value",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/trainer.py",
        'best = min(history, key=lambda row: row["eval_loss"]) if history else {}',
        "best = history[-1] if history else {}",
        "reward/test_trainer.py",
    ),
    Mutant(
        "models/kernels/dropout_gelu.py",
        "_LEVELS / (_LEVELS - dropped)",
        "1 / (1 - self.p)",
        "models/kernels/test_dropout_gelu.py",
    ),
    Mutant(
        "ppo/health.py",
        "if length <= 1 and ended == 1:",
        "if length <= 1:",
        "ppo/test_health.py",
    ),
    Mutant(
        "models/gguf.py",
        '(result.stderr.strip().splitlines() or ["no wheel came"])[-1]',
        '(result.stderr.strip().splitlines() or ["no wheel came"])[0]',
        "models/test_load.py",
    ),
    Mutant(
        "models/sampling_copy.py",
        "lambda: torch.cat([part.bias for part in parts]),",
        "lambda: torch.cat([parts[0].bias for part in parts]),",
        "generation/test_static.py",
    ),
    Mutant(
        "reporting/tables.py",
        'if len(found) > N_TROUBLES else ""',
        'if len(found) >= N_TROUBLES else ""',
        "reporting/test_report.py",
    ),
    Mutant("reporting/seeds.py", " and bool(found) and found == ", " and found == ", "reporting/test_seeds.py"),
    Mutant(
        "reporting/seeds.py",
        "if originals and len(originals) == len(stages) and len(names) == 1:",
        "if originals and len(originals) == len(stages):",
        "reporting/test_seeds.py",
    ),
    Mutant(
        "reporting/examples.py",
        "_FLOAT32 * max(map(abs, (*values, total)))",
        "_FLOAT32 * abs(total)",
        "reporting/test_report_examples.py",
    ),
    Mutant("reporting/pdf.py", 'align = "R" if cell.number else "L"', 'align = "L"', "reporting/test_pdf.py"),
    Mutant(
        "reporting/plots/seeds.py",
        "running_mean(list(last.values()), width)",
        "running_mean(list(last.values()))",
        "reporting/test_seeds.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        "states += 4 * sum(numel(p) for p in learned)",
        "states += 4 * sum(numel(p) for p in parameters)",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "min(rows, args.local_rollout_forward_batch_size)",
        "rows",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant("memory_estimate/reward.py", "longest[-n:]", "longest[:n]", "memory_estimate/test_reward_memory.py"),
    Mutant("memory_estimate/reward.py", "fuse_gelu(model)", "pass", "memory_estimate/test_reward_memory.py"),
    Mutant("memory_estimate/reward.py", "order.set_epoch(epoch)", "pass", "memory_estimate/test_reward_memory.py"),
    Mutant(
        "reward/order.py",
        "args.seed if args.data_seed is None else args.data_seed",
        "args.seed",
        "memory_estimate/test_reward_memory.py",
    ),
    Mutant(
        "memory_estimate/reward.py",
        "learning += activations(2) - activations(1)",
        "pass",
        "memory_estimate/test_reward_memory.py",
    ),
    Mutant("memory_estimate/reward.py", "module.p = 0.0", "pass", "memory_estimate/test_reward_memory.py"),
    Mutant(
        "model_card/card.py",
        "_is_hub_id(base, slashes=(0, 1))",
        "_is_hub_id(base, slashes=(1,))",
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/metrics.py", "evaluated = own is not None and _part", "evaluated = _part", "model_card/test_card.py"
    ),
    Mutant(
        "evaluation/generate.py",
        "answered(len(batch) * state.num_processes)",
        "answered(len(batch))",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "ratings/collect.py", "if len(others) >= MAX_RATERS:", "if len(others) > MAX_RATERS:", "ratings/test_collect.py"
    ),
    Mutant(
        "memory_estimate/reward.py",
        'sharding.trained("reward", full, args.optim)',
        'sharding.trained("reward", full, str(args.optim))',
        "memory_estimate/test_reward_memory.py",
    ),
    Mutant(
        "reporting/tables.py",
        "if len({tuple(column.items()) for column in columns.values()}) == 1:",
        "if len({tuple(column) for column in columns.values()}) == 1:",
        "reporting/test_tables.py",
    ),
    Mutant(
        "reporting/run.py",
        'if "checkpoint" not in str(path.relative_to(folder))',
        'if "checkpoint" not in path.name',
        "reporting/test_report.py",
    ),
    Mutant("reporting/notebook.py", "                shown.clear()\n", "", "reporting/test_notebook.py"),
    Mutant(
        "reporting/plots/seeds.py",
        "_show_curves(axis, 0.0, KL_BAND[1])",
        "_show_curves(axis)",
        "reporting/test_seeds.py",
    ),
    Mutant(
        "reporting/seed_report.py",
        "rows.append([row.name, str(row.n), mean,",
        "rows.append([row.name, str(len(row.values)), mean,",
        "reporting/test_seeds.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        "for place, size in kept.items() if place not in own)",
        "for place, size in kept.items())",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "perf/work.py",
        "heads = sum(answers[row] for group in groups for row in group)",
        "heads = sum(answers)",
        "perf/test_work.py",
    ),
    Mutant("perf/throughput.py", "gain if known else 1.0", "gain", "perf/test_throughput.py"),
    Mutant(
        "evaluation/kl.py",
        "other = suppress(head_logits(unwrap_peft(base), other), suppress_tokens)",
        "other = head_logits(unwrap_peft(base), other)",
        "evaluation/test_kl.py",
    ),
    Mutant(
        "ratings/sheet.py", '"prompt": _as_shown(row["prompt"])', '"prompt": row["prompt"]', "ratings/test_sheet.py"
    ),
    Mutant(
        "reporting/examples.py",
        "score = learned + penalty * (1 - ended)",
        "score = learned + penalty",
        "reporting/test_report_examples.py",
    ),
    Mutant(
        "reporting/pdf.py",
        "if whole > pdf.page_break_trigger",
        "if 0 * whole > pdf.page_break_trigger",
        "reporting/test_pdf.py",
    ),
    Mutant("reporting/plots/evaluation.py", " and len(set(length)) > 2:", ":", "reporting/test_evaluation_plots.py"),
    Mutant(
        "memory_estimate/account.py",
        "half=bool(args.bf16 or args.fp16))",
        "half=bool(args.bf16))",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "args.local_batch_size * sharding.processes)",
        "args.local_batch_size)",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "perf/work.py",
        'getattr(config, "head_dim", None) or config.hidden_size',
        "config.hidden_size",
        "perf/test_flops.py",
    ),
    Mutant(
        "perf/hardware.py", 'if device.type not in ("cpu", "mps"):', 'if device.type != "cpu":', "perf/test_hardware.py"
    ),
    Mutant("model_card/card.py", "len(language) == 2 and ", "", "model_card/test_card.py"),
    Mutant(
        "model_card/metrics.py",
        '", ".join([*judges, *(config.get("rewards") or [])])',
        '", ".join(judges)',
        "model_card/test_card.py",
    ),
    Mutant(
        "cli/prepare.py",
        'load_pairs(name, folder, revision, parse_columns("dataset_columns", given))',
        "load_pairs(name, folder, revision)",
        "cli/test_prepare.py",
    ),
    Mutant(
        "cli/prepare.py",
        'load_prompts(names, language, revision, folder, parse_columns("prompt_columns", given))',
        "load_prompts(names, language, revision, folder)",
        "cli/test_prepare.py",
    ),
    Mutant(
        "models/load.py",
        "if weights.is_floating_point() and not weights.sum().isfinite() and not weights.isfinite().all():",
        "if False:",
        "models/test_load.py",
    ),
    Mutant(
        "cli/prepare.py",
        'found.append((name, recipe.get("model_revision")))',
        "found.append((name, None))",
        "cli/test_prepare.py",
    ),
    Mutant(
        "cli/prepare.py",
        "(tuple(p.prompt_dataset), p.language, ",
        '(tuple(p.prompt_dataset), "en", ',
        "cli/test_prepare.py",
    ),
    Mutant(
        "distributed/operators.py",
        'was_killed=alone and file.read() != ""',
        "was_killed=False",
        "distributed/test_operators.py",
    ),
    Mutant(
        "distributed/operators.py",
        "                file.truncate(0)",
        "                pass",
        "distributed/test_operators.py",
    ),
    Mutant(
        "distributed/operators.py",
        "if was_killed and not _is_open(lock):",
        "if was_killed:",
        "distributed/test_operators.py",
    ),
    Mutant(
        "distributed/operators.py",
        "if was_killed and not _is_open(lock):",
        "if not _is_open(lock):",
        "distributed/test_operators.py",
    ),
    Mutant("ppo/health.py", "elif now - noise > 2 * target and", "elif now > 2 * target and", "ppo/test_health.py"),
    Mutant(
        "ppo/advantages.py",
        "lost = max(_NO_SPREAD, 4 * math.sqrt(torch.finfo(summed).eps))",
        "lost = _NO_SPREAD",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "data/layouts.py",
        'if len(parts) == 1 and isinstance(row.get("context"), str)',
        'if isinstance(row.get("context"), str)',
        "data/test_layouts.py",
    ),
    Mutant(
        "data/prompts.py",
        "{**(options or {}), **prompt.options}",
        "{**prompt.options, **(options or {})}",
        "data/test_prompt_sets.py",
    ),
    Mutant("data/hh_rlhf.py", "path.parts[len(local_path(source).parts) :]", "path.parts", "data/test_hh_rlhf.py"),
    Mutant("distributed/offload.py", 'device not in (None, "none")', 'device == "cpu"', "distributed/test_offload.py"),
    Mutant("functional/gae.py", "count.clamp(min=1)", "count.clamp(min=0)", "functional/test_gae.py"),
    Mutant("functional/gae.py", ".clamp(min=0).sqrt()", ".abs().sqrt()", "functional/test_gae.py"),
    Mutant(
        "functional/losses.py",
        '    if estimator == "k3":\n',
        '    if estimator != "k1":\n',
        "functional/test_losses.py",
    ),
    Mutant(
        "evaluation/generate.py",
        "found + config.eval_response_length > positions",
        "found + config.eval_response_length >= positions",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "evaluation/generate.py",
        "expected at most {positions - found}, so",
        "expected at most {positions - found - 1}, so",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "evaluation/generate.py",
        "for prompt {batch[i].prompt_id}",
        "for prompt {batch[0].prompt_id}",
        "evaluation/test_generate.py",
    ),
    Mutant(
        "evaluation/generate.py", "scores.isfinite().all():", "(~scores.isnan()).all():", "evaluation/test_generate.py"
    ),
    Mutant(
        "reward/named.py",
        '"rewards " + ", ".join(reward.name for reward in rewards)',
        '"rewards " + rewards[0].name',
        "evaluation/test_generate.py",
    ),
    Mutant("evaluation/answered.py", "ensure_ascii=False)", "ensure_ascii=True)", "evaluation/test_answered.py"),
    Mutant(
        "evaluation/summary.py",
        'if not np.isfinite(row["score"]):',
        'if np.isnan(row["score"]):',
        "evaluation/test_statistics.py",
    ),
    Mutant(
        "evaluation/validity.py",
        "if not groups or freedom < 1:",
        "if not groups or freedom < 2:",
        "evaluation/test_validity.py",
    ),
    Mutant(
        "reward/calls.py",
        "        return dict(given)\n    named",
        "        return {}\n    named",
        "reward/test_calls.py",
    ),
    Mutant(
        "reward/calls.py",
        "one.kind is one.POSITIONAL_ONLY and one.default is one.empty",
        "one.kind is one.POSITIONAL_ONLY",
        "reward/test_calls.py",
    ),
    Mutant(
        "reward/calls.py",
        "if math.isfinite(value := float(value)):",
        "if not math.isnan(value := float(value)):",
        "reward/test_calls.py",
    ),
    Mutant(
        "reward/calls.py",
        "isinstance(found, bool | int | float)",
        "type(found) in (int, float)",
        "reward/test_calls.py",
    ),
    Mutant(
        "reward/calls.py",
        "finally:\n                future.cancel()",
        "finally:\n                pass",
        "reward/test_calls.py",
    ),
    Mutant("reward/remote.py", "task.cancel()", "pass", "reward/test_calls.py"),
    Mutant("reward/remote.py", "if not timeout > 0:", "if timeout == 0:", "reward/test_calls.py"),
    Mutant(
        "reward/nonfinite.py",
        '"rejected_tokens": len(rejected)',
        '"rejected_tokens": len(chosen)',
        "reward/test_reward_nonfinite.py",
    ),
    Mutant(
        "reward/nonfinite.py",
        "batch.scores[:half], batch.scores[half:]",
        "batch.scores[half:], batch.scores[:half]",
        "reward/test_reward_nonfinite.py",
    ),
    Mutant("reward/nonfinite.py", "self.micro_batches.clear()", "pass", "reward/test_reward_nonfinite.py"),
    Mutant(
        "reward/nonfinite.py",
        "if self.pair_ids else number",
        "if self.pair_ids else len(known)",
        "reward/test_reward_nonfinite.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "rotate(checkpoint, REWARD, self.limit, best)",
        "rotate(checkpoint, REWARD, self.limit, None)",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "        self.args.save_total_limit = self.limit\n",
        "",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "        self.args.save_total_limit = None\n",
        "        pass\n",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "shutil.rmtree(incomplete[-1], ignore_errors=True)",
        "pass",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "reward/manifest_callback.py",
        "if incomplete and isinstance(error, SAVE_ERRORS):",
        "if incomplete and error is not None:",
        "reward/test_reward_resume.py",
    ),
    Mutant("reward/manifest_callback.py", "save_rows(self.folder, checkpoint)", "pass", "reward/test_reward_resume.py"),
    Mutant(
        "reward/adapters.py",
        "(is_deepspeed_zero3_enabled() or wants_fsdp())",
        "wants_fsdp()",
        "reward/test_reward_adapters.py",
    ),
    Mutant(
        "reward/trainer.py",
        "if checkpoint and args.save_only_model and not _resumable(checkpoint):",
        "if False:",
        "reward/test_reward_resume.py",
    ),
    Mutant(
        "reward/trainer.py",
        '{"step": saved["global_step"], "eval_loss": state.best_metric}',
        '{"step": state.global_step, "eval_loss": state.best_metric}',
        "reward/test_trainer.py",
    ),
    Mutant("reward/trainer.py", "seed=args.seed)}", "seed=0)}", "reward/test_trainer.py"),
    Mutant(
        "reward/tokenizers.py",
        "found if isinstance(found, list) else",
        "found[:1] if isinstance(found, list) else",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/tokenizers.py",
        "(tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)",
        "(tokenizer.eos_token,)",
        "reward/test_reward_functions.py",
    ),
    Mutant(
        "reward/reward_functions.py",
        "limit is not None and found > limit:",
        "limit is not None and found >= limit:",
        "reward/test_reward_families.py",
    ),
    Mutant(
        "reward/reward_functions.py",
        "min(self.positions, tokenizer.model_max_length)",
        "self.positions",
        "reward/test_reward_families.py",
    ),
    Mutant(
        "reward/reward_functions.py",
        "return encode_dialogue(self.tokenizer, dialogue, options)",
        "return encode_dialogue(self.tokenizer, dialogue)",
        "reward/test_reward_families.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "        return mean, std\n",
        "        return self.mean, self.std\n",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/advantages.py",
        "found mean {mean} and deviation {std}",
        "found mean {std} and deviation {mean}",
        "ppo/test_score_scaling.py",
    ),
    Mutant(
        "ppo/advantages.py", "if not math.isfinite(mean + std):", "if math.isnan(mean):", "ppo/test_score_scaling.py"
    ),
    Mutant("ppo/health.py", "symptom.value > WORSE * value", "symptom.value >= WORSE * value", "ppo/test_health.py"),
    Mutant("ppo/health.py", "if kl > limit:", "if kl >= limit:", "ppo/test_health.py"),
    Mutant(
        "ppo/health.py", "if entropy < COLLAPSED * first:", "if entropy <= COLLAPSED * first:", "ppo/test_health.py"
    ),
    Mutant(
        "ppo/health.py",
        'if n > 1 and row["objective/scores_std"]',
        'if n > 2 and row["objective/scores_std"]',
        "ppo/test_health.py",
    ),
    Mutant(
        "ppo/health.py",
        'and not self.said.keys() & {"kl_exploded", "kl_jumped"}:',
        'and not self.said.keys() & {"kl_exploded"}:',
        "ppo/test_health.py",
    ),
    Mutant(
        "ppo/health.py",
        'and not self.said.keys() & {"kl_exploded", "kl_jumped"}:',
        'and not self.said.keys() & {"kl_jumped"}:',
        "ppo/test_health.py",
    ),
    Mutant(
        "ppo/prompts.py",
        "if wanted and not eval_dataset:",
        "if wanted and eval_dataset is None:",
        "ppo/test_prompts.py",
    ),
    Mutant("ppo/prompts.py", '.lstrip("\\ufffd")', "", "ppo/test_prompts.py"),
    Mutant("ppo/callbacks.py", "step / steps_per_epoch\n", "0.0\n", "ppo/test_callbacks.py"),
    Mutant(
        "ppo/callbacks.py",
        "state.train_batch_size = self.args.per_device_train_batch_size",
        "pass",
        "ppo/test_callbacks.py",
    ),
    Mutant(
        "ppo/callbacks.py",
        "state.compute_steps(self.args, max_steps)\n        self.control = TrainerControl()",
        "state.compute_steps(self.args, max_steps)",
        "ppo/test_callbacks.py",
    ),
    Mutant("ppo/evaluation.py", 'nonfinite.sum(), "logged"', 'nonfinite.any(), "logged"', "ppo/test_callbacks.py"),
    Mutant(
        "ppo/trainer.py",
        "if self.args.load_best_model_at_end and not self.stopped:",
        "if self.args.load_best_model_at_end:",
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "if self.args.push_to_hub and not self.stopped:",
        "if self.args.push_to_hub:",
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/trainer.py",
        'saved and self.args.push_to_hub and self.args.hub_strategy == "every_save"',
        "saved and self.args.push_to_hub",
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/checkpointing.py",
        "if problem := from_main(lambda: problem_of(best)):",
        "if problem := None:",
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/checkpointing.py",
        'return "load_best_model_at_end: no checkpoint was evaluated, the last weights stay"',
        'return ""',
        "ppo/test_best_checkpoint.py",
    ),
    Mutant(
        "ppo/checkpointing.py",
        "repr((prompt.prompt_id, prompt.input_ids))",
        "repr(prompt.input_ids)",
        "ppo/test_checkpointing.py",
    ),
    Mutant(
        "ppo/checkpointing.py", "    except torch.OutOfMemoryError:\n        raise\n", "", "ppo/test_checkpointing.py"
    ),
    Mutant(
        "ppo/self_check.py",
        "except (UserError, torch.OutOfMemoryError):",
        "except UserError:",
        "ppo/test_self_check.py",
    ),
    Mutant(
        "ppo/self_check.py", "    if not weight.is_floating_point():\n        return\n", "", "ppo/test_self_check.py"
    ),
    Mutant("ppo/trainer.py", "PPO, first, self.args.save_total_limit)", "PPO, first, None)", "ppo/test_ppo_trainer.py"),
    Mutant(
        "ppo/trainer.py",
        'self.args.use_vllm and self.args.vllm_mode == "colocate"',
        "self.args.use_vllm",
        "ppo/test_ppo_trainer.py",
    ),
    Mutant(
        "ppo/trainer.py",
        '{"split_train": len(self.prompts)} if self.prompts else {}',
        '{"split_train": len(self.prompts)}',
        "ppo/test_ppo_trainer.py",
    ),
    Mutant("ppo/trainer.py", "steps = self.work[1:] or self.work", "steps = self.work", "ppo/test_ppo_trainer.py"),
    Mutant(
        "ppo/trainer.py",
        "data_collator is not None and not isinstance(data_collator, DataCollatorWithPadding)",
        "False",
        "ppo/test_ppo_trainer.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "kl {row['objective/kl_per_token']:.4f}",
        "kl {row['objective/kl']:.4f}",
        "ppo/test_ppo_trainer.py",
    ),
    Mutant("ppo/trainer.py", "initial=first,", "initial=0,", "ppo/test_ppo_trainer.py"),
    Mutant("ppo/roles.py", "{_LEFT_OUT.get((name, other), '')}", "", "ppo/test_roles.py"),
    Mutant(
        "ppo/roles.py",
        "if args.ref_adapter_name == trained and ref_model is None:",
        "if args.ref_adapter_name == trained:",
        "ppo/test_roles.py",
    ),
    Mutant(
        "ppo/roles.py",
        'name = "value_model" if is_own else "reward_model"',
        'name = "value_model"',
        "ppo/test_roles.py",
    ),
    Mutant(
        "ppo/roles.py", "value_model is not None and not has_token_head(value_model):", "False:", "ppo/test_roles.py"
    ),
    Mutant("ppo/roles.py", '"ref_model", model)))', '"value_model", model)))', "ppo/test_roles.py"),
    Mutant(
        "ppo/roles.py",
        "is_quantised(trained.policy) or is_quantised(trained.critic)",
        "is_quantised(trained.policy)",
        "distributed/test_launch.py",
    ),
    Mutant("ppo/rollout.py", "if functions and rows:", "if functions:", "ppo/test_rollout.py"),
    Mutant(
        "ppo/learner.py",
        "/ n_tokens > 1.5 * self.args.target_kl",
        "/ n_tokens >= 1.5 * self.args.target_kl",
        "ppo/test_learner.py",
    ),
    Mutant("ppo/export.py", "unwrap_peft(model).tie_weights()", "pass", "ppo/test_export.py"),
    Mutant("ppo/export.py", "requires_grad=p.requires_grad)", "requires_grad=True)", "ppo/test_export.py"),
    Mutant("ppo/export.py", "model = copy.deepcopy(empty)\n", "model = empty\n", "ppo/test_export.py"),
    Mutant("ppo/export.py", "    if not accelerator.is_main_process:\n        return None\n", "", "ppo/test_export.py"),
    Mutant(
        "ppo/optim.py",
        'f"optim: {args.optim} is unavailable: {error}"',
        'f"optim: it is unavailable: {error}"',
        "ppo/test_optim.py",
    ),
    Mutant(
        "ratings/serve.py",
        "if not isinstance(error, OSError):",
        "if isinstance(error, OSError):",
        "ratings/test_serve.py",
    ),
    Mutant(
        "ppo/trainer.py",
        "ids, [prompt.options for prompt in prompts]",
        "ids, [{} for prompt in prompts]",
        "ppo/test_prompts.py",
    ),
    Mutant("model_card/card.py", "        if converted:\n", "        if not converted:\n", "model_card/test_card.py"),
    Mutant("model_card/card.py", 'converted = kind == "adapter" and (', "converted = (", "model_card/test_card.py"),
    Mutant("model_card/card.py", ' or str(base).endswith(".gguf"))', ")", "model_card/test_card.py"),
    Mutant("model_card/card.py", 'config.get("temperature", 1.0)', "1.0", "model_card/test_card.py"),
    Mutant(
        "model_card/card.py",
        '(first if kind == "adapter" else "")',
        '(first if kind != "adapter" else "")',
        "model_card/test_card.py",
    ),
    Mutant("model_card/card.py", '"is_local": not hub_id', '"is_local": True', "model_card/test_card.py"),
    Mutant(
        "model_card/card.py",
        '"base_unknown": kind == "adapter" and not base',
        '"base_unknown": not base',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        'title if place == folder else f"{title}/{place.name}"',
        "title",
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        ' if facts.get("stage") else ""',
        ' if facts.get("id") and not facts.get("stage") else ""',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        'format_number(m.get("trainable"), ",d")',
        'format_number(m.get("parameters"), ",d")',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        '("max_length", "max_prompt_length", "response_length")',
        '("max_length", "response_length")',
        "model_card/test_card.py",
    ),
    Mutant("model_card/card.py", '.replace(f"{Path.home()}/", "~/")', "", "model_card/test_card.py"),
    Mutant(
        "model_card/card.py", 'code(wheel.member.rpartition("/")[2])', "code(wheel.member)", "model_card/test_card.py"
    ),
    Mutant("model_card/card.py", '"world_size", "engine"]', '"world_size"]', "model_card/test_card.py"),
    Mutant(
        "model_card/card.py",
        "_rows(seed | dict(facts), names)",
        "_rows(dict(facts) | seed, names)",
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        'for part in facts.get("data", {}).values() for name, n in part.items()]',
        'for part in list(facts.get("data", {}).values())[:1] for name, n in part.items()]',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        '("r", "lora_alpha", "target_modules"))',
        '("r", "lora_dropout", "target_modules"))',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py",
        '"saved_as": _fused(place)',
        '"saved_as": _fused(place / "adapter")',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/card.py", '(kind == "adapter" and _kind(folder) == "reward")', "False", "model_card/test_card.py"
    ),
    Mutant(
        "model_card/card.py",
        'pipeline_tag="text-classification" if kind == "reward" else "text-generation"',
        'pipeline_tag="text-generation"',
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/metrics.py",
        "isinstance(value, bool) or not isinstance(value, int | float) or not",
        "not isinstance(value, int | float) or not",
        "model_card/test_card.py",
    ),
    Mutant("model_card/metrics.py", " or not math.isfinite(value):", ":", "model_card/test_card.py"),
    Mutant("model_card/metrics.py", "    if not model or not gain:", "    if not model:", "model_card/test_card.py"),
    Mutant(
        "model_card/metrics.py",
        "if not isinstance(ends, list) or len(ends) != 2:",
        "if not isinstance(ends, list):",
        "model_card/test_card.py",
    ),
    Mutant(
        "model_card/metrics.py",
        '"" if key.startswith("kl") else',
        '"" if key == "kl_per_token" else',
        "model_card/test_card.py",
    ),
    Mutant("model_card/metrics.py", '"length": "gain at equal length",\n', "", "model_card/test_card.py"),
    Mutant(
        "model_card/metrics.py",
        '"agreement": accuracy,',
        '"agreement": format_number(after.get("accuracy"), ".1%"),',
        "model_card/test_card.py",
    ),
    Mutant("model_card/metrics.py", "None if correlation is None else ", "", "model_card/test_card.py"),
    Mutant(
        "reporting/pdf.py",
        "self._table.heads = len(self._table.table)",
        "self._table.heads = 1",
        "reporting/test_pdf.py",
    ),
    Mutant("reporting/pdf.py", '        self.set_lang("en")\n', "", "reporting/test_pdf.py"),
    Mutant(
        "reporting/pdf.py",
        'if missing and block.kind != "h1" and "author" not in block.names:',
        'if missing and block.kind != "h1":',
        "reporting/test_pdf.py",
    ),
    Mutant("reporting/pdf.py", "row.append(blocks.pop(0))", "row.append(blocks[0])", "reporting/test_pdf.py"),
    Mutant(
        "reporting/pdf.py",
        "unjoined = {_script(letter) for letter in letters if pdf.knows(letter)}",
        "unjoined = {_script(letter) for letter in letters}",
        "reporting/test_pdf.py",
    ),
    Mutant("reporting/pdf.py", "for letter in unknown[:5])", "for letter in unknown[:6])", "reporting/test_pdf.py"),
    Mutant(
        "reporting/pdf.py",
        "return _SIZES[first.kind] * 0.8 + _beginning(pdf, blocks[1:])",
        "return _SIZES[first.kind] * 0.8",
        "reporting/test_pdf.py",
    ),
    Mutant(
        "reporting/pdf.py",
        "return height if height < pdf.page_break_trigger - pdf.t_margin - 20 else 40.0",
        "return height",
        "reporting/test_pdf.py",
    ),
    Mutant(
        "reporting/pdf.py",
        '{"figure": 80.0, "sample": 35.0}.get(first.kind, 12.0)',
        '{"sample": 35.0}.get(first.kind, 12.0)',
        "reporting/test_pdf.py",
    ),
    Mutant(
        "reporting/pdf.py",
        "pdf.keep(min(_height(pdf, text, pdf.epw, size / 2), 60.0))",
        "pdf.keep(0.0)",
        "reporting/test_pdf.py",
    ),
    Mutant(
        "reporting/pdf.py",
        "asked = sum(_height(pdf, part.text, pdf.epw, _BODY / 2) for part in about)",
        "asked = 0.0",
        "reporting/test_pdf.py",
    ),
    Mutant("reporting/pdf.py", "max(below) + 2", "below[0] + 2", "reporting/test_pdf.py"),
    Mutant(
        "reporting/pdf.py", "h=height, alt_text=block.text)", "h=height, alt_text=row[0].text)", "reporting/test_pdf.py"
    ),
    Mutant(
        "reporting/pdf.py",
        'column[0].text.partition(" ")[0], _LINE)',
        "column[0].text, _LINE)",
        "reporting/test_pdf.py",
    ),
    Mutant(
        "reporting/pdf.py",
        "columns = max(map(len, block.table))",
        "columns = len(block.table[0])",
        "reporting/test_pdf.py",
    ),
    Mutant("reporting/pdf.py", "min(max(words), 45.0) + padding)", "max(words) + padding)", "reporting/test_pdf.py"),
    Mutant("reporting/pdf.py", "if sum(least) >= pdf.epw:", "if sum(least) >= 2 * pdf.epw:", "reporting/test_pdf.py"),
    Mutant(
        "reporting/seeds.py",
        '        return run.gold.get("after")',
        '        return run.gold.get("before")',
        "reporting/test_seeds.py",
    ),
    Mutant("reporting/seeds.py", '"eval_samples", "eval_steps")', '"eval_samples")', "reporting/test_seeds.py"),
    Mutant(
        "reporting/seeds.py", 'if len(group) > 1 and seed != "None"', "if len(group) > 1", "reporting/test_seeds.py"
    ),
    Mutant(
        "reporting/tables.py",
        "            if isinstance(counts, Mapping):\n",
        "            if counts:\n",
        "reporting/test_tables.py",
    ),
    Mutant(
        "reporting/tables.py",
        "    if after:\n        found.append",
        "    if audit:\n        found.append",
        "reporting/test_tables.py",
    ),
    Mutant("reporting/run.py", 'keep="\\n\\t")', 'keep="\\n")', "reporting/test_report.py"),
    Mutant(
        "reporting/run.py",
        "{_printable(name): _printable(part) for",
        "{name: _printable(part) for",
        "reporting/test_report.py",
    ),
    Mutant(
        "reporting/run.py", "printable(str(label)) for label in", "str(label) for label in", "reporting/test_report.py"
    ),
    Mutant(
        "reporting/run.py",
        "    return {key: value for key, value in record.items() if value is not None}",
        "    return dict(record)",
        "reporting/test_report.py",
    ),
    Mutant(
        "reporting/run.py",
        'rating_responses=_read_jsonl(folders["evaluation"] / "rating_responses.jsonl")',
        'rating_responses=_read_jsonl(folders["evaluation"] / "responses.jsonl")',
        "reporting/test_report.py",
    ),
    Mutant(
        "reporting/run.py",
        "'pairs' if folder.name.startswith('reward') else",
        "'pairs' if folder.name == 'reward' else",
        "reporting/test_report.py",
    ),
    Mutant(
        "reporting/run.py",
        'is_number(row["step"]) else -1)',
        'is_number(row["step"]) else 1e9)',
        "reporting/test_report.py",
    ),
    Mutant(
        "reporting/run.py",
        "except (ValueError, RecursionError) as error:",
        "except ValueError as error:",
        "reporting/test_report.py",
    ),
    Mutant("reporting/run.py", "all(map(is_number, row))]", "True]", "reporting/test_report.py"),
    Mutant("reporting/run.py", " or not all(isinstance(row, dict) for row in bins):", ":", "reporting/test_report.py"),
    Mutant("reporting/run.py", '"gains": dict, "validity": dict}', '"gains": dict}', "reporting/test_report.py"),
    Mutant(
        "reporting/run.py", "len(ends) == 2 and all(map(is_number, ends))", "len(ends) == 2", "reporting/test_report.py"
    ),
    Mutant("reporting/files.py", 'run {run_dir.resolve().name}"', 'run {run_dir.name}"', "reporting/test_files.py"),
    Mutant(
        "reporting/files.py",
        "any(mark in page.read_bytes() for mark in _MARKS)",
        "_MARKS[0] in page.read_bytes()",
        "reporting/test_files.py",
    ),
    Mutant(
        "reporting/files.py",
        "plot.stem not in images and plot.stem.startswith(_PLOTS)",
        "plot.stem not in images",
        "reporting/test_files.py",
    ),
    Mutant("reporting/files.py", ".unlink(missing_ok=True)", ".unlink()", "reporting/test_files.py"),
    Mutant(
        "reporting/tables.py",
        'if key.startswith("time/"))',
        'if key.startswith("time/act"))',
        "reporting/test_tables.py",
    ),
    Mutant("reporting/seeds.py", "if done(run, POLICIES[name])}", "}", "reporting/test_seeds.py"),
    Mutant(
        "storage/basis.py",
        "{one.relative_to(path).as_posix()} {digest_of(one)}",
        "{one.name} {digest_of(one)}",
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/basis.py",
        '{digest_of(one)}" for one in files]\n',
        '{one.stat().st_size}" for one in files]\n',
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/basis.py",
        "{one.name} {one.stat().st_size} {_part_digest(one)}",
        "{one.stat().st_size} {_part_digest(one)}",
        "storage/test_basis.py",
    ),
    Mutant(
        "config/ppo.py",
        'if self.save_strategy == "steps" and min(',
        "if min(",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        'if self.save_strategy == "no" or self.eval_strategy != self.save_strategy',
        "if self.eval_strategy != self.save_strategy",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        "if name is not None and self.greater_is_better is None:",
        "if name is not None:",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        'name.endswith(("scores", "reward", "mean"))',
        'name.endswith(("scores", "reward"))',
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        "least = 0.2 * self.batch_size",
        "least = 0.2 * self.local_batch_size",
        "config/test_batch.py",
    ),
    Mutant(
        "config/ppo.py",
        "self.kl_horizon <= least",
        "self.kl_horizon < least",
        "config/test_batch.py",
    ),
    Mutant(
        "config/ppo.py",
        "return self.batch_size // self.num_mini_batches",
        "return self.local_batch_size // self.num_mini_batches",
        "config/test_batch.py",
    ),
    Mutant(
        "config/ppo.py",
        "return self.per_device_train_batch_size * self.world_size",
        "return self.per_device_train_batch_size",
        "config/test_batch.py",
    ),
    Mutant(
        "config/ppo.py",
        "if self.use_vllm and not 0.01",
        "if not 0.01",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        "not 0.01 <= self.temperature <= 2",
        "not 0.01 < self.temperature <= 2",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        "not 0.01 <= self.temperature <= 2",
        "not 0.01 <= self.temperature < 2",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        'url.startswith(("http://", "https://"))',
        'url.startswith("http://")',
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        'self.do_predict or (self.do_eval and self.eval_strategy == "no")',
        "self.do_predict or self.do_eval",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        'if self.hub_strategy not in ("end", "every_save")',
        'if self.hub_strategy not in ("end", "every_save", "checkpoint")',
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        "self.report_to = trackers",
        "self.report_to = self.report_to",
        "config/test_effects.py",
    ),
    Mutant(
        "config/precision.py",
        "args.activation_checkpointing = args.gradient_checkpointing",
        "args.activation_checkpointing = bool(args.activation_checkpointing)",
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/precision.py",
        "times[1][0] < _HOPELESS * times[0][0]",
        "times[1][-1] < _HOPELESS * times[0][-1]",
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/precision.py",
        "from_main(lambda: _bf16(cpu_is_asked_for()))",
        "from_main(lambda: _bf16(False))",
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/precision.py",
        '"why": f"{launcher[1]}: {launcher[0]}"}',
        '"why": None}',
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/precision.py",
        '"taken": "bf16" if launcher[0] == "bf16" else "fp32"',
        '"taken": "fp32" if launcher[0] == "no" else "bf16"',
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/precision.py",
        'if word == "bf16" and not args.use_cpu and',
        'if word == "bf16" and',
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/precision.py",
        "{'' if found else 'no '}bf16",
        "bf16",
        "config/test_config_precision.py",
    ),
    Mutant(
        "config/schedule.py",
        "if kind in _WITHOUT_OPTIONS and options",
        "if kind == SchedulerType.CONSTANT and options",
        "config/test_effects.py",
    ),
    Mutant(
        "config/schedule.py",
        "num_warmup_steps=args.get_warmup_steps(steps)",
        "num_warmup_steps=int(args.warmup_steps)",
        "config/test_effects.py",
    ),
    Mutant(
        "config/trackers.py",
        "{*installed, *(name for name in LOGGER_TYPE_TO_CLASS if name not in builtin)}",
        "{*installed}",
        "config/test_effects.py",
    ),
    Mutant(
        "config/trackers.py",
        '[*known, "none", "all"]',
        "[*known]",
        "config/test_effects.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "max(1, (os.cpu_count() or 1) // processes)",
        "max(1, (os.cpu_count() or 1))",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'os.environ.setdefault("OMP_NUM_THREADS", str(threads))',
        'os.environ["OMP_NUM_THREADS"] = str(threads)',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'if processes is not None and engine.stem != "multi_cpu"',
        "if processes is not None",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "if seeds and run.run == RunConfig.run",
        "if len(seeds) > 1 and run.run == RunConfig.run",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "planned(recipe, one.folder(), seed)])",
        "planned(recipe, one.folder())])",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "plan = planned(recipe, folder, seed)",
        "plan = planned(recipe, folder)",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "if len(seeds) > 1:",
        "if seeds:",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "for seed, one in runs.items() for stage in",
        "for seed, one in [*runs.items()][:1] for stage in",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        '*(["--redo"] if stage.differs else [])',
        '*(["--redo"] if config.redo else [])',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'for name in ("title", "author")',
        'for name in ("title",)',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "'Report on all runs' if of else 'Report'",
        "'Report'",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "report_holds(folder, [one.folder() for one in of])",
        "report_holds(folder)",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "(128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGHUP)",
        "(128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM)",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "sys.exit(code if code > 0 else 128 - code)",
        "sys.exit(code if code > 0 else 1)",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'command += ["--redo"] if config.redo else []',
        "pass",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'command += ["--seeds", config.seeds] if config.seeds else []',
        "pass",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        '"RLHF_ENGINE": config.engine or ""',
        '"RLHF_ENGINE": ""',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'os.environ.setdefault("RLHF_VENV", sys.prefix)',
        'os.environ["RLHF_VENV"] = sys.prefix',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        "if sys.prefix != sys.base_prefix:",
        "if True:",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'left = [one.spec for one in plan[:-1] if one.state != "done"]',
        "left = [one.spec for one in plan[:-1]]",
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/parsing.py",
        "and not (one.several and value)",
        "and not one.several",
        "cli/test_parsing.py",
    ),
    Mutant(
        "cli/parsing.py",
        "if len(content) > _MAX_BYTES",
        "if len(content) >= _MAX_BYTES",
        "cli/test_parsing.py",
    ),
    Mutant(
        "cli/parsing.py",
        "not -_MAX_NUMBER <= found <= _MAX_NUMBER",
        "not found <= _MAX_NUMBER",
        "cli/test_parsing.py",
    ),
    Mutant(
        "cli/parsing.py",
        "and known[name[3:]].switch and not texts",
        "and known[name[3:]].switch",
        "cli/test_parsing.py",
    ),
    Mutant(
        "cli/parsing.py",
        "given = kept | given",
        "given = given | kept",
        "config/test_config_precision.py",
    ),
    Mutant(
        "cli/parsing.py",
        "isinstance(item, list | dict | set)",
        "isinstance(item, list | dict)",
        "cli/test_parsing.py",
    ),
    Mutant(
        "cli/parsing.py",
        'redo=bool(flags.get("redo"))',
        'redo=bool((of_recipe | flags).get("redo"))',
        "cli/test_parsing.py",
    ),
    Mutant(
        "cli/expected_time.py",
        "args.max_steps if args.max_steps > 0 else",
        "args.max_steps if args.max_steps > 10 else",
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/expected_time.py",
        '"epoch": per_epoch}',
        '"epoch": steps}',
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/expected_time.py",
        "args.eval_steps or args.logging_steps",
        "args.eval_steps or 1",
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/expected_time.py",
        "every >= 1 else 0)",
        "every > 1 else 0)",
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/expected_time.py",
        "limit = args.max_length or 512",
        "limit = args.max_length or 1024",
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/expected_time.py",
        "models[name], recipe)",
        "models[names[0]], recipe)",
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/expected_time.py",
        "any(not name or is_hub_id(name) for name in names)",
        "not names[0] or is_hub_id(names[0])",
        "cli/test_expected_time.py",
    ),
    Mutant(
        "cli/gpu_check.py",
        '"failed" if failed else "ok" if passed else "left out"',
        '"failed" if failed else "ok"',
        "cli/test_gpu_check.py",
    ),
    Mutant(
        "cli/gpu_check.py",
        'if times > self.slower else "ok"',
        'if times >= self.slower else "ok"',
        "cli/test_gpu_check.py",
    ),
    Mutant(
        "cli/gpu_check.py",
        'max(r["memory_peak"] for r in results)',
        'results[-1]["memory_peak"]',
        "cli/test_gpu_check.py",
    ),
    Mutant(
        "cli/gpu_check.py",
        'part["skipped"].get(reason, 0) + 1',
        "1",
        "cli/test_gpu_check.py",
    ),
    Mutant(
        "cli/train_ppo.py",
        "return (path, {}) if path or rewards else",
        "return (path, {}) if path else",
        "cli/test_train_ppo.py",
    ),
    Mutant(
        "cli/train_ppo.py",
        "if not args.dry_run or args.reward_model_path or args.rewards or is_done",
        "if not args.dry_run or args.reward_model_path or is_done",
        "cli/test_train_ppo.py",
    ),
    Mutant(
        "cli/train_ppo.py",
        "key=lambda item: -item[1].seconds",
        "key=lambda item: item[0]",
        "cli/test_train_ppo.py",
    ),
    Mutant(
        "cli/compare.py",
        "next((model for model in models[:-1] if Path(model).exists()), models[-1])",
        "models[-1]",
        "cli/test_compare.py",
    ),
    Mutant(
        "cli/compare.py",
        "if given is None:\n        return",
        "if given is None or not Path(given).exists():\n        return",
        "cli/test_compare.py",
    ),
    Mutant(
        "cli/compare.py",
        "for name in models if name in POLICIES}",
        "for name in POLICIES if (folder.parent / POLICIES[name]).exists()}",
        "cli/test_compare.py",
    ),
    Mutant(
        "cli/__main__.py",
        'COMMANDS[name].module == "pipeline" and not asked_for_help(sys.argv)',
        'COMMANDS[name].module == "pipeline"',
        "cli/test_help.py",
    ),
    Mutant(
        "cli/__main__.py",
        "not any(name in os.environ for name in names)",
        "not all(name in os.environ for name in names)",
        "cli/test_help.py",
    ),
    Mutant(
        "cli/__main__.py",
        "*sys.orig_argv[1:]]",
        "*sys.argv[1:]]",
        "cli/test_help.py",
    ),
    Mutant(
        "cli/script.py",
        "if not screen.is_part():  #",
        "if True:  #",
        "cli/test_script.py",
    ),
    Mutant(
        "cli/script.py",
        "if end.code == _MISTAKE:",
        "if end.code:",
        "cli/test_script.py",
    ),
    Mutant(
        "cli/script.py",
        'screen.error(f"error: {error}")\n        quiet.discard()',
        'screen.error(f"error: {error}")',
        "cli/test_script.py",
    ),
    Mutant(
        "cli/script.py",
        '["..."] * (len(message) > _MESSAGE)',
        '["..."] * (len(message) >= _MESSAGE)',
        "cli/test_script.py",
    ),
    Mutant(
        "cli/script.py",
        'if "RANK" in os.environ else ""',
        'if quiet.rank() > 9 else ""',
        "cli/test_script.py",
    ),
    Mutant(
        "cli/script.py",
        "traceback.print_exception(error, file=quiet.copies.err)",
        "traceback.print_exception(error)",
        "cli/test_script.py",
    ),
    Mutant(
        "cli/evaluate.py",
        'if gold else ["", ""]',
        'if gold else [""]',
        "cli/test_evaluate.py",
    ),
    Mutant(
        "cli/evaluate.py",
        "if reward_path is None and not functions:",
        "if reward_path is None:",
        "cli/test_evaluate.py",
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "return 2 if args.bf16 or args.fp16 else 4",
        "return 2 if args.bf16 else 4",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        "min(p.element_size(), 2 if self.half else 8)",
        "(2 if self.half else p.element_size())",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py", 'options | {"revision": "main"}', "options", "memory_estimate/test_account.py"
    ),
    Mutant(
        "memory_estimate/account.py",
        'base = adapter_base(path, options.get("revision"))',
        "base = adapter_base(path)",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        'adapter_base(resolve_model(name), options.get("revision")) is not None',
        "adapter_base(resolve_model(name)) is not None",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        ".strip().splitlines()[0]",
        ".strip().splitlines()[-1]",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py", "found a {kinds[0]}", "found a {kinds[-1]}", "memory_estimate/test_account.py"
    ),
    Mutant(
        "memory_estimate/account.py",
        "kept[storage.data_ptr()] = storage.nbytes()",
        "kept[storage.data_ptr()] = tensor.nbytes",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        "float(line.split()[1]) * 1024",
        "float(line.split()[1]) * 1000",
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py",
        'if line.startswith("VmRSS")',
        'if line.startswith("VmSize")',
        "memory_estimate/test_account.py",
    ),
    Mutant(
        "memory_estimate/account.py", "device = None if use_cpu else", "device =", "memory_estimate/test_account.py"
    ),
    Mutant("memory_estimate/account.py", "os.W_OK | os.X_OK", "os.X_OK", "memory_estimate/test_account.py"),
    Mutant(
        "memory_estimate/ppo.py",
        '(("model", policy), ("reward model", reward))',
        '(("model", policy), ("model", reward))',
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant("benchmark/growth.py", '"mean_response": n // 2,', '"mean_response": n,', "benchmark/test_growth.py"),
    Mutant(
        "benchmark/growth.py",
        '_BASE | {"batch": n, "micro": 8}',
        '_BASE | {"batch": n, "micro": n}',
        "benchmark/test_growth.py",
    ),
    Mutant("benchmark/growth.py", '"heads": n // sizes.head', '"heads": sizes.head', "benchmark/test_growth.py"),
    Mutant("benchmark/growth.py", '"positions": 2048}', "}", "benchmark/test_growth.py"),
    Mutant(
        "benchmark/counts.py",
        "{one['flops'] / 1e6:10,.1f}",
        "{one['flops'] / 1e9:10,.1f}",
        "benchmark/test_counts_of_work.py",
    ),
    Mutant(
        "benchmark/counts.py",
        'if "positions" in one else ""',
        'if "positions" not in one else ""',
        "benchmark/test_counts_of_work.py",
    ),
    Mutant("benchmark/predict.py", "if gpu.share > 1:", "if gpu.share >= 1:", "benchmark/test_predict.py"),
    Mutant("benchmark/predict.py", "-(-n // shape.micro)", "n // shape.micro", "benchmark/test_predict.py"),
    Mutant(
        "benchmark/predict.py",
        "numbers = shape.width * shape.layers",
        "numbers = shape.width",
        "benchmark/test_predict.py",
    ),
    Mutant(
        "benchmark/predict.py",
        "scored = sum(map(_weights, models)) * passes",
        "scored = sum(map(_weights, models))",
        "benchmark/test_predict.py",
    ),
    Mutant("benchmark/predict.py", "2 * logits * _LOGIT\n", "logits * _LOGIT\n", "benchmark/test_predict.py"),
    Mutant("benchmark/predict.py", "(_CAST + 2 * _USED)", "(_CAST + _USED)", "benchmark/test_predict.py"),
    Mutant("benchmark/predict.py", "trained * _OPTIMIZER", "_weights(model) * _OPTIMIZER", "benchmark/test_predict.py"),
    Mutant(
        "benchmark/predict.py",
        "sum(texts) * numbers * _STATE_TRAINED",
        "sum(texts) * numbers * _STATE",
        "benchmark/test_predict.py",
    ),
    Mutant(
        "benchmark/predict.py",
        "sum(prompts) * (policy.key_values * 2",
        "n * (policy.key_values * 2",
        "benchmark/test_predict.py",
    ),
    Mutant(
        "benchmark/predict.py", "learned = float(epochs * logits", "learned = float(logits", "benchmark/test_predict.py"
    ),
    Mutant(
        "benchmark/predict.py", "max(times, key=lambda column: times[column])", '"launch"', "benchmark/test_predict.py"
    ),
    Mutant(
        "benchmark/predict.py", "answers = shape.response - 1", "answers = shape.response", "benchmark/test_predict.py"
    ),
    Mutant(
        "benchmark/predict.py",
        'sum(longest) + sum(row["waiting"] for row in rows)',
        "sum(longest)",
        "benchmark/test_predict.py",
    ),
    Mutant(
        "benchmark/predict.py",
        'f"{step:.2f} s at {factor * gpu.launch_us:g} us"',
        'f"{step:.2f} s at {gpu.launch_us:g} us"',
        "benchmark/test_predict.py",
    ),
    Mutant(
        "benchmark/compare.py",
        "memory {of['bandwidth'] / 1e9:.0f}",
        "memory {of['bandwidth'] / 2**30:.0f}",
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/work.py",
        "prompt_lengths(shape.batch, seed)",
        "prompt_lengths(shape.batch, 0)",
        "benchmark/test_benchmark.py",
    ),
    Mutant("benchmark/work.py", "default_rng(seed + 2)", "default_rng(2)", "benchmark/test_benchmark.py"),
    Mutant(
        "benchmark/compare.py",
        'if side == "trl" and trl is not None and given["work"].startswith("ppo") else []',
        'if side == "trl" and trl is not None else []',
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/compare.py",
        '[*first, root, os.environ.get("PYTHONPATH", "")]',
        '[root, *first, os.environ.get("PYTHONPATH", "")]',
        "benchmark/test_comparison.py",
    ),
    Mutant("benchmark/compare.py", "timeout=limit, check", "timeout=_LIMIT, check", "benchmark/test_comparison.py"),
    Mutant("benchmark/compare.py", "if done.returncode or not lines:", "if not lines:", "benchmark/test_comparison.py"),
    Mutant("benchmark/compare.py", 'or ["no output"])[-1]', 'or ["no output"])[0]', "benchmark/test_comparison.py"),
    Mutant("benchmark/compare.py", "json.loads(lines[-1]", "json.loads(lines[0]", "benchmark/test_comparison.py"),
    Mutant("benchmark/compare.py", "counts |= run_side", "counts = run_side", "benchmark/test_comparison.py"),
    Mutant(
        "benchmark/compare.py",
        'given | {"seed": seed}, trl) for side',
        'given | {"seed": 0}, trl) for side',
        "benchmark/test_comparison.py",
    ),
    Mutant("benchmark/compare.py", "        check_equal(pair)\n", "        pass\n", "benchmark/test_comparison.py"),
    Mutant(
        "benchmark/compare.py",
        'pair["rlhf"]["memory_peak"] / pair["trl"]["memory_peak"]',
        'pair["rlhf"]["memory_peak"] / pair["rlhf"]["memory_before"]',
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/compare.py",
        '"bf16_flops": matmul_peak(device, torch.bfloat16)',
        '"bf16_flops": matmul_peak(device, torch.float32)',
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/compare.py",
        'result["response_tokens"][1:]\n',
        'result["response_tokens"]\n',
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/compare.py",
        "whole = statistics.median(map(seconds, results))",
        "whole = max(map(seconds, results))",
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/compare.py",
        'last = found["pairs"][-1]["rlhf"]',
        'last = found["pairs"][0]["rlhf"]',
        "benchmark/test_comparison.py",
    ),
    Mutant("benchmark/compare.py", "{flops / 1e9:,.0f}", "{flops / 1e6:,.0f}", "benchmark/test_comparison.py"),
    Mutant(
        "benchmark/compare.py",
        "{of['bf16_flops'] / 1e9:.0f} in bf16",
        "{of['fp32_flops'] / 1e9:.0f} in bf16",
        "benchmark/test_comparison.py",
    ),
    Mutant(
        "benchmark/others.py",
        '[step for step in clock.steps if step][1:],\n        "prompt_tokens": sum(map(len, sides)) / run.steps',
        '[step for step in clock.steps if step],\n        "prompt_tokens": sum(map(len, sides)) / run.steps',
        "benchmark/test_sides.py",
    ),
    Mutant(
        "benchmark/others.py", "sum(map(len, sides)) / run.steps", "sum(map(len, sides))", "benchmark/test_sides.py"
    ),
    Mutant(
        "benchmark/others.py",
        "row[: row.index(eos) + 1] if eos in row",
        "row[: row.index(eos)] if eos in row",
        "benchmark/test_sides.py",
    ),
    Mutant("benchmark/others.py", "uniforms(run.seed, step,", "uniforms(run.seed, 0,", "benchmark/test_sides.py"),
    Mutant("benchmark/others.py", "run.seed * 1000 + step", "run.seed * 1000", "benchmark/test_sides.py"),
    Mutant("benchmark/others.py", '"top_k": 0,', '"top_k": 50,', "benchmark/test_sides.py"),
    Mutant(
        "benchmark/ppo.py",
        "row.index(self.eos) + 1 if self.eos in row",
        "row.index(self.eos) if self.eos in row",
        "benchmark/test_sides.py",
    ),
    Mutant("benchmark/ppo.py", 'step["rest"] -= sum(phases.values())', "pass", "benchmark/test_sides.py"),
    Mutant("benchmark/ppo.py", "ref_model=None if lora else", "ref_model=", "benchmark/test_sides.py"),
    Mutant(
        "benchmark/ppo.py",
        'run.rank) if run.work == "ppo_lora" else None',
        '8) if run.work == "ppo_lora" else None',
        "benchmark/test_sides.py",
    ),
    Mutant("benchmark/ppo.py", 'self.clock.mark("generate")', 'self.clock.mark("score")', "benchmark/test_sides.py"),
    Mutant("benchmark/probe.py", "return seconds / n", "return seconds", "benchmark/test_sides.py"),
    Mutant("benchmark/probe.py", "if wait:\n", "if not wait:\n", "benchmark/test_sides.py"),
    Mutant(
        "benchmark/probe.py", 'result["response_tokens"][1]', 'result["response_tokens"][0]', "benchmark/test_sides.py"
    ),
    Mutant("benchmark/probe.py", '"launch (us)": 1e6 *', '"launch (us)": 1e3 *', "benchmark/test_sides.py"),
    Mutant(
        "memory_estimate/ppo.py",
        "enabled=bool(args.bf16 or args.fp16)",
        "enabled=bool(args.bf16)",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "memory_estimate/reward.py",
        "enabled=bool(args.bf16 or args.fp16)",
        "enabled=bool(args.bf16)",
        "memory_estimate/test_reward_memory.py",
    ),
    Mutant("benchmark/predict.py", '1 if row["captured"] else factor', "factor", "benchmark/test_predict.py"),
    Mutant(
        "models/actor_critic.py",
        "elif self.model.device.type != device.type:",
        "elif self.model.device != device:",
        "models/test_actor_critic.py",
    ),
    Mutant("models/actor_critic.py", "{(device.index or 0)!r}", "{device.index!r}", "models/test_actor_critic.py"),
    Mutant(
        "models/actor_critic.py",
        "trained = self.model.active_adapter\n",
        "trained = next(iter(self.model.peft_config))\n",
        "models/test_actor_critic.py",
    ),
    Mutant(
        "models/actor_critic.py", 'if config.bias != "none":', 'if config.bias == "all":', "models/test_actor_critic.py"
    ),
    Mutant(
        "models/actor_critic.py",
        'while name in policy.peft_config:\n        name += "_"',
        'if name in policy.peft_config:\n        name += "_"',
        "models/test_actor_critic.py",
    ),
    Mutant(
        "models/actor_critic.py",
        "adapter_name=trained, save_embedding_layers=False)",
        "adapter_name=next(iter(policy.peft_config)), save_embedding_layers=False)",
        "models/test_actor_critic.py",
    ),
    Mutant(
        "models/actor_critic.py",
        "for part in (policy, critic) for name in",
        "for part in (policy,) for name in",
        "models/test_actor_critic.py",
    ),
    Mutant(
        "models/actor_critic.py",
        "for module in in_training:\n            module.training = True",
        "base.train()",
        "models/test_token_logprobs.py",
    ),
    Mutant(
        "models/actor_critic.py",
        "if len(inputs[0]) <= size:",
        "if len(inputs[0]) < size:",
        "models/test_token_logprobs.py",
    ),
    Mutant(
        "models/lora.py",
        "self.requires_grad_(fused.weight.requires_grad).train(fused.training)",
        "self.train(fused.training)",
        "models/test_lora.py",
    ),
    Mutant("models/lora.py", ".train(split.training)", ".train()", "models/test_lora.py"),
    Mutant(
        "models/lora.py",
        "for buffer in model.buffers():\n        copies[id(buffer)]",
        "for buffer in ():\n        copies[id(buffer)]",
        "models/test_lora.py",
    ),
    Mutant("models/lora.py", "config.inference_mode = True", "pass", "models/test_lora.py"),
    Mutant(
        "models/lora.py",
        "isinstance(targets, str) or any(_ends_with(target, part) for target in _others(config) for part in PARTS)",
        "isinstance(targets, str)",
        "models/test_lora.py",
    ),
    Mutant(
        "models/load.py",
        "max(tokenizer.get_vocab().values()) + 1\n    own",
        "len(tokenizer.get_vocab())\n    own",
        "models/test_load.py",
    ),
    Mutant("models/load.py", "(needed > 1.01 * rows or", "(needed > rows or", "models/test_load.py"),
    Mutant(
        "models/load.py",
        "(tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)",
        "(tokenizer.eos_token_id, tokenizer.bos_token_id)",
        "models/test_load.py",
    ),
    Mutant(
        "models/load.py",
        'has_file(path, "tokenizer_config.json", revision=revision)',
        'has_file(path, "tokenizer_config.json")',
        "models/test_load.py",
    ),
    Mutant("models/load.py", "all_special_tokens)) <= 1", "all_special_tokens)) < 1", "models/test_load.py"),
    Mutant(
        "models/load.py",
        "model = load_adapter(model, path, revision)",
        "model = load_adapter(model, path)",
        "models/test_load.py",
    ),
    Mutant("models/load.py", 'if len(missing) > 3 else ""', 'if len(missing) > 4 else ""', "models/test_load.py"),
    Mutant("models/load.py", "cache_error(error) or UserError", "UserError", "models/test_load.py"),
    Mutant(
        "models/adapters.py",
        "isinstance(active, str) or len(active) != 1",
        "isinstance(active, str) or len(active) > 1",
        "models/test_adapters.py",
    ),
    Mutant(
        "models/adapters.py",
        "config = PeftConfig.from_pretrained(path, revision=revision)",
        "config = PeftConfig.from_pretrained(path)",
        "models/test_adapters.py",
    ),
    Mutant("models/adapters.py", 'device="cpu", revision=revision)', 'device="cpu")', "models/test_adapters.py"),
    Mutant("models/adapters.py", "config=config, revision=revision)", "config=config)", "models/test_adapters.py"),
    Mutant(
        "models/adapters.py",
        "len(saved) != embeddings.num_embeddings",
        "len(saved) < embeddings.num_embeddings",
        "models/test_adapters.py",
    ),
    Mutant(
        "models/sampling_copy.py",
        "if not is_plain(policy) or is_quantised(policy):",
        "if not is_plain(policy):",
        "generation/test_static.py",
    ),
    Mutant(
        "models/sampling_copy.py",
        'getattr(config, "modules_to_save", None) for config',
        "False for config",
        "generation/test_static.py",
    ),
    Mutant("models/sampling_copy.py", "self.model.eval()\n", "pass\n", "generation/test_static.py"),
    Mutant(
        "models/sampling_copy.py",
        "own.active_adapters[0]\n",
        'next(iter(own.lora_A), "")\n',
        "generation/test_static.py",
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "[[row] * width for row in range(rows)]",
        "[[0] * width] * rows",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "learning += activations(2, whole) - activations(1, whole)",
        "pass",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "memory_estimate/ppo.py", "[-args.per_device_train_batch_size :]", "[:]", "memory_estimate/test_ppo_memory.py"
    ),
    Mutant(
        "memory_estimate/ppo.py",
        "if not (args.use_cpu and trained.packs(",
        "if not (trained.packs(",
        "memory_estimate/test_ppo_memory.py",
    ),
    Mutant(
        "storage/checkpoint.py",
        "if spare and (step or any(fault",
        "if spare and (any(fault",
        "storage/test_left_aside.py",
    ),
    Mutant(
        "storage/checkpoint.py",
        "left.exists() and fault(checkpoint) is not None and fault(left) is None",
        "left.exists() and fault(checkpoint) is not None",
        "storage/test_left_aside.py",
    ),
    Mutant(
        "storage/checkpoint.py",
        'elif facts["step"] != checkpoint_step(checkpoint)',
        'elif facts["step"] > checkpoint_step(checkpoint)',
        "storage/test_checkpoint.py",
    ),
    Mutant("storage/lock.py", 'and owner["job"] == mine["job"] and _restarts', "and _restarts", "storage/test_lock.py"),
    Mutant(
        "tracking/recorder.py", 'event.WhichOneof("what") != "summary" or event', "event", "tracking/test_recorder.py"
    ),
    Mutant(
        "storage/stages.py",
        '("given", "flags", "data", "stages")] if',
        '("given", "flags", "data")] if',
        "storage/test_basis.py",
    ),
    Mutant(
        "storage/saver.py",
        "self.step, self._since, self._pending = step, time.monotonic(), True",
        "self.step, self._pending = step, True",
        "storage/test_saver.py",
    ),
    Mutant(
        "storage/saver.py",
        "self.step, self._since, self._in_block = 0, time.monotonic(), True",
        "self.step, self._in_block = 0, True",
        "storage/test_saver.py",
    ),
    Mutant(
        "storage/safe_load.py",
        "and path.name not in NEVER_READ",
        'and not path.name.startswith("training")',
        "faults/test_security_checkpoints.py",
    ),
    Mutant(
        "storage/run_folder.py",
        '.isoformat(timespec="seconds")',
        '.replace(tzinfo=None).isoformat(timespec="seconds")',
        "storage/test_run_folder.py",
    ),
    Mutant(
        "tracking/skipped_updates.py",
        '"score" if "score" in what else "gradient"',
        '"score" if what[0] == "score" else "gradient"',
        "tracking/test_skipped_updates.py",
    ),
    Mutant("console/steps.py", "min(self.done + by, self.total)", "self.done + by", "console/test_screen.py"),
    Mutant(
        "console/screen.py", "min(_TIME, _width() or _TIME) - len(took)", "_TIME - len(took)", "console/test_screen.py"
    ),
    Mutant(
        "config/commands.py",
        'if self.executor == "local" and self.sbatch',
        "if self.sbatch and not self.seeds",
        "config/test_edges.py",
    ),
    Mutant("config/stages.py", "self.dataset_dir = self.dataset_dir or None", "pass", "config/test_edges.py"),
    Mutant("config/caches.py", "return inside[-1:]", "return inside[:1]", "config/test_caches.py"),
    Mutant("config/caches.py", "error.__cause__ or error.__context__", "error.__cause__", "config/test_caches.py"),
    Mutant("config/caches.py", 'and path != Path("/")]', "]", "config/test_caches.py"),
    Mutant(
        "config/old_names.py", '"transformers 5" if name in REMOVED else "TRL 1.12"', '"TRL 1.12"', "test_old_names.py"
    ),
    Mutant(
        "config/ppo.py",
        "min(every, self.save_steps) >= 1 and self.save_steps % every",
        "every >= 1 and self.save_steps % every",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "config/ppo.py",
        "min(every, self.save_steps) >= 1 and self.save_steps % every",
        "self.save_steps % every",
        "config/test_ppo_config.py",
    ),
    Mutant(
        "cli/pipeline.py",
        'if engine == "multi_cpu" or devices == 0:',
        'if engine == "multi_cpu":',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/train_ppo.py",
        'policy.dtype or "float32" if model_args.dtype == "auto" else',
        'policy.dtype or "float32" if model_args.dtype else',
        "cli/test_train_ppo.py",
    ),
    Mutant(
        "cli/train_ppo.py",
        "sorted({p.tree_id for p in split.train})",
        "sorted({p.tree_id for p in train})",
        "cli/test_train_ppo.py",
    ),
    Mutant(
        "cli/foresight.py",
        'precision_line(settings[-1]) or precision(settings[-1])["taken"]',
        'precision(settings[-1])["taken"]',
        "cli/test_launching.py",
    ),
    Mutant(
        "cli/outcome.py",
        "if name in POLICIES else None",
        'if name in POLICIES and name == "full" else None',
        "cli/test_outcome.py",
    ),
    Mutant("cli/plan.py", 'if again and one.state == "done" else one', "if again else one", "storage/test_stages.py"),
    Mutant("cli/plan.py", "if args.stage in (None, one.spec.name)]", "if True]", "storage/test_stages.py"),
    Mutant(
        "cli/prepare.py",
        '(reward.startswith("pypi:") or is_hub_id(reward))',
        "is_hub_id(reward)",
        "cli/test_prepare.py",
    ),
    Mutant("cli/train_reward.py", "gold=data.gold)", "gold=False)", "cli/test_train_reward.py"),
    Mutant(
        "storage/checkpoint.py",
        '" ".join(str(problem).split())[:200]',
        '" ".join(str(problem).split())',
        "storage/test_checkpoint.py storage/test_left_aside.py",
    ),
    Mutant(
        "storage/checkpoint.py",
        '{"step", "batch_size", "engine", "processes"} <=',
        '{"step", "batch_size", "processes"} <=',
        "storage/test_checkpoint.py storage/test_left_aside.py",
    ),
    Mutant(
        "storage/checkpoint.py",
        '_say([*broken, *unfinished], f"',
        '_say([*broken], f"',
        "storage/test_checkpoint.py storage/test_left_aside.py",
    ),
    Mutant(
        "storage/disk.py",
        "    flush_folder(folder)\n    aside",
        "    aside",
        "storage/test_checkpoint.py storage/test_storage_disk.py",
    ),
    Mutant(
        "storage/disk.py",
        "    flush(aside)\n    os.replace(aside, folder / MANIFEST)",
        "    os.replace(aside, folder / MANIFEST)",
        "storage/test_checkpoint.py storage/test_storage_disk.py",
    ),
    Mutant(
        "storage/disk.py",
        "            if is_main:\n                flush_folder(aside)\n                _move_in",
        "            if True:\n                _move_in",
        "storage/test_checkpoint.py storage/test_storage_disk.py",
    ),
    Mutant(
        "storage/disk.py",
        "                flush_folder(aside)\n",
        "",
        "storage/test_checkpoint.py storage/test_storage_disk.py",
    ),
    Mutant(
        "storage/disk.py",
        "        finally:\n            if is_main:",
        "        finally:\n            if True:",
        "storage/test_checkpoint.py storage/test_storage_disk.py",
    ),
    Mutant(
        "storage/lock.py", "if error.errno not in _NO_LINKS:", "if error.errno == errno.EEXIST:", "storage/test_lock.py"
    ),
    Mutant("storage/saver.py", "self._in_block = False\n        if error", "if error", "storage/test_saver.py"),
    Mutant(
        "storage/saver.py",
        "self._pending, self._problem = False, None",
        "self._pending = False",
        "storage/test_saver.py",
    ),
    Mutant("storage/saver.py", "                flush(target.parent)\n", "", "storage/test_saver.py"),
    Mutant(
        "storage/stages.py",
        "since {' and '.join(changed)} changed: run",
        "since {changed[0]} changed: run",
        "storage/test_stages.py storage/test_basis.py",
    ),
    Mutant(
        "storage/stages.py",
        "did_you_mean(folder.name, sorted(runs))",
        "did_you_mean(folder.name, sorted(runs)[:1])",
        "storage/test_stages.py storage/test_basis.py",
    ),
    Mutant(
        "storage/run_folder.py",
        "        if self.is_main:\n            write_json",
        "        if True:\n            write_json",
        "storage/test_run_folder.py",
    ),
    Mutant(
        "storage/run_folder.py",
        "            if self.is_main:\n                self._lock",
        "            if True:\n                self._lock",
        "storage/test_run_folder.py",
    ),
    Mutant(
        "storage/run_folder.py",
        "file.write(json.dumps(row, ensure_ascii=False)",
        "file.write(json.dumps(row)",
        "storage/test_run_folder.py",
    ),
    Mutant(
        "storage/run_folder.py", "result.stdout.strip() or None", "result.stdout or None", "storage/test_run_folder.py"
    ),
    Mutant("storage/run_folder.py", "json.dumps(content, indent=2", "json.dumps(content", "storage/test_run_folder.py"),
    Mutant(
        "storage/safe_load.py",
        "error.strerror or type(error).__name__",
        "type(error).__name__",
        "faults/test_security_checkpoints.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "        if self.accelerator.is_main_process:\n"
        "            self.folder.mkdir(parents=True, exist_ok=True)\n            append",
        "        if True:\n            self.folder.mkdir(parents=True, exist_ok=True)\n            append",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "        if self.accelerator.is_main_process:\n            write_rows",
        "        if True:\n            write_rows",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "        if not self.accelerator.is_main_process:\n            return",
        "        if False:\n            return",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "        if self.accelerator.is_main_process:\n            load_rows",
        "        if True:\n            load_rows",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "        if self.accelerator.is_main_process:\n"
        "            self.folder.mkdir(parents=True, exist_ok=True)\n            last",
        "        if True:\n            self.folder.mkdir(parents=True, exist_ok=True)\n            last",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "    if PartialState().is_main_process:\n        path.parent",
        "    if True:\n        path.parent",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "if asked and PartialState().is_main_process else {}",
        "if asked else {}",
        "tracking/test_recorder.py",
    ),
    Mutant(
        "tracking/recorder.py",
        "args.run_name, step) if self.accelerator.is_main_process else {}",
        "args.run_name, step)",
        "tracking/test_recorder.py",
    ),
    Mutant("tracking/board.py", "if state.is_world_process_zero:", "if True:", "tracking/test_board.py"),
    Mutant(
        "tracking/progress.py", 'max(1.0, row["eps"] * seconds)', 'row["eps"] * seconds', "tracking/test_progress.py"
    ),
    Mutant(
        "tracking/progress.py",
        "self.pace or Pace(state.max_steps)",
        "Pace(state.max_steps)",
        "tracking/test_progress.py",
    ),
    Mutant(
        "tracking/progress.py",
        "state.max_steps, state.global_step, self.rows)",
        "state.max_steps, 0, self.rows)",
        "tracking/test_progress.py",
    ),
    Mutant(
        "tracking/progress.py",
        "state.max_steps, state.global_step, self.rows)",
        "state.max_steps, state.global_step)",
        "tracking/test_progress.py",
    ),
    Mutant("tracking/progress.py", 'if name.startswith("time/")', 'if name != "eps"', "tracking/test_progress.py"),
    Mutant(
        "tracking/skipped_updates.py",
        "if len(rows) > _SHOWN else",
        "if len(rows) >= _SHOWN else",
        "tracking/test_skipped_updates.py",
    ),
    Mutant(
        "console/screen.py",
        "_is_terminal(_out()) and not os.environ.get(quiet.VERBOSE) and not",
        "_is_terminal(_out()) and not",
        "console/test_screen.py",
    ),
    Mutant("storage/checkpoint.py", "        read(facts)\n", "        pass\n", "storage/test_checkpoint.py"),
    Mutant("storage/checkpoint.py", "if (path / MANIFEST).is_file()]", "]", "storage/test_checkpoint.py"),
    Mutant(
        "storage/disk.py",
        "        if is_main:\n            shutil.rmtree(aside, ignore_errors=True)\n            aside.mkdir",
        "        if True:\n            shutil.rmtree(aside, ignore_errors=True)\n            aside.mkdir",
        "storage/test_checkpoint.py",
    ),
    Mutant(
        "storage/run_folder.py", '"world_size": state.num_processes', '"world_size": 1', "storage/test_run_folder.py"
    ),
    Mutant(
        "distributed/accelerator.py",
        "sync_each_batch=wants_fsdp()",
        "sync_each_batch=False",
        "distributed/test_accelerator.py",
    ),
    Mutant(
        "distributed/accelerator.py",
        "cpu=args.use_cpu and not wants_deepspeed()",
        "cpu=args.use_cpu",
        "distributed/test_accelerator.py",
    ),
    Mutant(
        "distributed/accelerator.py",
        "counted=1)",
        "counted=args.gradient_accumulation_steps)",
        "distributed/test_accelerator.py",
    ),
    Mutant(
        "distributed/accelerator.py",
        '"broadcast_buffers": args.ddp_broadcast_buffers',
        '"broadcast_buffers": args.ddp_find_unused_parameters',
        "distributed/test_accelerator.py",
    ),
    Mutant(
        "distributed/accelerator.py",
        "enable_full_determinism(args.seed)",
        "set_seed(args.seed)",
        "distributed/test_accelerator.py",
    ),
    Mutant(
        "distributed/accelerator.py",
        "prepare_offload(accelerator.state.deepspeed_plugin, args.optim)",
        "pass",
        "distributed/test_accelerator.py",
    ),
    Mutant("perf/hardware.py", "if 8 * seconds > _TOO_LONG:", "if seconds > _TOO_LONG:", "perf/test_hardware.py"),
    Mutant("perf/hardware.py", "< _SPENT:", "< 0:", "perf/test_hardware.py"),
    Mutant("perf/hardware.py", "len(times) <= _TRIES or", "len(times) < _TRIES or", "perf/test_hardware.py"),
    Mutant(
        "perf/hardware.py",
        "2 * tokens * hidden * inner / best",
        "tokens * hidden * inner / best",
        "perf/test_hardware.py",
    ),
    Mutant(
        "perf/hardware.py",
        "float(module.get_device_properties(device).total_memory)",
        "float(module.get_device_properties(0).total_memory)",
        "perf/test_hardware.py",
    ),
    Mutant(
        "perf/hardware.py",
        "float(module.recommended_max_memory()) if",
        "float(module.recommended_max_memory()) / 2 if",
        "perf/test_hardware.py",
    ),
    Mutant(
        "perf/work.py",
        "_Seen.of(self.reward_roles[name].base, read.texts, read.passes, n)",
        "_Seen.of(self.reward_roles[name].base, texts, groups, n)",
        "perf/test_work.py",
    ),
    Mutant("perf/work.py", "self.dtype.itemsize) / memory_bandwidth", "4) / memory_bandwidth", "perf/test_work.py"),
    Mutant(
        "perf/work.py",
        "with self.reference_role.active() as model:\n            return Flops.of(model)",
        "return Flops.of(self.reference_role.model)",
        "perf/test_work.py",
    ),
    Mutant(
        "perf/work.py",
        "[] if module.disable_adapters or module.merged else",
        "[] if module.disable_adapters else",
        "perf/test_flops.py",
    ),
    Mutant(
        "perf/throughput.py", 'device.type != "cpu", meter', 'device.type == "cuda", meter', "perf/test_throughput.py"
    ),
    Mutant("perf/throughput.py", "meter.policy.frozen > 0", "meter.policy.trained > 0", "perf/test_throughput.py"),
    Mutant(
        "perf/throughput.py",
        'for name in ("score", "learn") if name in work and work[name].padding',
        'for name in ("learn",) if name in work and work[name].padding',
        "perf/test_throughput.py",
    ),
    Mutant(
        "ratings/serve.py",
        "not 0 < int(length) <= MAX_BYTES",
        "not 0 < int(length) < MAX_BYTES",
        "ratings/test_serve.py",
    ),
    Mutant("ppo/prompts.py", 'f"{prompt_id}\\n{seen[prompt_id]}" if', 'f"{prompt_id}\\n{i}" if', "ppo/test_prompts.py"),
    Mutant(
        "reward/metrics.py",
        "np.where(first_minus_second > 0, *LABELS)",
        "np.where(first_minus_second >= 0, *LABELS)",
        "reward/test_metrics.py",
    ),
    Mutant(
        "reward/metrics.py",
        "if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:",
        "if len(x) < 2 or np.ptp(x) == 0:",
        "evaluation/test_statistics.py",
    ),
    Mutant("model_card/card.py", '_kind(folder) == "reward"', '_kind(folder) != "policy"', "model_card/test_card.py"),
    Mutant("model_card/card.py", "if hub_id and place != folder:", "if place != folder:", "model_card/test_card.py"),
    Mutant(
        "model_card/card.py",
        '{"rlhf": __version__} | dict(facts.get("versions", {}))',
        'dict(facts.get("versions", {})) | {"rlhf": __version__}',
        "model_card/test_card.py",
    ),
    Mutant(
        "reporting/report.py",
        'run.evaluation.get("confidence", 0.95))\n    figures |=',
        "0.95)\n    figures |=",
        "reporting/test_report.py",
    ),
    Mutant(
        "data/hh_rlhf.py",
        "if data_dir is not None or is_hub_id(source):\n        return files",
        "if data_dir is not None:\n        return files",
        "data/test_sources.py",
    ),
]


def mutated(mutant: Mutant, folder: Path) -> str | None:
    """Run its tests on the copy in folder with the wrong line; None if they notice it, else what they say."""
    path = folder / "rlhf" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.line) != 1:
        return f"{text.count(mutant.line)} places have this line"
    path.write_text(text.replace(mutant.line, mutant.wrong), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
        tests = [f"tests/{name}" for name in mutant.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, *tests], cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    return None if done.returncode == 1 else done.stdout.strip().splitlines()[-1]


def copied(parent: Path) -> Path:
    """A copy of what tests need."""
    folder = parent / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("rlhf", "tests", "docs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


SWAPS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Add: "-"}
SWAPS |= {ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.And: "or", ast.Or: "and"}


def drawn(count: int, seed: int) -> Iterator[Mutant]:
    """Lines with one operator changed, from the files of LINES."""
    tests = {}
    for one in LINES:
        tests[one.file] = " ".join(dict.fromkeys([*tests.get(one.file, "").split(), *one.tests.split()]))
    found = []
    for file, names in sorted(tests.items()):
        text = (ROOT / "rlhf" / file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            kind = type(node.ops[0]) if isinstance(node, ast.Compare) else type(getattr(node, "op", None))
            parts = [node.left, node.comparators[0]] if isinstance(node, ast.Compare) else None
            parts = [node.left, node.right] if isinstance(node, ast.BinOp) else parts
            parts = node.values[:2] if isinstance(node, ast.BoolOp) else parts
            if parts and kind in SWAPS:
                whole, left, right = (ast.get_source_segment(text, part) or "" for part in (node, *parts))
                if text.count(whole) == 1 and "\n" not in whole:
                    rest = whole[whole.rindex(right) + len(right) :] if right in whole else ""
                    found.append(Mutant(file, whole, f"({left} {SWAPS[kind]} {right}{rest})", names))
    yield from random.Random(seed).sample(found, min(count, len(found)))


def survivors(mutants: Sequence[Mutant]) -> list[str]:
    """What no test noticed, one line each."""
    lines = []
    with tempfile.TemporaryDirectory() as parent:
        folder = copied(Path(parent))
        for mutant in mutants:
            if said := mutated(mutant, folder):
                lines.append(f"{mutant.file}: {mutant.line!r} -> {mutant.wrong!r}: {said}")
                print(lines[-1], flush=True)
    return lines


def main(words: list[str]) -> None:
    if words[:1] == ["--draw"]:
        count, seed = int(words[1]), int(words[2]) if len(words) > 2 else 0
        chosen = list(drawn(count, seed))
    else:
        chosen = [one for one in LINES if not words or any(word in one.file + one.wrong for word in words)]
    left = survivors(chosen)
    print(f"{len(chosen) - len(left)} of {len(chosen)} noticed")
    raise SystemExit(bool(left))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every causal class of the installed transformers, tiny, tried in PPO: the table in docs/models.md.

    python tests/models/families.py [--results FILE] [--write] [KIND ...]

Each part is compared with the obvious: one text at a time, a whole pass without cache or padding, transformers' own
head and autograd. Dropout is on in every config. `refused` is a UserError before the first step.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import tiny_ppo
import torch
import transformers
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf.errors import UserError
from rlhf.generation.decode import generate
from rlhf.models.actor_critic import texts_of
from rlhf.models.lora import merged_model
from rlhf.models.unwrap import unwrap_peft
from rlhf.ppo.roles import critic_from

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PARTS = ("log-probs", "decoding", "critic", "LoRA", "gradient")
MARK = "<!-- made by tests/models/families.py -->"
SECONDS = 120  # of a processor, for one kind
VOCABULARY = 400
STOPS = list(range(0, VOCABULARY, 8))  # so that rows end at different times
# The sizes of a config, by their names in transformers.
_SIZES = {
    32: """hidden_size d_model n_embd embedding_size word_embed_proj_dim moe_intermediate_size d_embed dim_model
        shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size audio_hidden_size
        input_embedding_size moe_shared_expert_intermediate_size share_expert_dim""",
    64: """intermediate_size ffn_dim n_inner dff decoder_ffn_dim encoder_ffn_dim d_ff dim_ff ffn_hidden_size
        index_topk""",
    16: "kv_lora_rank q_lora_rank image_size",
    8: """head_dim global_head_dim qk_nope_head_dim v_head_dim ssm_state_size mamba_d_state state_size sliding_window
        hidden_size_per_layer_input index_head_dim patch_size""",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_attention_heads n_head n_heads
        num_heads decoder_attention_heads encoder_attention_heads attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts qk_rope_head_dim""",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k mamba_expand index_n_heads eos_token_id",
    1: "n_group topk_group n_shared_experts num_shared_experts bos_token_id",
    0: "pad_token_id",
    0.15: "initializer_range",
    256: "max_position_embeddings n_positions max_target_positions",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()} | {"is_decoder": True}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mpt": {"max_seq_len": 256},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "lfm2": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "olmo_hybrid": LINEAR | {"num_key_value_heads": 4, "linear_num_key_heads": 4},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64, "ssm_multipliers": None},
    "bamba": MAMBA2 | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "zamba2": {
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8, "num_hidden_layers": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "qwen4_exp_text": LINEAR
    | {
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2},
    "dots3_note_text": {"per_layer_config": None},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
}

# Where a name of the above says something else, or is refused.
NOT_SET = {"diffllama": ["attention_dropout"], "zaya": ["num_experts_per_tok"]}

_DRAW = torch.Generator().manual_seed(3)


def _rows(lengths):
    return [torch.randint(3, VOCABULARY, (n,), generator=_DRAW).tolist() for n in lengths]


PROMPTS, RESPONSES = _rows([3, 11, 19, 7, 11, 24]), _rows([5, 1, 9, 12, 3, 7])
PROMPTS[4][:4] = PROMPTS[1][:4]
TEMPERATURE = 0.7


def tiny_config(kind):
    """A small config of a kind of model, dropout on; parts of a composite one are small, too."""
    return _tiny(CONFIG_MAPPING[kind], kind)


def _tiny(made_by, kind):
    plain = made_by()
    names = set(vars(plain)) | set(getattr(made_by, "attribute_map", {})) | set(getattr(made_by, "__annotations__", {}))
    given = {name: value for name, value in SIZES.items() if name in names}
    given |= {
        name: 0.1
        for name, value in vars(plain).items()
        if isinstance(value, float) and ("drop" in name or "jitter" in name) and "classifier" not in name
    }
    if "qk_rope_head_dim" in names:  # attention over a latent state has as many keys as queries, of two parts
        given |= {name: value for name, value in {"num_key_value_heads": 4, "head_dim": 4}.items() if name in names}
    given = {name: value for name, value in given.items() if name not in NOT_SET.get(kind, ())}
    for name, part in (getattr(made_by, "sub_configs", None) or {}).items():
        own = getattr(plain, name, None)
        part = type(own) if own is not None else part
        if part is not AutoConfig and isinstance(part, type):
            given[name] = _tiny(part, part.model_type)
    return made_by(**given | SPECIAL.get(kind, {}))


def make(kind):
    """A tiny model of a kind, with weights that make a difference. None: it cannot be made small by these names."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 2e7:
        raise ValueError(f"not tiny: {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and p.std() < 0.1:
                p.normal_(0, 0.15)
            elif p.ndim == 1:
                p.add_((0.1 if "norm" in name else 0.05) * torch.randn_like(p))
    model.generation_config.eos_token_id = STOPS
    return model.eval()


def obvious(model, prompts=PROMPTS, responses=RESPONSES):
    """Log-probs of each response by a whole pass over its text alone."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        logp = (model(input_ids=ids, use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        found.append(logp[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    return torch.cat(found)


@torch.no_grad()
def sampled(model, u):
    """Responses by whole passes, and how near a draw was to another token."""
    found, margin = [], 1.0
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for x in u[row].double():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            total = (logits / TEMPERATURE).softmax(-1).cumsum(-1)
            margin = min(margin, float((total - x * total[-1]).abs().min()))
            ids.append(int(torch.searchsorted(total, (x * total[-1]).reshape(1), right=True)))
            if ids[-1] in STOPS:
                break
        found.append(ids[len(prompt) :])
    return found, margin


def texts():
    return texts_of(PROMPTS, RESPONSES, [range(len(PROMPTS))], max(map(len, RESPONSES)), "cpu")[0]


def close(found, want, what="off by"):
    worst = float((found - want).abs().max())
    return "right" if worst < 2e-3 * max(1.0, float(want.abs().max())) else f"WRONG: {what} {worst:.1e}"


def same(model, plain):
    u = torch.rand(len(PROMPTS), 16, generator=torch.Generator().manual_seed(1))
    found, (want, margin) = generate(model, PROMPTS, u, STOPS, TEMPERATURE), sampled(plain, u)
    equal = sum(a == b for a, b in zip(found, want, strict=True))
    return "right" if equal == len(want) else f"WRONG: {equal} of {len(want)} responses, nearest draw {margin:.0e}"


@functools.cache
def tokenizer():
    return tiny.chat_tokenizer()


def trainer(model, value_model=None, peft_config=None, **options):
    given = {
        "model": model,
        "value_model": value_model,
        "peft_config": peft_config,
        "processing_class": copy.deepcopy(tokenizer()),
        "reward_model": lambda completions, **_: [float(len(one[0]["content"])) for one in completions],
    }
    settings = {"critic": "shared", "temperature": TEMPERATURE, "learning_rate": 0.0, "max_steps": 1}
    options = settings | {"response_length": 8, "num_ppo_epochs": 1} | options
    return tiny_ppo.trainer(tempfile.mkdtemp(), "llama", reward=len, given=given, **options)


def step(made):
    """A PPO step at learning rate 0."""
    rows, record = [], made.record
    made.record = lambda *given: rows.append(record(*given)) or rows[-1]
    made.train()
    ratio = rows[0]["val/ratio_max"]
    return "right" if abs(ratio - 1) < 2e-3 else f"WRONG: ratio {ratio:.3f} at learning rate 0"


def first(*found):
    return next((one for one in found if one != "right"), "right")


def log_probs(plain, made):
    made.roles.trained.eval()
    with torch.no_grad():
        return close(made.roles.trained(texts())[0], obvious(plain))


def decoding(plain, made):
    return same(made.roles.trained.policy.eval(), plain)


def critic(plain, made):
    value = critic_from(plain)
    with torch.no_grad():
        value.score.weight.normal_(0, 0.3)
    own = copy.deepcopy(value).eval()
    own.config.pad_token_id = own.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        want = torch.stack(
            [own(input_ids=torch.tensor([p + r])).logits[0, 0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        )
        run = trainer(copy.deepcopy(plain), critic="separate", value_model=value)
        run.roles.trained.eval()
        values = run.roles.trained.states_and_values(texts())[1].flatten()[texts().last]
    return first(close(values, want), step(run))


def lora(plain, made):
    names = {name.rpartition(".")[2] for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    known = ("q_proj", "v_proj", "query_key_value", "qkv_proj", "Wqkv", "qkv")
    targets = [name for name in known if name in names] or "all-linear"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
    run = trainer(
        copy.deepcopy(plain),
        peft_config=config if plain.config.model_type != "gpt2" else LoraConfig(r=4, lora_dropout=0.0),
    )
    policy = run.roles.trained.policy
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    merged = merged_model(policy).eval()
    run.roles.trained.eval()
    with torch.no_grad():
        want = obvious(merged)
        moved = float((want - obvious(plain)).abs().max())
        found = close(run.roles.trained(texts())[0], want)
    if moved < 1e-2:
        found = "WRONG: the adapter changes nothing"
    return first(found, same(policy.eval(), merged), step(run))


def gradient(plain, made):
    want = {}
    own = copy.deepcopy(plain)
    obvious(own).sum().backward()
    want = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in want.values())
    for checkpointing in (False, True):
        try:
            run = trainer(copy.deepcopy(plain), gradient_checkpointing=checkpointing)
        except UserError:
            if not checkpointing:
                raise
            continue  # this kind has no layers for it
        trained = run.roles.trained.train()
        trained(texts())[0].sum().backward()
        mine = {name: p.grad for name, p in unwrap_peft(trained.policy).named_parameters()}
        for name, grad in want.items():
            worst = float(((mine[name] if mine[name] is not None else torch.zeros_like(grad)) - grad).abs().max())
            if worst > 2e-3 * largest:
                return f"WRONG: {name} off by {worst / largest:.1e}" + (", checkpointed" if checkpointing else "")
        found = step(run)
        if found != "right":
            return found + (", checkpointed" if checkpointing else "")
    return "right"


def attempt(part, *given):
    try:
        return part(*given)
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:  # what a user would see as a traceback
        places = traceback.extract_tb(error.__traceback__)
        where = next((f"{Path(x.filename).name}:{x.lineno}" for x in reversed(places) if "/rlhf/" in x.filename), "?")
        return f"TRACEBACK: {type(error).__name__} {str(error)[:110]!r} at {where}"


def tried(kind):
    """Part -> right, refused: why, WRONG: how, or TRACEBACK: where."""
    try:
        plain = make(kind)
    except Exception as error:
        why = " ".join(str(error).split())[:150]
        return dict.fromkeys(PARTS, f"not tried: {type(error).__name__}: {why}")
    made = attempt(trainer, copy.deepcopy(plain))
    if isinstance(made, str):
        return dict.fromkeys(PARTS, made)
    ways = (log_probs, decoding, critic, lora, gradient)
    return {part: attempt(way, plain, made) for part, way in zip(PARTS, ways, strict=True)}


def _work(kind, pipe):
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pipe.send(tried(kind))


def limited(kind):
    """`tried`, in a process of its own: part -> what was found."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_work, args=(kind, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return dict.fromkeys(PARTS, f"TRACEBACK: no answer in {SECONDS} s of a processor")
    finally:
        child.join()


def table(found):
    """Rows of Markdown: right or refused, and why."""
    lines = [f"| kind | {' | '.join(PARTS)} | why refused |", "|---" * (len(PARTS) + 2) + "|"]
    for kind, parts in sorted(found.items()):
        words = [parts[part].partition(":")[0] for part in PARTS]
        why = dict.fromkeys(text.partition(": ")[2] for text in parts.values() if text.startswith(("refused", "not")))
        lines.append(f"| {kind} | {' | '.join(words)} | {'; '.join(map(_plain, why))} |")
    return lines


def _plain(text):
    return text.replace("use a model of another kind: ", "").replace("|", "/").replace("<", "").replace("`", "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--results", type=Path, help="a JSON file: what is in it is not tried again")
    parser.add_argument("--write", action="store_true", help="write the table into docs/models.md")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = json.loads(given.results.read_text()) if given.results and given.results.exists() else {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        step(trainer(tiny.llama()))  # what is measured once, and the tokenizer
    for kind in given.kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if kind in found:
            continue
        found[kind] = limited(kind)
        print(f"{kind}: {json.dumps(found[kind])}", flush=True)
        if given.results:
            given.results.write_text(json.dumps(found, indent=1))
    if given.write:
        before, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
        left = [f"`{kind}`" for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in found]
        count = f"{len(found)} of {len(found) + len(left)} kinds, transformers {transformers.__version__}."
        count += f" Not run yet: {', '.join(left)}." if left else ""
        PAGE.write_text(before + mark + "\n".join(["", "", count, "", *table(found), ""]), encoding="utf-8")
    bad = [kind for kind, parts in found.items() if any(text.startswith(("WRONG", "TRACE")) for text in parts.values())]
    sys.exit(f"wrong: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()

"""Several processes and one vLLM server: each gets the responses to its prompts, and the server gets whole weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_vllm import serving
from workers import launch

WORKER = """
sys.path.insert(0, options["here"])
import pytest
from test_vllm import answer, install

rank = int(os.environ.get("RANK", 0))
package = install(folder / f"packages-{rank}", pytest.MonkeyPatch())
run = trainer(folder / "run", lora=options["lora"], max_steps=2, per_device_train_batch_size=1, **options["all"])
collect, rollouts = run.collect, []

def kept(step, batch):
    rollouts.append(collect(step, batch))
    if rank == 0:
        torch.save(dict(package.SENT), folder / f"step-{step}.pt")
    return rollouts[-1]

run.collect = kept
run.train()
for step, rollout in enumerate(rollouts, 1):
    assert rollout.responses == [answer(prompt.input_ids, step) for prompt in rollout.prompts]
mine = [[5 + rank], [50, rank]]
assert run.generate(mine) == [answer(prompt, 3) for prompt in mine]
if rank == 0:
    torch.save(dict(package.SENT), folder / "end.pt")
run.save_model()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_processes(tmp_path, lora):
    """The last batch of an epoch has no row for one of them. At the end the server has the weights that are saved."""
    with serving() as server:
        where = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 0}
        options = {"here": str(Path(__file__).parent), "lora": lora, "all": where}
        launch(tmp_path, WORKER, options, 2)
        assert [len(body["prompt"]) for body in server.of("/v1/completions")] == [4, 4, 4]
    sent, saved = torch.load(tmp_path / "end.pt"), load_file(tmp_path / "run" / "model.safetensors")
    assert sent.keys() == saved.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(sent[name].float(), weight.float(), atol=1e-6, rtol=0, msg=name)
    first = torch.load(tmp_path / "step-1.pt")
    assert any(not torch.equal(first[name], sent[name]) for name in sent)

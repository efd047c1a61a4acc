"""Our model in bfloat16 arithmetic, as it trains, against transformers' in bfloat16, on the same converted weights."""

from pathlib import Path

import torch
from conversions import import_model, write_llama
from one_rank_model import one_rank
from rank_processes import Rank
from transformers import LlamaForCausalLM

from k2_megatron.convert.torch_dist import checkpoint_folder
from k2_megatron.train.checkpoints.load import load_weights

LAYERS = 3
UNIT_ROUNDOFF = 2.0**-8  # of bfloat16, whose significand has eight bits: half of the distance between 1 and the next
# What one layer rounds on the way of a number: norm, QKV, RoPE, scores, probabilities, their product with values,
# output matrix, sum; norm, gate and up, SwiGLU, down, sum
ROUNDINGS_PER_LAYER = 13


def bfloat16_logits(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    with one_rank(run / "start.toml", []) as (_config, _groups, _kernels, model), torch.no_grad():
        load_weights(checkpoint_folder(run), [model], torch.device("cpu"))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model.eval()(tokens, positions, None).float()


def test_both_models_in_bfloat16_differ_by_its_rounding(tmp_path: Path) -> None:
    """Each run rounds n = 13 x layers + 2 times. Roundings are independent, so that the root mean square of what they
    do to a logit is at most sqrt(n) u of the logits' own, and sqrt(2 n) u between two runs that round in other orders.
    A wrong permutation or angle changes logits by their own size."""
    write_llama(tmp_path / "hf", kv_heads=2, dtype=torch.bfloat16, layers=LAYERS)
    import_model(tmp_path / "hf", tmp_path / "run", tensor=2)
    tokens = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(5))
    outcome = Rank(bfloat16_logits, (tmp_path / "run", tokens), {}, tmp_path / "rank").finish()
    assert outcome.exit_code == 0, outcome.stderr
    ours, found = outcome.result, {}
    for dtype in (torch.bfloat16, torch.float32):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=dtype).eval()
        with torch.no_grad():
            found[dtype] = model(tokens).logits.float()
    size = found[torch.float32].square().mean().sqrt()
    bound = (2 * (ROUNDINGS_PER_LAYER * LAYERS + 2)) ** 0.5 * UNIT_ROUNDOFF
    difference = (ours - found[torch.bfloat16]).square().mean().sqrt() / size
    assert difference <= bound, f"{difference:.4f}, bound {bound:.4f}"
    to_exact = {name: (logits - found[torch.float32]).square().mean().sqrt() / size
                for name, logits in (("ours", ours), ("theirs", found[torch.bfloat16]))}  # fmt: skip
    assert to_exact["ours"] <= bound / 2**0.5, to_exact
    assert not torch.equal(ours, found[torch.float32]), "nothing was rounded: this was no bfloat16 arithmetic"

"""The planner's formulas against published numbers, against megatron-core's schedule, and against themselves."""

from itertools import product
from types import SimpleNamespace

import pytest

from k2_megatron.config import load_config
from k2_megatron.config.flops import flops_per_token, hardware_flops_per_token
from k2_megatron.plan.memory import layer_activation_bytes, rank_memory
from k2_megatron.plan.parameters import model_parameters, rank_parameters
from k2_megatron.plan.schedule import bubble, chunks_in_flight
from k2_megatron.plan.text import checkpoint_bytes, kept_checkpoints, plan_text
from k2_megatron.plan.time import training_seconds

TOY, STAGE1 = "examples/toy/toy.toml", "examples/k2_65b/stage1.toml"
ONE_RANK = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"]
MODEL_KEYS = ("layers", "hidden_size", "ffn_hidden_size", "heads", "kv_heads", "vocab_size", "sequence_length")
# name: the sizes of MODEL_KEYS, and the parameter count of the released weights
RELEASED = {
    "Llama 2 7B": ((32, 4096, 11008, 32, 32, 32000, 4096), 6_738_415_616),
    "Llama 2 70B": ((80, 8192, 28672, 64, 8, 32000, 4096), 68_976_648_192),
    "Llama 3 8B": ((32, 4096, 14336, 32, 8, 128256, 8192), 8_030_261_248),
    "Llama 3 70B": ((80, 8192, 28672, 64, 8, 128256, 8192), 70_553_706_496),
    "Llama 3.1 405B": ((126, 16384, 53248, 128, 8, 128256, 8192), 405_853_388_800),
}


def released(name, overrides=()):
    sizes = [f"model.{key}={value}" for key, value in zip(MODEL_KEYS, RELEASED[name][0], strict=True)]
    return load_config(TOY, [*ONE_RANK, *sizes, *overrides])


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(name):
    assert model_parameters(released(name)).total == RELEASED[name][1]


def test_parameters_of_k2():
    config = load_config(STAGE1)
    assert model_parameters(config).total == 65_286_184_960
    assert model_parameters(config).without_embeddings == 64_761_372_672
    held = [rank_parameters(config, stage).total for stage in range(4)]
    assert held == [2_056_880_128, 2_024_079_360, 2_024_079_360, 2_056_888_320]


@pytest.mark.parametrize("overrides", [[], ["parallel.virtual_pipeline=2"], ["model.kv_heads=2"]])
def test_ranks_of_one_replica_hold_the_model_once(overrides):
    config = load_config(TOY, overrides)
    tensor, stages = config.parallel.tensor, range(config.parallel.pipeline)
    held = sum(rank_parameters(config, stage).total for stage in stages) * tensor
    norms = sum(rank_parameters(config, s).layer_norms + rank_parameters(config, s).final_norm for s in stages)
    assert held == model_parameters(config).total + (tensor - 1) * norms  # norms are on every tensor rank


def test_flops_of_k2():
    model = load_config(STAGE1).model
    assert flops_per_token(model, "full") == 406_240_886_784
    assert flops_per_token(model, "full") - flops_per_token(model, "causal") == 6 * 2048 * 8192 * 80


@pytest.mark.parametrize(
    ("name", "tflops", "tokens_per_second"), [("Llama 3 8B", 744, 14_451), ("Llama 3.1 405B", 827, 328)]
)
def test_flops_of_published_throughputs(name, tflops, tokens_per_second):
    """Megatron-Bridge publishes both TFLOP/s and tokens/s a GPU (H100, fp8); their ratio counts attention causally."""
    published = tflops * 1e12 / tokens_per_second
    model = released(name).model
    assert flops_per_token(model, "causal") == pytest.approx(published, rel=0.002)
    assert flops_per_token(model, "full") > 1.03 * published


@pytest.mark.parametrize(("recompute", "factor", "head"), [("none", 72, 12), ("full", 96, 16)])
def test_flops_of_megatron_paper(recompute, factor, head):
    """Narayanan et al. 2021, equation 3: 96 B s l h^2 (1 + s / 6h + V / 16lh), with each layer computed again.

    It is for GPT's MLP of two h x 4h matrices; three of h x 8h/3 have as many weights.
    """
    sizes = ["model.hidden_size=768", "model.ffn_hidden_size=2048", "model.layers=6", "model.sequence_length=512"]
    model = load_config(TOY, [*ONE_RANK, *sizes]).model
    s, hidden, layers, vocabulary = 512, 768, 6, model.vocab_size
    paper = factor * layers * hidden**2 * (1 + s / (6 * hidden) + vocabulary / (head * layers * hidden))
    assert hardware_flops_per_token(model, "full", recompute, 2048) == pytest.approx(paper, rel=1e-12)


def test_training_time_of_k2():
    """480 A100: 148, 111 and 89 days at 30, 40 and 50 % of the peak."""
    config = load_config(STAGE1)
    assert [round(training_seconds(config, "A100", part) / 86400) for part in (0.3, 0.4, 0.5)] == [148, 111, 89]
    with pytest.raises(ValueError, match="device 'Z80': its peak is not known"):
        training_seconds(config, "Z80", 0.5)


def test_bubble_of_k2():
    assert bubble(load_config(STAGE1), 0) == 3 / 34
    interleaved = load_config(STAGE1, ["parallel.virtual_pipeline=5", "train.global_batch=1920"])
    assert bubble(interleaved, 0) == 3 / (5 * 32)


@pytest.mark.parametrize("virtual", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [4, 8, 12])
def test_micro_batches_in_flight_are_those_of_megatron_core(virtual, micro_batches):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    overrides = ["model.layers=16", "parallel.pipeline=4", f"parallel.virtual_pipeline={virtual}"]
    config = load_config(TOY, [*overrides, f"train.global_batch={4 * micro_batches}"])
    for stage in range(4):
        group = SimpleNamespace(size=lambda: 4, rank=lambda stage=stage: stage)
        sizes = {"pp_group": group, "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None}
        total, all_warmup, warmup, remaining = get_pp_rank_microbatches(
            micro_batches, virtual, 4, p2p_communicator=SimpleNamespace(**sizes)
        )
        assert (remaining == 0) == all_warmup
        assert chunks_in_flight(config, stage) == min(warmup + 1, total)


def test_model_state_is_18_bytes_a_parameter_under_bfloat16():
    for stage in range(4):
        config = load_config(STAGE1)
        parameters = rank_parameters(config, stage).total
        assert rank_memory(config, stage).model_state == 18 * parameters
        sharded = load_config(STAGE1, ["parallel.distributed_optimizer=true"])
        assert rank_memory(sharded, stage).model_state == 6 * parameters + -(-12 * parameters // 15)
        single = load_config(STAGE1, ["train.precision=float32"])
        assert rank_memory(single, stage).model_state == 16 * parameters


def test_each_level_of_the_tree_that_a_rank_adds_up_is_one_more_gradient_buffer():
    gradients = [
        rank_memory(load_config(STAGE1, [f"parallel.ranks={32 * data}", "train.gradient_leaves=30"]), 0).gradients
        for data in (30, 15, 5, 1)
    ]
    assert [size / (4 * 2_056_880_128) for size in gradients] == [1, 2, 3, 4]


def test_full_recompute_keeps_the_layers_inputs():
    """Korthikanti et al. 2022, table 2: 2sbh bytes a layer; sequence parallelism divides them by the tensor ranks."""
    config = load_config(STAGE1)
    assert layer_activation_bytes(config, "full") == 2 * 2048 * 4 * 8192 // 8
    without = load_config(STAGE1, ["parallel.sequence=false"])
    assert layer_activation_bytes(without, "full") == 2 * 2048 * 4 * 8192
    assert layer_activation_bytes(config, "full") < layer_activation_bytes(config, "selective")
    assert layer_activation_bytes(config, "selective") < layer_activation_bytes(config, "none")


def test_checkpoints_of_k2():
    config = load_config(STAGE1)
    assert checkpoint_bytes(config) == 14 * 65_286_184_960
    assert kept_checkpoints(config) == (360, 360)
    for keep_last, kept in ((1, 2), (2, 2), (3, 3)):  # as apply_retention: the newest two always stay
        assert kept_checkpoints(load_config(STAGE1, [f"checkpoint.keep_last={keep_last}"])) == (kept, kept + 1)
    # the last two (steps 337,819 and 338,760), and every tenth: 36, of which the last step is one
    thinned = ["checkpoint.keep_last=2", "checkpoint.keep_every_steps=9410"]
    assert kept_checkpoints(load_config(STAGE1, thinned)) == (37, 38)
    # 240 steps, saved every 100: at 100, 200 and 240
    uneven = load_config(TOY, ["checkpoint.chunks=", "checkpoint.every_steps=100", "checkpoint.keep_last="])
    assert (uneven.checkpoints, kept_checkpoints(uneven)) == (3, (3, 3))


def test_kept_checkpoints_are_those_that_retention_leaves():
    def shaped(every, steps, last, thinned):
        checkpoint = SimpleNamespace(every_steps=every, keep_last=last, keep_every_steps=thinned)
        saved = -(-steps // every)
        return SimpleNamespace(checkpoint=checkpoint, train=SimpleNamespace(steps=steps), checkpoints=saved)

    def kept(saved, last, thinned):
        return len({*saved[-max(2, last) :], *(step for step in saved if thinned and step % thinned == 0)})

    for every, steps, last, times in product(range(1, 6), range(1, 30), (1, 2, 3, 40), (None, 1, 2, 3)):
        thinned = times and times * every
        saved = sorted({*range(every, steps + 1, every), steps})
        expected = (kept(saved, last, thinned), kept(saved[:-1], last, thinned) + 1)
        assert kept_checkpoints(shaped(every, steps, last, thinned)) == expected, (every, steps, last, thinned)
    assert kept_checkpoints(shaped(1, 10**26, 2, 10**25)) == (11, 12), "counted by formula: one by one it has no end"


def test_plan_text_of_k2():
    text = plan_text(load_config(STAGE1))
    for part in (
        "65,286,184,960  64,761,372,672 without embedding and output",
        "tensor 8 x pipeline 4 x context 1 x data 15 = 480 ranks",
        "pipeline bubble 8.8% of the useful time, 8.1% of the whole",
        "1,415,312,179,200 tokens in all, 4,177,920 a step",
        "from step 0: global batch 2,040 = 34 micro-batches of 4 on 15 data-parallel ranks",
        "4.062e+11 a token, 5.75e+23 in all, attention counted full",
        "attention counted causal",
        "480 x A100: 148.1 days at 30%",
        "checkpoints   every 941 steps (3,931,422,720 tokens at the full batch), 360 in all",
        "914 GB each, 360 kept: 329 TB",
        "2.831 TB read as 2-byte tokens",
    ):
        assert part in text


def test_plan_text_tells_of_the_most_checkpoints_at_once():
    assert "0.08419 GB each, 2 kept: 0.1684 GB, 3 while the last is saved: 0.2526 GB" in plan_text(load_config(TOY))


@pytest.mark.parametrize(("chunk", "again"), [(1000, 1 - 96 / 4096), (1024, 0.75), (4096, 0.0), (9999, 0.0)])
def test_a_loss_in_chunks_computes_all_logits_but_the_last_chunks_again(chunk, again):
    config = load_config(TOY, [f"model.loss_chunk_tokens={chunk}"])
    head = 2 * config.model.vocab_size * config.model.hidden_size
    extra = hardware_flops_per_token(config.model, "full", "none", 4096) - flops_per_token(config.model, "full")
    assert extra == pytest.approx(again * head, rel=1e-9)


def test_plan_text_shows_the_ramp_and_the_held_out_rows():
    text = plan_text(load_config(TOY, ["train.batch_ramp={start=4, increment=4, samples=96}", "train.recompute=full"]))
    assert "from step 12: global batch 12 = 3 micro-batches of 4" in text
    assert "held out      runs/toy_data/held_out, every 80 steps" in text
    assert "with what is recomputed" in text
    assert "A100" not in text  # a float32 run is not planned on tensor cores

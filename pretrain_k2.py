"""Pretrain K2, or a model of its family: the whole run, top to bottom.

    python pretrain_k2.py examples/toy/toy.toml              a plain start: begins its own local ranks (NCCL or gloo)
    srun python pretrain_k2.py examples/k2_65b/stage1.toml   under Slurm or torchrun: takes its rank from there
    python pretrain_k2.py CONFIG.toml --plan                 print what would run, and stop
    python pretrain_k2.py CONFIG.toml --dry-run              build every distinct rank with fake tensors, and stop

In: a TOML configuration and tokens. Out: a run folder with journal.jsonl, checkpoints/ and the resolved configuration.
Started again it resumes from the newest checkpoint, in the same layout or another.
"""

import argparse
import faulthandler
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch.distributed as distributed

from k2_megatron.config import Config, load_config
from k2_megatron.config.changes import CHANGEABLE, keys_given
from k2_megatron.config.flops import output_share
from k2_megatron.data.ledger import Ledger
from k2_megatron.kernels.dispatch import choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.arguments import step_number
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import Device, find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.launch import RankEnvironment, read_environment, run_local_ranks, single_rank
from k2_megatron.runtime.mistakes import leave, run_program
from k2_megatron.runtime.seeds import require_determinism, seed_everything
from k2_megatron.runtime.signals import StopSignals, end_at_once
from k2_megatron.train.agreement import code_and_configuration, open_agreed_data, require_agreement
from k2_megatron.train.checkpoints.folders import remove_unfinished
from k2_megatron.train.checkpoints.load import find_checkpoint, load_checkpoint
from k2_megatron.train.checkpoints.manifest import read_manifest
from k2_megatron.train.checkpoints.start_from import check_start, start_from_checkpoint, start_plan, start_report
from k2_megatron.train.doubts import Batch, Doubts
from k2_megatron.train.events import change_fields, resume_fields, start_fields, step_fields
from k2_megatron.train.layer_norms import ActivationSquares
from k2_megatron.train.not_finite import computed_in_vain, count_as_update
from k2_megatron.train.optimizer import build_optimizer, set_learning_rate, wrap_model
from k2_megatron.train.parts import Parts
from k2_megatron.train.phases import StepPhases
from k2_megatron.train.position import going_on_from, taken_before
from k2_megatron.train.replicas import compare_replicas, stop_when_different
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.run_folder import (
    check_run_folder,
    hold_run_folder,
    refuse_lost_checkpoints,
    with_past,
    write_config,
)
from k2_megatron.train.saves import Saves
from k2_megatron.train.schedule import learning_rate_at
from k2_megatron.train.spikes.rollback import decide_together, go_back
from k2_megatron.train.spikes.watch import SpikeWatch
from k2_megatron.train.step import evaluate, train_step
from k2_megatron.train.stragglers import StragglerReports
from k2_megatron.train.summary import resume_changes, resume_report, stopped_text, summary_text
from k2_megatron.train.views import Views
from k2_megatron.train.watchdog import STEP, Watchdog, collective_timeout_seconds

RENDEZVOUS_TIMEOUT_SECONDS = 600.0


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    environment = read_environment()
    config = load_config(options.config, options.set, world_size=environment.world_size if environment else None)
    given = keys_given(options.set)
    if options.plan or options.dry_run:
        from k2_megatron.plan.dry_run import dry_run_text
        from k2_megatron.plan.text import plan_text

        print(plan_text(with_past(config)) if options.plan else dry_run_text(config))
        if config.checkpoint.start_from:
            print(f"\n{start_plan(config)}")
        return 0
    if environment is None:  # a plain start: tell mistakes once, here, and only then start ranks
        check_run_folder(config, given)
        check_start(config)
        open_run_data(with_past(config))
        if config.world_size > 1:
            return run_local_ranks(
                [__file__, *arguments], config.world_size, collective_timeout_seconds(config.watchdog)
            )
        environment = single_rank()
    device = find_device(environment.local_rank)
    until = config.train.steps if options.until is None else options.until
    with cpu_stands_in_for_cuda(device.type), ExitStack() as on_exit:
        return train(config, environment, device, until, given, on_exit)


def train(
    config: Config, environment: RankEnvironment, device: Device, until: int, given: set[str], on_exit: ExitStack
) -> int:
    # The world, the folder, and what events are written to
    faulthandler.enable()  # a crash inside a library shows where
    if config.train.deterministic:
        require_determinism()
    end_at_once()
    connect(environment, device, RENDEZVOUS_TIMEOUT_SECONDS)
    require_agreement(code_and_configuration(config))
    # A rank may wait for a dead node's lock before it meets the others again; after that the watchdog's limits decide.
    groups = build_groups(config.parallel, max(RENDEZVOUS_TIMEOUT_SECONDS, collective_timeout_seconds(config.watchdog)))
    seed_everything(config.run.seed, groups)
    stop = StopSignals()
    folder = Path(config.run.folder)
    checkpoints = folder / "checkpoints"
    is_writer, not_saved = groups.rank == 0, []
    if is_writer:
        not_saved = check_run_folder(config, given)
        lock = hold_run_folder(config)
        remove_unfinished(checkpoints)
    distributed.barrier()
    journal = Journal(folder, writer=is_writer)
    not_finite_before = computed_in_vain(journal)
    spikes = SpikeWatch(config.spikes, folder, writer=is_writer)
    watchdog = Watchdog(
        config.watchdog, folder, groups.rank, groups.world_size, lambda step: config.global_batch_at(step)
    )

    # The newest sound checkpoint, and what this configuration means to a run that has come so far
    newest, damage = find_checkpoint(checkpoints, groups)
    if newest is None:
        refuse_lost_checkpoints(folder)
    else:
        manifest = read_manifest(newest)
        changes = resume_changes(config, manifest, newest, given | taken_before(config, Ledger(folder)))
        config = going_on_from(config, manifest)

    # Data, model, optimizer
    data = open_agreed_data(config, writer=is_writer)
    if is_writer:
        write_config(config)
    views = Views(config, folder, enabled=is_writer)
    kernels = choose_backends(config.model.kernels, device.type)
    chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
    optimizer = build_optimizer(config, chunks, kernels, groups.collection)
    parts = Parts(groups, chunks, optimizer, device.torch)
    activations = ActivationSquares(parts, config.model.layers, kernels["adamw"])
    if is_writer:
        journal.write("start", **start_fields(config, environment.launcher, device, data.fingerprint))

    # Resume from it, whatever layout wrote it
    step, origin, passed_over = 0, None, 0  # passed_over: steps without an update since the last one
    if newest is None and config.checkpoint.start_from:
        origin = start_from_checkpoint(config, parts)
        journal.write("start_from", **origin)
        views.say(start_report(config, origin))
    if newest is not None:
        load_checkpoint(newest, manifest, config, parts)
        data.resume_at(manifest)
        spikes.resume_at(manifest)
        step, origin, passed_over = manifest["step"], manifest.get("origin"), manifest.get("passed_over", 0)
        journal.write("resume", **resume_fields(config, manifest, newest, damage, changes))
        views.say(resume_report(config, manifest, newest, [*not_saved, *damage], changes))
    saves = Saves(checkpoints, config.checkpoint, parts, journal, watchdog, step)
    on_exit.push(lambda _kind, error, _trace: saves.let_end(error))
    doubts = Doubts(config.spikes, not_finite_before, parts, journal, views.say)
    reports = StragglerReports(groups, output_share(config.model, config.parallel.pipeline), journal, views.say)
    leaving = "--until"

    # The loop: one step, what is told of it, then the rare events
    while step < min(until, config.train.steps):
        if step == saves.kept_step and (signal := stop.agreed(device.torch)):  # it came during the start or a save
            leaving = signal
            break
        watchdog.at(STEP, step)
        set_learning_rate(optimizer, learning_rate_at(config, step), config.optimizer.weight_decay)
        measured = activations if (step + 1) % config.log.layers_every_steps == 0 else None
        every = config.log.phases_every_steps
        phases = StepPhases(device.torch) if every and (step + 1) % every == 0 else None
        batch = Batch(step + 1, config.consumed_samples_at(step), config.consumed_samples_at(step + 1), data.train)
        attempt = partial(train_step, config, parts, data.train, step, activations=measured, phases=phases)
        settled = doubts.settle(batch, attempt, spikes.ceiling(), begin_again=partial(watchdog.at, STEP, step))
        result = settled.result
        step += 1
        event = step_fields(config, step, result, settled.seconds, device)
        stop_when_different(result.difference, step, saves.saved_step, journal)
        doubts.tell(settled)
        if result.updated:
            passed_over = 0
            journal.write("step", **event, ledger=data.ledger.mark())
            views.step(event)
        else:
            passed_over += 1
            doubts.passed_over(settled, event, end=passed_over > config.spikes.not_finite_steps)
            count_as_update(optimizer)
        if phases:
            reports.tell(step, {**phases.collect(result.data_seconds), "checkpoint": saves.take_seconds()})
        data.consumed(batch.first_sample, batch.end_sample)
        spike = spikes.observe(event, result.sample_losses) if result.updated else None
        if spike:
            watchdog.at("spike", step)  # the others wait for rank 0's dossier in stop.agreed, before the next step
            if spike.kind == "malignant":  # what is decided on is what stays: no save, and no retention, comes between
                saves.wait()
            decision = decide_together(config, spike, checkpoints, data)
            spikes.tell(spike, decision, data.train, journal, views.say)
            if decision.kind != "watch":
                watchdog.at("rollback", step)
                amended = go_back(config, spike, decision, checkpoints, data)
                newest, _ = find_checkpoint(checkpoints, groups)
                assert newest is not None, "it was decided to go back to one"
                manifest = read_manifest(newest)
                changes = resume_changes(config, manifest, newest, CHANGEABLE)  # they hold from here on
                config = going_on_from(config, manifest)
                data = open_agreed_data(config, writer=is_writer)
                load_checkpoint(newest, manifest, config, parts)
                data.resume_at(manifest)
                spikes.resume_at(manifest)
                if is_writer:
                    write_config(config)
                back = {"from_step": step, "step": manifest["step"], "amendment": amended, "ledger": data.ledger.mark()}
                step, passed_over = manifest["step"], manifest.get("passed_over", 0)  # an earlier version saved none
                journal.write("rollback", **back, **change_fields(config, step, changes))
                saves.go_back(step)
                continue

        last = step == config.train.steps
        held_out, evaluate_every = data.held_out, config.train.evaluate_every_steps
        if held_out and evaluate_every and (step % evaluate_every == 0 or last):
            watchdog.at("evaluation", step)
            held_out_loss = evaluate(config, parts, held_out)
            journal.write("evaluation", step=step, held_out_loss=held_out_loss)
            views.evaluation(step, held_out_loss)
        stopped_by = stop.agreed(device.torch, save_failed=saves.failed) or ("--until" if step >= until else None)
        if step % config.checkpoint.every_steps == 0 or last or stopped_by:
            watchdog.at("checkpoint", step)
            saves.wait()
            saves.remove_older(spikes)  # here, where the others wait for as long as it takes
            stop_when_different(compare_replicas(parts), step, saves.saved_step, journal)
            journal.sync()
            data.record_position(config, step)
            facts = {**data.position(), **spikes.position(), "origin": origin, "passed_over": passed_over}
            saves.begin(step, config, parts, facts)
        saves.look()
        if stopped_by and not last:
            leaving = stopped_by
            break

    # Leave
    watchdog.at("end", step)
    saves.wait()
    saves.remove_older(spikes)
    finished = step == config.train.steps
    journal.write("stop", step=step, saved_step=saves.saved_step, reason="finished" if finished else leaving)
    if is_writer:
        views.say(summary_text(config, journal.path) if finished else stopped_text(leaving, step))
    views.close()
    journal.close()
    if is_writer:
        lock.close()
    disconnect()
    watchdog.stop()
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pretrain_k2.py", description="Pretrain K2 from a TOML configuration.")
    parser.add_argument("config", help="the run's configuration, such as examples/toy/toy.toml")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override one value")
    parser.add_argument("--until", type=step_number, metavar="STEP", help="save after this step, and stop")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="print what would run, and stop")
    only.add_argument("--dry-run", action="store_true", help="build every distinct rank with fake tensors, and stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    leave(lambda: run_program(main, sys.argv[1:]))

"""The parts of a training run; `pretrain_k2.py` puts them in order.

    a step        step.py; schedule.py, optimizer.py; parts.py and model_chunks.py, what a rank trains; order_free.py
                  and gradient_tree.py, sums that are the same in any layout; layer_norms.py, what is told of layers
    data          run_data.py, feeds under the ledger; position.py, where a run stands; verify_data.py, the proof
    is it right?  agreement.py, ranks that start alike; attempts.py and doubts.py, a step made again; not_finite.py;
                  replicas.py and replica_gradients.py, what several ranks hold alike; spikes/; replay.py
    does it move? phases.py and stragglers.py, who is slow; heartbeats.py and watchdog.py, who hangs
    checkpoints/  written, found and loaded; saves.py, when a run does it
    telling       run_folder.py, events.py, summary.py, views.py

Read step.py first, then checkpoints/save.py and doubts.py.
"""

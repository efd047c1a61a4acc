"""The parts of a training step: schedule, optimizer, step, checkpoint. `pretrain_k2.py` puts them in order."""

"""Loss spikes: found while the run trains (detector), judged (policy), told of in dossiers (watch), acted on
through the ledger (rollback).

What is found is a pure function of losses, gradient norms and layers, which are equal on every rank, so that every rank
finds the same without a word between them; what is done about it also depends on the checkpoints that rank 0 sees, and
rank 0 tells the others.
"""

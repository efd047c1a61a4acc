"""Loss spikes: found while the run trains (detector), judged (policy), told of (dossier), acted on through the ledger.

Everything decided here is a pure function of losses and gradient norms, which are equal on every rank, so that every
rank decides the same without a word between them.
"""

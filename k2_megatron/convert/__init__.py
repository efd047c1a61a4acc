"""Checkpoints in and out: Hugging Face, the old K2 shards, other chunk layouts; streamed, resumable, proved.

    names.py         the one table: our tensors, Hugging Face's, the old K2 code's, and which rows go where
    sources          hugging_face.py, torch_dist.py, legacy_k2.py: rows of our tensors read from each kind of checkpoint
    products         to_hugging_face.py, to_torch_dist.py: files written unit by unit, over processes (work.py)
    proof            fingerprint.py (bits), logits.py (both models on one batch), verify.py and describe.py (offline)

Only logits.py and the old shards' reader need torch; the rest moves bytes with numpy, so that a worker is small.
"""

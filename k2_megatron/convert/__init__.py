"""Checkpoints in and out: Hugging Face, the old K2 shards, other chunk layouts; streamed, resumable, proved.

    names.py         the one table: our tensors, Hugging Face's, the old K2 code's, and which rows go where
    sources          hugging_face.py, torch_dist.py, legacy_k2.py: rows of our tensors read from each kind of checkpoint
    products         to_hugging_face.py, to_torch_dist.py: files written unit by unit, over processes (work.py)
    proof            fingerprint.py (bits), logits.py (ours and transformers_model.py or legacy_model.py on one batch),
                     verify.py and describe.py (offline)

Only models and the tables of old shards (legacy_file.py) need torch; the rest moves bytes with numpy, so that a worker
is small.
"""

"""Text to tokens to rows: everything between a folder of documents and the batch a training step reads.

In the order of the data: readers (text files) -> encoder (text to ids) -> preprocess (.bin/.idx shards and a manifest)
-> recipe and plan (which row when) -> schedule and ledger (amendments) -> feed (rows for the model) -> inspect.
Nothing is imported here, so that training loads numpy alone and not pyarrow or the fast encoder.
"""

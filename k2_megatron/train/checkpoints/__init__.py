"""Checkpoints, complete or absent: what one holds, how it is written, found and loaded in any layout.

    folders.py             step_* folders and `latest`: written aside, published by a rename, set aside, kept or removed
    manifest.py            k2.json, which names every file with size and hash, and whether they agree
    file_hash.py           size and hash of a file; aes_lanes.py defines the hash
    state.py               what is stored, by global name; optimizer_boxes.py a rank's part of the distributed optimizer
    save.py                a save, in the foreground or the background; host_copies.py the memory for the copies,
                           hashing_writer.py torch's writer that hashes what it writes
    load.py                find the checkpoint a run goes on from, and load it
    restricted_loading.py  torch's tables and byte objects read so that no pickle calls anything; pickles.py reads them
    start_from.py          begin with the weights of another run; imported_record.py where a converted model came from

folders, manifest, file_hash, pickles and imported_record need no torch: conversions read them too. When a run saves is
decided in train/saves.py.
"""

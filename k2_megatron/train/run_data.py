"""The data of one run: the rows it trains on, the rows it is evaluated on, and its position among them."""

from k2_megatron.config import Config
from k2_megatron.data.feed import Feed, open_feed
from k2_megatron.train.checkpoint_files import CheckpointError


class RunData:
    """`train` and `held_out` (None when the run is not evaluated) give rows by sample number."""

    def __init__(self, train: Feed, held_out: Feed | None) -> None:
        self.train = train
        self.held_out = held_out
        self.fingerprint = train.fingerprint

    def position(self) -> dict:
        """What a checkpoint says of the data; the sample number itself is a function of the step."""
        return {"data": self.fingerprint}

    def check_position(self, manifest: dict) -> None:
        """CheckpointError when the checkpoint was trained on other rows than this run would go on with."""
        if manifest["data"] != self.fingerprint:
            raise CheckpointError(
                f"the checkpoint of step {manifest['step']} was trained on data {manifest['data']}, data.train is now "
                f"{self.fingerprint}; put the old files back, or start a new run.folder"
            )


def open_run_data(config: Config) -> RunData:
    """Open what data.train and data.held_out name. ValueError when files are missing, damaged or do not fit."""
    shape = {
        "sequence_length": config.model.sequence_length,
        "seed": config.run.seed,
        "vocab_size": config.model.vocab_size,
    }
    # One prefix for both is split by document; two names are taken whole.
    split = config.data.train == config.data.held_out
    train = open_feed(config.data.train, part="train" if split else "all", **shape)
    held_out = None
    if config.train.evaluate_every_steps:
        held_out = open_feed(config.data.held_out, part="held_out" if split else "all", **shape)
    return RunData(train, held_out)
